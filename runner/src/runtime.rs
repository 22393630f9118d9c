//! ONNX Runtime and the plugin, found and loaded by [`retro_runtime`], and their errors.

use retro_runtime::OrtError;
pub use retro_runtime::{PLUGIN, PLUGIN_VARIABLE, RUNTIME_VARIABLE, Runtime, find_plugin};
pub(crate) use retro_runtime::{check, one_line};

/// A number of threads that ONNX Runtime's pool cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ThreadsError {
    /// No thread.
    #[error("-t 0: ask for at least one thread")]
    NoThread,
    /// More than 1024.
    #[error("-t {0}: expected 1 to 1024 threads")]
    TooMany(usize),
}

/// Checks a number of threads for ONNX Runtime's pool.
///
/// # Errors
/// When the number is 0 or above 1024.
pub fn check_threads(threads: Option<usize>) -> Result<(), ThreadsError> {
    match threads {
        Some(0) => Err(ThreadsError::NoThread),
        Some(n) if n > 1024 => Err(ThreadsError::TooMany(n)),
        _ => Ok(()),
    }
}

/// An error of ONNX Runtime, whatever the crate `ort` lets it carry.
pub(crate) fn ort_error<R>(error: ort::Error<R>) -> OrtError {
    error.into()
}
