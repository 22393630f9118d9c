// println! and its like panic when nobody reads.
#![deny(clippy::print_stdout, clippy::print_stderr)]

use anyhow::{Context, Result, bail};
use clap::Parser;
use retro_export::{
    cli::{Cli, Command},
    convert, inspect, revert, write_repository,
};
use serde::Serialize;
use std::{
    fmt::Display,
    io::{self, Write},
    process::ExitCode,
};

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { retro_runtime::disable_telemetry() };
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let line = format!("{error:#}").replace(['\n', '\r'], " ");
            let _ = writeln!(io::stderr(), "error: {line}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Some(Command::Inspect { model, graph, json }) => return say(&inspect(model, graph.as_deref())?, *json),
        Some(Command::Triton(repository)) => {
            let folder = write_repository(repository)?;
            return print(&format!("wrote    {}\n", folder.display()));
        }
        None => {}
    }
    if cli.revert {
        let (source, target) = cli
            .model
            .as_ref()
            .zip(cli.output.as_ref())
            .context("name a model and an output")?;
        let (written, bytes) = revert(source, cli.graph.as_deref(), target, cli.external_data, cli.force)?;
        let report = serde_json::json!({ "source": source, "target": written, "bytes": bytes });
        return if cli.json {
            print(&format!("{report}\n"))
        } else {
            print(&format!(
                "wrote    {} ({bytes} bytes): the original, byte for byte\n",
                written.display()
            ))
        };
    }
    let report = convert(&cli.options())?;
    say(&report, cli.json)?;
    if let Some(fault) = report.verification.as_ref().and_then(|v| v.fault()) {
        let target = report.target.unwrap_or_default();
        bail!("the converted model {} {fault}: do not use it", target.display());
    }
    Ok(())
}

fn say(report: &(impl Serialize + Display), json: bool) -> Result<()> {
    print(&if json {
        serde_json::to_string(report)? + "\n"
    } else {
        report.to_string()
    })
}

fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever read the report has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to stdout"),
    }
}
