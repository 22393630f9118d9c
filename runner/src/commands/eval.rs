//! `retro-run eval`: documents with known answers under several policies, as a table.

use std::{
    io::{self, Write},
    path::PathBuf,
    str::FromStr,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use retro_contract::Budget;
use serde::Serialize;

use super::LibraryArgs;
use crate::{
    Model, OpenOptions, Runtime, Text,
    batch::Prefilled,
    generate::{CHUNK, Policy},
    progress,
    score::{Document, Scorer, mean_and_error, read_documents},
    stats::{Stats, StatsJson},
};

#[derive(Args)]
pub struct EvalArgs {
    /// Documents: JSON lines with prompt, answers and reference.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// How many of them.
    #[arg(long, default_value_t = 8, value_name = "N")]
    docs: usize,
    /// What a step reads, where a run does not say otherwise [default: as converted].
    #[arg(short, long, value_name = "B")]
    budget: Option<Budget>,
    /// Documents decoded at a time.
    #[arg(long, default_value_t = 8, value_name = "N")]
    batch: usize,
    /// A policy: NAME=DIR[,window=W][,budget=B]; may be given several times. Runs of one DIR one after another share its prompts.
    #[arg(long = "run", value_name = "NAME=DIR", required = true)]
    runs: Vec<RunSpec>,
    /// How outputs are judged.
    #[arg(long, default_value = "ledger", value_name = "NAME")]
    score: Scorer,
    /// Tokens to generate at most a document [default: a little more than the references have, else until the context is full].
    #[arg(short, long, value_name = "N")]
    n_predict: Option<usize>,
    /// Prompt tokens fed at a time.
    #[arg(long, default_value_t = CHUNK, value_name = "TOKENS")]
    chunk: usize,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    libraries: LibraryArgs,
}

/// A policy to compare.
#[derive(Clone, Debug, PartialEq)]
pub struct RunSpec {
    name: String,
    folder: PathBuf,
    window: Option<usize>,
    budget: Option<Budget>,
}

impl FromStr for RunSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        const FORM: &str = "expected NAME=DIR[,window=W][,budget=B]";
        // A name may hold "=" ("Retro w=2"): the folder starts after the last one before the first comma.
        let (head, options) = s.split_once(',').unwrap_or((s, ""));
        let (name, folder) = head.rsplit_once('=').ok_or(FORM)?;
        if name.is_empty() || folder.is_empty() {
            return Err(FORM.into());
        }
        let mut spec = Self {
            name: name.into(),
            folder: folder.into(),
            window: None,
            budget: None,
        };
        for option in options.split(',').filter(|o| !o.is_empty()) {
            match option.split_once('=') {
                Some(("window", w)) => spec.window = Some(w.parse().map_err(|_| format!("window {w:?} is no number"))?),
                Some(("budget", b)) => spec.budget = Some(b.parse()?),
                _ => return Err(format!("{option:?}: {FORM}")),
            }
        }
        Ok(spec)
    }
}

/// One line of the table.
#[derive(Serialize)]
struct Row {
    policy: String,
    window: usize,
    /// Percent over all documents.
    right: f64,
    /// Standard error over documents; none for a single one.
    right_error: Option<f64>,
    documents: usize,
    stats: StatsJson,
}

/// Runs the verb.
///
/// # Errors
/// Whatever keeps a policy from being measured, in one line.
pub fn eval(args: &EvalArgs) -> Result<()> {
    ensure!(args.docs >= 1, "--docs 0: ask for at least one document");
    ensure!(args.batch >= 1, "--batch 0: decode at least one document at a time");
    ensure!(args.chunk >= 1, "--chunk 0: a chunk has at least one token");
    let documents = read_documents(&args.data, args.docs)?;
    let (runtime, open) = args.libraries.load()?;
    let mut rows = Vec::new();
    // Neighbours of one folder share its session and its prompts' state.
    for group in args.runs.chunk_by(|a, b| a.folder == b.folder) {
        rows.extend(evaluate(args, &runtime, &open, &documents, group)?);
    }
    let mut stdout = io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::json!({ "rows": rows }))?;
    } else {
        write!(stdout, "{}", table(&rows))?;
    }
    stdout.flush()?;
    Ok(())
}

