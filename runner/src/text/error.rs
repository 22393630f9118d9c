//! What can be wrong with a tokenizer.

use std::path::PathBuf;

/// The result of the tokenizer's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Each is one line that says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Error {
    /// A JSON file beside the tokenizer cannot be read.
    #[error(transparent)]
    Folder(#[from] retro_model_io::Error),
    #[error("{0} has no tokenizer.json: copy the model's there")]
    NoTokenizer(PathBuf),
    #[error("cannot read the tokenizer {path}: {reason}")]
    Read { path: PathBuf, reason: String },
    #[error("{path}: {reason}")]
    Truncation { path: PathBuf, reason: String },
    #[error("cannot add the tokens that tokenizer_config.json names to {path}: {reason}")]
    AddTokens { path: PathBuf, reason: String },
    #[error("tokenizer_config.json: {0} is no token")]
    NotAToken(&'static str),
    #[error("tokenizer_config.json asks for {name} {token:?} around a text, which tokenizer.json does not have")]
    MissingToken { name: &'static str, token: String },
    #[error("the tokenizer refuses the prompt: {0}")]
    Encode(String),
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("the tokenizer cannot decode: {0}")]
    Decode(String),
}
