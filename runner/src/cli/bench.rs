//! `retro-run bench`: prompt and generation speed of models at several context depths, side by side in one run.

use std::{path::PathBuf, str::FromStr, time::Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use super::{args::SessionArgs, output::print};
use crate::{
    DecoderState, Feed, Interrupt, Interrupted, Model, OpenOptions, Runtime,
    bench::{
        Samples,
        selector_state::StatePattern,
        synthetic_cache,
        table::{Cell, Column, Format, Table},
    },
    decoder::decode_loop::{CHUNK, Decoder, Policy},
    interrupt::Signals,
    model_folder::chosen,
    model_spec::PolicyOptions,
    progress::{self, note},
};

#[derive(Args)]
pub struct BenchArgs {
    /// Model, converted or not: DIR[,window=W][,budget=B][,graph=NAME][,name=NAME]; may be given several times.
    #[arg(short, long = "model", value_name = "DIR", required = true)]
    models: Vec<BenchModel>,
    /// Graph to use from folders with several, for models without graph=NAME: its file name or variant.
    #[arg(long, value_name = "NAME")]
    graph: Option<String>,
    /// Prompt lengths to time (pp tests); 0: none.
    #[arg(short = 'p', long, value_delimiter = ',', default_value = "512", value_name = "LIST")]
    n_prompt: Vec<usize>,
    /// Numbers of tokens to generate (tg tests); 0: none.
    #[arg(short, long, value_delimiter = ',', default_value = "32", value_name = "LIST")]
    n_gen: Vec<usize>,
    /// Context depths: tokens in the cache before a test.
    #[arg(short = 'd', long, value_delimiter = ',', default_value = "0", value_name = "LIST")]
    depth: Vec<usize>,
    /// Prefill random tokens to reach the depth, instead of filling the caches with synthetic keys and values.
    #[arg(long)]
    prefill_depth: bool,
    /// Prompt tokens per prefill chunk.
    #[arg(long, default_value_t = CHUNK, value_name = "TOKENS")]
    chunk: usize,
    /// Repetitions of every test, models interleaved.
    #[arg(short, long, default_value_t = 5, value_name = "N")]
    repetitions: usize,
    /// Output format.
    #[arg(short, long, default_value = "md", value_name = "FORMAT")]
    output: Format,
    #[command(flatten)]
    session: SessionArgs,
}

/// A model and how to run it.
#[derive(Clone, Debug, PartialEq)]
struct BenchModel {
    folder: PathBuf,
    options: PolicyOptions,
    graph: Option<String>,
    name: Option<String>,
}

impl FromStr for BenchModel {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut parts = s.split(',');
        let mut spec = Self {
            folder: parts.next().unwrap_or_default().into(),
            options: PolicyOptions::default(),
            graph: None,
            name: None,
        };
        for option in parts {
            if let Some(name) = option.strip_prefix("name=") {
                spec.name = Some(name.to_owned());
            } else if let Some(graph) = option.strip_prefix("graph=") {
                spec.graph = Some(graph.to_owned());
            } else if !spec.options.set(option)? {
                return Err(format!(
                    "{option:?}: expected DIR[,window=W][,budget=B][,rectify=N][,graph=NAME][,name=NAME]"
                ));
            }
        }
        Ok(spec)
    }
}

impl BenchModel {
    fn label(&self) -> String {
        let folder = self
            .folder
            .file_name()
            .unwrap_or(self.folder.as_os_str())
            .to_string_lossy();
        let graph = self.graph.as_ref().map_or_else(String::new, |g| format!(" {g}"));
        let rectify = self
            .options
            .rectify
            .map_or_else(String::new, |n| format!(", rectify {n}"));
        self.name.clone().unwrap_or_else(|| format!("{folder}{graph}{rectify}"))
    }
}

/// A test at a depth.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Test {
    Prompt(usize),
    Generate(usize),
}

impl Test {
    fn tokens(self) -> usize {
        match self {
            Self::Prompt(n) | Self::Generate(n) => n,
        }
    }

    /// As llama-bench calls it.
    fn name(self) -> String {
        match self {
            Self::Prompt(n) => format!("pp{n}"),
            Self::Generate(n) => format!("tg{n}"),
        }
    }
}

/// Untimed decoding steps once the window is full.
const WARM_UP: usize = 2;

