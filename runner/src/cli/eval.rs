//! `retro-run eval`: compares attention policies by answers on documents, or by KL divergence from dense attention.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use retro_contract::Budget;
use serde::Serialize;
use xxhash_rust::xxh3::Xxh3;

use super::{
    args::SessionArgs,
    output::{folder_of, print, write_whole},
};
use crate::{
    Interrupt, Interrupted, OpenOptions, Runtime,
    built_model_cache::folder_key,
    decoder::decode_loop::CHUNK,
    eval::{
        self,
        converted_models::ConvertedModelCache,
        documents, html,
        journal::{Header, Journal},
        perplexity,
        policy::{ModelSource, PolicyKind, PolicyRow, PolicySpec, rows},
        score::{Scorer, read_documents},
        summary::{documents as summarize_documents, documents_table, fidelities, fidelity_table},
    },
    interrupt::Signals,
    model_folder::chosen,
    model_spec::ModelSpec,
    progress::{Items, note},
    tables::{Alignment, markdown},
};

#[derive(Args)]
pub struct EvalArgs {
    /// Unconverted model: a folder, an ONNX file, or a folder of Llama weights. It is converted for each policy, in a
    /// temporary folder.
    #[arg(value_name = "MODEL", required_unless_present = "runs")]
    model: Option<PathBuf>,
    /// Graph to use from a folder with several: its file name or variant.
    #[arg(long, value_name = "NAME", requires = "model")]
    graph: Option<String>,
    /// Documents with known answers to generate on: JSON lines with prompt, answers and reference.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "perplexity",
        conflicts_with = "perplexity"
    )]
    data: Option<PathBuf>,
    /// Compare next-token distributions on these texts instead: perplexity, and KL divergence from dense attention.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    perplexity: Vec<PathBuf>,
    /// Number of documents [default: all].
    #[arg(long, value_name = "N")]
    docs: Option<usize>,
    /// Policy: dense, streaming (StreamingLLM), periodic (pi-Attention's pattern), quest, retro (the paper's selection)
    /// or recommended (retro-export's defaults, but for the floor: every policy reads 64 tokens at least). Options
    /// follow:
    /// retro,window=4,selector=moments,group-score=softmax,lambda=2.5,correlation=0.2,sketch-bits=2,page-size=16,
    /// min-pages=4,sink-pages=1,dense-layers=0+1. May be given several times [default: all but periodic].
    #[arg(long = "policy", value_name = "NAME[,OPTION=VALUE]...", requires = "model")]
    policies: Vec<PolicySpec>,
    /// Windows of the policies retro and recommended.
    #[arg(short, long = "windows", value_delimiter = ',', default_values_t = [2, 4, 8], value_name = "W,W")]
    windows: Vec<usize>,
    /// Budgets: what a decoding step reads of the cache, as shares (0.10) or in tokens (2048).
    #[arg(
        short,
        long = "budgets",
        alias = "budget",
        value_delimiter = ',',
        default_value = "0.10",
        value_name = "B,B"
    )]
    budgets: Vec<Budget>,
    /// Also compare a model as it is, converted or not: NAME=DIR[,window=W][,budget=B][,graph=NAME]; may be given
    /// several times.
    #[arg(long = "run", value_name = "NAME=DIR")]
    runs: Vec<ModelSpec>,
    /// Batch size: documents (or texts) decoded together.
    #[arg(long, default_value_t = 8, value_name = "N")]
    batch: usize,
    /// How answers are scored.
    #[arg(long, default_value = "ledger", value_name = "NAME")]
    score: Scorer,
    /// Maximum tokens to generate per document [default: a few more than the longest reference, else until the context
    /// is full]; with --perplexity, maximum tokens to predict per text [default: 1024].
    #[arg(short, long, value_name = "N")]
    n_predict: Option<usize>,
    /// With --perplexity: tokens of each text that are prefilled with dense attention.
    #[arg(long, default_value_t = 1024, value_name = "TOKENS")]
    prompt_tokens: usize,
    /// Prompt tokens per prefill chunk.
    #[arg(long, default_value_t = CHUNK, value_name = "TOKENS")]
    chunk: usize,
    /// Append results to this file, and skip those that it already has.
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Write a self-contained HTML report with table and figures.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the figures to this folder as SVG files.
    #[arg(long, value_name = "DIR")]
    figures: Option<PathBuf>,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    session: SessionArgs,
}