fn evaluate(
    args: &EvalArgs,
    runtime: &Runtime,
    open: &OpenOptions,
    documents: &[Document],
    group: &[RunSpec],
) -> Result<Vec<Row>> {
    let folder = group.first().map(|spec| spec.folder.as_path()).context("no run")?;
    let mut model = Model::open(runtime, folder, open)?;
    let text = Text::open(&model.folder)?;
    eprintln!("{}: {}", folder.display(), model.plugin_line());
    if let Some(line) = model.device_line() {
        eprintln!("{line}");
    }
    let policies = group
        .iter()
        .map(|spec| {
            // One budget for all: models that were not converted have none to set.
            let budget = spec.budget.or(args.budget.filter(|_| model.retro.is_some()));
            Policy::new(&model, spec.window, budget).with_context(|| spec.name.clone())
        })
        .collect::<Result<Vec<Policy>>>()?;
    let batch = if model.fixed_capacity { args.batch } else { 1 };
    let mut shares: Vec<Vec<f64>> = vec![Vec::new(); group.len()];
    let mut stats = vec![Stats::default(); group.len()];
    for part in documents.chunks(batch) {
        let prompts = part
            .iter()
            .map(|d| text.encode(&d.prompt))
            .collect::<Result<Vec<_>>>()?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let max_new = max_new(args, &model, &text, part, longest)?;
        let total: usize = prompts.iter().map(Vec::len).sum();
        let count = prompts.len();
        let mut prefilled: Option<Prefilled> = None;
        for (i, (spec, policy)) in group.iter().zip(&policies).enumerate() {
            let reusable = prefilled.take().filter(Prefilled::reusable);
            let mut ready = match reusable {
                Some(p) => p,
                None => {
                    let bar = progress::bar(total, &format!("{} prompts", folder.display()), true);
                    let p = Prefilled::new(&mut model, prompts.clone(), longest + max_new, args.chunk, |n| {
                        bar.inc(n as u64)
                    })?;
                    bar.finish_and_clear();
                    p
                }
            };
            let bar = progress::bar(count * max_new, &spec.name, true);
            let (outputs, figures) = ready.decode(&mut model, *policy, max_new, |n| bar.inc(n as u64))?;
            bar.finish_and_clear();
            for (document, output) in part.iter().zip(&outputs) {
                let right = args.score.judge(&text.decode(output)?, &document.answers);
                let share = right.iter().filter(|&&r| r).count() as f64 / right.len().max(1) as f64;
                if let Some(list) = shares.get_mut(i) {
                    list.push(100.0 * share);
                }
            }
            if let Some(sum) = stats.get_mut(i) {
                add(sum, &figures);
            }
            prefilled = Some(ready);
        }
    }
    let rows = group
        .iter()
        .zip(&policies)
        .zip(shares.iter().zip(&stats))
        .map(|((spec, policy), (shares, stats))| {
            let (right, error) = mean_and_error(shares);
            Row {
                policy: spec.name.clone(),
                window: policy.window,
                right,
                right_error: error.is_finite().then_some(error),
                documents: shares.len(),
                stats: stats.json(),
            }
        });
    Ok(rows.collect())
}

