//! What commands print and write.

use std::{
    io::{self, Write},
    path::Path,
};

use anyhow::{Context, Result};
use retro_onnx::leave_to_umask;

/// Writes the result of a command to stdout.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.context(STDOUT)
}

/// The context of an error of stdout.
pub const STDOUT: &str = "cannot write to stdout";

/// The folder that a file lies in.
pub fn folder_of(path: &Path) -> &Path {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// Writes a file to a temporary one and renames it, so that a failure leaves the old file.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let folder = folder_of(path);
    let write = || -> Result<()> {
        let mut builder = tempfile::Builder::new();
        leave_to_umask(&mut builder, 0o666);
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(text.as_bytes())?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
