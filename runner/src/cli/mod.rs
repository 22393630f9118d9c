//! The program: verbs, their options, and what the shell gets to see.

mod args;
mod bench;
mod bench_op;
mod eval;
mod output;
mod run;

use std::{io, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::{Interrupted, interrupt::Signals, progress::note, runtime::one_line};

/// Generates text with ONNX language models, with retrospective sparse attention where they were converted for it.
#[derive(Parser)]
#[command(name = "retro-run", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Generate text from a prompt.
    Run(Box<run::RunArgs>),
    /// Generate over documents with known answers under several policies, and compare.
    Eval(Box<eval::EvalArgs>),
    /// Measure models, converted or not, side by side.
    Bench(Box<bench::BenchArgs>),
    /// Measure the operator alone against ONNX Runtime's GroupQueryAttention.
    BenchOp(Box<bench_op::BenchOpArgs>),
}

/// Runs the command line and says how it went: one line on stderr for an error, nothing for a closed pipe. The exit code is 130
/// or 143 where SIGINT or SIGTERM ended the work.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = Signals::install()
        .context("cannot take charge of SIGINT and SIGTERM")
        .and_then(|signals| match cli.command {
            Command::Run(args) => run::run(&args, &signals),
            Command::Eval(args) => eval::eval(&args, &signals),
            Command::Bench(args) => bench::bench(&args, &signals),
            Command::BenchOp(args) => bench_op::bench_op(&args, &signals),
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => match e.downcast_ref::<Interrupted>() {
            Some(interrupted) => {
                note(&interrupted.to_string());
                ExitCode::from(interrupted.exit_code())
            }
            // Whoever read our text has had enough of it.
            None if is_broken_pipe(&e) => ExitCode::SUCCESS,
            None => {
                note(&format!("error: {}", one_line(&format!("{e:#}"))));
                ExitCode::FAILURE
            }
        },
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let pipe = |e: &(dyn std::error::Error + 'static)| {
        e.downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    };
    error.chain().any(pipe)
}
