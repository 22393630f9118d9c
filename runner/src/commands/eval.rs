//! `retro-run eval`: policies compared over documents with known answers, or by how far they are from dense attention.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use retro_contract::Budget;
use serde::Serialize;

use super::{SessionArgs, print};
use crate::{
    Interrupt, Interrupted, OpenOptions, Runtime,
    eval::{
        documents, html,
        journal::{Header, Journal},
        perplexity,
        policy::{Kind, PolicySpec, Row, Source, rows},
        summary::{documents as summarize_documents, documents_table, fidelities, fidelity_table, markdown},
        workshop::Workshop,
    },
    generate::CHUNK,
    interrupt::Signals,
    model::chosen,
    named::NamedModel,
    prepare::key,
    progress::{Items, note},
    score::{Scorer, read_documents},
};

#[derive(Args)]
pub struct EvalArgs {
    /// The model, as its exporter made it: a folder, an ONNX file, or a folder of Llama weights. It is converted as the
    /// policies need, in a temporary folder.
    #[arg(value_name = "MODEL", required_unless_present = "runs")]
    model: Option<PathBuf>,
    /// Which graph of the model's folder, where it holds several: its file's name or its variant.
    #[arg(long, value_name = "NAME", requires = "model")]
    graph: Option<String>,
    /// Documents to generate over: JSON lines with prompt, answers and reference.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "perplexity",
        conflicts_with = "perplexity"
    )]
    data: Option<PathBuf>,
    /// Compare next-token distributions over these texts instead; may be given several times.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    perplexity: Vec<PathBuf>,
    /// How many documents [default: all].
    #[arg(long, value_name = "N")]
    docs: Option<usize>,
    /// A policy: dense, streaming (StreamingLLM), quest, retro (the paper's selection) or recommended (retro-export's
    /// defaults), with options: retro,window=4,selector=moments,group-score=softmax,lambda=2.5,correlation=0.2,page-size=16,sink-pages=1,
    /// dense-layers=0+1. May be given several times [default: all five].
    #[arg(long = "policy", value_name = "NAME[,OPTION=VALUE]...", requires = "model")]
    policies: Vec<PolicySpec>,
    /// Windows of the policies retro and recommended.
    #[arg(short, long = "windows", value_delimiter = ',', default_values_t = [2, 4, 8], value_name = "W,W")]
    windows: Vec<usize>,
    /// What a step reads: shares of the context like 0.15, or numbers of tokens like 2048.
    #[arg(
        short,
        long = "budgets",
        alias = "budget",
        value_delimiter = ',',
        default_value = "0.15",
        value_name = "B,B"
    )]
    budgets: Vec<Budget>,
    /// A model as it is, converted or not: NAME=DIR[,window=W][,budget=B][,graph=NAME]; may be given several times.
    #[arg(long = "run", value_name = "NAME=DIR")]
    runs: Vec<NamedModel>,
    /// Documents (or texts) decoded at a time.
    #[arg(long, default_value_t = 8, value_name = "N")]
    batch: usize,
    /// How outputs are judged.
    #[arg(long, default_value = "ledger", value_name = "NAME")]
    score: Scorer,
    /// Tokens to generate at most a document [default: a little more than the references have, else until the context is
    /// full]; with --perplexity, tokens to predict at most a text [default: 1024].
    #[arg(short, long, value_name = "N")]
    n_predict: Option<usize>,
    /// With --perplexity: tokens of a text that are read densely before.
    #[arg(long, default_value_t = 1024, value_name = "TOKENS")]
    prompt_tokens: usize,
    /// Prompt tokens fed at a time.
    #[arg(long, default_value_t = CHUNK, value_name = "TOKENS")]
    chunk: usize,
    /// Keep results in this file as they come, and go on from those that it holds.
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Write a page with the table and figures, which stands alone.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the figures into this folder as SVG files.
    #[arg(long, value_name = "DIR")]
    figures: Option<PathBuf>,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    session: SessionArgs,
}

/// The row of a model that is compared as it is.
fn row(run: &NamedModel) -> Result<Row> {
    Ok(Row {
        kind: Kind::Folder,
        label: run.name.clone(),
        source: Source::Graph(chosen(&run.folder, run.graph.as_deref())?),
        window: run.knobs.window,
        budget: run.knobs.budget,
    })
}

/// Runs the verb.
///
/// # Errors
/// Whatever keeps a policy from being measured, in one line.
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
struct Bench {
    runtime: Runtime,
    open: OpenOptions,
    workshop: Workshop,
    rows: Vec<Row>,
    /// Name and key of the model for the file of results.
    model: String,
    interrupt: Interrupt,
}

