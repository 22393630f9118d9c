//! ONNX Runtime and the plugin, as [`retro_runtime`] finds them, and how many threads they get.

use anyhow::{Result, bail};
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
