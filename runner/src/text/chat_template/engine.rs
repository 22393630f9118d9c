//! Compiles and runs templates.

use std::{collections::BTreeMap, error::Error as _, io, path::PathBuf, sync::mpsc, thread, time::Duration};

use minijinja::{
    AutoEscape, Environment, ErrorKind,
    syntax::SyntaxConfig,
    value::{Serde, Value as Jinja},
};
use retro_runtime::one_line;
use serde_json::Value;

use crate::text::chat_template::{
    RenderOptions,
    conversation::Conversation,
    error::{Error, Place, Result},
    functions::{self, Refusal},
    generation::without_generation_blocks,
    python,
    source::{DEFAULT, Source},
};

/// What a template may do for any conversation: steps, and 64 bytes made for each. Real ones need a few thousand.
const BASE_FUEL: u64 = 1_000_000;

/// More than that is not given, however long the conversation.
const MAX_FUEL: u64 = 8_000_000;

/// Bytes of text for each step that a template may do: conversations count in both.
const TEXT_PER_FUEL: usize = 16;

/// Real ones take milliseconds.
const DEADLINE: Duration = Duration::from_secs(10);

/// Stack for nested values. It is reserved; what is not used takes no memory.
const BASE_STACK: usize = 64 << 20;
const STACK_PER_FUEL: usize = 256;
const STACK_PER_BYTE: usize = 2048;

/// Characters of the engine's or a template's message that an error line shows.
const MESSAGE_CHARACTERS: usize = 400;

/// The templates of a file, compiled.
pub struct Engine {
    environment: Environment<'static>,
    path: PathBuf,
    names: Vec<String>,
}

/// A template that was chosen.
pub struct Template<'a> {
    engine: &'a Engine,
    name: &'a str,
}

impl Engine {
    pub fn new(source: Source) -> Result<Self> {
        let bytes: usize = source.templates.values().map(String::len).sum();
        let stack = BASE_STACK + bytes * STACK_PER_BYTE;
        // The engine reads nested expressions by recursion, and some of a byte each.
        let thread = thread::Builder::new().stack_size(stack).spawn(|| Self::compile(source));
        let thread = thread.map_err(|source| Error::Thread { stack, source })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn compile(source: Source) -> Result<Self> {
        let mut environment = environment();
        let mut names = Vec::new();
        for (name, text) in source.templates {
            let text = text.replace("\r\n", "\n").replace('\r', "\n");
            let text = without_generation_blocks(&text).into_owned();
            environment
                .add_template_owned(name.clone(), text)
                .map_err(|e| Error::Syntax {
                    at: place(&source.path, &name, e.line()),
                    reason: message(&e),
                })?;
            names.push(name);
        }
        Ok(Self {
            environment,
            path: source.path,
            names,
        })
    }

    /// The template to use: for tools the one named so, if there is one.
    pub fn choose(&self, tools: bool) -> Result<Template<'_>> {
        let wanted = if tools { &["tool_use", DEFAULT][..] } else { &[DEFAULT] };
        let found = wanted
            .iter()
            .find_map(|wanted| self.names.iter().find(|name| name == wanted));
        let name = found.ok_or_else(|| Error::NoDefault {
            path: self.path.clone(),
            names: self.names.join(", "),
        })?;
        Ok(Template { engine: self, name })
    }
}