impl Bench {
    fn new(args: &EvalArgs, interrupt: Interrupt) -> Result<Self> {
        // Whatever is wrong with a model or a policy is said before ONNX Runtime is looked for.
        let named = args
            .model
            .as_deref()
            .or_else(|| args.runs.first().map(|r| r.folder.as_path()));
        let named = named.context("name a model, or one with --run")?;
        let mut workshop = match &args.model {
            Some(model) => Workshop::new(model, args.graph.as_deref())?,
            None => Workshop::of_nothing(named)?,
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
            all = rows(&specs, workshop.graph(), &args.windows, &args.budgets);
        }
        for run in &args.runs {
            all.push(row(run).with_context(|| run.name.clone())?);
        }
        for row in &all {
            if let Source::Converted(settings) = &row.source {
                settings.check().with_context(|| row.label.clone())?;
            }
        }
        let (runtime, open) = args.session.load()?;
        for row in &all {
            interrupt.check()?;
            workshop.open(&row.source).with_context(|| row.label.clone())?;
        }
        let folder = if named.is_file() { folder_of(named) } else { named };
        // A folder's graphs are models of their own.
        let graph = match (&args.graph, named.is_file()) {
            (Some(graph), _) => format!(" {graph}"),
            (None, true) => format!(" {}", named.file_name().unwrap_or_default().display()),
            (None, false) => String::new(),
        };
        Ok(Self {
            runtime,
            open,
            workshop,
            rows: all,
            model: key(folder)? + &graph,
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
        Some(path) => Journal::open(path, header),
        None => Ok(Journal::in_memory()),
    }
}

fn fingerprint(parts: &[&dyn AsRef<[u8]>]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.iter().for_each(|p| p.as_ref().hash(&mut hasher));
    hasher.finish()
}

fn eval_documents(args: &EvalArgs, data: &Path, interrupt: Interrupt) -> Result<()> {
    let documents = read_documents(data, args.docs.unwrap_or(usize::MAX))?;
    let mut bench = Bench::new(args, interrupt)?;
    let text = fs::read(data).with_context(|| format!("cannot read {}", data.display()))?;
    // Documents that are not asked for change the length that outputs may have.
    let print = fingerprint(&[&text]);
    let what = format!("{} documents {print:016x}, -n {:?}", documents.len(), args.n_predict);
    let mut results = journal(args, &bench.header(what))?;
    let bar = Items::new("eval", bench.rows.len() * documents.len(), "documents");
    let job = documents::Job {
        runtime: &bench.runtime,
        open: &bench.open,
        documents: &documents,
        rows: &bench.rows,
        batch: args.batch,
        chunk: args.chunk,
        n_predict: args.n_predict,
        scorer: args.score,
        interrupt: &bench.interrupt,
    };
    let interrupted = interruption(job.run(&mut bench.workshop, &mut results, &bar))?;
    bar.finish();
    let mut rows = summarize_documents(&bench.rows, &results, documents.len());
    if interrupted.is_some() {
        rows.retain(|row| row.documents == documents.len());
    }
    let facts = [
        format!("model {}, {} documents of {}", named(args), documents.len(), data.display()),
        "Standard errors are over documents. Right answers by quarter of the output; the first wrong answer after so many percent of \
         them; what a step of one sequence reads of keys, values and page summaries in all layers."
            .to_owned(),
    ];
    if let Some(interrupted) = interrupted {
        return Err(finished_rows(
            args,
            interrupted,
            &facts,
            &documents_table(&rows),
            &rows,
            bench.rows.len(),
        )?
        .into());
    }
    let figures = if args.html.is_some() || args.figures.is_some() {
        html::documents_figures(&rows)?
    } else {
        Vec::new()
    };
    finish(args, "Right answers", &facts, &documents_table(&rows), &figures, &rows)
}

fn eval_texts(args: &EvalArgs, interrupt: Interrupt) -> Result<()> {
    let read = |path: &PathBuf| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let texts = args.perplexity.iter().map(read).collect::<Result<Vec<String>>>()?;
    let names: Vec<String> = args.perplexity.iter().map(|p| p.display().to_string()).collect();
    let mut bench = Bench::new(args, interrupt)?;
    let predict = args.n_predict.unwrap_or(1024);
    let print = fingerprint(&texts.iter().map(|t| t as &dyn AsRef<[u8]>).collect::<Vec<_>>());
    let what = format!(
        "{} texts {print:016x}, {} + {predict} tokens",
        texts.len(),
        args.prompt_tokens
    );
    let mut results = journal(args, &bench.header(what))?;
    let bar = Items::new("eval", bench.rows.len() * texts.len(), "texts");
    ensure!(
        args.model.is_some(),
        "--perplexity compares with dense attention: name the MODEL as its exporter made it"
    );
    let job = perplexity::Job {
        runtime: &bench.runtime,
        open: &bench.open,
        texts: &texts,
        names: &names,
        rows: &bench.rows,
        batch: args.batch,
        chunk: args.chunk,
        prompt: args.prompt_tokens,
        predict,
        interrupt: &bench.interrupt,
    };
    let interrupted = interruption(job.run(&mut bench.workshop, &mut results, &bar))?;
    bar.finish();
    let mut rows = fidelities(&bench.rows, &results, texts.len());
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
    if let Some(interrupted) = interrupted {
        return Err(finished_rows(
            args,
            interrupted,
            &facts,
            &fidelity_table(&rows),
            &rows,
            bench.rows.len(),
        )?
        .into());
    }
    let figures = if args.html.is_some() || args.figures.is_some() {
        html::fidelity_figures(&rows)?
    } else {
        Vec::new()
    };
    finish(
        args,
        "Fidelity to dense attention",
        &facts,
        &fidelity_table(&rows),
        &figures,
        &rows,
    )
}

fn named(args: &EvalArgs) -> String {
    args.model
        .as_ref()
        .map_or_else(|| "as named".to_owned(), |m| m.display().to_string())
}

/// Whether work was interrupted; any other error stays one.
fn interruption(result: Result<()>) -> Result<Option<Interrupted>> {
    match result {
        Ok(()) => Ok(None),
        Err(e) => e.downcast::<Interrupted>().map(Some),
    }
}

/// Prints the rows that were complete when the work was interrupted, and says where the other results are. Reports are left
/// for a whole run.
fn finished_rows<T: Serialize>(
    args: &EvalArgs,
    interrupted: Interrupted,
    facts: &[String],
    table: &[Vec<String>],
    rows: &[T],
    total: usize,
) -> Result<Interrupted> {
    if !rows.is_empty() || args.json {
        print_rows(args, facts, table, &rows)?;
    }
    let kept = match &args.resume {
        Some(path) => format!(
            "{} keeps what was measured; the same command goes on from there",
            path.display()
        ),
        None => "give --resume FILE to go on from what was measured".to_owned(),
    };
    note(&format!("{} of {total} rows are complete; {kept}", rows.len()));
    Ok(interrupted)
}

fn print_rows(args: &EvalArgs, facts: &[String], table: &[Vec<String>], rows: &impl Serialize) -> Result<()> {
    if args.json {
        print(&format!("{}\n", serde_json::json!({ "facts": facts, "rows": rows })))
    } else {
        print(&markdown(table))
    }
}

/// Prints and writes what was found, each whatever becomes of the other.
fn finish(
    args: &EvalArgs,
    title: &str,
    facts: &[String],
    table: &[Vec<String>],
    figures: &[(String, String)],
    rows: &impl Serialize,
) -> Result<()> {
    let written = write_reports(args, title, facts, table, figures);
    print_rows(args, facts, table, rows).and(written)
}

fn write_reports(
    args: &EvalArgs,
    title: &str,
    facts: &[String],
    table: &[Vec<String>],
    figures: &[(String, String)],
) -> Result<()> {
    if let Some(path) = &args.html {
        write_whole(path, &html::page(title, facts, table, figures))?;
    }
    if let Some(folder) = &args.figures {
        fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        for (name, svg) in figures {
            write_whole(&folder.join(format!("{name}.svg")), svg)?;
        }
    }
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// Whether files can be made in the folder that an output goes to.
fn writable(output: &Path, folder: &Path) -> Result<()> {
    let cannot = || format!("cannot write {}", output.display());
    ensure!(folder.is_dir(), "{}: {} is no folder", cannot(), folder.display());
    tempfile::tempfile_in(folder).map(drop).with_context(cannot)
}

/// Writes beside and renames, so that a failure leaves what was there.
fn write_whole(path: &Path, text: &str) -> Result<()> {
    let folder = folder_of(path);
    let write = || -> Result<()> {
        // As readable as any file that the user makes: temporary files are the owner's alone otherwise.
        let open_to_all = fs::Permissions::from_mode(0o666);
        let mut file = tempfile::Builder::new().permissions(open_to_all).tempfile_in(folder)?;
        file.write_all(text.as_bytes())?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
