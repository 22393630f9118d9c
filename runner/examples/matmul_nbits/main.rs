//! Benchmark of products with 4 and 8 bit weights: `com.microsoft::MatMulNBits` and `ai.retro::MatMulNBits` alone, for
//! several numbers of rows of A, interleaved in one process.
//!
//!     cargo run --release -p retro-run --example matmul_nbits -- --device cuda --rows 1,2,4,8,16
//!
//! A session has as many nodes as make its weights larger than the caches, each with weights of its own; all read the
//! same A. On a GPU a run is a replayed CUDA graph, and the device is waited for once a sample.

mod args;
mod bench;
#[path = "../common/mod.rs"]
mod common;
mod graph;
mod table;

use std::process::ExitCode;

use anyhow::Result;
use args::Args;
use bench::Measurement;
use clap::Parser;
use common::session_host::SessionHost;
use retro_run::decoder::device_buffers::DeviceBuffer;

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { retro_run::disable_telemetry() };
    common::exit_code(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    args.check()?;
    let host = SessionHost::new(args.device, args.ort.as_deref(), args.plugin.as_deref(), args.threads)?;
    let copied = DeviceBuffer::new(host.gpu.as_ref(), 2 * args.weight_bytes())?;
    let bandwidth = host.copy_bandwidth(&copied)?;
    drop(copied);
    let about = table::about(args, &host.name()?, bandwidth);
    eprintln!("{about}");
    let operators = bench::operators(&host, args)?;
    let mut rows = Vec::new();
    for &shape in &args.shape {
        rows.extend(Measurement::new(&host, args, shape, &operators)?.measure()?);
        eprintln!("done: {shape}");
    }
    print!("{}", table::print(args, &rows, &about, bandwidth)?);
    Ok(())
}
