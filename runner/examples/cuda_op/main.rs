//! Times RetroAttention nodes against ONNX Runtime's GroupQueryAttention nodes on the same caches: N nodes in one session each,
//! all tensors on the device, all variants by turns in one process.
//!
//!     cargo run --release -p retro-run --example cuda_op -- --context 32k,128k --budget 0.15,2048 --window 1,2,8
//!
//! Each run is a decoding step one token further, with another query: a counter in the graph picks it, so that nothing
//! waits for the host. Counting costs every variant the same three small kernels a run (`--overhead` times them alone).

mod fill;
mod graph;
mod table;

use std::{path::PathBuf, process::ExitCode, str::FromStr, sync::Arc, time::Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Parser, ValueEnum};
use graph::{Feeding, Kind, Shape, of_layer};
use ort::{
    session::{NoSelectedOutputs, RunOptions, Session},
    value::TensorElementType,
};
use retro_contract::{Budget, GroupScore, Mode, Selector, limits, pages_for, ring_slots};
use retro_export::onnx::DataType;
use retro_run::{
    Device, Runtime,
    arena::{ALIGNMENT, Arena, Bindings, View},
    device::left_to_cpu,
    gpu::Gpu,
    runtime,
};
use table::Row;

#[derive(Parser)]
#[command(about = "Times RetroAttention against GroupQueryAttention")]
struct Args {
    /// cuda, cuda:N or cpu.
    #[arg(long, default_value = "cuda")]
    device: Device,
    /// Valid tokens, like 4096 or 128k.
    #[arg(long, value_delimiter = ',', default_value = "1k,8k,32k,128k")]
    context: Vec<Tokens>,
    #[arg(long, value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// Shares of the context like 0.15, or tokens like 2048.
    #[arg(long, value_delimiter = ',', default_value = "0.15,2048")]
    budget: Vec<Budget>,
    /// Tokens fed a step.
    #[arg(long, value_delimiter = ',', default_value = "1,2,8")]
    window: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "retro")]
    mode: Vec<Mode>,
    /// Page selections, like bounds+max or moments+softmax.
    #[arg(long, value_delimiter = ',', default_value = "bounds+max")]
    select: Vec<Selection>,
    /// Under a CUDA graph: off, on or both.
    #[arg(long, default_value = "off")]
    cuda_graph: When,
    /// Tokens fed to GroupQueryAttention; it is what others are compared with at 1.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    gqa_tokens: Vec<usize>,
    /// Instead of steps: prompts of so many tokens, fed to an empty cache.
    #[arg(long, value_delimiter = ',')]
    prefill: Vec<Tokens>,
    /// Page summaries: random numbers like those of random keys, or computed from the cache by a prefill.
    #[arg(long, default_value = "random")]
    summaries: Summaries,
    #[arg(long, default_value_t = 16)]
    layers: usize,
    #[arg(long, default_value_t = 32)]
    heads: usize,
    #[arg(long, default_value_t = 8)]
    kv_heads: usize,
    #[arg(long, default_value_t = 128)]
    head_size: usize,
    #[arg(long, default_value_t = limits::PAGE_SIZE)]
    page_size: usize,
    #[arg(long, default_value = "f16")]
    dtype: Dtype,
    /// RoPE inside the nodes.
    #[arg(long)]
    rotary: bool,
    /// Wait for the device after every run, as a host does that looks at its output.
    #[arg(long)]
    sync: bool,
    /// Also the graph without attention nodes.
    #[arg(long)]
    overhead: bool,
    /// Runs that are timed together.
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Times that all variants are run, by turns; the median counts.
    #[arg(short, long, default_value_t = 7)]
    repetitions: usize,
    #[arg(short, long, default_value = "md")]
    output: Format,
    #[arg(long)]
    plugin: Option<PathBuf>,
    #[arg(long)]
    ort: Option<PathBuf>,
}

#[derive(Clone, Copy)]
struct Tokens(usize);

