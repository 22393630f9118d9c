//! Loads a tokenizer as transformers does: tokenizer.json, with the changes of tokenizer_config.json.
//!
//! The post-processor of tokenizer.json adds BOS and EOS. Some tokenizer classes replace it by the flags
//! `add_bos_token` and `add_eos_token`; all others ignore these flags. That is what transformers 4 does (transformers 5
//! writes no such flags).

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::{AddedToken, PreTokenizerWrapper, Tokenizer};

use crate::{
    model_folder::ModelFolder,
    runtime::one_line,
    text::error::{Error, Result},
};

/// A tokenizer, with the BOS and EOS tokens it adds.
pub struct Loaded {
    pub tokenizer: Tokenizer,
    /// Replaces the tokens of the post-processor.
    pub bos_eos: Option<BosEos>,
}

/// Tokens added before and after a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BosEos {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
}

/// A class that follows the flags: its name, the `model_type`s that imply it, and its default BOS and EOS.
struct Class {
    name: &'static str,
    model_types: &'static [&'static str],
    bos: &'static str,
    eos: &'static str,
}

const CLASSES: [Class; 5] = [
    Class {
        name: "LlamaTokenizer",
        model_types: &["llama", "mistral", "mixtral", "phi3"],
        bos: "<s>",
        eos: "</s>",
    },
    Class {
        name: "CodeLlamaTokenizer",
        model_types: &["code_llama"],
        bos: "<s>",
        eos: "</s>",
    },
    Class {
        name: "GemmaTokenizer",
        model_types: &["gemma", "gemma2", "gemma3", "gemma3_text"],
        bos: "<bos>",
        eos: "<eos>",
    },
    Class {
        name: "CohereTokenizer",
        model_types: &["cohere", "cohere2"],
        bos: "<BOS_TOKEN>",
        eos: "<|END_OF_TURN_TOKEN|>",
    },
    Class {
        name: NEOX,
        model_types: &["gpt_neox", "olmo", "olmoe"],
        bos: "<|endoftext|>",
        eos: "<|endoftext|>",
    },
];

/// The one class that also replaces the post-processor without flags: then it adds nothing.
const NEOX: &str = "GPTNeoXTokenizer";

/// Loads the tokenizer of a model folder.
///
/// # Errors
/// When there is none, a file is damaged, or a token that is to be added is not in the vocabulary.
pub fn load(folder: &ModelFolder) -> Result<Loaded> {
    let path = folder.tokenizer.as_deref().ok_or_else(|| {
        let place = folder.graph.parent().unwrap_or(Path::new("."));
        Error::NoTokenizer(place.to_owned())
    })?;
    let mut tokenizer = Tokenizer::from_file(path).map_err(|e| Error::Read {
        path: path.to_owned(),
        reason: one_line(&e),
    })?;
    let settings = TokenizerConfig::read(path.parent().unwrap_or(Path::new("")))?;
    // Settings of training: a prompt is neither truncated nor padded.
    tokenizer.with_truncation(None).map_err(|e| Error::Truncation {
        path: path.to_owned(),
        reason: one_line(&e),
    })?;
    tokenizer.with_padding(None);
    settings.add_tokens(&mut tokenizer).map_err(|reason| Error::AddTokens {
        path: path.to_owned(),
        reason,
    })?;
    let config = &settings.config;
    if let Some(split) = config.get("split_special_tokens").and_then(Value::as_bool) {
        tokenizer.set_encode_special_tokens(split);
    }
    if let (Some(add), Some(PreTokenizerWrapper::ByteLevel(mut level))) = (
        config.get("add_prefix_space").and_then(Value::as_bool),
        tokenizer.get_pre_tokenizer().cloned(),
    ) {
        level.add_prefix_space = add;
        tokenizer.with_pre_tokenizer(Some(level));
    }
    let bos_eos = settings.bos_eos(&tokenizer, folder)?;
    Ok(Loaded { tokenizer, bos_eos })
}

/// The special tokens that a tokenizer's configuration names, by their names there.
///
/// # Errors
/// When a file is damaged.
pub fn special_tokens(folder: &Path) -> Result<Map<String, Value>, retro_model_io::Error> {
    let settings = TokenizerConfig::read(folder)?;
    let class = settings.class();
    let default = |name: &str| match name {
        "bos_token" => class.map(|c| c.bos),
        "eos_token" => class.map(|c| c.eos),
        _ => None,
    };
    let token = |name: &'static str| {
        let text = settings.special(name).map_or_else(|| default(name), content)?;
        Some((name.to_owned(), text.into()))
    };
    Ok(SPECIAL_TOKENS.into_iter().filter_map(token).collect())
}

const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// The JSON files beside tokenizer.json; null for a missing file.
struct TokenizerConfig {
    config: Value,
    special_tokens_map: Value,
    model: Value,
}

impl TokenizerConfig {
    fn read(folder: &Path) -> Result<Self, retro_model_io::Error> {
        let file = |name: &str| retro_model_io::read_json(&folder.join(name)).map(Option::unwrap_or_default);
        Ok(Self {
            config: file("tokenizer_config.json")?,
            special_tokens_map: file("special_tokens_map.json")?,
            model: file("config.json")?,
        })
    }