/// The row of a model given by `--run`.
fn row(run: &ModelSpec) -> Result<PolicyRow> {
    Ok(PolicyRow {
        kind: PolicyKind::Folder,
        label: run.name.clone(),
        source: ModelSource::Graph(chosen(&run.folder, run.graph.as_deref())?),
        window: run.options.window,
        budget: run.options.budget,
    })
}

/// Runs the command.
///
/// # Errors
/// When an option, a model or a policy cannot be used, ONNX Runtime fails, or a report cannot be written.
pub fn eval(args: &EvalArgs, signals: &Signals) -> Result<()> {
    ensure!(args.docs != Some(0), "--docs 0: ask for at least one document");
    ensure!(args.batch >= 1, "--batch 0: decode at least one document at a time");
    ensure!(args.chunk >= 1, "--chunk 0: a chunk has at least one token");
    ensure!(
        args.prompt_tokens >= 1,
        "--prompt-tokens 0: a prompt has at least one token"
    );
    ensure!(args.n_predict != Some(0), "-n 0: ask for at least one token");
    ensure!(
        !args.windows.contains(&0),
        "--windows 0: the smallest window is 1 (Quest, without correction)"
    );
    // Hours of work would be for nothing.
    if let Some(path) = &args.html {
        ensure!(
            !path.is_dir(),
            "--html: cannot write {}: it is a folder",
            path.display()
        );
        writable(path, folder_of(path)).context("--html")?;
    }
    if let Some(folder) = &args.figures {
        let there = folder.ancestors().find(|f| !f.as_os_str().is_empty() && f.exists());
        writable(folder, there.unwrap_or(Path::new("."))).context("--figures")?;
    }
    match &args.data {
        Some(data) => eval_documents(args, data, signals.listen()),
        None => eval_texts(args, signals.listen()),
    }
}

/// What both kinds of comparison share: the libraries, the source model, the rows.
struct Comparison {
    runtime: Runtime,
    open: OpenOptions,
    converted: ConvertedModelCache,
    rows: Vec<PolicyRow>,
    /// Identifies the model in the file of results.
    model: String,
    interrupt: Interrupt,
}

impl Comparison {
    fn new(args: &EvalArgs, interrupt: Interrupt) -> Result<Self> {
        // Models and policies are checked before ONNX Runtime is loaded.
        let named = args
            .model
            .as_deref()
            .or_else(|| args.runs.first().map(|r| r.folder.as_path()));
        let named = named.context("name a model, or one with --run")?;
        let mut converted = match &args.model {
            Some(model) => ConvertedModelCache::new(model, args.graph.as_deref())?,
            None => ConvertedModelCache::of_nothing(named)?,
        };
        let mut all = Vec::new();
        if args.model.is_some() {
            let every = ["dense", "streaming", "quest", "retro", "recommended"];
            let default = every.iter().map(|name| name.parse().map_err(anyhow::Error::msg));
            let specs = if args.policies.is_empty() {
                default.collect::<Result<Vec<PolicySpec>>>()?
            } else {
                args.policies.clone()
            };
            all = rows(&specs, converted.graph(), &args.windows, &args.budgets);
        }
        for run in &args.runs {
            all.push(row(run).with_context(|| run.name.clone())?);
        }
        for row in &all {
            if let ModelSource::Converted(settings) = &row.source {
                settings.check().with_context(|| row.label.clone())?;
            }
        }
        let (runtime, open) = args.session.load()?;
        for row in &all {
            interrupt.check()?;
            converted.open(&row.source).with_context(|| row.label.clone())?;
        }
        let folder = if named.is_file() { folder_of(named) } else { named };
        // Each graph of a folder is a model of its own.
        let graph = match (&args.graph, named.is_file()) {
            (Some(graph), _) => format!(" {graph}"),
            (None, true) => format!(" {}", named.file_name().unwrap_or_default().display()),
            (None, false) => String::new(),
        };
        Ok(Self {
            runtime,
            open,
            converted,
            rows: all,
            model: folder_key(folder)? + &graph,
            interrupt,
        })
    }