impl FromStr for Tokens {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (digits, unit) = s.strip_suffix(['k', 'K']).map_or((s, 1), |d| (d, 1024));
        match digits.parse::<usize>().ok().and_then(|n| n.checked_mul(unit)) {
            Some(n @ 1..=0x100_0000) => Ok(Self(n)),
            _ => Err(format!("{s:?}: expected a number of tokens like 4096 or 128k")),
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
struct Selection(Selector, GroupScore);

impl FromStr for Selection {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (selector, score) = s.split_once('+').ok_or("expected SELECTOR+SCORE like bounds+max")?;
        let selector = selector.parse().map_err(|e| format!("{e}"))?;
        Ok(Self(selector, score.parse().map_err(|e| format!("{e}"))?))
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum When {
    Off,
    On,
    Both,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Summaries {
    Random,
    Prefill,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    Md,
    Json,
    Csv,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    fn onnx(self) -> DataType {
        match self {
            Self::F32 => DataType::Float,
            Self::F16 => DataType::Float16,
            Self::Bf16 => DataType::Bfloat16,
        }
    }

    fn element(self) -> TensorElementType {
        match self {
            Self::F32 => TensorElementType::Float32,
            Self::F16 => TensorElementType::Float16,
            Self::Bf16 => TensorElementType::Bfloat16,
        }
    }
}

/// Room behind the context for the steps that are timed.
const ROOM: usize = 256;
/// Runs before the timed ones; a CUDA graph is captured in the first.
const WARM_UP: usize = 3;
/// Left to ONNX Runtime's own buffers.
const RESERVE: usize = 6 << 30;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", format!("{e:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

/// What all variants need.
struct Host<'a> {
    args: &'a Args,
    runtime: Runtime,
    plugin: PathBuf,
    gpu: Option<Arc<Gpu>>,
    shape: Shape,
}

impl Host<'_> {
    fn session(&self, kind: Kind, feeding: Feeding, layers: usize, cuda_graph: bool) -> Result<Session> {
        let shape = Shape {
            layers,
            rotary: self.shape.rotary && layers > 0,
            ..self.shape
        };
        let model = graph::model(kind, feeding, &shape);
        let text = |e: &dyn std::fmt::Display| anyhow!("{e}");
        let builder = Session::builder(self.runtime.environment()).map_err(|e| text(&e))?;
        let builder = self.args.device.provide(builder, cuda_graph).map_err(|e| text(&e))?;
        let mut builder = builder.with_operator_library(&self.plugin).map_err(|e| text(&e))?;
        let session = builder.commit_from_memory(&model).map_err(|e| text(&e))?;
        if self.gpu.is_some()
            && let Some(left) = left_to_cpu(&session)?
        {
            return Err(anyhow!("{left}"));
        }
        Ok(session)
    }

    fn synchronize(&self) -> Result<()> {
        self.gpu.as_ref().map_or(Ok(()), |gpu| gpu.synchronize())
    }
}

fn run(args: &Args) -> Result<()> {
    ensure!(args.runs + WARM_UP + 8 < ROOM, "--runs: at most {}", ROOM - WARM_UP - 9);
    ensure!(
        args.runs >= 1 && args.repetitions >= 1 && args.layers >= 1,
        "nothing to measure"
    );
    ensure!(args.window.iter().all(|&w| (1..=64).contains(&w)), "--window: 1 to 64");
    let runtime = Runtime::load_for(args.device, args.ort.as_deref())?;
    let plugin = runtime::find_plugin(args.plugin.as_deref())?
        .context("no plugin: build it with `cargo build --release`, or name it with --plugin")?;
    let gpu = args.device.gpu()?;
    let shape = Shape {
        layers: args.layers,
        heads: args.heads,
        kv_heads: args.kv_heads,
        size: args.head_size,
        page: args.page_size,
        rotary: args.rotary,
        dtype: args.dtype.onnx(),
    };
    let host = Host {
        args,
        runtime,
        plugin,
        gpu,
        shape,
    };
    let mut groups: Vec<(usize, usize)> = if args.prefill.is_empty() {
        args.context
            .iter()
            .flat_map(|c| args.batch.iter().map(|&b| (c.0, b)))
            .collect()
    } else {
        args.prefill.iter().map(|s| (s.0, 1)).collect()
    };
    let free = host.gpu.as_ref().map_or(Ok(usize::MAX), |gpu| gpu.free_memory())?;
    groups.retain(|&(context, batch)| {
        let need = Plan::new(&host, context, batch).bytes + RESERVE;
        let fits = need <= free;
        if !fits {
            eprintln!(
                "left out: context {context}, batch {batch} needs {:.1} GB, {:.1} GB are free",
                need as f64 / 1e9,
                free as f64 / 1e9
            );
        }
        fits
    });
    let most = groups
        .iter()
        .map(|&(c, b)| Plan::new(&host, c, b).bytes)
        .max()
        .context("nothing fits")?;
    let arena = Arena::new(host.gpu.as_ref(), most)?;
    let bandwidth = copy_bandwidth(&host, &arena)?;
    let about = about(&host, bandwidth)?;
    eprintln!("{}", about["text"].as_str().unwrap_or_default());
    fill::normals(&arena, 0, most, shape.dtype)?;

    let mut bench = Bench::new(&host)?;
    let mut rows = Vec::new();
    for (context, batch) in groups {
        rows.extend(bench.group(&arena, context, batch, bandwidth)?);
        eprintln!("done: context {context}, batch {batch}");
    }
    let text = match args.output {
        Format::Md => format!(
            "{}\n\n{}",
            about["text"].as_str().unwrap_or_default(),
            table::markdown(&rows)
        ),
        Format::Json => table::json(&rows, &about),
        Format::Csv => table::csv(&rows),
    };
    print!("{text}");
    Ok(())
}

fn about(host: &Host<'_>, bandwidth: f64) -> Result<serde_json::Value> {
    let device = match &host.gpu {
        Some(gpu) => gpu.describe()?.0,
        None => "CPU".to_owned(),
    };
    let s = &host.shape;
    let text = format!(
        "{device}; {} nodes, {} / {} heads of {}, {:?}, pages of {}; a copy moves {:.0} GB/s (read and written)",
        s.layers,
        s.heads,
        s.kv_heads,
        s.size,
        s.dtype,
        s.page,
        bandwidth / 1e9
    );
    Ok(serde_json::json!({ "device": device, "copy_bytes_per_second": bandwidth, "text": text }))
}

/// Bytes read and written a second by a copy inside the block.
fn copy_bandwidth(host: &Host<'_>, arena: &Arena) -> Result<f64> {
    let bytes = (arena.bytes() / 2).min(2 << 30);
    let mut best = f64::INFINITY;
    for _ in 0..6 {
        host.synchronize()?;
        let start = Instant::now();
        arena.copy(bytes, 0, bytes)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * bytes as f64 / best)
}

/// Where the buffers of a context and batch lie.
struct Plan {
    capacity: usize,
    pages: usize,
    /// Keys and values of each layer.
    caches: Vec<[usize; 2]>,
    /// Of each layer: summaries, page steps, output cache, log-sum-exps.
    state: Vec<[usize; 4]>,
    bank: usize,
    output: usize,
    rotary: [usize; 2],
    budget: usize,
    lengths: usize,
    bytes: usize,
}

impl Plan {
    fn new(host: &Host<'_>, context: usize, batch: usize) -> Self {
        let (s, args) = (&host.shape, host.args);
        let element = fill::bytes_of(s.dtype);
        let capacity = context + ROOM;
        let pages = pages_for(capacity, s.page);
        let ring = ring_slots(args.window.iter().copied().max().unwrap_or(1));
        let most = args.window.iter().chain(&args.gqa_tokens).copied().max().unwrap_or(1);
        let prompt = if args.prefill.is_empty() { 0 } else { context };
        let chunk = if args.summaries == Summaries::Prefill { CHUNK } else { 0 };
        let mut next = 0usize;
        let mut take = |bytes: usize| {
            let at = next;
            next = (next + bytes).next_multiple_of(ALIGNMENT);
            at
        };
        let cache = batch * s.kv_heads * capacity * s.size * element;
        let caches = (0..s.layers).map(|_| [take(cache), take(cache)]).collect();
        let bank = take((graph::BANK * most).max(prompt).max(batch * chunk) * s.packed() * element);
        let output = take((batch * most).max(prompt).max(batch * chunk) * s.heads * s.size * element);
        let rotary = [(); 2].map(|()| take(capacity * s.size / 2 * element));
        let state = (0..s.layers)
            .map(|_| {
                [
                    take(batch * s.kv_heads * pages * 2 * s.size * element),
                    take(batch * s.kv_heads * pages * 4),
                    take(batch * ring * s.heads * s.size * 4),
                    take(batch * ring * s.heads * 4),
                ]
            })
            .collect();
        let (budget, lengths) = (take(batch * 4), take(batch * 4));
        Self {
            capacity,
            pages,
            caches,
            state,
            bank,
            output,
            rotary,
            budget,
            lengths,
            bytes: next,
        }
    }
}

/// Tokens of a chunk of the prefill that computes summaries.
const CHUNK: usize = 2048;

/// A session that is measured.
struct Variant {
    kind: Kind,
    cuda_graph: bool,
    session: Session,
}

/// One line of the table in the making.
struct Entry<'a> {
    variant: &'a Variant,
    tokens: usize,
    budget: Option<Budget>,
    bindings: Bindings,
    options: RunOptions<NoSelectedOutputs>,
    micros: Vec<f64>,
    /// Host and device tensors that only this entry has.
    _own: Vec<View>,
}

struct Bench<'a> {
    host: &'a Host<'a>,
    variants: Vec<Variant>,
    /// Computes summaries.
    filling: Vec<(Selector, Session)>,
    graphs_used: usize,
}

fn retro(mode: Mode, selection: Selection, window: usize) -> Kind {
    Kind::Retro {
        mode,
        selector: selection.0,
        group_score: selection.1,
        window,
    }
}

impl<'a> Bench<'a> {
    fn new(host: &'a Host<'a>) -> Result<Self> {
        let args = host.args;
        let feeding = if args.prefill.is_empty() {
            Feeding::Steps
        } else {
            Feeding::Direct
        };
        let mut kinds = Vec::new();
        // GroupQueryAttention has no float32 on CUDA.
        if args.dtype != Dtype::F32 || host.gpu.is_none() {
            kinds.push(Kind::Gqa);
        }
        for &mode in &args.mode {
            for &selection in &args.select {
                if mode == Mode::Retro || selection == args.select[0] {
                    kinds.extend(args.window.iter().map(|&window| retro(mode, selection, window)));
                }
            }
        }
        let graphs: &[bool] = match args.cuda_graph {
            _ if feeding == Feeding::Direct => &[false],
            When::Off => &[false],
            When::On => &[true],
            When::Both => &[false, true],
        };
        ensure!(
            host.gpu.is_some() || graphs == [false],
            "--cuda-graph: the device is not a GPU"
        );
        let mut variants = Vec::new();
        for &cuda_graph in graphs {
            for &kind in &kinds {
                let session = host
                    .session(kind, feeding, args.layers, cuda_graph)
                    .with_context(|| format!("no session for {kind:?}"))?;
                variants.push(Variant {
                    kind,
                    cuda_graph,
                    session,
                });
            }
        }
        let mut filling = Vec::new();
        if args.summaries == Summaries::Prefill && feeding == Feeding::Steps {
            for selection in &args.select {
                if filling.iter().all(|(s, _)| *s != selection.0) {
                    let kind = retro(Mode::Retro, *selection, args.window.iter().copied().max().unwrap_or(1));
                    filling.push((selection.0, host.session(kind, Feeding::Direct, args.layers, false)?));
                }
            }
        }
        Ok(Self {
            host,
            variants,
            filling,
            graphs_used: 0,
        })
    }

