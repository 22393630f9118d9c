//! The tokenizer.json that is made of a GGUF file, against llama.cpp's tokenizer, and the files beside it.

use std::{collections::BTreeMap, fs};

use retro_models::Options;
use retro_run::{model_folder::ModelFolder, text::ModelTokenizer};
use retro_tests::{
    gguf::{SENTENCEPIECE, TINY_GGUFS, TinyGguf},
    paths,
};
use serde_json::{Value, json};

use crate::build_file;

fn models() -> impl Iterator<Item = TinyGguf> {
    TINY_GGUFS.into_iter().chain([SENTENCEPIECE])
}

#[test]
fn texts_become_the_tokens_that_llama_cpp_makes_of_them() {
    let expected = fs::read_to_string(paths::data("gguf/expected_tokens.json")).unwrap();
    let expected: BTreeMap<String, Vec<(String, Vec<u32>)>> = serde_json::from_str(&expected).unwrap();
    assert_eq!(expected.len(), 2);
    let folder = tempfile::tempdir().unwrap();
    for (name, texts) in expected {
        let out = folder.path().join(&name);
        let tiny = models().find(|tiny| tiny.name == name).unwrap();
        build_file(&tiny.bytes(), &out, &Options::default()).unwrap();
        let tokenizer = ModelTokenizer::open(&ModelFolder::open(&out, None).unwrap()).unwrap();
        for (text, ids) in texts {
            assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{name}: {text:?}");
        }
    }
}

#[test]
fn the_files_beside_the_graph_say_what_the_metadata_say() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("llama");
    build_file(&TINY_GGUFS[0].bytes(), &out, &Options::default()).unwrap();
    let json = |name: &str| -> Value { serde_json::from_str(&fs::read_to_string(out.join(name)).unwrap()).unwrap() };
    // The token named by the file, and the end of a text.
    assert_eq!(
        json("generation_config.json"),
        json!({"bos_token_id": 1, "eos_token_id": [2, 0]})
    );
    let config = json("config.json");
    for (key, value) in [
        ("model_type", json!("llama")),
        ("num_hidden_layers", json!(3)),
        ("head_dim", json!(16)),
        ("max_position_embeddings", json!(512)),
        ("tie_word_embeddings", json!(true)),
        ("rope_theta", json!(1000.0)),
        ("rms_norm_eps", json!(1e-5)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(json("genai_config.json")["model"]["eos_token_id"], json!([2, 0]));
    assert_eq!(json("genai_config.json")["model"]["type"], "llama");
    assert_eq!(json("tokenizer_config.json")["eos_token"], "<|im_end|>");
    let template = fs::read_to_string(out.join("chat_template.jinja")).unwrap();
    assert_eq!(template, "{{ messages[0].content }}");
}

#[test]
fn another_tokenizer_may_be_given() {
    let folder = tempfile::tempdir().unwrap();
    let (out, own) = (folder.path().join("out"), folder.path().join("own.json"));
    fs::write(&own, "{}").unwrap();
    let mut file = TINY_GGUFS[0].writer().finish();
    // A pre-tokenizer that is not known.
    let at = file.windows(6).position(|w| w == b"smollm").unwrap();
    file[at..at + 6].copy_from_slice(b"amodel");
    assert!(
        build_file(&file, &out, &Options::default())
            .unwrap_err()
            .contains("--tokenizer")
    );
    let options = Options {
        tokenizer: Some(own),
        ..Options::default()
    };
    build_file(&file, &out, &options).unwrap();
    assert_eq!(fs::read_to_string(out.join("tokenizer.json")).unwrap(), "{}");
}
