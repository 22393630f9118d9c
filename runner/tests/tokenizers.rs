//! Token ids and text are transformers': small tokenizers built as those of well-known models, with the ids that it
//! gives.
//!
//! `data/tokenizers/make.py` makes them and says what they are.

use std::{fs, path::Path};

use retro_run::{ModelFolder, ModelTokenizer, text::Detokenizer};
use serde_json::Value;

fn data() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizers")
}

/// The text of a folder with these files and a graph that nobody looks at.
fn open(files: &[(&str, &[u8])]) -> ModelTokenizer {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.onnx"), "").unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    ModelTokenizer::open(&ModelFolder::open(dir.path(), None).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn ids_and_text_are_those_of_transformers() {
    let expected: Value = serde_json::from_slice(&fs::read(data().join("expected.json")).unwrap()).unwrap();
    let models = expected["models"].as_object().unwrap();
    assert!(models.len() >= 20);
    let mut wrong = Vec::new();
    for (name, model) in models {
        let read = |file: &str| fs::read(data().join(name).join(file)).unwrap();
        let names = ["tokenizer.json", "tokenizer_config.json", "config.json"];
        let files = names.map(|file| (file, read(file)));
        let text = open(&files.each_ref().map(|(file, bytes)| (*file, bytes.as_slice())));
        for case in model["cases"].as_array().unwrap() {
            let (prompt, want, back) = (
                case["text"].as_str().unwrap(),
                ids(&case["ids"]),
                case["back"].as_str().unwrap(),
            );
            let got = text.encode(prompt).unwrap();
            if got != want {
                wrong.push(format!("{name}: {prompt:?} is {got:?}, expected {want:?}"));
            }
            let whole = text.decode(&want).unwrap();
            let mut detokenizer = Detokenizer::default();
            let mut streamed: String = want.iter().map(|&id| detokenizer.push(&text, id).unwrap()).collect();
            streamed += &detokenizer.finish(&text).unwrap();
            for (how, got) in [("as a whole", whole), ("token by token", streamed)] {
                if got != back {
                    wrong.push(format!(
                        "{name}: {prompt:?} comes back {how} as {got:?}, expected {back:?}"
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A folder as onnxruntime-genai needs it: its bos_token_id is for whoever asks, not for every text.
#[test]
fn the_configuration_of_genai_adds_nothing() {
    let tokenizer = fs::read(data().join("bare/tokenizer.json")).unwrap();
    let genai = br#"{"model": {"bos_token_id": 257, "decoder": {"filename": "model.onnx"}}}"#;
    let with = open(&[("tokenizer.json", &tokenizer), ("genai_config.json", genai)]);
    let without = open(&[("tokenizer.json", &tokenizer)]);
    let ids = with.encode("Hello").unwrap();
    assert!(!ids.contains(&257), "{ids:?}");
    assert_eq!(ids, without.encode("Hello").unwrap());
}

#[test]
fn a_token_that_is_asked_for_and_not_there_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.onnx"), "").unwrap();
    fs::copy(data().join("bare/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let config = r#"{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "bos_token": "<start>"}"#;
    fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let error = ModelTokenizer::open(&ModelFolder::open(dir.path(), None).unwrap())
        .map(drop)
        .unwrap_err();
    assert!(format!("{error:#}").contains("bos_token \"<start>\""), "{error:#}");
}

/// special_tokens_map.json is older than the list of added tokens in tokenizer_config.json. Ids are transformers
/// 4.57.3's.
#[test]
fn an_older_file_of_special_tokens_counts_where_there_is_no_newer_list() {
    let tokenizer = fs::read(data().join("llama-2/tokenizer.json")).unwrap();
    for (list, first) in [("", 2), (r#", "added_tokens_decoder": {}"#, 1)] {
        let config = format!(
            r#"{{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "bos_token": "<s>", "eos_token": "</s>"{list}}}"#
        );
        let text = open(&[
            ("tokenizer.json", &tokenizer),
            ("tokenizer_config.json", config.as_bytes()),
            ("special_tokens_map.json", br#"{"bos_token": "</s>"}"#),
        ]);
        assert_eq!(text.encode("Hello").unwrap().first(), Some(&first), "{list}");
    }
}

/// The demo models: `code` was trained with <bos> in front of a file, the prompts of `ledger` have it already.
#[test]
fn the_demo_models_begin_as_they_were_trained() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("models");
    let encode = |name: &str, prompt: &str| {
        let read = |file: &str| fs::read(models.join(name).join(file)).unwrap();
        let text = open(&[
            ("tokenizer.json", &read("tokenizer.json")),
            ("config.json", &read("config.json")),
        ]);
        text.encode(prompt).unwrap()
    };
    let code = encode("code", "def f(x):");
    assert_eq!(code.iter().filter(|&&id| id == 1).count(), 1);
    assert_eq!(code.first(), Some(&1));
    let ledger = encode("ledger", "<bos> facts :");
    assert_eq!((ledger.len(), ledger.iter().filter(|&&id| id == 1).count()), (3, 1));
}
