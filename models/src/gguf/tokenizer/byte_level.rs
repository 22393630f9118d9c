//! Byte-level BPE, as GPT-2 has it: texts are split by a regular expression, their bytes are written as characters, and
//! merged by rank.

use retro_gguf::Metadata;
use serde_json::{Value, json};

use crate::{
    error::TokenizerError,
    gguf::tokenizer::{
        Parts,
        vocabulary::{Vocabulary, missing},
    },
};

const MERGES: &str = "tokenizer.ggml.merges";

/// How a text is split before its bytes are merged.
struct PreTokenizer {
    /// `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    split: Split,
    /// Texts are brought into Unicode's composed form first.
    compose: bool,
    /// A word that is a token is that token, whatever the merges make of it.
    ignore_merges: bool,
    add_bos: bool,
}

enum Split {
    /// GPT-2's expression, which `tokenizers` has itself.
    Gpt2,
    /// The same, and each digit by itself.
    Digits,
    Regex(&'static str),
}

/// Each as in the tokenizer.json of the models that llama.cpp's converter gives the name to.
const PRE_TOKENIZERS: [PreTokenizer; 6] = [
    PreTokenizer {
        names: &["gpt-2", "phi-2"],
        split: Split::Gpt2,
        compose: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"],
        split: Split::Digits,
        compose: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama3", "llama-v3", "llama-bpe", "falcon3"],
        split: Split::Regex(LLAMA3),
        compose: false,
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer {
        names: &["dbrx", "smaug-bpe"],
        split: Split::Regex(LLAMA3),
        compose: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        split: Split::Regex(QWEN2),
        compose: true,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["tekken"],
        split: Split::Regex(TEKKEN),
        compose: false,
        ignore_merges: true,
        add_bos: true,
    },
];

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The parts of a byte-level tokenizer.json.
pub fn parts(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Parts, TokenizerError> {
    let name = metadata.string("tokenizer.ggml.pre")?.unwrap_or_default();
    let known = PRE_TOKENIZERS.iter().find(|p| p.names.contains(&name));
    let pre = known.ok_or_else(|| TokenizerError::PreTokenizer {
        got: name.to_owned(),
        known: PRE_TOKENIZERS.map(|p| p.names.join(", ")).join(", "),
    })?;
    Ok(Parts {
        normalizer: if pre.compose {
            json!({"type": "NFC"})
        } else {
            Value::Null
        },
        pre_tokenizer: pre.split.json(),
        decoder: byte_level(true),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocabulary.map(),
            "merges": merges(metadata, vocabulary)?,
        }),
        sentencepiece: false,
        add_bos: pre.add_bos,
    })
}

/// Bytes as characters; `regex`: GPT-2's expression splits before.
fn byte_level(regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex})
}

impl Split {
    fn json(&self) -> Value {
        let both = |first: Value, regex: bool| json!({"type": "Sequence", "pretokenizers": [first, byte_level(regex)]});
        match self {
            Self::Gpt2 => byte_level(true),
            Self::Digits => both(json!({"type": "Digits", "individual_digits": true}), true),
            Self::Regex(regex) => {
                let split = json!({
                    "type": "Split",
                    "pattern": {"Regex": regex},
                    "behavior": "Isolated",
                    "invert": false,
                });
                both(split, false)
            }
        }
    }
}

/// Pairs of tokens, the first merged first.
fn merges(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Vec<Value>, TokenizerError> {
    let list = metadata.array(MERGES)?.ok_or_else(|| missing(MERGES))?;
    let pair = |merge: &str| {
        let (left, right) = merge.split_once(' ')?;
        let whole = format!("{left}{right}");
        let known = [left, right, &whole].iter().all(|t| vocabulary.id(t).is_some());
        known.then(|| json!([left, right]))
    };
    let pairs = list.strings().map(|merge| {
        let merge = merge?;
        pair(merge).ok_or_else(|| TokenizerError::Merge(merge.to_owned()))
    });
    pairs.collect()
}
