//! What can be wrong with a chat template.

use std::{io, path::PathBuf};

/// The result of finding and rendering chat templates.
pub type Result<T, E = Error> = std::result::Result<T, E>;

const REMEDY: &str = "give another template with --template FILE, or none with --no-template";

/// Each is one line that says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Error {
    /// A JSON file of the model's folder cannot be read.
    #[error(transparent)]
    Folder(#[from] retro_model_io::Error),
    #[error("cannot read the chat template {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the chat template {path} has {bytes} bytes, more than the {limit} of any template: {REMEDY}")]
    TooLarge { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{0}: chat_template is neither text nor a list of templates with a name: {REMEDY}")]
    NotATemplate(PathBuf),
    #[error("{0} has no chat_template: {REMEDY}")]
    NoTemplate(PathBuf),
    #[error("{path} has several chat templates and none is named \"default\", but {names}: {REMEDY}")]
    NoDefault { path: PathBuf, names: String },
    #[error("the chat template {at}: {reason}: {REMEDY}")]
    Syntax { at: Place, reason: String },
    /// The template called `raise_exception`.
    #[error("the chat template {at} refuses the conversation: {message} (or {REMEDY})")]
    Refused { at: Place, message: String },
    #[error("the chat template {at}: {reason}: {REMEDY}")]
    Render { at: Place, reason: String },
    #[error("the chat template {at} does too much work or makes too much text for this conversation: {REMEDY}")]
    OutOfFuel { at: Place },
    #[error("no thread with a stack of {stack} bytes can be started to render the chat template: {source}")]
    Thread { stack: usize, source: io::Error },
    #[error("the conversation is empty: a chat template needs a message")]
    EmptyConversation,
    #[error("message {0} is no JSON object with a role and a content")]
    NotAMessage(usize),
    #[error("a conversation is either continued in its last message or followed by a new one, not both")]
    ContinueAndPrompt,
    #[error("the last message has no text to continue")]
    NothingToContinue,
    #[error("the chat template {at} leaves out the text of the last message, which therefore can't be continued")]
    CannotContinue { at: Place },
}

/// Where in a template something is wrong.
#[derive(Clone, Debug)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// The template's name in the file, for those beside "default".
    pub name: Option<String>,
    /// The line of the template's text, from 1 on.
    pub line: Option<usize>,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(name) = &self.name {
            write!(f, " ({name})")?;
        }
        match self.line {
            Some(line) => write!(f, ", line {line}"),
            None => Ok(()),
        }
    }
}
