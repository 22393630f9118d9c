//! `retro-run bench-op`: the operator alone against ONNX Runtime's GroupQueryAttention.

use anyhow::{Result, ensure};
use clap::Args;
use retro_contract::{Budget, Mode, limits};
use retro_models::Dtype;
use serde_json::Value;

use super::{args::LibraryArgs, output::print};
use crate::{
    Device, Interrupt, Interrupted, OpenOptions, Runtime,
    bench::{
        Samples,
        args::PageSelection,
        memory::MemoryProbe,
        op::{
            data::{Caches, Rows},
            node::Node,
            operator::{AttentionShape, Operator, RetroVariant},
        },
        table::{Cell, Column, Format, Table},
    },
    decoder::session::BetweenRuns,
    interrupt::Signals,
    progress::{self, note},
    runtime,
};

#[derive(Args)]
pub struct BenchOpArgs {
    /// Context lengths: tokens in the cache.
    #[arg(
        short,
        long,
        value_delimiter = ',',
        default_value = "1024,8192,32768",
        value_name = "LIST"
    )]
    context: Vec<usize>,
    /// Budgets: what a step reads of the cache, as shares (0.15) or in tokens (2048); 1.0 is everything.
    #[arg(short, long, value_delimiter = ',', default_value = "0.15", value_name = "LIST")]
    budget: Vec<Budget>,
    /// Windows: tokens fed per step.
    #[arg(short, long, value_delimiter = ',', default_value = "1,2,8", value_name = "LIST")]
    window: Vec<usize>,
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "retro",
        value_name = "LIST",
        help = format!("Modes: {}", Mode::VALUES.join(", "))
    )]
    mode: Vec<Mode>,
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "bounds+max",
        value_name = "LIST",
        help = PageSelection::help()
    )]
    select: Vec<PageSelection>,
    /// Data types: f32, f16.
    #[arg(long, value_delimiter = ',', default_value = "f32", value_name = "LIST")]
    dtype: Vec<Dtype>,
    /// Threads of ONNX Runtime's pool [default: one per core].
    #[arg(short, long, value_delimiter = ',', value_name = "LIST")]
    threads: Vec<usize>,
    /// Query heads.
    #[arg(long, default_value_t = 32, value_name = "N")]
    heads: usize,
    /// KV heads; must divide the query heads.
    #[arg(long, default_value_t = 8, value_name = "N")]
    kv_heads: usize,
    /// Elements per head.
    #[arg(long, default_value_t = 128, value_name = "N")]
    head_size: usize,
    /// Tokens per page, a power of two.
    #[arg(long, default_value_t = limits::PAGE_SIZE, value_name = "TOKENS")]
    page_size: usize,
    /// Bits of an element of a sketch, 1 or 2.
    #[arg(long, default_value_t = limits::SKETCH_BITS, value_name = "N")]
    sketch_bits: usize,
    /// Nodes per session, each with its own caches; 0: enough for 128 MiB of caches, at most 16.
    #[arg(long, default_value_t = 0, value_name = "N")]
    nodes: usize,
    /// Change of the query from token to token: 0 none, 1 another random query. It sets how many of a step's pages are
    /// new to the retrospective tokens (column exposure).
    #[arg(long, default_value_t = 0.15, value_name = "X")]
    drift: f32,
    /// Timed steps. Two more, and those that fill the window, run before them untimed.
    #[arg(short, long, default_value_t = 10, value_name = "N")]
    repetitions: usize,
    /// Output format.
    #[arg(short, long, default_value = "md", value_name = "FORMAT")]
    output: Format,
    #[command(flatten)]
    libraries: LibraryArgs,
}

/// Default size of the caches of all nodes of a session, in bytes.
const CACHES: usize = 128 << 20;
const WARM_UP: usize = 2;

impl BenchOpArgs {
    /// GroupQueryAttention and every combination of the options that differs from the others.
    fn operators(&self) -> Vec<Operator> {
        let mut list = vec![Operator::Gqa];
        for &mode in &self.mode {
            for &budget in &self.budget {
                for &selection in &self.select {
                    for &window in &self.window {
                        // Settings that a mode ignores get one value, so that the same operator is timed once.
                        let budget = if mode == Mode::Dense {
                            Budget::Ratio(1.0)
                        } else {
                            budget
                        };
                        let selection = if mode == Mode::Retro {
                            selection
                        } else {
                            PageSelection::default()
                        };
                        let operator = Operator::Retro(RetroVariant {
                            window,
                            budget,
                            mode,
                            selection,
                        });
                        if !list.contains(&operator) {
                            list.push(operator);
                        }
                    }
                }
            }
        }
        list
    }

