//! `retro-run`: the command.

use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { retro_run::disable_telemetry() };
    retro_run::cli::main()
}
