//! Templates of real models make the same text as transformers' `apply_chat_template`, to the byte.
//!
//! `tests/data/chat_templates/golden.py` makes the expected texts, and says how to compare further templates.

use std::{env, fs, path::PathBuf};

use retro_run::text::chat_template::{ChatTemplate, Error, RenderOptions};
use serde_json::{Map, Value, json};

fn folder() -> PathBuf {
    let here = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat_templates");
    env::var_os("RETRO_CHAT_TEMPLATES").map_or_else(here, PathBuf::from)
}

fn json_file(name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder().join(name)).unwrap()).unwrap()
}

/// The template of a folder that has it and the special tokens.
fn template(text: &str, special_tokens: &Value) -> Result<ChatTemplate, Error> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("chat_template.jinja"), text).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), special_tokens.to_string()).unwrap();
    ChatTemplate::find_in(dir.path()).map(|found| found.unwrap())
}

fn now(golden: &Value) -> jiff::Zoned {
    let now: jiff::civil::DateTime = golden["now"].as_str().unwrap().parse().unwrap();
    now.to_zoned(jiff::tz::TimeZone::UTC).unwrap()
}

fn options(conversation: &Value, now: &jiff::Zoned) -> RenderOptions {
    let list = |name: &str| conversation.get(name).map(|v| v.as_array().unwrap().clone());
    let flag = |name: &str| conversation.get(name).is_some_and(|v| v == true);
    RenderOptions {
        tools: list("tools"),
        documents: list("documents"),
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
        variables: conversation
            .get("variables")
            .map_or_else(Map::new, |v| v.as_object().unwrap().clone()),
        now: Some(now.clone()),
    }
}

#[test]
fn templates_render_as_in_transformers() {
    let golden = json_file("golden.json");
    let now = now(&golden);
    let (mut cases, mut wrong) = (0, Vec::new());
    for (file, model) in json_file("models.json").as_object().unwrap() {
        let text = fs::read_to_string(folder().join("templates").join(file)).unwrap();
        let template = template(&text, &model["special_tokens"]).unwrap();
        for (name, expected) in golden["golden"][file].as_object().unwrap() {
            let conversation = &golden["conversations"][name];
            let messages = conversation["messages"].as_array().unwrap();
            let got = match template.render(messages, &options(conversation, &now)) {
                Ok(text) => Value::String(text),
                Err(Error::Refused { message, .. }) => json!({ "refused": message }),
                Err(error) => json!({ "failed": error.to_string() }),
            };
            cases += 1;
            if got != *expected {
                wrong.push(format!("{file}: {name}\n  got      {got}\n  expected {expected}"));
            }
        }
    }
    assert!(cases > 0);
    assert!(
        wrong.is_empty(),
        "{} of {cases} differ\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn expressions_give_what_jinja_and_python_give() {
    let golden = json_file("golden.json");
    let special_tokens = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let messages = golden["conversations"]["system and turns"]["messages"]
        .as_array()
        .unwrap();
    let options = options(&Value::Null, &now(&golden));
    let expressions = golden["expressions"].as_array().unwrap();
    let mut wrong = Vec::new();
    for pair in expressions {
        let (text, expected) = (pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
        let got = template(text, &special_tokens).and_then(|template| template.render(messages, &options));
        let got = got.unwrap_or_else(|error| error.to_string());
        if got != expected {
            wrong.push(format!("{text}\n  got      {got:?}\n  expected {expected:?}"));
        }
    }
    assert!(!expressions.is_empty());
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
}
