//! The program: verbs, their options, and what the shell gets to see.

mod bench;
mod bench_op;
mod eval;
mod run;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use crate::{Device, Interrupted, OpenOptions, Runtime, interrupt::Signals, progress::note, runtime};

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

/// How many threads ONNX Runtime gets, and where the libraries are.
#[derive(Args, Clone, Debug)]
struct SessionArgs {
    /// Where to run: cpu, cuda or cuda:N, the GPU of that number. The models' element type is best float16 there.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: Device,
    /// Replay decoding steps as a CUDA graph: less work for the host, where the graph allows it.
    #[arg(long)]
    cuda_graph: bool,
    /// Threads [default: one per core].
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    #[command(flatten)]
    libraries: LibraryArgs,
}

impl SessionArgs {
    fn load(&self) -> Result<(Runtime, OpenOptions)> {
        runtime::check_threads(self.threads)?;
        let (runtime, options) = self.libraries.load(self.device)?;
        let options = OpenOptions {
            threads: self.threads,
            cuda_graph: self.cuda_graph,
            ..options
        };
        Ok((runtime, options))
    }
}

/// Where the libraries are.
#[derive(Args, Clone, Debug)]
struct LibraryArgs {
    /// The plugin libretro_attention.so [default: $RETRO_ATTENTION_PLUGIN, else beside this program].
    #[arg(long, value_name = "PATH")]
    plugin: Option<PathBuf>,
    /// ONNX Runtime's library [default: $ORT_DYLIB_PATH, else beside this program, .cache/onnxruntime of its tree, the system's].
    #[arg(long, value_name = "PATH")]
    ort: Option<PathBuf>,
}

impl LibraryArgs {
    fn load(&self, device: Device) -> Result<(Runtime, OpenOptions)> {
        let plugin = runtime::find_plugin(self.plugin.as_deref())?;
        let runtime = Runtime::load_for(device, self.ort.as_deref())?;
        let options = OpenOptions {
            plugin,
            device,
            ..Default::default()
        };
        Ok((runtime, options))
    }
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
                note(&format!("error: {}", runtime::one_line(&format!("{e:#}"))));
                ExitCode::FAILURE
            }
        },
    }
}

/// Writes a verb's result to stdout.
fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.context(STDOUT)
}

/// What failed when stdout did.
const STDOUT: &str = "cannot write to stdout";

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let pipe = |e: &(dyn std::error::Error + 'static)| {
        e.downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    };
    error.chain().any(pipe)
}
