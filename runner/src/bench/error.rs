//! What can go wrong in a benchmark, beside what the decoder's errors say.

use ort::value::TensorElementType;
use retro_runtime::OrtError;

use crate::{Device, decoder, runtime::one_line, tables};

/// The result of the benchmarks' calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Each is one line that says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Error {
    /// A model cannot be opened or run.
    #[error(transparent)]
    Decoder(#[from] decoder::Error),
    /// A table cannot be written.
    #[error(transparent)]
    Table(#[from] tables::Error),
    #[error("the plugin is needed: build it with `cargo build --release`, or name it with --plugin")]
    NoPlugin,
    #[error("cannot make a session: {0}")]
    Session(String),
    #[error("caches of {0} cannot be filled with random numbers")]
    CacheType(TensorElementType),
    #[error("{depth} tokens and {steps} steps exceed the model's context of {most} tokens")]
    Context { depth: usize, steps: usize, most: usize },
    #[error("no memory for a buffer of shape {shape:?}: {error}")]
    NoMemory { shape: Vec<usize>, error: OrtError },
    #[error(
        "the caches take {needed:.1} GiB on {device}, where {free:.1} GiB are free: ask for fewer sequences or tokens"
    )]
    Room { device: Device, needed: f64, free: f64 },
    #[error("no row for this step")]
    NoRow,
    #[error("no output")]
    NoOutput,
    #[error("the output is too short")]
    ShortOutput,
}

impl Error {
    /// ONNX Runtime refuses a graph of this program.
    pub(super) fn session<R>(error: ort::Error<R>) -> Self {
        Self::Session(one_line(&error))
    }
}

impl From<OrtError> for Error {
    fn from(error: OrtError) -> Self {
        Self::Decoder(error.into())
    }
}
