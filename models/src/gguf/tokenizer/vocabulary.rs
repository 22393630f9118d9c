//! The tokens of a GGUF file, and those with a meaning.

use std::collections::HashMap;

use retro_gguf::{Metadata, Value as Gguf};
use serde_json::{Map, Value, json};

use crate::error::TokenizerError;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
/// No tokenizer has longer ones; the search for the merges of a piece takes time by the square of this.
const MAX_TOKEN_BYTES: usize = 1024;

/// What a token is, by llama.cpp's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Tokens by id, and back.
pub struct Vocabulary<'a> {
    tokens: Vec<(&'a str, Kind)>,
    ids: HashMap<&'a str, usize>,
}

/// Ids of the tokens with a meaning.
pub struct Special {
    pub bos: Option<u64>,
    pub eos: Option<u64>,
    pub unknown: Option<u64>,
    pub pad: Option<u64>,
    /// All that end a text or a turn; `eos` is the first.
    pub ends: Vec<u64>,
}

/// Tokens that llama.cpp takes for ends of turns by what they say (`special_eog_ids`), of the models that are built.
const ENDS: [&str; 8] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eot|>",
    "</s>",
];

impl<'a> Vocabulary<'a> {
    /// Reads the tokens, of which there must not be more than rows of the embedding.
    pub fn read(metadata: &'a Metadata, rows: usize) -> Result<Self, TokenizerError> {
        let list = metadata.array(TOKENS)?.ok_or_else(|| missing(TOKENS))?;
        if list.len() > rows {
            return Err(TokenizerError::TooManyTokens {
                tokens: list.len(),
                rows,
            });
        }
        let kinds = metadata.array(TYPES)?;
        let mut kinds: Box<dyn Iterator<Item = Kind>> = match kinds {
            Some(kinds) if kinds.len() != list.len() => {
                return Err(TokenizerError::Length {
                    key: TYPES,
                    got: kinds.len(),
                    tokens: list.len(),
                });
            }
            Some(kinds) => Box::new(kinds.numbers().map(kind)),
            None => Box::new(std::iter::repeat(Kind::Normal)),
        };
        let mut vocabulary = Self {
            tokens: Vec::with_capacity(list.len()),
            ids: HashMap::with_capacity(list.len()),
        };
        for (id, token) in list.strings().enumerate() {
            let (token, kind) = (token?, kinds.next().unwrap_or(Kind::Normal));
            if token.len() > MAX_TOKEN_BYTES {
                return Err(TokenizerError::LongToken {
                    id,
                    bytes: token.len(),
                    limit: MAX_TOKEN_BYTES,
                });
            }
            vocabulary.tokens.push((token, kind));
            // Rows that only fill up the embedding may share a name.
            if vocabulary.ids.insert(token, id).is_some() && kind != Kind::Unused {
                return Err(TokenizerError::TokenTwice(token.to_owned()));
            }
        }
        Ok(vocabulary)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The text of a token.
    pub fn token(&self, id: u64) -> Option<&'a str> {
        let id = usize::try_from(id).ok()?;
        self.tokens.get(id).map(|(token, _)| *token)
    }

    /// The id of a text.
    pub fn id(&self, token: &str) -> Option<usize> {
        self.ids.get(token).copied()
    }

    /// All, in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, Kind)> + '_ {
        self.tokens.iter().copied()
    }

    /// `vocab` of a tokenizer.json: texts to ids.
    pub fn map(&self) -> Map<String, Value> {
        let ids = self.tokens.iter().enumerate();
        ids.map(|(id, (token, _))| ((*token).to_owned(), id.into())).collect()
    }

    /// `added_tokens` of a tokenizer.json: those that are found in a text before it is split. `strip`: white space after
    /// the token belongs to it.
    pub fn added(&self, strip: impl Fn(&str) -> bool) -> Vec<Value> {
        let added = self.tokens.iter().enumerate().filter_map(|(id, (token, kind))| {
            let special = match kind {
                Kind::Control | Kind::Unknown => true,
                Kind::UserDefined => false,
                Kind::Normal | Kind::Unused | Kind::Byte => return None,
            };
            Some(json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": strip(token),
                "normalized": false,
                "special": special,
            }))
        });
        added.collect()
    }
}

impl Special {
    /// Reads the ids, each of which must be a token's.
    pub fn read(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Self, TokenizerError> {
        let id = |key: &'static str| match metadata.integer(key)? {
            Some(id) if vocabulary.token(id).is_none() => Err(TokenizerError::NoToken { key, id }),
            other => Ok(other),
        };
        let eos = id("tokenizer.ggml.eos_token_id")?;
        let turns = [id("tokenizer.ggml.eot_token_id")?, id("tokenizer.ggml.eom_token_id")?];
        let mut ends: Vec<u64> = eos.into_iter().chain(turns.into_iter().flatten()).collect();
        let named = ENDS.iter().filter_map(|token| vocabulary.id(token));
        let control = |id: &usize| matches!(vocabulary.tokens.get(*id), Some((_, Kind::Control | Kind::UserDefined)));
        ends.extend(named.filter(control).map(|id| id as u64));
        let mut seen = Vec::new();
        ends.retain(|id| {
            !seen.contains(id) && {
                seen.push(*id);
                true
            }
        });
        Ok(Self {
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos,
            unknown: id("tokenizer.ggml.unknown_token_id")?,
            pad: id("tokenizer.ggml.padding_token_id")?,
            ends,
        })
    }
}

pub fn missing(key: &str) -> TokenizerError {
    TokenizerError::Gguf(retro_gguf::Error::NoKey(key.to_owned()))
}

fn kind(value: Gguf) -> Kind {
    let number = match value {
        Gguf::Signed(n) => n,
        Gguf::Unsigned(n) => i64::try_from(n).unwrap_or(0),
        _ => 0,
    };
    match number {
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        _ => Kind::Normal,
    }
}
