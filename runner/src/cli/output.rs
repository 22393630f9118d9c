//! What commands print and write.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use anyhow::{Context, Result};

/// Writes a verb's result to stdout.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.context(STDOUT)
}

/// What failed when stdout did.
pub const STDOUT: &str = "cannot write to stdout";

/// Writes beside and renames, so that a failure leaves what was there.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let folder = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let write = || -> Result<()> {
        // As readable as any file that the user makes: temporary files are the owner's alone otherwise.
        let open_to_all = fs::Permissions::from_mode(0o666);
        let mut file = tempfile::Builder::new().permissions(open_to_all).tempfile_in(folder)?;
        file.write_all(text.as_bytes())?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