/// Runs the command.
///
/// # Errors
/// When an option or a model cannot be used, or ONNX Runtime fails.
pub fn bench(args: &BenchArgs, signals: &Signals) -> Result<()> {
    ensure!(args.repetitions >= 1, "-r 0: ask for at least one repetition");
    ensure!(args.chunk >= 1, "--chunk 0: a chunk has at least one token");
    let tests: Vec<Test> = args
        .n_prompt
        .iter()
        .map(|&n| Test::Prompt(n))
        .chain(args.n_gen.iter().map(|&n| Test::Generate(n)))
        .filter(|t| t.tokens() > 0)
        .collect();
    ensure!(!tests.is_empty(), "nothing to measure: -p and -n are both 0");
    let mut specs = args.models.clone();
    for spec in &mut specs {
        ensure!(spec.folder.exists(), "there is no model at {}", spec.folder.display());
        if spec.graph.is_none() {
            spec.graph.clone_from(&args.graph);
        }
        // The table names the model as the user does.
        spec.name = Some(spec.label());
        spec.folder = chosen(&spec.folder, spec.graph.as_deref())?;
    }
    let (runtime, open) = args.session.load()?;
    let mut contenders = Contenders::open(&runtime, &open, &specs)?;
    contenders.interrupt = signals.listen();
    let mut table = Table::new(&COLUMNS);
    let measured = contenders.measure_all(args, &tests, &mut table);
    // Rows measured before an interruption are printed; after a failure they are not.
    if !measured.as_ref().is_err_and(|e| !e.is::<Interrupted>()) {
        print(&table.print(args.output, &facts(args, &runtime))?)?;
    }
    measured
}

