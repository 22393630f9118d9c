//! `retro-run chat`: a conversation with a model.

mod command;
mod input;

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::ProgressBar;
use retro_contract::limits;

use self::{
    command::{Command, HELP, Line, parse},
    input::{Got, Input, Terminal, history_file},
};
use super::{
    args::{ModelArgs, ReadingArgs, SamplingArgs, SessionArgs},
    output::STDOUT,
    template::TemplateArgs,
};
use crate::{
    Interrupt, Model, ModelTokenizer,
    built_model_cache::prepare,
    chat::{self, Answer, Chat, ChatOptions},
    decoder::{
        self,
        generate::{Event, Finish},
    },
    interrupt::Signals,
    progress::{self, note},
};

#[derive(Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    template: TemplateArgs,
    /// Maximum number of tokens of an answer [default: until the turn ends or the context is full].
    #[arg(short, long, value_name = "N")]
    n_predict: Option<usize>,
    /// Context size: maximum tokens of the whole conversation [default: the model's context, 8192 at most].
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    /// Stop string; may be given several times.
    #[arg(long, value_name = "STR")]
    stop: Vec<String>,
    /// Go on with a conversation that /save wrote.
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// Keep no typed lines for the next time. They are kept in retro-attention/chat-history of the user's data folder
    /// ($XDG_DATA_HOME, else ~/.local/share).
    #[arg(long)]
    no_history: bool,
    #[command(flatten)]
    reading: ReadingArgs,
    #[command(flatten)]
    session: SessionArgs,
    // Last: its help heading holds for all options after it.
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
///
/// # Errors
/// When an option or the model cannot be used, stdout takes nothing, or a line of standard input failed.
pub fn chat(args: &ChatArgs, signals: &Signals) -> Result<()> {
    args.sampling.options()?;
    args.reading.check()?;
    let rendering = args.template.rendering()?;
    let named = &args.model.path()?;
    let (runtime, open) = args.session.load()?;
    let window = args.reading.window.unwrap_or(limits::WINDOW);
    let folder = prepare(named, window, open.device, open.plugin.is_some(), &mut note)?;
    let model = Model::open(&runtime, &folder, &open)?;
    let tokenizer = ModelTokenizer::open(&model.folder)?;
    let template = args.template.demand(&model.folder)?;
    let (sampling, said) = args.sampling.options_for(&model.folder.sampling)?;
    let interrupt = signals.listen();
    signals.rest();
    let options = ChatOptions {
        context: args.ctx_size,
        max_answer: args.n_predict,
        chunk: args.reading.chunk,
        sampling,
        stops: args.stop.clone(),
        rendering,
        interrupt: interrupt.clone(),
        ..ChatOptions::new(args.reading.policy(&model)?)
    };
    note(&model.plugin_line());
    if let Some(line) = model.device_line() {
        note(&line);
    }
    said.iter().for_each(|line| note(line));
    let mut chat = Chat::new(model, tokenizer, template, options)?;
    if let Some(path) = &args.load {
        chat.set_messages(chat::read(path)?);
    }
    if let Some(text) = &args.template.system {
        chat.set_system(Some(text));
    }
    let seated = io::stdin().is_terminal() && io::stdout().is_terminal();
    let input = if seated {
        let history = history_file().filter(|_| !args.no_history);
        note(&format!(
            "a context of {} tokens; /help lists the commands, Ctrl-D ends",
            chat.capacity()
        ));
        Input::Terminal(Box::new(Terminal::new(history)?))
    } else {
        Input::Lines(io::stdin().lock())
    };
    let session = Session {
        chat,
        signals,
        interrupt,
        seated,
        cut_at: args.n_predict,
    };
    session.lead(input)
}

/// The most tokens that are read without a progress bar.
const SHORT: usize = 256;

struct Session<'a> {
    chat: Chat,
    signals: &'a Signals,
    interrupt: Interrupt,
    /// Somebody sits at a terminal.
    seated: bool,
    /// The most tokens of an answer that were asked for.
    cut_at: Option<usize>,
}

/// What ends a conversation, and what the user is told before it goes on.
enum Trouble {
    Ends(anyhow::Error),
    Told(String),
}

impl From<chat::Error> for Trouble {
    fn from(error: chat::Error) -> Self {
        Self::Told(error.to_string())
    }
}

impl From<decoder::Error> for Trouble {
    fn from(error: decoder::Error) -> Self {
        chat::Error::from(error).into()
    }
}

