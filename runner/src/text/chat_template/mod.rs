//! Chat templates: how a conversation becomes the text that a model was trained on.
//!
//! A template is Jinja, rendered as transformers does (`apply_chat_template`, `tokenize=False`): with its settings,
//! functions and filters, and with what templates use of Python's methods and `json.dumps`. A template comes with a
//! model and is not trusted: it has no access to anything but the conversation, and its work and memory are limited.
//!
//! - `source.rs` finds templates and special tokens in a model's folder
//! - `conversation.rs` is what a template sees of a conversation
//! - `engine.rs` compiles and runs a template; `functions.rs` has what it can call, `python.rs` Python's methods,
//!   `json.rs` Python's `json.dumps`, and `generation.rs` the blocks that mark what a model has written

mod conversation;
mod engine;
mod error;
mod functions;
mod generation;
mod json;
mod python;
mod source;

use std::path::Path;

use serde_json::{Map, Value};

pub use error::{Error, Place, Result};

use crate::{
    model_folder::ModelFolder,
    text::{
        chat_template::{conversation::Conversation, engine::Engine, source::Source},
        tokenizer_config,
    },
};

/// A model's chat template, compiled.
pub struct ChatTemplate {
    engine: Engine,
    /// `bos_token` and the others, as text.
    special_tokens: Map<String, Value>,
}

/// What a template gets beside the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// Functions that the model may call, as JSON schemas. With them the template named "tool_use" is taken if there
    /// is one.
    pub tools: Option<Vec<Value>>,
    /// Documents to answer from, by convention with `title` and `text`.
    pub documents: Option<Vec<Value>>,
    /// End with the beginning of the assistant's next message.
    pub add_generation_prompt: bool,
    /// End within the last message, so that the model continues it.
    pub continue_final_message: bool,
    /// Further variables, such as `enable_thinking`. They win over special tokens of the same name.
    pub variables: Map<String, Value>,
    /// The date and time that `strftime_now` gives; today's if none.
    pub now: Option<jiff::Zoned>,
}

impl ChatTemplate {
    /// The template of a model's folder, from beside the tokenizer: chat_template.jinja (and those of the folder
    /// additional_chat_templates), else chat_template.json, else tokenizer_config.json. None if there is none.
    ///
    /// # Errors
    /// A file cannot be read, holds no template, or the template is no valid Jinja.
    pub fn find(folder: &ModelFolder) -> Result<Option<Self>> {
        Self::find_in(place(folder))
    }

    /// As [`find`](Self::find), in the folder that has the tokenizer's files.
    ///
    /// # Errors
    /// As `find`.
    pub fn find_in(folder: &Path) -> Result<Option<Self>> {
        let Some(source) = Source::find(folder)? else {
            return Ok(None);
        };
        Self::new(source, folder).map(Some)
    }

    /// The template of a file: Jinja, or a JSON file whose `chat_template` it is. Special tokens are those of the
    /// model's folder.
    ///
    /// # Errors
    /// The file cannot be read, holds no template, or the template is no valid Jinja.
    pub fn from_file(file: &Path, folder: &ModelFolder) -> Result<Self> {
        Self::new(Source::read(file)?, place(folder))
    }

    fn new(source: Source, folder: &Path) -> Result<Self> {
        Ok(Self {
            engine: Engine::new(source)?,
            special_tokens: tokenizer_config::special_tokens(folder)?,
        })
    }

    /// The text of a conversation. Messages are as in OpenAI's API: `role`, `content` (text or parts), `tool_calls`,
    /// `tool_call_id`, `name`, `reasoning_content`. Special tokens are in the text: it is to be encoded without adding
    /// any.
    ///
    /// # Errors
    /// The template fails, refuses the conversation, or takes too much work.
    pub fn render(&self, messages: &[Value], options: &RenderOptions) -> Result<String> {
        let template = self.engine.choose(options.tools.is_some())?;
        let conversation = Conversation::new(messages, options)?;
        let variables = self.special_tokens.iter().chain(&options.variables);
        let text = template.render(&conversation, variables, options)?;
        match conversation.continued() {
            None => Ok(text),
            Some(end) => end
                .cut(text)
                .ok_or_else(|| Error::CannotContinue { at: template.place() }),
        }
    }
}

/// The folder with the tokenizer's files.
fn place(folder: &ModelFolder) -> &Path {
    let file = folder.tokenizer.as_deref().unwrap_or(&folder.graph);
    file.parent().unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests;
