//! `retro-run run`: generates text from a prompt.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use retro_contract::{Budget, limits};
use serde_json::json;

use super::{args::SessionArgs, output::STDOUT};
use crate::{
    Model, ModelTokenizer,
    built_model_cache::prepare,
    decoder::{
        decode_loop::{CHUNK, Policy},
        generate::{Event, Finish, Generation, generate, plan},
        sampling::Sampling,
    },
    eval::score::read_documents,
    interrupt::Signals,
    model_folder::chosen,
    progress::{self, note},
};

#[derive(Args)]
pub struct RunArgs {
    /// Model folder (model.onnx, genai_config.json or config.json, tokenizer.json), ONNX file, or folder of Llama
    /// weights.
    #[arg(value_name = "DIR", required_unless_present = "model", conflicts_with = "model")]
    folder: Option<PathBuf>,
    /// Same as DIR.
    #[arg(short, long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Graph to use from a folder with several: its file name (model_q4f16.onnx) or variant (q4f16).
    #[arg(long, value_name = "NAME")]
    graph: Option<String>,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Maximum number of tokens to generate [default: until end of text or the context is full].
    #[arg(short, long, value_name = "N")]
    n_predict: Option<usize>,
    /// Context size: maximum tokens of prompt and output [default: as needed, up to the model's context].
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    /// Stop string; may be given several times.
    #[arg(long, value_name = "STR")]
    stop: Vec<String>,
    /// Continue past the end-of-text token.
    #[arg(long)]
    ignore_eos: bool,
    /// Window: tokens fed per decoding step, from 1 (Quest, no correction) to the converted model's [default: that].
    #[arg(short, long, value_name = "W")]
    window: Option<usize>,
    /// Budget: what a decoding step reads of the cache, as a share (0.15) or in tokens (2048) [default: as converted].
    #[arg(short, long, value_name = "B")]
    budget: Option<Budget>,
    /// Prompt tokens per prefill chunk.
    #[arg(long, default_value_t = CHUNK, value_name = "TOKENS")]
    chunk: usize,
    /// Print the text at the end instead of streaming it.
    #[arg(long)]
    no_stream: bool,
    /// Print one JSON object: text, tokens, statistics.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    session: SessionArgs,
    // Last: its help heading holds for all options after it.
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// The prompt: one of three options.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct PromptArgs {
    /// Prompt text.
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Read the prompt from a file.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Use the prompt of document N (from 0) of a JSON-lines file: FILE.jsonl:N.
    #[arg(long, value_name = "FILE:N")]
    document: Option<String>,
}

#[derive(Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Random seed.
    #[arg(short, long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Temperature; 0 is greedy decoding.
    #[arg(long, default_value_t = 0.0, value_name = "X", allow_negative_numbers = true)]
    temp: f32,
    /// Top-k sampling: keep the K most likely tokens; 0 keeps all.
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Top-p sampling: keep the most likely tokens up to this cumulative probability.
    #[arg(long, default_value_t = 1.0, value_name = "P", allow_negative_numbers = true)]
    top_p: f32,
    /// Min-p sampling: keep tokens with at least this share of the top token's probability.
    #[arg(long, default_value_t = 0.0, value_name = "P", allow_negative_numbers = true)]
    min_p: f32,
    /// Repetition penalty over the last 64 tokens; 1 is off.
    #[arg(long, default_value_t = 1.0, value_name = "X", allow_negative_numbers = true)]
    repeat_penalty: f32,
}

impl SamplingArgs {
    fn options(&self) -> Result<Sampling> {
        let options = Sampling {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed,
        };
        options.check()?;
        Ok(options)
    }
}

impl PromptArgs {
    fn read(&self) -> Result<String> {
        if let Some(text) = &self.prompt {
            return Ok(text.clone());
        }
        if let Some(path) = &self.file {
            return fs::read_to_string(path).with_context(|| format!("cannot read the prompt {}", path.display()));
        }
        let Some(document) = &self.document else {
            bail!("give a prompt with -p, -f or --document")
        };
        let place = document
            .rsplit_once(':')
            .and_then(|(file, n)| Some((file, n.parse::<usize>().ok()?)));
        let (file, n) = place.with_context(|| format!("--document {document:?}: expected FILE.jsonl:N"))?;
        let documents = read_documents(Path::new(file), n.saturating_add(1))?;
        let count = documents.len();
        let found = documents.into_iter().nth(n);
        found
            .map(|d| d.text())
            .with_context(|| format!("{file} has no document {n}: it holds {count}"))
    }
}

/// Runs the command.
///
/// # Errors
/// When an option, the model or the prompt cannot be used, or ONNX Runtime fails.
pub fn run(args: &RunArgs, signals: &Signals) -> Result<()> {
    let sampling = args.sampling.options()?;
    ensure!(args.chunk >= 1, "--chunk 0: a chunk has at least one token");
    let prompt = args.prompt.read()?;
    let named = args
        .folder
        .as_ref()
        .or(args.model.as_ref())
        .context("name a model folder")?;
    let named = &chosen(named, args.graph.as_deref())?;
    let (runtime, open) = args.session.load()?;
    let folder = prepare(
        named,
        args.window.unwrap_or(limits::WINDOW),
        open.plugin.is_some(),
        &mut note,
    )?;
    let mut model = Model::open(&runtime, &folder, &open)?;
    let text = ModelTokenizer::open(&model.folder)?;
    let tokens = text.encode(&prompt)?;
    let interrupt = signals.listen();
    let options = Generation {
        plan: plan(tokens.len(), args.n_predict, args.ctx_size, model.context_length())?,
        policy: Policy::new(&model, args.window, args.budget)?,
        chunk: args.chunk,
        sampling,
        stops: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        interrupt: interrupt.clone(),
    };
    note(&model.plugin_line());
    if let Some(line) = model.device_line() {
        note(&line);
    }

    let stream = !args.no_stream && !args.json;
    let mut stdout = io::stdout().lock();
    // A bar would tear text that is streamed to the same terminal.
    let text_shows = stream && io::stdout().is_terminal();
    let reading = progress::bar(tokens.len(), "prompt", true);
    let writing = progress::bar(options.plan.max_new, "text", !text_shows);
    let output = generate(&mut model, &text, &tokens, &options, &mut |event| -> Result<()> {
        match event {
            Event::Prompt(n) => reading.inc(n as u64),
            Event::Text(piece) => {
                reading.finish_and_clear();
                writing.inc(1);
                if stream {
                    let written = stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush());
                    written.context(STDOUT)?;
                }
            }
        }
        Ok(())
    });
    reading.finish_and_clear();
    writing.finish_and_clear();
    let output = output?;
    let rest = if args.json {
        let object = json!({
            "text": output.text,
            "tokens": output.tokens,
            "finish": output.finish,
            "window": options.policy.window,
            "stats": output.stats.json(),
        });
        format!("{object}\n")
    } else {
        // The text unchanged, and a line end for the terminal.
        let text = if stream { "" } else { output.text.as_str() };
        format!("{text}\n")
    };
    let written = stdout.write_all(rest.as_bytes()).and_then(|()| stdout.flush());
    written.context(STDOUT)?;
    for line in output.stats.lines() {
        note(&line);
    }
    match output.finish {
        Finish::Interrupted => Ok(interrupt.check()?),
        Finish::Length if args.n_predict.is_none() => {
            note(&format!("the context of {} tokens is full", options.plan.capacity));
            Ok(())
        }
        _ => Ok(()),
    }
}
