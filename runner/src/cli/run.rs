//! `retro-run run`: generates text from a prompt.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use retro_contract::limits;
use serde_json::json;

use super::{
    args::{ModelArgs, ReadingArgs, SamplingArgs, SessionArgs},
    output::STDOUT,
    template::TemplateArgs,
};
use crate::{
    Model, ModelFolder, ModelTokenizer,
    built_model_cache::prepare,
    decoder::generate::{Event, Finish, Generation, generate, plan},
    eval::score::read_documents,
    interrupt::Signals,
    progress::{self, note},
    text::chat_template::RenderOptions,
};

#[derive(Args)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    turn: TurnArgs,
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
    #[command(flatten)]
    reading: ReadingArgs,
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

/// Whether the prompt is what a user says to the model, or text that the model goes on with.
#[derive(Args)]
struct TurnArgs {
    /// The prompt is a user's turn, written with the model's chat template. So are -p and -f, without this option, where
    /// the model has a template.
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    template: TemplateArgs,
    /// The prompt is text as it is, whether the model has a template or not.
    #[arg(long, conflicts_with_all = ["chat", "template", "system", "chat_template_kwargs"])]
    no_template: bool,
}

impl RunArgs {
    /// The prompt's tokens: as a turn, or as it is; and whether it is a turn.
    fn tokens(&self, prompt: &str, folder: &ModelFolder, text: &ModelTokenizer) -> Result<(Vec<u32>, bool)> {
        let turn = &self.turn;
        let asked = turn.chat || turn.template.any();
        // The prompts of documents are made for models without a template.
        if turn.no_template || (self.prompt.document.is_some() && !asked) {
            return Ok((text.encode(prompt)?, false));
        }
        let template = if asked {
            turn.template.demand(folder)?
        } else {
            match turn.template.find(folder)? {
                Some(template) => template,
                None => return Ok((text.encode(prompt)?, false)),
            }
        };
        note(&format!(
            "the prompt is a user's turn, by {}; --no-template feeds it as it is",
            turn.template.describe()
        ));
        let options = RenderOptions {
            add_generation_prompt: true,
            ..turn.template.rendering()?
        };
        let system = turn.template.system.as_deref().map(|text| ("system", text));
        let messages = system.into_iter().chain([("user", prompt)]);
        let messages: Vec<_> = messages
            .map(|(role, text)| json!({"role": role, "content": text}))
            .collect();
        Ok((text.encode_as_is(&template.render(&messages, &options)?)?, true))
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
    let mut sampling = args.sampling.options()?;
    args.reading.check()?;
    let prompt = args.prompt.read()?;
    let named = &args.model.path()?;
    let (runtime, open) = args.session.load()?;
    let folder = prepare(
        named,
        args.reading.window.unwrap_or(limits::WINDOW),
        open.device,
        open.plugin.is_some(),
        &mut note,
    )?;
    let mut model = Model::open(&runtime, &folder, &open)?;
    let text = ModelTokenizer::open(&model.folder)?;
    let (tokens, is_turn) = args.tokens(&prompt, &model.folder, &text)?;
    if is_turn {
        let (said, line) = args.sampling.options_for(&model.folder.sampling)?;
        sampling = said;
        line.iter().for_each(|line| note(line));
    }
    let interrupt = signals.listen();
    let options = Generation {
        plan: plan(tokens.len(), args.n_predict, args.ctx_size, model.context_length())?,
        policy: args.reading.policy(&model)?,
        chunk: args.reading.chunk,
        sampling,
        stops: args.stop.clone(),
        more_ends: Vec::new(),
        ignore_eos: args.ignore_eos,
        interrupt: interrupt.clone(),
    };
    options.policy.fits(args.ctx_size.unwrap_or(usize::MAX))?;
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
            Event::Reads(_) => {}
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
