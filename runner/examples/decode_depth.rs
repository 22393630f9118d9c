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
    bench::{args::TokenCount, room::require_room, selector_state::StatePattern, synthetic_cache::DecodeAtDepth},
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
    /// Sequences that decode together, all of the same depth; tokens/s counts all of them.
    #[arg(short, long, default_value_t = 1)]
    batch: usize,
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

/// A model, opened once however many policies it is measured with: weights are large.
struct Opened {
    model: Model,
    pattern: StatePattern,
}

/// The time of a step of one policy at one depth.
struct Row<'a> {
    spec: &'a ModelSpec,
    depth: usize,
    /// Milliseconds a step: the median, the least and the most.
    millis: f64,
    least: f64,
    most: f64,
    /// Of the first policy over this one's.
    faster_than_first: f64,
    /// This one's over that of the same model and budget with w = 1, where that is measured too.
    times_one_token: Option<f64>,
}

fn run(args: &Args) -> Result<()> {
    ensure!(
        args.steps >= 1 && args.repetitions >= 1 && args.batch >= 1,
        "nothing to measure"
    );
    check_threads(args.threads)?;
    let runtime = Runtime::load_for(args.device, args.ort.as_deref())?;
    let options = OpenOptions {
        threads: args.threads,
        plugin: find_plugin(args.plugin.as_deref())?,
        device: args.device,
        steps: if args.cuda_graph { Steps::Captured } else { Steps::Plain },
        ..Default::default()
    };
    let mut models: BTreeMap<&PathBuf, Opened> = BTreeMap::new();
    for spec in &args.runs {
        if !models.contains_key(&spec.folder) {
            let model = Model::open(&runtime, &spec.folder, &options)?;
            eprintln!("{}: {}", spec.folder.display(), model.plugin_line());
            if let Some(line) = model.device_line() {
                eprintln!("{line}");
            }
            let pattern = StatePattern::of_model(&runtime, &options, &model)?;
            models.insert(&spec.folder, Opened { model, pattern });
        }
    }
    room(args, &models)?;
    let mut rows = Vec::new();
    for depth in &args.depth {
        rows.extend(measure(args, &mut models, depth.0)?);
    }
    if args.json {
        print_json(args, &rows);
    } else {
        print_table(args, &rows);
    }
    Ok(())
}

impl Args {
    fn at(&self, depth: usize) -> DecodeAtDepth {
        DecodeAtDepth {
            batch: self.batch,
            depth,
            warm_up: self.warm_up,
            steps: self.steps,
        }
    }
}

/// Checks that the caches fit, before anything is measured.
fn room(args: &Args, models: &BTreeMap<&PathBuf, Opened>) -> Result<()> {
    let mut largest = BTreeMap::new();
    for spec in &args.runs {
        let model = &models.get(&spec.folder).context("opened above")?.model;
        for depth in &args.depth {
            let window = model.window(spec.options.window)?;
            let capacity = args.at(depth.0).capacity(model, window)?;
            let bytes = model.state_bytes(args.batch, capacity).unwrap_or(usize::MAX);
            let most = largest.entry(&spec.folder).or_insert(0);
            *most = bytes.max(*most);
        }
    }
    // On a GPU each session keeps what it has allocated once.
    let needed = match args.device {
        Device::Cpu => largest.into_values().max(),
        Device::Cuda(_) => largest.into_values().reduce(usize::saturating_add),
    };
    let any = &models.values().next().context("a model")?.model;
    Ok(require_room(any, needed.unwrap_or(0))?)
}

/// Measures all policies at one depth, interleaved.
fn measure<'a>(args: &'a Args, models: &mut BTreeMap<&PathBuf, Opened>, depth: usize) -> Result<Vec<Row<'a>>> {
    let mut samples: Vec<Vec<f64>> = vec![Vec::new(); args.runs.len()];
    for _ in 0..args.repetitions {
        for (spec, samples) in args.runs.iter().zip(&mut samples) {
            let Opened { model, pattern } = models.get_mut(&spec.folder).context("opened above")?;
            let named = || format!("{} at {depth}", spec.name);
            let policy = Policy::new(model, spec.options.window, spec.options.budget).with_context(named)?;
            let time = args.at(depth).run(model, pattern.bytes(), policy).with_context(named)?;
            samples.push(1e3 * time.as_secs_f64() / args.steps as f64);
        }
    }
    let mut medians = Vec::new();
    for samples in &mut samples {
        samples.sort_by(f64::total_cmp);
        medians.push(samples[samples.len() / 2]);
    }
    let one_token = |spec: &ModelSpec| {
        let same = |other: &&ModelSpec| {
            let one = other.options.window == Some(1);
            one && other.folder == spec.folder && other.options.budget == spec.options.budget
        };
        args.runs.iter().position(|other| same(&other))
    };
    let row = |((spec, samples), &millis): ((&'a ModelSpec, &Vec<f64>), &f64)| {
        eprintln!("done: {} at {depth}", spec.name);
        Row {
            spec,
            depth,
            millis,
            least: samples[0],
            most: samples[samples.len() - 1],
            faster_than_first: medians[0] / millis,
            times_one_token: one_token(spec).map(|at| millis / medians[at]),
        }
    };
    Ok(args.runs.iter().zip(&samples).zip(&medians).map(row).collect())
}

fn print_json(args: &Args, rows: &[Row<'_>]) {
    let row = |row: &Row<'_>| {
        serde_json::json!({
            "policy": row.spec.name, "depth": row.depth, "batch": args.batch, "milliseconds_per_step": row.millis,
            "milliseconds_per_token": row.millis / args.batch as f64,
            "least": row.least, "most": row.most, "tokens_per_second": 1e3 * args.batch as f64 / row.millis,
            "times_faster_than_first": row.faster_than_first, "times_one_token": row.times_one_token,
        })
    };
    let rows: Vec<_> = rows.iter().map(row).collect();
    println!(
        "{}",
        serde_json::json!({ "device": args.device.to_string(), "cuda_graph": args.cuda_graph, "rows": rows })
    );
}

fn print_table(args: &Args, rows: &[Row<'_>]) {
    let title = format!("faster than {}", args.runs[0].name);
    let titles = [
        "depth",
        "batch",
        "policy",
        "tokens/s",
        "ms/step",
        "min..max",
        &title,
        "time over w = 1",
    ];
    let mut lines = vec![titles.map(str::to_owned).to_vec()];
    for row in rows {
        lines.push(vec![
            row.depth.to_string(),
            args.batch.to_string(),
            row.spec.name.clone(),
            format!("{:.1}", 1e3 * args.batch as f64 / row.millis),
            format!("{:.3}", row.millis),
            format!("{:.3}..{:.3}", row.least, row.most),
            format!("{:.2}", row.faster_than_first),
            row.times_one_token.map_or_else(String::new, |x| format!("{x:.3}")),
        ]);
    }
    print!("{}", markdown(&lines, Alignment::Right));
}