    /// Adds tokens that are in the configuration and not, or otherwise, in tokenizer.json. Only those of the
    /// vocabulary: the model has no others.
    fn add_tokens(&self, tokenizer: &mut Tokenizer) -> Result<(), String> {
        let known = tokenizer.get_added_tokens_decoder();
        let mut wanted: Vec<(u64, AddedToken)> = Vec::new();
        for (id, value) in self
            .config
            .get("added_tokens_decoder")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            let token = added_token(value, false);
            let token = token.ok_or_else(|| format!("added_tokens_decoder: {id} is no token"))?;
            if !known.values().any(|k| same(k, &token)) {
                wanted.push((id.parse().unwrap_or(u64::MAX), token));
            }
        }
        wanted.sort_by_key(|(id, _)| *id);
        let mut wanted: Vec<AddedToken> = wanted.into_iter().map(|(_, token)| token).collect();
        for name in SPECIAL_TOKENS {
            wanted.extend(
                self.special(name)
                    .and_then(|v| added_token(v, true))
                    .filter(|t| is_new(t, &known, &wanted)),
            );
        }
        for name in ["additional_special_tokens", "extra_special_tokens"] {
            for value in self.special(name).and_then(Value::as_array).into_iter().flatten() {
                wanted.extend(added_token(value, true).filter(|t| is_new(t, &known, &wanted)));
            }
        }
        wanted.retain(|token| tokenizer.token_to_id(&token.content).is_some());
        tokenizer.add_tokens(wanted).map_err(|e| one_line(&e))?;
        Ok(())
    }

    /// A special token by its name in tokenizer_config.json; `null` is an answer. Where that has no list of added
    /// tokens, special_tokens_map.json is asked first.
    fn special(&self, name: &str) -> Option<&Value> {
        let older = self.config.get("added_tokens_decoder").is_none();
        let map = self.special_tokens_map.get(name).filter(|_| older);
        map.or_else(|| self.config.get(name))
    }

    fn class(&self) -> Option<&'static Class> {
        let text = |json: &Value, key: &str| json.get(key).and_then(Value::as_str).map(str::to_owned);
        let named = text(&self.config, "tokenizer_class").or_else(|| text(&self.model, "tokenizer_class"));
        match named {
            Some(name) => {
                let name = name.strip_suffix("Fast").unwrap_or(&name);
                CLASSES.iter().find(|c| c.name == name)
            }
            None => {
                let kind = text(&self.model, "model_type")?;
                CLASSES.iter().find(|c| c.model_types.contains(&kind.as_str()))
            }
        }
    }

    fn bos_eos(&self, tokenizer: &Tokenizer, folder: &ModelFolder) -> Result<Option<BosEos>> {
        let Some(class) = self.class() else { return Ok(None) };
        let flag = |name: &str| self.config.get(name).and_then(Value::as_bool);
        let (bos, eos) = (flag("add_bos_token"), flag("add_eos_token"));
        if bos.is_none() && eos.is_none() && class.name != NEOX {
            return Ok(None);
        }
        let id = |name: &'static str, default: &str, configured: Option<u32>| -> Result<Option<u32>> {
            let text = match self.special(name) {
                Some(Value::Null) => return Ok(None),
                Some(value) => content(value).ok_or(Error::NotAToken(name))?,
                None => default,
            };
            let id = tokenizer.token_to_id(text).or(configured);
            let missing = || Error::MissingToken {
                name,
                token: text.to_owned(),
            };
            id.map(Some).ok_or_else(missing)
        };
        let mut bos_eos = BosEos::default();
        if bos.unwrap_or(class.name != NEOX) {
            bos_eos.bos = id("bos_token", class.bos, folder.bos)?;
        }
        if eos.unwrap_or(false) {
            bos_eos.eos = id("eos_token", class.eos, folder.eos.first().copied())?;
        }
        Ok(Some(bos_eos))
    }
}

fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// A token with its flags, or by its text alone.
fn added_token(value: &Value, special: bool) -> Option<AddedToken> {
    let flag = |name: &str, default: bool| value.get(name).and_then(Value::as_bool).unwrap_or(default);
    let special = special || flag("special", false);
    let token = AddedToken::from(content(value)?, special)
        .single_word(flag("single_word", false))
        .lstrip(flag("lstrip", false))
        .rstrip(flag("rstrip", false));
    let normalized = flag("normalized", token.normalized);
    Some(token.normalized(normalized))
}

fn same(a: &AddedToken, b: &AddedToken) -> bool {
    let flags = |t: &AddedToken| (t.single_word, t.lstrip, t.rstrip, t.normalized, t.special);
    a.content == b.content && flags(a) == flags(b)
}

fn is_new<'a>(
    token: &AddedToken,
    known: impl IntoIterator<Item = (&'a u32, &'a AddedToken)>,
    wanted: &[AddedToken],
) -> bool {
    let known = known.into_iter().map(|(_, k)| k);
    !known.chain(wanted).any(|k| k.content == token.content)
}