impl Session<'_> {
    fn lead(mut self, mut input: Input) -> Result<()> {
        let mut failed = 0;
        loop {
            let line = match input.next()? {
                Got::Line(line) => parse(&line),
                Got::Fault(reason) => Err(reason),
                Got::Dropped => {
                    note("Ctrl-D or /exit ends the conversation");
                    continue;
                }
                Got::End => break,
            };
            let done = match line {
                Ok(Line::Blank) => continue,
                Ok(Line::Do(Command::Exit)) => break,
                Ok(Line::Do(command)) => self.obey(&command),
                Ok(Line::Say(text)) => self.say(&text),
                Err(reason) => Err(Trouble::Told(reason)),
            };
            match done {
                Ok(()) => {}
                Err(Trouble::Ends(e)) => return Err(e),
                Err(Trouble::Told(reason)) => {
                    failed += 1;
                    note(&format!("error: {}", crate::runtime::one_line(&reason)));
                }
            }
        }
        match failed {
            0 => Ok(()),
            _ if self.seated => Ok(()),
            1 => bail!("a line of standard input failed (above)"),
            n => bail!("{n} lines of standard input failed (above)"),
        }
    }

    fn obey(&mut self, command: &Command) -> Result<(), Trouble> {
        match command {
            Command::Help => HELP.iter().for_each(|line| note(line)),
            Command::Exit => {}
            Command::Clear => {
                self.chat.clear();
                let kept = self.chat.system().map_or("", |_| "; the system prompt stays");
                note(&format!("the conversation begins anew{kept}"));
            }
            Command::System(None) => note(self.chat.system().unwrap_or("there is no system prompt")),
            Command::System(Some(text)) => {
                self.chat.set_system(Some(text));
                note("the system prompt is set");
            }
            Command::Save(path) => {
                chat::write(path, self.chat.messages())?;
                note(&format!("{} is written: {}", path.display(), self.messages()));
            }
            Command::Load(path) => self.load(path)?,
            Command::Stats => self.stats(),
        }
        Ok(())
    }

    fn load(&mut self, path: &Path) -> Result<(), Trouble> {
        self.chat.set_messages(chat::read(path)?);
        note(&format!(
            "{} is read: {}, which the model reads with your next one",
            path.display(),
            self.messages()
        ));
        Ok(())
    }

    fn messages(&self) -> String {
        match self.chat.messages().len() {
            1 => "1 message".to_owned(),
            n => format!("{n} messages"),
        }
    }

    fn stats(&self) {
        note(&self.chat.model().plugin_line());
        note(&format!("sampling: {}", self.chat.sampling().describe()));
        let capacity = self.chat.capacity();
        let Some(last) = self.chat.last() else {
            note(&format!(
                "{}, no answer yet; a context of {capacity} tokens",
                self.messages()
            ));
            return;
        };
        last.stats.lines().iter().for_each(|line| note(line));
        note(&format!(
            "{}; context {} of {capacity} tokens ({:.0} %)",
            self.messages(),
            last.used,
            100.0 * last.used as f64 / capacity as f64
        ));
    }

    /// Says something to the model and prints what it answers.
    fn say(&mut self, text: &str) -> Result<(), Trouble> {
        self.signals.listen();
        let mut stdout = io::stdout().lock();
        let mut reading = ProgressBar::hidden();
        let answered = self.chat.say(text, &mut |event| match event {
            Event::Reads(n) => {
                // A short message is read before a bar could be seen.
                reading = progress::bar(n, "prompt", self.seated && n > SHORT);
                Ok(())
            }
            Event::Prompt(n) => {
                reading.inc(n as u64);
                Ok(())
            }
            Event::Text(piece) => {
                reading.finish_and_clear();
                put(&mut stdout, piece)
            }
        });
        reading.finish_and_clear();
        let interrupted = self.interrupt.raised();
        self.signals.rest();
        let answer = answered?.clone();
        put(&mut stdout, "\n")?;
        self.remark(&answer);
        match interrupted {
            // At a terminal Ctrl-C is about the answer, elsewhere about the program.
            Some(signal) if !(self.seated && signal.is_ctrl_c()) => Err(Trouble::Ends(signal.into())),
            _ => Ok(()),
        }
    }

    /// What there is to tell of an answer.
    fn remark(&self, answer: &Answer) {
        note(&format!("[{}]", figures(answer, self.chat.capacity())));
        match (answer.finish, self.cut_at) {
            (Finish::Interrupted, _) if answer.text.is_empty() => {
                note("stopped: your message is not part of the conversation")
            }
            (Finish::Interrupted, _) => note("stopped: the conversation goes on with the answer as far as it came"),
            (Finish::Length, Some(most)) if answer.stats.generated_tokens >= most => {
                note(&format!("the answer was cut after {most} tokens (-n)"));
            }
            (Finish::Length, _) => note(&format!(
                "the context of {} tokens is full, and the answer was cut: /clear begins anew",
                self.chat.capacity()
            )),
            _ => {}
        }
    }
}

/// The figures of an answer in a line.
fn figures(answer: &Answer, capacity: usize) -> String {
    let stats = &answer.stats;
    let mut parts = vec![format!(
        "read {}, wrote {} tokens",
        stats.prompt_tokens, stats.generated_tokens
    )];
    parts.extend(stats.decode_rate().map(|rate| format!("{rate:.1} tokens/s")));
    if let (Some(pages), Some(share)) = (stats.reading.pages(), stats.reading.share()) {
        parts.push(format!("{pages:.1} pages a step ({:.0} %)", 100.0 * share));
    }
    parts.push(format!("context {} of {capacity}", answer.used));
    parts.join(", ")
}

fn put(stdout: &mut impl Write, text: &str) -> Result<(), Trouble> {
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.context(STDOUT).map_err(Trouble::Ends)
}