/// Tokens that a free-running output may have: those of the longest reference and a few more, within the context.
fn max_new(args: &EvalArgs, model: &Model, text: &Text, documents: &[Document], longest: usize) -> Result<usize> {
    let room = model.context_length().map(|c| c.saturating_sub(longest));
    let references = documents
        .iter()
        .map(|d| d.reference.as_deref().map(|r| text.encode(r)).transpose());
    let references = references.collect::<Result<Option<Vec<_>>>>();
    let of_references = references?.map(|list| list.iter().map(Vec::len).max().unwrap_or(0) + 4);
    let wanted = args.n_predict.or(of_references).or(room);
    let wanted = wanted.context("neither the documents nor the model say how long outputs are: give -n")?;
    let most = room.map_or(wanted, |room| wanted.min(room));
    ensure!(
        most >= 1,
        "a prompt of {longest} tokens leaves no room in the model's context"
    );
    Ok(most)
}

fn add(sum: &mut Stats, part: &Stats) {
    sum.prompt_tokens += part.prompt_tokens;
    sum.prompt_time += part.prompt_time;
    sum.first_token += part.first_token;
    sum.generated_tokens += part.generated_tokens;
    sum.decoded_tokens += part.decoded_tokens;
    sum.decode_time += part.decode_time;
    sum.reading.add(&part.reading);
    sum.kv_bytes = sum.kv_bytes.max(part.kv_bytes);
    sum.state_bytes = sum.state_bytes.max(part.state_bytes);
}

/// Markdown, with columns wide enough to be read as they are.
fn table(rows: &[Row]) -> String {
    let mut lines = vec![["policy", "right answers %", "KV pages read", "exposure", "tokens/s"].map(str::to_owned)];
    for row in rows {
        let error = row.right_error.map_or_else(String::new, |e| format!(" ± {e:.1}"));
        let pages = match (row.stats.share_of_valid_pages, row.stats.pages_per_kv_head_and_step) {
            (Some(share), Some(pages)) => format!("{:.1} % ({pages:.1})", 100.0 * share),
            _ => "100 %".to_owned(),
        };
        let exposure = row
            .stats
            .effective_exposure
            .map_or_else(|| "-".to_owned(), |e| format!("{e:.2}"));
        let speed = row
            .stats
            .decode_tokens_per_second
            .map_or_else(|| "-".to_owned(), |r| format!("{r:.0}"));
        lines.push([
            row.policy.clone(),
            format!("{:.1}{error}", row.right),
            pages,
            exposure,
            speed,
        ]);
    }
    let width = |column: usize| {
        lines
            .iter()
            .filter_map(|l| l.get(column))
            .map(|c| c.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; 5] = std::array::from_fn(width);
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        for (cell, width) in line.iter().zip(widths) {
            out += &format!("| {cell}{} ", " ".repeat(width - cell.chars().count().min(width)));
        }
        out += "|\n";
        if i == 0 {
            widths.iter().for_each(|w| out += &format!("|{}", "-".repeat(w + 2)));
            out += "|\n";
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_parse_with_equals_signs_in_their_names() {
        let spec: RunSpec = "Retro w=2=out/ledger-retro,window=2,budget=0.25".parse().unwrap();
        assert_eq!(
            (spec.name.as_str(), spec.folder.to_str()),
            ("Retro w=2", Some("out/ledger-retro"))
        );
        assert_eq!((spec.window, spec.budget), (Some(2), Some(Budget::Ratio(0.25))));
        let plain: RunSpec = "dense=out/ledger".parse().unwrap();
        assert_eq!((plain.window, plain.budget), (None, None));
        for bad in ["dense", "=out", "a=", "a=b,window=x", "a=b,pages=3", "a=b,budget=2.5"] {
            assert!(bad.parse::<RunSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_table_is_aligned_markdown() {
        let row = Row {
            policy: "dense".into(),
            window: 1,
            right: 100.0,
            right_error: Some(0.0),
            documents: 8,
            stats: Stats::default().json(),
        };
        let text = table(&[row]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[2].starts_with("| dense  | 100.0 ± 0.0"), "{text}");
        assert!(
            lines.iter().all(|l| l.chars().count() == lines[0].chars().count()),
            "{text}"
        );
    }
}
