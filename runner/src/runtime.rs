//! ONNX Runtime and the plugin, as [`retro_runtime`] finds them, and how many threads they get.

use std::fmt::Display;

use anyhow::{Error, Result, anyhow, bail};
pub use retro_runtime::{PLUGIN, PLUGIN_VARIABLE, RUNTIME_VARIABLE, Runtime, find_plugin};
pub(crate) use retro_runtime::{check, one_line};

/// Threads for ONNX Runtime's pool.
///
/// # Errors
/// When the number is 0 or absurd.
pub fn check_threads(threads: Option<usize>) -> Result<()> {
    match threads {
        Some(0) => bail!("-t 0: ask for at least one thread"),
        Some(n) if n > 1024 => bail!("-t {n}: that is more threads than any machine has"),
        _ => Ok(()),
    }
}

/// An error of the crate `ort` as one of ours: one line, without the builder that some of them carry.
pub(crate) fn ort_error(error: impl Display) -> Error {
    anyhow!("{}", one_line(&error))
}
