//! `retro-run eval`: compares attention policies by answers on documents, or by KL divergence from dense attention.

mod args;
mod report;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use xxhash_rust::xxh3::Xxh3;

pub use self::args::EvalArgs;
use self::{
    args::TaskArgs,
    report::{Report, writable},
};
use super::output::{folder_of, write_whole};
use crate::{
    Interrupt, Interrupted, ModelTokenizer, OpenOptions, Runtime,
    built_model_cache::folder_key,
    decoder::session::Steps,
    eval::{
        self,
        converted_models::ConvertedModelCache,
        documents, html,
        journal::{Header, Journal},
        perplexity,
        policy::{ModelSource, PolicyKind, PolicyRow, PolicySpec, rows},
        score::{Document, prepare_answers, read_documents},
        scorer::{Answers, Scorer},
        summary::{documents as summarize_documents, documents_table, fidelities, fidelity_table},
        tasks::{self, Task, TaskOptions},
    },
    interrupt::Signals,
    model_folder::{ModelFolder, chosen},
    model_spec::ModelSpec,
    progress::Items,
};

/// The row of a model given by `--run`.
fn row(run: &ModelSpec) -> Result<PolicyRow> {
    Ok(PolicyRow {
        kind: PolicyKind::Folder,
        label: run.name.clone(),
        source: ModelSource::Graph(chosen(&run.folder, run.graph.as_deref())?),
        window: run.options.window,
        budget: run.options.budget,
        rectify: run.options.rectify,
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
    ensure!(args.task.cases >= 1, "--cases 0: ask for at least one document");
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
    if let Some(path) = &args.task.save_data {
        writable(path, folder_of(path)).context("--save-data")?;
    }
    if args.perplexity.is_empty() {
        eval_documents(args, signals.listen())
    } else {
        eval_texts(args, signals.listen())
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
            Some(model) => ConvertedModelCache::new(model, args.graph.as_deref(), args.session.device())?,
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
        let (runtime, open) = args.session.load_with(Steps::Plain)?;
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

    /// The graph whose tokenizer counts.
    fn graph(&self, args: &EvalArgs) -> Result<PathBuf> {
        match (&args.model, args.runs.first()) {
            (None, Some(run)) => Ok(chosen(&run.folder, run.graph.as_deref())?),
            _ => Ok(self.converted.graph().to_owned()),
        }
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

/// Documents, and what they are.
struct Questions {
    documents: Vec<Document>,
    answers: Vec<Answers>,
    /// What they are, for the reader.
    name: String,
    /// Identifies them in the file of results.
    key: String,
}

/// The documents of `--data`.
fn read_questions(args: &EvalArgs, data: &Path) -> Result<Questions> {
    let documents = read_documents(data, args.docs.unwrap_or(usize::MAX))?;
    let answers = prepare_answers(data, &documents, args.score)?;
    let text = fs::read(data).with_context(|| format!("cannot read {}", data.display()))?;
    // The whole file: documents beyond --docs still decide the longest reference.
    let print = fingerprint(&[&text]);
    let mut key = format!("{} documents {print:016x}, -n {:?}", documents.len(), args.n_predict);
    if args.score != Scorer::default() {
        key += &format!(", scored as {:?}", args.score);
    }
    Ok(Questions {
        name: format!("{} documents of {}", documents.len(), data.display()),
        documents,
        answers,
        key,
    })
}

/// The documents of `--task`, made in tokens of the model's.
fn make_questions(args: &EvalArgs, task: Task, graph: &Path) -> Result<Questions> {
    let TaskArgs { cases, seed, .. } = args.task;
    let read = |path: &PathBuf| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let texts = args.task.text.iter().map(read).collect::<Result<Vec<String>>>()?;
    let tokenizer = ModelTokenizer::open(&ModelFolder::open(graph, None)?)?;
    let options = TaskOptions {
        task,
        lengths: &args.task.length,
        cases,
        seed,
        texts: &texts,
    };
    let documents = tasks::documents(&options, |text| Ok(tokenizer.encode(text)?.len()))?;
    let answers = prepare_answers(Path::new("--task"), &documents, Scorer::default())?;
    let lines = documents.iter().map(serde_json::to_string);
    let text = lines.collect::<Result<Vec<String>, _>>()?.join("\n") + "\n";
    if let Some(path) = &args.task.save_data {
        write_whole(path, &text)?;
    }
    let print = fingerprint(&[&text]);
    Ok(Questions {
        name: format!(
            "{cases} cases of {} of {} tokens, seed {seed}",
            task.name(),
            args.task.length
        ),
        key: format!("{cases} cases {print:016x}, -n {:?}", args.n_predict),
        documents,
        answers,
    })
}

fn eval_documents(args: &EvalArgs, interrupt: Interrupt) -> Result<()> {
    // A file's lines are checked before models are converted.
    let read = args
        .data
        .as_deref()
        .map(|data| read_questions(args, data))
        .transpose()?;
    let mut comparison = Comparison::new(args, interrupt)?;
    let questions = match (read, args.task.task) {
        (Some(questions), _) => questions,
        (None, Some(task)) => make_questions(args, task, &comparison.graph(args)?)?,
        (None, None) => bail!("name documents with --data or --task"),
    };
    let documents = &questions.documents;
    let dense = if args.dense_questions { ", dense questions" } else { "" };
    let mut results = journal(args, &comparison.header(questions.key.clone() + dense))?;
    let bar = Items::new("eval", comparison.rows.len() * documents.len(), "documents");
    let job = documents::DocumentsJob {
        runtime: &comparison.runtime,
        open: &comparison.open,
        documents,
        answers: &questions.answers,
        rows: &comparison.rows,
        batch: args.batch,
        chunk: args.chunk,
        n_predict: args.n_predict,
        dense_questions: args.dense_questions,
        interrupt: &comparison.interrupt,
    };
    let interrupted = interruption(job.run(&mut comparison.converted, &mut results, &bar))?;
    bar.finish();
    let mut rows = summarize_documents(&comparison.rows, &results, documents.len());
    if interrupted.is_some() {
        rows.retain(|row| row.documents == documents.len());
    }
    let facts = [
        format!("model {}, {}", named(args), questions.name),
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
