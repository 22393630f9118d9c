//! What can go wrong in a comparison, beside what the decoder's errors say.

use std::{io, path::PathBuf};

use super::{scorer::AnswerError, tasks::TaskError};
use crate::{Interrupted, decoder, text};

/// The result of the comparison's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Each is one line that says what is wrong, where, and what to do. The cause, where there is one, is the error's
/// source.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Error {
    /// The run was stopped.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// A model cannot be opened or run.
    #[error(transparent)]
    Decoder(#[from] decoder::Error),
    /// A tokenizer fails.
    #[error(transparent)]
    Text(#[from] text::Error),
    /// A folder has no model that can be told.
    #[error(transparent)]
    Folder(#[from] retro_model_io::Error),
    /// A graph cannot be built from weights.
    #[error(transparent)]
    Build(#[from] retro_models::Error),
    /// A model cannot be converted.
    #[error(transparent)]
    Convert(#[from] Box<retro_export::Error>),
    /// A mistake of this program.
    #[error("{0}")]
    Internal(&'static str),

    // Models and policies.
    #[error("there is no model at {}", .0.display())]
    NoModel(PathBuf),
    #[error("no temporary folder: set TMPDIR to a folder with free space")]
    NoTemporaryFolder(#[source] io::Error),
    #[error(
        "{} was converted already: give the unconverted model, or compare this one with --run NAME=DIR",
        .0.display()
    )]
    Converted(PathBuf),
    #[error("cannot copy {}", .path.display())]
    Copy { path: PathBuf, source: io::Error },
    #[error("{name}")]
    Policy { name: String, source: decoder::Error },

    // Documents and texts.
    #[error("cannot read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} line {line} is no document", .path.display())]
    NotADocument {
        path: PathBuf,
        line: usize,
        source: serde_json::Error,
    },
    #[error("{} line {line}: n_predict is 0: ask for at least one token", .path.display())]
    NothingToPredict { path: PathBuf, line: usize },
    #[error("{} line {line}", .path.display())]
    Answers {
        path: PathBuf,
        line: usize,
        source: AnswerError,
    },
    /// A task's documents cannot be made.
    #[error(transparent)]
    Task(#[from] TaskError),
    #[error("{} holds no documents", .0.display())]
    NoDocuments(PathBuf),
    #[error("document {number}")]
    Prompt { number: usize, source: text::Error },
    #[error("document {0}: no token stands before its question: give it a prompt")]
    QuestionOnly(usize),
    #[error("document {number}: its reference")]
    Reference { number: usize, source: text::Error },
    #[error("neither the documents nor the model say how long outputs are: give -n")]
    UnknownLength,
    #[error("a prompt of {0} tokens leaves no room in the model's context")]
    NoRoom(usize),
    #[error("{name}")]
    Tokens { name: String, source: text::Error },
    #[error(
        "{name} has {tokens} tokens, which leaves fewer than {least} behind a prompt of {prompt}: give a longer text or a smaller --prompt-tokens"
    )]
    ShortText {
        name: String,
        tokens: usize,
        least: usize,
        prompt: usize,
    },

    // The file of results.
    #[error("cannot open {}", .path.display())]
    OpenResults { path: PathBuf, source: io::Error },
    #[error("{} is no file of results: give --resume another name", .0.display())]
    NoResults(PathBuf),
    #[error(
        "{} holds results of another run (of {found}; asked for are {asked}): give --resume another name",
        .path.display()
    )]
    OtherRun {
        path: PathBuf,
        found: String,
        asked: String,
    },
    #[error("cannot shorten {}", .path.display())]
    ShortenResults { path: PathBuf, source: io::Error },
    #[error("cannot write {}", .path.display())]
    WriteResults { path: PathBuf, source: io::Error },
    #[error("cannot write the file of results")]
    AddResult(#[source] io::Error),

    // Figures.
    #[error("the figure {0:?} has no data")]
    NoData(String),
    #[error("cannot draw {title:?}: {reason}")]
    Draw { title: String, reason: String },
}