    fn check(&self) -> Result<()> {
        ensure!(self.repetitions >= 1, "-r 0: ask for at least one repetition");
        for &n in &self.context {
            ensure!((1..=1 << 24).contains(&n), "-c {n}: expected 1 to 16777216 tokens");
        }
        for &w in &self.window {
            ensure!(
                (1..=limits::WINDOW_MAX).contains(&w),
                "--window {w}: expected 1 to {}",
                limits::WINDOW_MAX
            );
        }
        ensure!(
            self.kv_heads >= 1 && self.heads >= 1 && self.heads.is_multiple_of(self.kv_heads),
            "--heads {} is not a multiple of --kv-heads {}",
            self.heads,
            self.kv_heads
        );
        ensure!(self.head_size >= 1, "--head-size 0: a head has at least one element");
        ensure!(
            (1..=limits::SKETCH_BITS_MAX).contains(&self.sketch_bits),
            "--sketch-bits {}: expected 1 to {}",
            self.sketch_bits,
            limits::SKETCH_BITS_MAX
        );
        for selector in self.select.iter().map(|s| s.selector) {
            let sizes = selector.page_sizes();
            ensure!(
                self.page_size.is_power_of_two() && sizes.contains(&self.page_size),
                "--page-size {}: expected a power of two in {}..{} with the selector {selector}",
                self.page_size,
                sizes.start(),
                sizes.end()
            );
        }
        ensure!(
            (0.0..=1.0).contains(&self.drift),
            "--drift {}: expected 0 to 1",
            self.drift
        );
        self.threads
            .iter()
            .try_for_each(|&t| Ok(runtime::check_threads(Some(t))?))
    }
}

const COLUMNS: [Column; 16] = [
    column("dtype", "dtype"),
    column("context", "context"),
    column("threads", "threads"),
    column("operator", "operator"),
    column("budget", "budget"),
    column("window", "w"),
    column("select", "selection"),
    column("exposure", "exposure"),
    column("us", "us a node"),
    column("us_deviation", ""),
    column("us_best", "best"),
    column("mbytes", "MB"),
    column("gbytes_per_second", "GB/s"),
    column("share_of_bandwidth", "% of memory's"),
    column("gqa_ratio", "x GQA"),
    column("gqa_ratio_of_best", "best"),
];

const fn column(key: &'static str, heading: &'static str) -> Column {
    Column { key, heading }
}

/// Runs the command.
///
/// # Errors
/// When an option cannot be used, ONNX Runtime fails, or an operator's output is wrong.
pub fn bench_op(args: &BenchOpArgs, signals: &Signals) -> Result<()> {
    args.check()?;
    let (runtime, open) = args.libraries.load(Device::default())?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if args.threads.is_empty() {
        vec![cores]
    } else {
        args.threads.clone()
    };
    let mut table = Table::new(&COLUMNS);
    let mut ceilings = Vec::new();
    let interrupt = signals.listen();
    let mut measure_all = || -> Result<()> {
        for &dtype in &args.dtype {
            for &context in &args.context {
                for &threads in &threads {
                    let case = Case {
                        dtype,
                        context,
                        threads,
                    };
                    let bandwidth = measure(args, &runtime, &open, case, &mut table, &interrupt)?;
                    ceilings.push((threads, bandwidth));
                }
            }
        }
        Ok(())
    };
    let measured = measure_all();
    // Rows measured before an interruption are printed; after a failure they are not.
    if measured.as_ref().is_err_and(|e| !e.is::<Interrupted>()) {
        return measured;
    }
    let mut facts = vec![
        ("heads", Value::from(args.heads)),
        ("kv_heads", args.kv_heads.into()),
        ("head_size", args.head_size.into()),
        ("page_size", args.page_size.into()),
        ("sketch_bits", args.sketch_bits.into()),
        ("drift", args.drift.into()),
        ("repetitions", args.repetitions.into()),
    ];
    let ceiling: Vec<Value> = ceilings
        .iter()
        .map(|&(threads, b)| serde_json::json!({"threads": threads, "read_gbytes_per_second": b / 1e9}))
        .collect();
    facts.push(("memory", ceiling.into()));
    print(&table.print(args.output, &facts)?)?;
    measured
}

/// What a group of rows has in common.
#[derive(Clone, Copy)]
struct Case {
    dtype: Dtype,
    context: usize,
    threads: usize,
}

