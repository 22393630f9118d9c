//! What can go wrong in a conversation.

use std::{io, path::PathBuf};

use crate::{
    decoder,
    text::{self, chat_template},
};

/// The result of a conversation's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Each is one line that says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Error {
    /// The model fails.
    #[error(transparent)]
    Decoder(#[from] decoder::Error),
    /// The tokenizer fails.
    #[error(transparent)]
    Text(#[from] text::Error),
    /// The template refuses the conversation.
    #[error(transparent)]
    Template(#[from] chat_template::Error),
    #[error("the model's context length is unknown: give -c")]
    UnknownContext,
    #[error(
        "with this message the conversation takes {tokens} tokens, and the context holds {capacity}: /clear begins \
         anew{}",
        if *.larger { ", and a larger -c holds more" } else { "" }
    )]
    Full {
        tokens: usize,
        capacity: usize,
        /// Whether the model could hold more.
        larger: bool,
    },
    #[error("cannot read the conversation {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} holds no conversation that /save wrote: {reason}")]
    Foreign { path: PathBuf, reason: String },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
}
