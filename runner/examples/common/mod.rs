//! What the programs that time single nodes share.

pub mod dtype;
pub mod fill;
pub mod session_host;

use std::process::ExitCode;

/// What a program ends with: an error is one line, and exit code 1.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", format!("{e:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}
