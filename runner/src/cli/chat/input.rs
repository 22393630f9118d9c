//! Where a user's lines come from: an editor on a terminal, else standard input.

use std::{
    borrow::Cow,
    fs,
    io::{self, BufRead},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rustyline::{
    Cmd, Config, Context, Editor, EventHandler, Helper, KeyCode, KeyEvent, Modifiers,
    completion::{Completer, Pair},
    error::ReadlineError,
    highlight::Highlighter,
    hint::Hinter,
    history::FileHistory,
    validate::{ValidationContext, ValidationResult, Validator},
};

use super::command::NAMES;
use crate::progress::note;

/// Lines, one after another.
pub enum Input {
    /// From who sits at a terminal.
    Terminal(Box<Terminal>),
    /// From a pipe or a file.
    Lines(io::StdinLock<'static>),
}

/// What came of waiting for a line.
pub enum Got {
    Line(String),
    /// A line that is no text; why.
    Fault(String),
    /// Ctrl-C on the line.
    Dropped,
    End,
}

impl Input {
    /// Waits for the next line.
    pub fn next(&mut self) -> Result<Got> {
        match self {
            Self::Terminal(terminal) => terminal.next(),
            Self::Lines(lines) => {
                let mut line = Vec::new();
                let read = lines.read_until(b'\n', &mut line);
                if read.context("cannot read standard input")? == 0 {
                    return Ok(Got::End);
                }
                Ok(match String::from_utf8(line) {
                    Ok(line) => Got::Line(line),
                    Err(_) => Got::Fault("a line of standard input is no UTF-8 text".to_owned()),
                })
            }
        }
    }
}

/// A terminal with a line editor.
pub struct Terminal {
    editor: Editor<Editing, FileHistory>,
    /// Where lines are kept for the next time.
    history: Option<PathBuf>,
}

/// The most lines that are kept.
const KEPT: usize = 1000;

impl Terminal {
    /// An editor, with the lines of earlier times if there is a file to keep them in.
    pub fn new(history: Option<PathBuf>) -> Result<Self> {
        let failed = "cannot take charge of the terminal";
        let config = Config::builder().max_history_size(KEPT).context(failed)?.build();
        let mut editor = Editor::with_config(config).context(failed)?;
        editor.set_helper(Some(Editing));
        let another = EventHandler::Simple(Cmd::Newline);
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), another);
        let mut terminal = Self { editor, history };
        if let Some(path) = &terminal.history
            && path.exists()
            && let Err(e) = terminal.editor.load_history(path)
        {
            let path = path.display();
            note(&format!(
                "earlier lines cannot be read from {path} ({e}), and none are kept"
            ));
            terminal.history = None;
        }
        Ok(terminal)
    }

    fn next(&mut self) -> Result<Got> {
        match self.editor.readline("> ") {
            Ok(line) => {
                self.keep(&line);
                Ok(Got::Line(line.replace("\\\n", "\n")))
            }
            Err(ReadlineError::Interrupted) => Ok(Got::Dropped),
            Err(ReadlineError::Eof) => Ok(Got::End),
            Err(e) => Err(e).context("cannot read from the terminal"),
        }
    }

    /// Keeps a line at once: a conversation may end by a signal.
    fn keep(&mut self, line: &str) {
        let kept = || -> Result<()> {
            if self.editor.add_history_entry(line)?
                && let Some(path) = &self.history
            {
                if let Some(folder) = path.parent() {
                    fs::create_dir_all(folder)?;
                }
                self.editor.append_history(path)?;
            }
            Ok(())
        }();
        if let Err(e) = kept {
            note(&format!("lines are not kept for the next time: {e:#}"));
            self.history = None;
        }
    }
}

/// The file that lines are kept in: in the user's data folder.
pub fn history_file() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let data = variable("XDG_DATA_HOME").or_else(|| variable("HOME").map(|home| home.join(".local/share")));
    Some(data?.join(Path::new("retro-attention/chat-history")))
}

/// What the editor knows of a conversation: which lines go on, and the commands' names.
struct Editing;

impl Validator for Editing {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if context.input().ends_with('\\') {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}

impl Completer for Editing {
    type Candidate = Pair;

    fn complete(&self, line: &str, position: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let typed = line.get(..position).filter(|typed| typed.starts_with('/'));
        let names = NAMES
            .iter()
            .filter(|name| typed.is_some_and(|typed| name.starts_with(typed)));
        let pair = |name: &&str| Pair {
            display: (*name).to_owned(),
            replacement: (*name).to_owned(),
        };
        Ok((0, names.map(pair).collect()))
    }
}

impl Hinter for Editing {
    type Hint = String;
}

impl Highlighter for Editing {
    fn highlight<'l>(&self, line: &'l str, _: usize) -> Cow<'l, str> {
        Cow::Borrowed(line)
    }
}

impl Helper for Editing {}
