//! A GGUF file's tokenizer as a tokenizer.json of Hugging Face's `tokenizers`.

mod byte_level;
mod sentencepiece;
mod vocabulary;

use retro_gguf::Metadata;
use serde_json::{Value, json};

pub use vocabulary::{Special, Vocabulary};

use crate::{config::Family, error::TokenizerError};

/// The tokenizer.json of a vocabulary.
pub fn json(metadata: &Metadata, vocabulary: &Vocabulary<'_>, special: &Special) -> Result<Value, TokenizerError> {
    let parts = match metadata.string("tokenizer.ggml.model")? {
        Some("gpt2") => byte_level::parts(metadata, vocabulary)?,
        Some("llama") => sentencepiece::parts(metadata, vocabulary, special)?,
        other => return Err(TokenizerError::Kind(other.unwrap_or_default().to_owned())),
    };
    // Phi-3's tokens of turns; the file does not say it, and llama.cpp goes by the model's name.
    let phi3 = parts.sentencepiece && metadata.string("general.architecture")? == Some(Family::Phi3.model_type());
    let add = |key: &str, default: bool| Ok::<_, TokenizerError>(metadata.boolean(key)?.unwrap_or(default));
    let bos = add("tokenizer.ggml.add_bos_token", parts.add_bos)?;
    let eos = add("tokenizer.ggml.add_eos_token", false)?;
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(|token| phi3 && !KEEP_SPACE.contains(&token)),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": template(vocabulary, special.bos.filter(|_| bos), special.eos.filter(|_| eos)),
        "decoder": parts.decoder,
        "model": parts.model,
    }))
}

/// Phi-3's tokens that leave white space after them alone.
const KEEP_SPACE: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// What differs between the kinds of tokenizers.
pub struct Parts {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub decoder: Value,
    pub model: Value,
    /// Pieces with scores, not merges of bytes.
    pub sentencepiece: bool,
    /// Texts begin with the BOS token, where the file does not say.
    pub add_bos: bool,
}

/// The post-processor that adds these tokens around a text; null for none.
fn template(vocabulary: &Vocabulary<'_>, bos: Option<u64>, eos: Option<u64>) -> Value {
    let token = |id: Option<u64>| id.and_then(|id| Some((id, vocabulary.token(id)?)));
    let (bos, eos) = (token(bos), token(eos));
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let special = |(_, token): (u64, &str), kind: u8| json!({"SpecialToken": {"id": token, "type_id": kind}});
    let text = |name: &str, kind: u8| {
        let sequence = json!({"Sequence": {"id": name, "type_id": kind}});
        let before = bos.map(|t| special(t, kind));
        let after = eos.map(|t| special(t, kind));
        before.into_iter().chain([sequence]).chain(after).collect::<Vec<_>>()
    };
    let tokens = bos.into_iter().chain(eos).map(|(id, token)| {
        let entry = json!({"id": token, "ids": [id], "tokens": [token]});
        (token.to_owned(), entry)
    });
    let pair = [text("A", 0), text("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": pair,
        "special_tokens": tokens.collect::<serde_json::Map<_, _>>(),
    })
}
