//! SentencePiece's BPE, as Llama 2 and Mistral have it: pieces with scores, spaces as U+2581, bytes where there is no
//! piece. The merges are those that transformers derives from the scores (`SentencePieceExtractor`).

use retro_gguf::{Metadata, Value as Gguf};
use serde_json::{Value, json};

use crate::{
    error::TokenizerError,
    gguf::tokenizer::{
        Parts,
        vocabulary::{Kind, Special, Vocabulary, missing},
    },
};

const SCORES: &str = "tokenizer.ggml.scores";
/// What stands for a space.
const SPACE: &str = "\u{2581}";

/// The parts of a SentencePiece tokenizer.json.
pub fn parts(metadata: &Metadata, vocabulary: &Vocabulary<'_>, special: &Special) -> Result<Parts, TokenizerError> {
    let prefix = metadata.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let prepend = json!({"type": "Prepend", "prepend": SPACE});
    let normalizers = if prefix { vec![prepend, replace] } else { vec![replace] };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": special.unknown.and_then(|id| vocabulary.token(id)),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary.map(),
            "merges": merges(metadata, vocabulary)?,
        }),
        sentencepiece: true,
        add_bos: true,
    })
}

/// Each pair of pieces that makes a third, best score of the third first.
fn merges(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Vec<Value>, TokenizerError> {
    let scores = metadata.array(SCORES)?.ok_or_else(|| missing(SCORES))?;
    if scores.len() != vocabulary.len() {
        return Err(TokenizerError::Length {
            key: SCORES,
            got: scores.len(),
            tokens: vocabulary.len(),
        });
    }
    let scores = scores.numbers().map(|value| match value {
        Gguf::Float(x) => x,
        _ => 0.0,
    });
    let mut found: Vec<(f64, &str, &str)> = Vec::new();
    for ((piece, kind), score) in vocabulary.iter().zip(scores) {
        if kind != Kind::Normal {
            continue;
        }
        let mut pairs = Vec::new();
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(l), Some(r)) = (vocabulary.id(left), vocabulary.id(right)) {
                pairs.push((l, r, left, right));
            }
        }
        pairs.sort_unstable();
        found.extend(pairs.into_iter().map(|(_, _, left, right)| (score, left, right)));
    }
    // Stable: pairs that make the same piece stay in the order of their ids, pieces of one score too.
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(found.into_iter().map(|(_, left, right)| json!([left, right])).collect())
}
