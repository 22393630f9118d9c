//! Times RetroAttention nodes against ONNX Runtime's GroupQueryAttention nodes on the same caches: N nodes in one session each,
//! all tensors on the device, all variants by turns in one process.
//!
//!     cargo run --release -p retro-run --example cuda_op -- --context 32k,128k --budget 0.15,2048 --window 1,2,8
//!
//! Each run is a decoding step one token further, with another query: a counter in the graph picks it, so that nothing
//! waits for the host. Counting costs every variant the same three small kernels a run (`--overhead` times them alone).

mod args;
mod bench;
mod fill;
mod graph;
mod group;
mod host;
mod plan;
mod rows;
mod summaries;
mod table;
mod timing;

use std::process::ExitCode;

use anyhow::{Context, Result};
use args::{Args, Format};
use bench::Bench;
use clap::Parser;
use group::Group;
use host::Host;
use plan::Plan;
use retro_run::decoder::device_buffers::Arena;

/// Left to ONNX Runtime's own buffers.
const RESERVE: usize = 6 << 30;

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { retro_run::disable_telemetry() };
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", format!("{e:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    args.check()?;
    let host = Host::new(args)?;
    let plans = plans_that_fit(&host)?;
    let most = plans.iter().map(|p| p.bytes).max().context("nothing fits")?;
    let arena = Arena::new(host.gpu.as_ref(), most)?;
    let bandwidth = timing::copy_bandwidth(&host, &arena)?;
    let about = host.about(bandwidth)?;
    let title = about["text"].as_str().unwrap_or_default();
    eprintln!("{title}");
    fill::normals(&arena, 0, most, host.shape.dtype)?;

    let mut bench = Bench::new(&host)?;
    let mut rows = Vec::new();
    for plan in plans {
        let group = Group {
            host: &host,
            arena: &arena,
            plan,
        };
        rows.extend(bench.measure(&group, bandwidth)?);
        eprintln!("done: context {}, batch {}", group.plan.context, group.plan.batch);
    }
    let text = match args.output {
        Format::Md => format!("{title}\n\n{}", table::markdown(&rows)),
        Format::Json => table::json(&rows, &about),
        Format::Csv => table::csv(&rows),
    };
    print!("{text}");
    Ok(())
}

fn plans_that_fit(host: &Host<'_>) -> Result<Vec<Plan>> {
    let free = host.free_memory()?;
    let groups = host.args.groups().into_iter();
    let mut plans: Vec<Plan> = groups.map(|(context, batch)| Plan::new(host, context, batch)).collect();
    plans.retain(|plan| {
        let need = plan.bytes + RESERVE;
        let fits = need <= free;
        if !fits {
            eprintln!(
                "left out: context {}, batch {} needs {:.1} GB, {:.1} GB are free",
                plan.context,
                plan.batch,
                need as f64 / 1e9,
                free as f64 / 1e9
            );
        }
        fits
    });
    Ok(plans)
}