impl Template<'_> {
    /// Renders a conversation. Later variables win.
    pub fn render<'v>(
        &self,
        conversation: &Conversation,
        variables: impl Iterator<Item = (&'v String, &'v Value)>,
        options: &RenderOptions,
    ) -> Result<String> {
        let now = options.now.clone();
        let mut context: BTreeMap<String, Jinja> = BTreeMap::from([(
            "strftime_now".to_owned(),
            Jinja::from_function(move |format: &str| functions::strftime(now.as_ref(), format)),
        )]);
        context.extend(variables.map(|(name, value)| (name.clone(), Jinja::from(Serde(value)))));
        let own = [
            ("messages", Jinja::from(Serde(&conversation.messages))),
            ("tools", Jinja::from(Serde(&options.tools))),
            ("documents", Jinja::from(Serde(&options.documents))),
            ("add_generation_prompt", options.add_generation_prompt.into()),
        ];
        context.extend(own.map(|(name, value)| (name.to_owned(), value)));
        let fuel = fuel(conversation, options);
        let mut environment = self.engine.environment.clone();
        environment.set_fuel(Some(fuel));
        self.render_apart(environment, context, fuel as usize)
    }

    /// Renders in a thread of its own: the engine goes through nested values by recursion, and a few steps nest a value
    /// once more, which takes stack; and it joins lists without counting the steps that going through them takes, which
    /// only a clock ends. A thread that is given up ends with the program.
    fn render_apart(
        &self,
        environment: Environment<'static>,
        context: BTreeMap<String, Jinja>,
        fuel: usize,
    ) -> Result<String> {
        let stack = BASE_STACK + fuel * STACK_PER_FUEL;
        let (send, receive) = mpsc::channel();
        let name = self.name.to_owned();
        let thread = thread::Builder::new().stack_size(stack).spawn(move || {
            let template = environment.get_template(&name);
            let mut text = BoundedText::new(fuel * TEXT_PER_FUEL);
            let rendered = template.and_then(|template| template.render_captured_to(context, &mut text).map(drop));
            // Nobody listens any more once the time is over.
            _ = send.send(rendered.map(|()| text.text));
        });
        let thread = thread.map_err(|source| Error::Thread { stack, source })?;
        match receive.recv_timeout(DEADLINE) {
            Ok(rendered) => rendered.map_err(|e| self.error(&e)),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(Error::OutOfFuel { at: self.place() }),
            Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => Err(Error::OutOfFuel { at: self.place() }),
            },
        }
    }

    /// The template, without a line.
    pub fn place(&self) -> Place {
        place(&self.engine.path, self.name, None)
    }

    fn error(&self, error: &minijinja::Error) -> Error {
        let at = place(&self.engine.path, self.name, error.line());
        // A call of a macro or an included template wraps what went wrong in it.
        let mut cause = error;
        while let Some(inner) = cause.source().and_then(|s| s.downcast_ref::<minijinja::Error>()) {
            cause = inner;
        }
        if let Some(Refusal(text)) = cause.source().and_then(|s| s.downcast_ref()) {
            let message = shown(text);
            return Error::Refused { at, message };
        }
        match cause.kind() {
            ErrorKind::OutOfFuel | ErrorKind::WriteFailure => Error::OutOfFuel { at },
            _ => Error::Render {
                at,
                reason: message(cause),
            },
        }
    }
}

/// What a template makes. The engine does not count it where it writes out a value: a list that holds another twice,
/// and so on, is large.
struct BoundedText {
    text: String,
    limit: usize,
}

impl BoundedText {
    fn new(limit: usize) -> Self {
        Self {
            text: String::new(),
            limit,
        }
    }
}

impl io::Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.text.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        // The engine writes whole strings.
        let text = std::str::from_utf8(bytes).map_err(io::Error::other)?;
        self.text.push_str(text);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The environment that transformers gives to templates.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    if let Ok(syntax) = syntax {
        environment.set_syntax(syntax);
    }
    // What is made is no HTML, whatever a template's name ends with.
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_debug(false);
    environment.set_unknown_method_callback(python::method);
    functions::add(&mut environment);
    environment
}

/// What a template may do. Many go through all messages for each.
fn fuel(conversation: &Conversation, options: &RenderOptions) -> u64 {
    let lists = [
        Some(&conversation.messages),
        options.tools.as_ref(),
        options.documents.as_ref(),
    ];
    let bytes: usize = lists.into_iter().flatten().flatten().map(bytes).sum();
    let messages = conversation.messages.len() as u64;
    let pairs = messages.saturating_mul(messages);
    let fuel = BASE_FUEL
        .saturating_add(bytes as u64)
        .saturating_add(pairs.saturating_mul(32));
    fuel.min(MAX_FUEL)
}

/// The text of a value, about.
fn bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(list) => list.iter().map(|v| 8 + bytes(v)).sum(),
        Value::Object(map) => map.iter().map(|(key, v)| 8 + key.len() + bytes(v)).sum(),
        _ => 8,
    }
}

fn place(path: &std::path::Path, name: &str, line: Option<usize>) -> Place {
    Place {
        path: path.to_owned(),
        name: (name != DEFAULT).then(|| name.to_owned()),
        line,
    }
}

/// What the engine says, without the place.
fn message(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => shown(&format!("{}: {detail}", error.kind())),
        None => shown(&error.kind().to_string()),
    }
}

/// Text of a template in one line of bounded length that does nothing to a terminal.
fn shown(text: &str) -> String {
    let mut characters = text.chars();
    let mut shown: String = characters.by_ref().take(MESSAGE_CHARACTERS).collect();
    if characters.next().is_some() {
        shown.push_str("...");
    }
    let shown = one_line(&shown);
    shown.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
