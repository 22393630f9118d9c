//! The `retro-export` command, as a user calls it.

use std::{path::Path, process::Command};

use retro_tests::paths;

/// Tokens of a page unless `--page-size` says otherwise.
pub fn default_page() -> usize {
    retro_export::Settings::default().page_size
}

/// Converts a model folder into another; the error is what the command printed.
pub fn convert(from: &Path, to: &Path, options: &[&str]) -> Result<(), String> {
    let mut command = Command::new(paths::command("retro-export"));
    let output = command
        .arg(from)
        .arg("-o")
        .arg(to)
        .arg("--no-verify")
        .args(options)
        .output()
        .expect("retro-export starts");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() { Ok(()) } else { Err(text) }
}