    fn header(&self, data: String) -> Header {
        Header {
            retro_run: env!("CARGO_PKG_VERSION").to_owned(),
            model: self.model.clone(),
            data,
        }
    }
}

fn journal<T: Clone + Serialize + serde::de::DeserializeOwned>(args: &EvalArgs, header: &Header) -> Result<Journal<T>> {
    match &args.resume {
        Some(path) => Ok(Journal::open(path, header)?),
        None => Ok(Journal::in_memory()),
    }
}

/// A hash of the parts that does not depend on the compiler.
fn fingerprint(parts: &[&dyn AsRef<[u8]>]) -> u64 {
    let mut hasher = Xxh3::new();
    for part in parts {
        let bytes = part.as_ref();
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    hasher.digest()
}

fn eval_documents(args: &EvalArgs, data: &Path, interrupt: Interrupt) -> Result<()> {
    let documents = read_documents(data, args.docs.unwrap_or(usize::MAX))?;
    let mut comparison = Comparison::new(args, interrupt)?;
    let text = fs::read(data).with_context(|| format!("cannot read {}", data.display()))?;
    // The whole file: documents beyond --docs still decide the longest reference.
    let print = fingerprint(&[&text]);
    let what = format!("{} documents {print:016x}, -n {:?}", documents.len(), args.n_predict);
    let mut results = journal(args, &comparison.header(what))?;
    let bar = Items::new("eval", comparison.rows.len() * documents.len(), "documents");
    let job = documents::DocumentsJob {
        runtime: &comparison.runtime,
        open: &comparison.open,
        documents: &documents,
        rows: &comparison.rows,
        batch: args.batch,
        chunk: args.chunk,
        n_predict: args.n_predict,
        scorer: args.score,
        interrupt: &comparison.interrupt,
    };
    let interrupted = interruption(job.run(&mut comparison.converted, &mut results, &bar))?;
    bar.finish();
    let mut rows = summarize_documents(&comparison.rows, &results, documents.len());
    if interrupted.is_some() {
        rows.retain(|row| row.documents == documents.len());
    }
    let facts = [
        format!("model {}, {} documents of {}", named(args), documents.len(), data.display()),
        "Standard errors are over documents. First wrong at: answers before the first wrong one. Read a step: keys, values and page \
         summaries of one sequence in all layers."
            .to_owned(),
    ];
    let report = Report {
        title: "Right answers",
        facts: &facts,
        table: &documents_table(&rows),
        rows: &rows,
        total: comparison.rows.len(),
    };
    report.end(args, interrupted, || html::documents_figures(&rows))
}

fn eval_texts(args: &EvalArgs, interrupt: Interrupt) -> Result<()> {
    let read = |path: &PathBuf| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let texts = args.perplexity.iter().map(read).collect::<Result<Vec<String>>>()?;
    let names: Vec<String> = args.perplexity.iter().map(|p| p.display().to_string()).collect();
    let mut comparison = Comparison::new(args, interrupt)?;
    let predict = args.n_predict.unwrap_or(1024);
    let print = fingerprint(&texts.iter().map(|t| t as &dyn AsRef<[u8]>).collect::<Vec<_>>());
    let what = format!(
        "{} texts {print:016x}, {} + {predict} tokens",
        texts.len(),
        args.prompt_tokens
    );
    let mut results = journal(args, &comparison.header(what))?;
    let bar = Items::new("eval", comparison.rows.len() * texts.len(), "texts");
    ensure!(
        args.model.is_some(),
        "--perplexity compares with dense attention: give the unconverted MODEL"
    );
    let job = perplexity::FidelityJob {
        runtime: &comparison.runtime,
        open: &comparison.open,
        texts: &texts,
        names: &names,
        rows: &comparison.rows,
        batch: args.batch,
        chunk: args.chunk,
        prompt: args.prompt_tokens,
        predict,
        interrupt: &comparison.interrupt,
    };
    let interrupted = interruption(job.run(&mut comparison.converted, &mut results, &bar))?;
    bar.finish();
    let mut rows = fidelities(&comparison.rows, &results, texts.len());
    if interrupted.is_some() {
        rows.retain(|row| row.texts == texts.len());
    }
    let facts = [
        format!(
            "model {}, {} texts: {} tokens read densely, then {predict} at most, each given",
            named(args),
            texts.len(),
            args.prompt_tokens
        ),
        "KL: mean divergence of a policy's next-token distribution from dense attention's, in nats a token; over Quest's, text by \
         text. Standard errors are over texts."
            .to_owned(),
    ];
    let report = Report {
        title: "Fidelity to dense attention",
        facts: &facts,
        table: &fidelity_table(&rows),
        rows: &rows,
        total: comparison.rows.len(),
    };
    report.end(args, interrupted, || html::fidelity_figures(&rows))
}

fn named(args: &EvalArgs) -> String {
    args.model
        .as_ref()
        .map_or_else(|| "as named".to_owned(), |m| m.display().to_string())
}

/// Tells an interruption from other errors.
fn interruption(result: Result<(), eval::Error>) -> Result<Option<Interrupted>, eval::Error> {
    match result {
        Ok(()) => Ok(None),
        Err(eval::Error::Interrupted(interrupted)) => Ok(Some(interrupted)),
        Err(e) => Err(e),
    }
}

/// What a comparison has found.
struct Report<'a, T> {
    title: &'a str,
    /// Lines about all rows.
    facts: &'a [String],
    table: &'a [Vec<String>],
    /// The rows of the table that are complete.
    rows: &'a [T],
    /// Rows of a complete run.
    total: usize,
}

