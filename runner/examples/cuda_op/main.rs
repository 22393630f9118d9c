//! Benchmark of RetroAttention nodes against ONNX Runtime's GroupQueryAttention nodes on the same caches: N nodes per
//! session, all tensors on the device, all variants interleaved in one process.
//!
//!     cargo run --release -p retro-run --example cuda_op -- --context 32k,128k --budget 0.15,2048 --window 1,2,8
//!
//! Each run is the next decoding step, with another query: a counter in the graph picks it, so that nothing waits for
//! the host. The counter costs every variant the same three small kernels per run (`--overhead` times them alone).

mod args;
mod bench;
#[path = "../common/mod.rs"]
mod common;
mod entry;
mod graph;
mod group;
mod host;
mod layout;
mod rows;
mod steps;
mod summaries;
mod table;
mod timing;

use std::process::ExitCode;

use anyhow::{Context, Result};
use args::Args;
use bench::Measurement;
use clap::Parser;
use common::fill;
use group::Group;
use host::Host;
use layout::MemoryLayout;
use retro_run::decoder::device_buffers::DeviceBuffer;

/// Bytes of GPU memory left to ONNX Runtime.
const RESERVE: usize = 6 << 30;

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { retro_run::disable_telemetry() };
    common::exit_code(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    args.check()?;
    let host = Host::new(args)?;
    let layouts = layouts_that_fit(&host)?;
    let most = layouts.iter().map(|p| p.bytes).max().context("nothing fits")?;
    let buffer = DeviceBuffer::new(host.gpu(), most)?;
    let bandwidth = host.sessions.copy_bandwidth(&buffer)?;
    let about = host.about(bandwidth)?;
    let title = about["text"].as_str().unwrap_or_default();
    eprintln!("{title}");
    fill::normals(&buffer, 0, most, host.shape.dtype)?;

    let mut bench = Measurement::new(&host)?;
    let mut rows = Vec::new();
    for layout in layouts {
        let group = Group {
            host: &host,
            buffer: &buffer,
            layout,
        };
        rows.extend(bench.measure(&group, bandwidth)?);
        eprintln!("done: context {}, batch {}", group.layout.context, group.layout.batch);
    }
    let text = table::print(&rows, args.output, &about)?;
    print!("{text}");
    Ok(())
}

fn layouts_that_fit(host: &Host<'_>) -> Result<Vec<MemoryLayout>> {
    let free = host.free_memory()?;
    let groups = host.args.groups().into_iter();
    let mut layouts: Vec<MemoryLayout> = groups
        .map(|(context, batch)| MemoryLayout::new(host, context, batch))
        .collect();
    layouts.retain(|layout| {
        let need = layout.bytes + RESERVE;
        let fits = need <= free;
        if !fits {
            eprintln!(
                "left out: context {}, batch {} needs {:.1} GB, {:.1} GB are free",
                layout.context,
                layout.batch,
                need as f64 / 1e9,
                free as f64 / 1e9
            );
        }
        fits
    });
    Ok(layouts)
}
