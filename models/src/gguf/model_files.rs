//! The files beside a graph that comes from a GGUF file: tokenizer, chat template, configurations.

use retro_gguf::{Gguf, Metadata};
use serde_json::{Map, Value, json};

use crate::{
    config::{LlamaConfig, eos_json, without_null_ids},
    error::TokenizerError,
    gguf::tokenizer::{self, Special, Vocabulary},
};

/// The configuration with its token ids, and the files' names and contents.
pub struct ModelFiles {
    pub config: LlamaConfig,
    pub files: Vec<(&'static str, String)>,
}

/// Makes them. `tokenizer`: tokenizer.json too.
pub fn make(file: &Gguf, config: LlamaConfig, tokenizer: bool) -> Result<ModelFiles, TokenizerError> {
    let metadata = &file.metadata;
    let vocabulary = Vocabulary::read(metadata, config.vocab_size)?;
    let special = Special::read(metadata, &vocabulary)?;
    let config = LlamaConfig {
        bos_token_id: special.bos,
        eos_token_ids: special.ends.clone(),
        pad_token_id: special.pad,
        ..config
    };
    let mut files = Vec::new();
    if tokenizer {
        files.push((
            "tokenizer.json",
            tokenizer::json(metadata, &vocabulary, &special)?.to_string(),
        ));
    }
    if let Some(template) = metadata.string("tokenizer.chat_template")? {
        files.push(("chat_template.jinja", template.to_owned()));
    }
    let config_json = with_origin(config.to_json(), metadata)?;
    for (name, json) in [
        (
            "tokenizer_config.json",
            tokenizer_config(&config, &vocabulary, &special),
        ),
        ("config.json", config_json),
        ("generation_config.json", generation_config(&config)),
    ] {
        files.push((name, format!("{json:#}\n")));
    }
    Ok(ModelFiles { config, files })
}

fn tokenizer_config(config: &LlamaConfig, vocabulary: &Vocabulary<'_>, special: &Special) -> Value {
    let mut entries = Map::new();
    // The class that follows tokenizer.json and no rules of its own.
    entries.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    entries.insert("model_max_length".into(), config.max_positions.into());
    entries.insert("clean_up_tokenization_spaces".into(), false.into());
    for (key, id) in [
        ("bos_token", special.bos),
        ("eos_token", special.eos),
        ("pad_token", special.pad),
        ("unk_token", special.unknown),
    ] {
        if let Some(token) = id.and_then(|id| vocabulary.token(id)) {
            entries.insert(key.into(), token.into());
        }
    }
    Value::Object(entries)
}

fn generation_config(config: &LlamaConfig) -> Value {
    without_null_ids(json!({
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_json(&config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }))
}

/// What the model is called, where the file says so.
fn with_origin(mut config: Value, metadata: &Metadata) -> Result<Value, TokenizerError> {
    if let (Some(name), Some(entries)) = (metadata.string("general.name")?, config.as_object_mut()) {
        entries.insert("_name_or_path".into(), name.into());
    }
    Ok(config)
}