    fn group(&mut self, arena: &Arena, context: usize, batch: usize, bandwidth: f64) -> Result<Vec<Row>> {
        let host = self.host;
        let args = host.args;
        let plan = Plan::new(host, context, batch);
        // An earlier group may have had other things here: queries, keys and values fed, and RoPE's angles.
        fill::normals(arena, plan.bank, plan.output - plan.bank, host.shape.dtype)?;
        fill::normals(
            arena,
            plan.rotary[0],
            plan.state[0][0] - plan.rotary[0],
            host.shape.dtype,
        )?;
        for state in &plan.state {
            arena.fill(state[2], state[3] - state[2], 0)?;
        }
        let mut rows = Vec::new();
        let mut selectors: Vec<Selector> = args.select.iter().map(|s| s.0).collect();
        selectors.dedup();
        let prompt = !args.prefill.is_empty();
        // All variants by turns; summaries are of one kind at a time, so variants of another selector take turns of their own,
        // with GroupQueryAttention again among them.
        for selector in selectors {
            if !prompt {
                self.fill_summaries(arena, &plan, context, batch, selector)?;
            }
            let mut entries = Vec::new();
            for variant in &self.variants {
                if matches!(variant.kind, Kind::Retro { selector: s, .. } if s != selector) {
                    continue;
                }
                for (tokens, budget) in lines(args, variant.kind, context, prompt, batch) {
                    self.graphs_used += usize::from(variant.cuda_graph);
                    entries.push(entry(
                        host,
                        arena,
                        &plan,
                        context,
                        batch,
                        variant,
                        tokens,
                        budget,
                        self.graphs_used,
                    )?);
                }
            }
            for _ in 0..args.repetitions {
                for entry in &mut entries {
                    let micros = time(host, arena, &plan, context, batch, entry, prompt)?;
                    entry.micros.push(micros);
                }
            }
            rows.extend(table_rows(host, &entries, context, batch, bandwidth, prompt));
        }
        if args.overhead && !prompt {
            rows.push(overhead(host, arena, &plan, context, batch)?);
        }
        Ok(rows)
    }

