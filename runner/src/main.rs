//! `retro-run`: the command.

use std::process::ExitCode;

fn main() -> ExitCode {
    retro_run::commands::main()
}