/// Measures the rows of one case; returns the machine's read bandwidth in bytes per second.
fn measure(
    args: &BenchOpArgs,
    runtime: &Runtime,
    open: &OpenOptions,
    case: Case,
    table: &mut Table,
    interrupt: &Interrupt,
) -> Result<f64> {
    let Case {
        dtype,
        context,
        threads,
    } = case;
    let shape = AttentionShape {
        heads: args.heads,
        kv_heads: args.kv_heads,
        head_size: args.head_size,
        page_size: args.page_size,
        dtype,
        sketch_bits: args.sketch_bits,
    };
    let operators = args.operators();
    let fill = operators.iter().map(Operator::window).max().unwrap_or(1) - 1;
    let before = fill + WARM_UP;
    let steps = before + args.repetitions;
    let nodes = match args.nodes {
        0 => CACHES.div_ceil(context * shape.token_bytes()).clamp(1, 16),
        n => n,
    };
    let options = OpenOptions {
        threads: Some(threads),
        between_runs: BetweenRuns::Sleep,
        ..open.clone()
    };
    let rows = Rows::new(&shape, steps, args.drift);
    let mut caches = Caches::new(&shape, nodes, context, steps)?;
    let mut measured = operators
        .iter()
        .map(|&operator| Node::new(runtime, &options, &shape, operator, &mut caches))
        .collect::<Result<Vec<_>, _>>()?;

    let memory = MemoryProbe::new(threads);
    memory.pass();
    let mut bandwidth: f64 = 0.0;
    let mut samples = vec![Samples::default(); measured.len()];
    let bar = progress::bar(steps, &format!("{dtype:?} {context}"), true);
    for step in 0..steps {
        interrupt.check()?;
        if step >= before {
            bandwidth = bandwidth.max(memory.pass());
        }
        // Interleaved, so that a slow moment of the machine meets all of them.
        for (node, samples) in measured.iter_mut().zip(&mut samples) {
            memory.flush();
            let seconds = node.step(&rows, context + step)?;
            if step >= before {
                samples.0.push(seconds);
            }
        }
        check_dense(&measured, context + step + 1, dtype)?;
        bar.inc(1);
    }
    bar.finish_and_clear();

    let gqa = samples.first().cloned().unwrap_or_default();
    let len = context + before + args.repetitions.div_ceil(2);
    for (node, samples) in measured.iter().zip(&samples) {
        let bytes = node.operator.bytes(&shape, len, node.pages());
        table.push(row(case, node, samples, &gqa, bytes, bandwidth));
    }
    note(&format!(
        "{context} tokens, {threads} threads: {nodes} nodes of Hq {}, Hkv {}, D {}; memory reads {:.1} GB/s",
        shape.heads,
        shape.kv_heads,
        shape.head_size,
        bandwidth / 1e9
    ));
    Ok(bandwidth)
}

/// The row of an operator: `bytes` moved per step, against `gqa`'s samples and the machine's bandwidth.
fn row(case: Case, node: &Node, samples: &Samples, gqa: &Samples, bytes: f64, bandwidth: f64) -> Vec<Cell> {
    let ratios = Samples(gqa.0.iter().zip(&samples.0).map(|(g, s)| g / s).collect());
    // Best step against best pass over memory: other load on the machine shall not count.
    let rate = bytes / samples.best();
    let (budget, selection) = match node.operator {
        Operator::Gqa => (String::new(), String::new()),
        Operator::Retro(r) if r.mode == Mode::Retro => (r.budget.to_string(), r.selection.to_string()),
        Operator::Retro(r) => (r.budget.to_string(), String::new()),
    };
    let sparse = node.operator != Operator::Gqa;
    vec![
        Cell::text(if case.dtype == Dtype::F32 { "f32" } else { "f16" }),
        Cell::count(case.context),
        Cell::count(case.threads),
        Cell::text(node.operator.to_string()),
        Cell::text(budget),
        Cell::count(node.operator.window()),
        Cell::text(selection),
        Cell::maybe(node.exposure(), 2),
        Cell::number(samples.mean() * 1e6, 0),
        Cell::number(samples.deviation() * 1e6, 0),
        Cell::number(samples.best() * 1e6, 0),
        Cell::number(bytes / 1e6, 1),
        Cell::number(rate / 1e9, 1),
        Cell::number(100.0 * rate / bandwidth, 0),
        Cell::maybe(sparse.then(|| ratios.median()), 2),
        Cell::maybe(sparse.then(|| gqa.best() / samples.best()), 2),
    ]
}

/// Fails if an operator computes something else: where the newest token attends to every page, its output must be that
/// of GroupQueryAttention.
fn check_dense(measured: &[Node], len: usize, dtype: Dtype) -> Result<()> {
    let tolerance = if dtype == Dtype::F32 { 1e-4 } else { 1e-2 };
    let Some((gqa, others)) = measured.split_first() else {
        return Ok(());
    };
    for node in others.iter().filter(|n| n.is_dense(len)) {
        let worst = gqa
            .newest
            .iter()
            .zip(&node.newest)
            .fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
        ensure!(
            worst <= tolerance,
            "{:?} differs from GroupQueryAttention by {worst}: nothing was measured",
            node.operator
        );
    }
    Ok(())
}
