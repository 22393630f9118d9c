//! Decoding speed of models at given context depths. The caches are synthetic (filled with random numbers, not by a
//! prefill); models and policies are interleaved in one process.
//!
//!     cargo run --release -p retro-run --example decode_depth -- --device cuda --depth 8k,32k,128k \\
//!       --run "dense=MODEL" --run "retro=CONVERTED,window=2,budget=0.15"

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use retro_run::{
    Device, Model, OpenOptions, Runtime,
    bench::{args::TokenCount, selector_state::StatePattern, synthetic_cache::decode_at},
    decoder::{decode_loop::Policy, session::Steps},
    model_spec::ModelSpec,
    runtime::{check_threads, find_plugin},
    tables::{Alignment, markdown},
};

#[derive(Parser)]
#[command(about = "Decoding speed at depth")]
struct Args {
    /// Policy: NAME=DIR[,window=W][,budget=B]; may be given several times. The first is the baseline.
    #[arg(long = "run", value_name = "NAME=DIR", required = true)]
    runs: Vec<ModelSpec>,
    /// Context depths in tokens, like 4096 or 128k.
    #[arg(long, value_delimiter = ',', default_value = "8k,32k,128k")]
    depth: Vec<TokenCount>,
    /// Steps per timed sample.
    #[arg(short, long, default_value_t = 32)]
    steps: usize,
    /// Untimed steps before them, once the window is full.
    #[arg(long, default_value_t = 8)]
    warm_up: usize,
    /// Samples per policy, interleaved; the median is reported.
    #[arg(short, long, default_value_t = 3)]
    repetitions: usize,
    #[arg(long, default_value = "cpu")]
    device: Device,
    #[arg(long)]
    cuda_graph: bool,
    #[arg(short, long)]
    threads: Option<usize>,
    #[arg(long)]
    plugin: Option<PathBuf>,
    #[arg(long)]
    ort: Option<PathBuf>,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

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
    ensure!(args.steps >= 1 && args.repetitions >= 1, "nothing to measure");
    check_threads(args.threads)?;
    let runtime = Runtime::load_for(args.device, args.ort.as_deref())?;
    let options = OpenOptions {
        threads: args.threads,
        plugin: find_plugin(args.plugin.as_deref())?,
        device: args.device,
        steps: if args.cuda_graph { Steps::Captured } else { Steps::Plain },
        ..Default::default()
    };
    // One session per folder: weights are large.
    let mut models: BTreeMap<&PathBuf, (Model, StatePattern)> = BTreeMap::new();
    for spec in &args.runs {
        if !models.contains_key(&spec.folder) {
            let model = Model::open(&runtime, &spec.folder, &options)?;
            eprintln!("{}: {}", spec.folder.display(), model.plugin_line());
            if let Some(line) = model.device_line() {
                eprintln!("{line}");
            }
            let pattern = StatePattern::of_model(&runtime, &options, &model)?;
            models.insert(&spec.folder, (model, pattern));
        }
    }
    let mut rows = Vec::new();
    for depth in &args.depth {
        let mut millis: Vec<Vec<f64>> = vec![Vec::new(); args.runs.len()];
        for _ in 0..args.repetitions {
            for (spec, millis) in args.runs.iter().zip(&mut millis) {
                let (model, pattern) = models.get_mut(&spec.folder).context("opened above")?;
                let policy =
                    Policy::new(model, spec.options.window, spec.options.budget).with_context(|| spec.name.clone())?;
                let time = decode_at(model, (depth.0, pattern.bytes()), policy, args.warm_up, args.steps)
                    .with_context(|| format!("{} at {}", spec.name, depth.0))?;
                millis.push(1e3 * time.as_secs_f64() / args.steps as f64);
            }
        }
        let mut first = None;
        for (spec, mut millis) in args.runs.iter().zip(millis) {
            millis.sort_by(f64::total_cmp);
            let (least, median, most) = (millis[0], millis[millis.len() / 2], millis[millis.len() - 1]);
            let reference = *first.get_or_insert(median);
            eprintln!("done: {} at {}", spec.name, depth.0);
            rows.push((spec.name.clone(), depth.0, median, least, most, reference / median));
        }
    }
    if args.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, depth, median, least, most, faster)| {
                serde_json::json!({"policy": name, "depth": depth, "milliseconds_per_token": median, "least": least, "most": most,
                    "tokens_per_second": 1e3 / median, "times_faster_than_first": faster})
            })
            .collect();
        println!(
            "{}",
            serde_json::json!({ "device": args.device.to_string(), "cuda_graph": args.cuda_graph, "rows": rows })
        );
        return Ok(());
    }
    let title = format!("faster than {}", args.runs[0].name);
    let titles = ["depth", "policy", "tokens/s", "ms/token", "min..max", &title];
    let mut lines = vec![titles.map(str::to_owned).to_vec()];
    for (name, depth, median, least, most, faster) in rows {
        lines.push(vec![
            depth.to_string(),
            name,
            format!("{:.1}", 1e3 / median),
            format!("{median:.3}"),
            format!("{least:.3}..{most:.3}"),
            format!("{faster:.2}"),
        ]);
    }
    print!("{}", markdown(&lines, Alignment::Right));
    Ok(())
}
