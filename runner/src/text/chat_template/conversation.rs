//! What a template sees of a conversation.

use serde_json::{Map, Value};

use crate::text::chat_template::{
    RenderOptions,
    error::{Error, Result},
};

/// Names under which a message's reasoning comes. Templates read the first; gpt-oss' reads the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Put behind a text that is to be continued, so that it is found in what the template makes.
const END_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Messages as transformers gives them to a template.
pub struct Conversation {
    pub messages: Vec<Value>,
    continued: Option<Continued>,
}

/// The text that the model is to continue.
pub struct Continued {
    text: String,
}

impl Conversation {
    pub fn new(messages: &[Value], options: &RenderOptions) -> Result<Self> {
        if messages.is_empty() {
            return Err(Error::EmptyConversation);
        }
        if options.continue_final_message && options.add_generation_prompt {
            return Err(Error::ContinueAndPrompt);
        }
        let message = |(i, message): (usize, &Value)| {
            let object = message.as_object().ok_or(Error::NotAMessage(i + 1))?;
            Ok(with_reasoning(object))
        };
        let mut messages: Vec<_> = messages.iter().enumerate().map(message).collect::<Result<_>>()?;
        let mut continued = None;
        if options.continue_final_message {
            let last = messages.last_mut().and_then(|m| m.get_mut("content"));
            let text = last.and_then(last_text).ok_or(Error::NothingToContinue)?;
            continued = Some(Continued { text: text.clone() });
            text.push_str(END_MARK);
        }
        Ok(Self {
            messages: messages.into_iter().map(Value::Object).collect(),
            continued,
        })
    }

    pub fn continued(&self) -> Option<&Continued> {
        self.continued.as_ref()
    }
}

impl Continued {
    /// Ends a rendered conversation where the text ends; none if the text isn't there.
    pub fn cut(&self, mut rendered: String) -> Option<String> {
        let end = rendered.rfind(END_MARK.trim_end())?;
        if !rendered.contains(self.text.trim()) {
            return None;
        }
        let whole = rendered[end..].starts_with(END_MARK);
        rendered.truncate(end);
        // The template has removed space from the text's end: the mark must not preserve it.
        if !whole {
            rendered.truncate(rendered.trim_end().len());
        }
        Some(rendered)
    }
}

/// A message without the entries that are null, which many templates print or fail on, and with its reasoning under
/// the names that templates read.
fn with_reasoning(message: &Map<String, Value>) -> Map<String, Value> {
    let mut entries: Map<_, _> = message.clone();
    entries.retain(|_, value| !value.is_null());
    if let Some(reasoning) = REASONING.iter().find_map(|name| entries.get(*name)).cloned() {
        if !entries.contains_key("thinking") {
            entries.shift_insert(0, "thinking".to_owned(), reasoning.clone());
        }
        entries.insert("reasoning_content".to_owned(), reasoning);
    }
    entries
}

/// The text of a content, or of its last part that has any.
fn last_text(content: &mut Value) -> Option<&mut String> {
    let text = match content {
        Value::Array(parts) => parts.iter_mut().rev().find_map(|part| part.get_mut("text"))?,
        text => text,
    };
    match text {
        Value::String(text) => Some(text),
        _ => None,
    }
}
