//! The command line: subcommands, their options, exit codes.

mod args;
mod bench;
mod bench_op;
mod chat;
mod eval;
mod output;
mod run;
mod serve;
mod template;

use std::{io, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::{Interrupted, interrupt::Signals, progress::note, runtime::one_line};

/// Generates text with ONNX language models. Models converted by retro-export decode with sparse attention.
#[derive(Parser)]
#[command(name = "retro-run", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Generate text from a prompt.
    Run(Box<run::RunArgs>),
    /// Chat with a model: line by line on a terminal, or a line a turn from standard input.
    Chat(Box<chat::ChatArgs>),
    /// Serve a model to many clients at a time, with OpenAI's API.
    Serve(Box<serve::ServeArgs>),
    /// Compare attention policies: answers on documents, or perplexity and KL divergence on texts.
    Eval(Box<eval::EvalArgs>),
    /// Benchmark models side by side: prompt and generation speed.
    Bench(Box<bench::BenchArgs>),
    /// Benchmark the operator alone against ONNX Runtime's GroupQueryAttention.
    BenchOp(Box<bench_op::BenchOpArgs>),
}

/// Runs the command line. An error is one line on stderr and exit code 1; a closed pipe is no error. After SIGINT the
/// exit code is 130, after SIGTERM 143.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = Signals::install()
        .context("cannot take charge of SIGINT and SIGTERM")
        .and_then(|signals| match cli.command {
            Command::Run(args) => run::run(&args, &signals),
            Command::Chat(args) => chat::chat(&args, &signals),
            Command::Serve(args) => serve::serve(*args, &signals),
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
            // The reader of our output closed it: `| head`, say.
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