    fn fill_summaries(
        &self,
        arena: &Arena,
        plan: &Plan,
        context: usize,
        batch: usize,
        selector: Selector,
    ) -> Result<()> {
        let host = self.host;
        if let Some((_, session)) = self.filling.iter().find(|(s, _)| *s == selector) {
            return prefill_summaries(host, arena, plan, session, context, batch);
        }
        for state in &plan.state {
            fill::summaries(
                arena,
                state[0],
                state[1] - state[0],
                host.shape.dtype,
                selector,
                host.shape.size,
            )?;
        }
        Ok(())
    }
}

/// Which lines a kind has in the table: tokens fed, budget.
fn lines(args: &Args, kind: Kind, context: usize, prompt: bool, batch: usize) -> Vec<(usize, Option<Budget>)> {
    match kind {
        _ if prompt => vec![(context, None)],
        // ONNX Runtime's node takes several tokens after a past for one sequence only.
        Kind::Gqa => args
            .gqa_tokens
            .iter()
            .filter(|&&t| t == 1 || batch == 1)
            .map(|&t| (t, None))
            .collect(),
        Kind::Retro {
            mode: Mode::Dense,
            window,
            ..
        } => vec![(window, None)],
        Kind::Retro { window, .. } => args.budget.iter().map(|&b| (window, Some(b))).collect(),
    }
}

fn pages_of(budget: Option<Budget>, context: usize, page: usize) -> usize {
    budget.map_or(pages_for(context, page), |b| {
        b.pages(limits::BUDGET_MIN_PAGES, context, page)
    })
}

fn host_ints(values: &[i32]) -> Result<View> {
    let arena = Arena::new(None, 4 * values.len())?;
    let view = arena.tensor(0, TensorElementType::Int32, &[values.len()])?;
    view.write(0, &ints(values))?;
    Ok(view)
}

fn ints(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Binds caches and state, all in place.
fn bind_state(
    host: &Host<'_>,
    arena: &Arena,
    plan: &Plan,
    batch: usize,
    kind: Kind,
    bindings: &mut Bindings,
) -> Result<()> {
    let (s, element) = (&host.shape, host.args.dtype.element());
    for (layer, (caches, state)) in plan.caches.iter().zip(&plan.state).enumerate() {
        for (names, &offset) in [("past_key", "present_key"), ("past_value", "present_value")]
            .iter()
            .zip(caches)
        {
            let view = arena.tensor(offset, element, &[batch, s.kv_heads, plan.capacity, s.size])?;
            bindings.in_place(&of_layer(names.0, layer), &of_layer(names.1, layer), &view)?;
        }
        if let Kind::Retro { window, .. } = kind {
            let ring = ring_slots(window);
            let tensors: [(TensorElementType, Vec<usize>); 4] = [
                (element, vec![batch, s.kv_heads, plan.pages, 2, s.size]),
                (TensorElementType::Int32, vec![batch, s.kv_heads, plan.pages]),
                (TensorElementType::Float32, vec![batch, ring, s.heads, s.size]),
                (TensorElementType::Float32, vec![batch, ring, s.heads]),
            ];
            for ((names, (element, shape)), &offset) in graph::STATE.iter().zip(&tensors).zip(state) {
                let view = arena.tensor(offset, *element, shape)?;
                bindings.in_place(&of_layer(names.0, layer), &of_layer(names.1, layer), &view)?;
            }
        }
    }
    if s.rotary {
        for (name, &offset) in ["cos", "sin"].iter().zip(&plan.rotary) {
            bindings.input(name, &arena.tensor(offset, element, &[plan.capacity, s.size / 2])?)?;
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the parts of one line, used once")]
fn entry<'v>(
    host: &Host<'_>,
    arena: &Arena,
    plan: &Plan,
    context: usize,
    batch: usize,
    variant: &'v Variant,
    tokens: usize,
    budget: Option<Budget>,
    graph_id: usize,
) -> Result<Entry<'v>> {
    let (s, element) = (&host.shape, host.args.dtype.element());
    let prompt = !host.args.prefill.is_empty();
    let mut bindings = Bindings::new(&variant.session)?;
    bind_state(host, arena, plan, batch, variant.kind, &mut bindings)?;
    let lengths = arena.tensor(plan.lengths, TensorElementType::Int32, &[batch])?;
    if prompt {
        bindings.input("qkv", &arena.tensor(plan.bank, element, &[batch, tokens, s.packed()])?)?;
        bindings.input("seqlens_k", &lengths)?;
    } else {
        bindings.input(
            "bank",
            &arena.tensor(plan.bank, element, &[graph::BANK, tokens, s.packed()])?,
        )?;
        bindings.in_place("lengths", "seqlens_k", &lengths)?;
    }
    let output = arena.tensor(plan.output, element, &[batch, tokens, s.heads * s.size])?;
    for layer in 0..s.layers {
        bindings.output(&of_layer("output", layer), &output)?;
    }
    // An upper bound of what the steps reach; capturing a graph takes steps, too.
    let total = if prompt {
        context
    } else {
        context + WARM_UP + host.args.runs + 8
    };
    let mut own = vec![host_ints(&[total as i32])?];
    bindings.input("total_sequence_length", &own[0])?;
    if variant.kind != Kind::Gqa {
        own.push(host_ints(&[if prompt { -1 } else { tokens as i32 - 1 }])?);
        bindings.input("retro_length", &own[1])?;
        bindings.input(
            "page_budget",
            &arena.tensor(plan.budget, TensorElementType::Int32, &[batch])?,
        )?;
    }
    let mut options = RunOptions::new().map_err(|e| anyhow!("{e}"))?;
    if !host.args.sync {
        options.disable_device_sync().map_err(|e| anyhow!("{e}"))?;
    }
    if variant.cuda_graph {
        options
            .set("gpu_graph_id", graph_id.to_string())
            .map_err(|e| anyhow!("{e}"))?;
    }
    Ok(Entry {
        variant,
        tokens,
        budget,
        bindings,
        options,
        micros: Vec::new(),
        _own: own,
    })
}

/// Microseconds a layer of one run of an entry.
fn time(
    host: &Host<'_>,
    arena: &Arena,
    plan: &Plan,
    context: usize,
    batch: usize,
    entry: &Entry<'_>,
    prompt: bool,
) -> Result<f64> {
    // The first step is at position context - 1; a prompt fills the cache up to there.
    let before = if prompt { context - 1 } else { context - 2 } as i32;
    // Everything stays everything when the steps pass the first context's pages.
    let everything = entry.budget == Some(Budget::Ratio(1.0));
    let pages = if everything {
        i32::MAX
    } else {
        pages_of(entry.budget, context, host.shape.page) as i32
    };
    arena.write(plan.budget, &ints(&vec![pages; batch]))?;
    let reset = || -> Result<()> { arena.write(plan.lengths, &ints(&vec![before; batch])) };
    reset()?;
    for state in &plan.state {
        // No page was loaded of late: the first tokens fed again have the most to catch up with.
        arena.fill(state[1], state[2] - state[1], 0)?;
    }
    let run = || entry.bindings.run(&entry.variant.session, Some(&entry.options));
    let (warm_up, runs) = if prompt { (1, 1) } else { (WARM_UP, host.args.runs) };
    for _ in 0..warm_up {
        run()?;
    }
    host.synchronize()?;
    let start = Instant::now();
    for _ in 0..runs {
        run()?;
    }
    host.synchronize()?;
    let micros = 1e6 * start.elapsed().as_secs_f64() / (runs * host.shape.layers) as f64;
    if !prompt {
        // The counter must have moved with every run, else nothing was measured.
        let mut bytes = [0; 4];
        arena.read(plan.lengths, &mut bytes)?;
        let expected = before + (warm_up + runs) as i32;
        let got = i32::from_le_bytes(bytes);
        ensure!(
            got == expected || (entry.variant.cuda_graph && got > before + runs as i32),
            "{:?}: after {} runs the counter is {got}, expected {expected}",
            entry.variant.kind,
            warm_up + runs
        );
    }
    Ok(micros)
}

fn table_rows(
    host: &Host<'_>,
    entries: &[Entry<'_>],
    context: usize,
    batch: usize,
    bandwidth: f64,
    prompt: bool,
) -> Vec<Row> {
    let (s, element) = (&host.shape, fill::bytes_of(host.shape.dtype) as f64);
    let median = |entry: &Entry<'_>| sorted(&entry.micros)[entry.micros.len() / 2];
    let row = |entry: &Entry<'_>| {
        let kind = entry.variant.kind;
        let reference = entries.iter().find(|e| {
            e.variant.kind == Kind::Gqa && e.variant.cuda_graph == entry.variant.cuda_graph && (prompt || e.tokens == 1)
        });
        let row = (batch * s.kv_heads * s.size) as f64 * element;
        let (loaded, summaries) = match kind {
            Kind::Retro { mode: Mode::Retro, .. } => (
                pages_of(entry.budget, context, s.page) * s.page,
                2.0 * pages_for(context, s.page) as f64,
            ),
            Kind::Retro {
                mode: Mode::Streaming, ..
            } => (pages_of(entry.budget, context, s.page) * s.page, 0.0),
            _ => (context, 0.0),
        };
        let bytes = row * (2.0 * loaded.min(context) as f64 + if prompt { 0.0 } else { summaries });
        let micros = sorted(&entry.micros);
        let (what, selector) = match kind {
            Kind::Gqa => ("GQA".to_owned(), "-".to_owned()),
            Kind::Retro {
                mode,
                selector,
                group_score,
                ..
            } => (
                if prompt {
                    "RetroAttention".to_owned()
                } else {
                    mode.to_string()
                },
                if mode == Mode::Retro {
                    format!("{selector}+{group_score}")
                } else {
                    "-".to_owned()
                },
            ),
        };
        Row {
            what,
            context,
            batch,
            tokens: entry.tokens,
            budget: entry.budget.map_or_else(|| "-".to_owned(), |b| b.to_string()),
            selector,
            graph: entry.variant.cuda_graph,
            micros: [median(entry), micros[0], micros[micros.len() - 1]],
            bytes,
            share: bytes / (median(entry) * 1e-6) / bandwidth,
            speedup: reference.map(|r| median(r) / median(entry)),
        }
    };
    entries.iter().map(row).collect()
}

fn sorted(numbers: &[f64]) -> Vec<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Chunks of random tokens, so that caches and summaries belong together.
fn prefill_summaries(
    host: &Host<'_>,
    arena: &Arena,
    plan: &Plan,
    session: &Session,
    context: usize,
    batch: usize,
) -> Result<()> {
    let (s, element) = (&host.shape, host.args.dtype.element());
    ensure!(batch == 1, "--summaries prefill: for --batch 1");
    let window = host.args.window.iter().copied().max().unwrap_or(1);
    let selection = host.args.select[0];
    let kind = retro(Mode::Retro, selection, window);
    let mut done = 0;
    while done < context {
        let count = CHUNK.min(context - done);
        done += count;
        let mut bindings = Bindings::new(session)?;
        bind_state(host, arena, plan, batch, kind, &mut bindings)?;
        bindings.input("qkv", &arena.tensor(plan.bank, element, &[batch, count, s.packed()])?)?;
        arena.write(plan.lengths, &ints(&vec![done as i32 - 1; batch]))?;
        bindings.input(
            "seqlens_k",
            &arena.tensor(plan.lengths, TensorElementType::Int32, &[batch])?,
        )?;
        let numbers = [host_ints(&[done as i32])?, host_ints(&[-1])?];
        bindings.input("total_sequence_length", &numbers[0])?;
        bindings.input("retro_length", &numbers[1])?;
        arena.write(plan.budget, &ints(&vec![0; batch]))?;
        bindings.input(
            "page_budget",
            &arena.tensor(plan.budget, TensorElementType::Int32, &[batch])?,
        )?;
        let output = arena.tensor(plan.output, element, &[batch, count, s.heads * s.size])?;
        for layer in 0..s.layers {
            bindings.output(&of_layer("output", layer), &output)?;
        }
        bindings.run(session, None)?;
        // The next chunk has other tokens.
        let bytes = batch * CHUNK * s.packed() * fill::bytes_of(s.dtype);
        let from = plan.caches[done / CHUNK % s.layers][1];
        if bytes <= plan.caches[0][1] {
            arena.copy(plan.bank, from, bytes)?;
        }
    }
    Ok(())
}

/// The counter and the picking of rows alone, as if they were one layer of as many as there are.
fn overhead(host: &Host<'_>, arena: &Arena, plan: &Plan, context: usize, batch: usize) -> Result<Row> {
    let element = host.args.dtype.element();
    let session = host.session(Kind::Gqa, Feeding::Steps, 0, false)?;
    let mut bindings = Bindings::new(&session)?;
    bindings.input(
        "bank",
        &arena.tensor(plan.bank, element, &[graph::BANK, 1, host.shape.packed()])?,
    )?;
    bindings.in_place(
        "lengths",
        "seqlens_k",
        &arena.tensor(plan.lengths, TensorElementType::Int32, &[batch])?,
    )?;
    bindings.output(
        "qkv",
        &arena.tensor(plan.output, element, &[batch, 1, host.shape.packed()])?,
    )?;
    let total = host_ints(&[context as i32])?;
    bindings.input("total_sequence_length", &total)?;
    arena.write(plan.lengths, &ints(&vec![0; batch]))?;
    let mut options = RunOptions::new().map_err(|e| anyhow!("{e}"))?;
    if !host.args.sync {
        options.disable_device_sync().map_err(|e| anyhow!("{e}"))?;
    }
    let mut micros = Vec::new();
    for _ in 0..host.args.repetitions {
        bindings.run(&session, Some(&options))?;
        host.synchronize()?;
        let start = Instant::now();
        for _ in 0..host.args.runs {
            bindings.run(&session, Some(&options))?;
        }
        host.synchronize()?;
        micros.push(1e6 * start.elapsed().as_secs_f64() / (host.args.runs * host.shape.layers) as f64);
    }
    let micros = sorted(&micros);
    Ok(Row {
        what: "no attention".to_owned(),
        context,
        batch,
        tokens: 1,
        budget: "-".to_owned(),
        selector: "-".to_owned(),
        graph: false,
        micros: [micros[micros.len() / 2], micros[0], micros[micros.len() - 1]],
        bytes: 0.0,
        share: 0.0,
        speedup: None,
    })
}