/// Figures by name, as SVG.
type Figures = Vec<(String, String)>;

impl<T: Serialize> Report<'_, T> {
    /// Ends the command: prints the table and writes the reports that were asked for, each whatever becomes of the
    /// other. An interrupted run ends with that error, and writes no reports.
    fn end(
        &self,
        args: &EvalArgs,
        interrupted: Option<Interrupted>,
        figures: impl Fn() -> Result<Figures, eval::Error>,
    ) -> Result<()> {
        if let Some(interrupted) = interrupted {
            self.end_early(args)?;
            return Err(interrupted.into());
        }
        let figures = match (&args.html, &args.figures) {
            (None, None) => Vec::new(),
            _ => figures()?,
        };
        let written = self.write(args, &figures);
        self.print(args).and(written)
    }

    /// Prints the rows that were complete when the run was interrupted, and says how to resume it.
    fn end_early(&self, args: &EvalArgs) -> Result<()> {
        if !self.rows.is_empty() || args.json {
            self.print(args)?;
        }
        let kept = match &args.resume {
            Some(path) => format!(
                "{} has the results so far; the same command resumes the run",
                path.display()
            ),
            None => "give --resume FILE to make runs resumable".to_owned(),
        };
        note(&format!(
            "{} of {} rows are complete; {kept}",
            self.rows.len(),
            self.total
        ));
        Ok(())
    }

    fn print(&self, args: &EvalArgs) -> Result<()> {
        let Self { facts, table, rows, .. } = self;
        if args.json {
            print(&format!("{}\n", serde_json::json!({ "facts": facts, "rows": rows })))
        } else {
            print(&markdown(table, Alignment::Left))
        }
    }

    fn write(&self, args: &EvalArgs, figures: &[(String, String)]) -> Result<()> {
        if let Some(path) = &args.html {
            write_whole(path, &html::page(self.title, self.facts, self.table, figures))?;
        }
        if let Some(folder) = &args.figures {
            fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
            for (name, svg) in figures {
                write_whole(&folder.join(format!("{name}.svg")), svg)?;
            }
        }
        Ok(())
    }
}

/// Whether files can be made in the folder that an output goes to.
fn writable(output: &Path, folder: &Path) -> Result<()> {
    let cannot = || format!("cannot write {}", output.display());
    ensure!(folder.is_dir(), "{}: {} is no folder", cannot(), folder.display());
    tempfile::tempfile_in(folder).map(drop).with_context(cannot)
}