fn facts(args: &BenchArgs, runtime: &Runtime) -> [(&'static str, Value); 3] {
    let threads = args.session.threads.map_or(Value::Null, Value::from);
    [
        ("threads", threads),
        ("repetitions", args.repetitions.into()),
        ("onnxruntime", runtime.path.display().to_string().into()),
    ]
}

const COLUMNS: [Column; 11] = [
    column("model", "model"),
    column("test", "test"),
    column("depth", "depth"),
    column("window", "w"),
    column("budget", "budget"),
    column("tokens_per_second", "tokens/s"),
    column("tokens_per_second_deviation", ""),
    column("tokens_per_second_best", "best"),
    column("ratio_to_first", "x first model"),
    column("share_of_pages", "pages read"),
    column("exposure", "exposure"),
];

const fn column(key: &'static str, heading: &'static str) -> Column {
    Column { key, heading }
}

/// The models, each opened once however often it is given.
struct Contenders {
    opened: Vec<Opened>,
    /// Name, index among the opened models, policy.
    list: Vec<(String, usize, Policy)>,
    /// Ends the work between two steps.
    interrupt: Interrupt,
}

struct Opened {
    folder: PathBuf,
    model: Model,
    /// Longest window that this model is run with.
    window: usize,
    state: Option<DecoderState>,
    /// What its synthetic caches have as the selector's state.
    pattern: StatePattern,
}

impl Contenders {
    fn open(runtime: &Runtime, options: &OpenOptions, specs: &[BenchModel]) -> Result<Self> {
        let mut opened: Vec<Opened> = Vec::new();
        let mut list = Vec::new();
        for spec in specs {
            let at = match opened.iter().position(|o| o.folder == spec.folder) {
                Some(at) => at,
                None => {
                    let model = Model::open(runtime, &spec.folder, options)?;
                    note(&format!("{}: {}", spec.folder.display(), model.plugin_line()));
                    if let Some(line) = model.device_line() {
                        note(&line);
                    }
                    opened.push(Opened {
                        folder: spec.folder.clone(),
                        pattern: StatePattern::of_model(runtime, options, &model)?,
                        model,
                        window: 1,
                        state: None,
                    });
                    opened.len() - 1
                }
            };
            let one = opened.get_mut(at).context("no such model")?;
            let policy = Policy::new(&one.model, spec.options.window, spec.options.budget)
                .and_then(|policy| policy.rectified(&one.model, spec.options.rectify))
                .with_context(|| spec.label())?;
            one.window = one.window.max(policy.window);
            list.push((spec.label(), at, policy));
        }
        let interrupt = Interrupt::default();
        Ok(Self {
            opened,
            list,
            interrupt,
        })
    }

    fn measure_all(&mut self, args: &BenchArgs, tests: &[Test], table: &mut Table) -> Result<()> {
        for &depth in &args.depth {
            self.reach(args, depth, tests)?;
            for &test in tests {
                if depth == 0 && matches!(test, Test::Generate(_)) {
                    // A decoding step needs a token before it.
                    self.reach(args, 1, tests)?;
                    self.measure(args, 1, test, table)?;
                    self.reach(args, 0, tests)?;
                } else {
                    self.measure(args, depth, test, table)?;
                }
            }
        }
        Ok(())
    }

    /// Makes every model's state hold `depth` tokens and have room for every test.
    fn reach(&mut self, args: &BenchArgs, depth: usize, tests: &[Test]) -> Result<()> {
        let most = tests.iter().map(|t| t.tokens()).max().unwrap_or(0);
        for one in &mut self.opened {
            let capacity = depth + most + WARM_UP + one.window;
            if let Some(context) = one.model.context_length() {
                ensure!(
                    capacity <= context,
                    "{}: {capacity} tokens exceed the model's context of {context}",
                    one.folder.display()
                );
            }
            one.state = None;
            one.state = Some(one.model.new_state(1, capacity)?);
            one.set(args, depth, true, &self.interrupt)?;
        }
        Ok(())
    }

    fn measure(&mut self, args: &BenchArgs, depth: usize, test: Test, table: &mut Table) -> Result<()> {
        let mut samples = vec![Samples::default(); self.list.len()];
        let mut readings = vec![crate::decoder::page_reads::PageReads::default(); self.list.len()];
        let total = args.repetitions * self.list.len();
        let bar = progress::bar(total, &format!("{} @ {depth}", test.name()), true);
        for _ in 0..args.repetitions {
            for ((_, at, policy), (samples, reading)) in self.list.iter().zip(samples.iter_mut().zip(&mut readings)) {
                let one = self.opened.get_mut(*at).context("no such model")?;
                one.set(args, depth, false, &self.interrupt)?;
                let seconds = match test {
                    Test::Prompt(n) => {
                        one.feed(depth, WARM_UP.min(n), args.chunk, &self.interrupt)?;
                        one.set(args, depth, false, &self.interrupt)?;
                        let start = Instant::now();
                        one.feed(depth, n, args.chunk, &self.interrupt)?;
                        start.elapsed().as_secs_f64()
                    }
                    Test::Generate(n) => {
                        let prompt = tokens(depth);
                        let state = one.state.as_mut().context(NO_STATE)?;
                        let mut decoder = Decoder::new(&mut one.model, state, &[&prompt], *policy)?;
                        for _ in 0..policy.window - 1 + WARM_UP {
                            self.interrupt.check()?;
                            decoder.push(0, 1);
                            decoder.step()?;
                        }
                        let before = decoder.time;
                        for _ in 0..n {
                            self.interrupt.check()?;
                            decoder.push(0, 1);
                            decoder.step()?;
                        }
                        reading.add(&decoder.reading());
                        (decoder.time - before).as_secs_f64()
                    }
                };
                samples.0.push(test.tokens() as f64 / seconds);
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        let first = samples.first().cloned().unwrap_or_default();
        for (((label, at, policy), samples), reading) in self.list.iter().zip(&samples).zip(&readings) {
            let retro = self.opened.get(*at).and_then(|o| o.model.retro.as_ref());
            let ratios = Samples(samples.0.iter().zip(&first.0).map(|(a, b)| a / b).collect());
            let budget = policy
                .budget
                .map(|b| b.to_string())
                .or(retro.and_then(|r| r.budget).map(|b| b.to_string()));
            let generates = matches!(test, Test::Generate(_));
            table.push(vec![
                Cell::text(label.clone()),
                Cell::text(test.name()),
                Cell::count(depth),
                Cell::count(policy.window),
                Cell::text(budget.unwrap_or_default()),
                Cell::number(samples.mean(), 2),
                Cell::number(samples.deviation(), 2),
                Cell::number(samples.0.iter().copied().fold(0.0, f64::max), 2),
                Cell::number(ratios.median(), 2),
                Cell::maybe(reading.share().filter(|_| generates), 3),
                Cell::maybe(reading.exposure().filter(|_| generates && policy.window > 1), 2),
            ]);
        }
        Ok(())
    }
}

const NO_STATE: &str = "no state";

impl Opened {
    /// Brings the state to `depth` tokens: a fresh one is filled, a used one rewound.
    fn set(&mut self, args: &BenchArgs, depth: usize, fresh: bool, interrupt: &Interrupt) -> Result<()> {
        let state = self.state.as_mut().context(NO_STATE)?;
        if !fresh && self.model.fixed_capacity {
            return Ok(state.kv_mut().rewind(depth)?);
        }
        if depth > 0 && !args.prefill_depth {
            return synthetic_cache::fill(state.kv_mut(), depth, self.pattern.bytes()).with_context(|| {
                format!(
                    "{}: give --prefill-depth to feed a prompt instead",
                    self.model.folder.graph.display()
                )
            });
        }
        *state = self.model.new_state(1, state.kv().capacity())?;
        self.feed(0, depth, args.chunk, interrupt)
    }

    /// Feeds `count` tokens of a prompt after `depth` others.
    fn feed(&mut self, depth: usize, count: usize, chunk: usize, interrupt: &Interrupt) -> Result<()> {
        let state = self.state.as_mut().context(NO_STATE)?;
        let all = tokens(depth + count);
        let chunk = self.model.io.input_ids.width.unwrap_or(chunk);
        let mut done = depth;
        for part in all.get(depth..).unwrap_or(&[]).chunks(chunk) {
            interrupt.check()?;
            done += part.len();
            let feed = Feed {
                ids: part.iter().map(|&id| i64::from(id)).collect(),
                lengths: vec![done],
                retro_length: -1,
                ..Feed::default()
            };
            self.model.run(state, &feed)?;
        }
        Ok(())
    }
}

/// Token ids below 64, which every vocabulary has.
fn tokens(count: usize) -> Vec<u32> {
    let next = |i: usize| (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58;
    (0..count).map(|i| next(i) as u32).collect()
}
