//! Which token a template ends an assistant's turn with. Configurations often name the end of a text alone.

use serde_json::json;

use crate::{
    ModelTokenizer,
    text::chat_template::{ChatTemplate, RenderOptions},
};

/// A text that no template has in it.
const ANSWER: &str = "Xylograph";

/// The special token that follows an answer. `None` where none does, and where the template refuses so short a
/// conversation.
pub(crate) fn written(template: &ChatTemplate, tokenizer: &ModelTokenizer, options: &RenderOptions) -> Option<u32> {
    let conversation = [
        json!({"role": "user", "content": "Hello"}),
        json!({"role": "assistant", "content": ANSWER}),
    ];
    let options = RenderOptions {
        add_generation_prompt: false,
        ..options.clone()
    };
    let text = template.render(&conversation, &options).ok()?;
    let (_, after) = text.rsplit_once(ANSWER)?;
    let ids = tokenizer.encode_as_is(after.trim_start()).ok()?;
    ids.first().copied().filter(|&id| tokenizer.is_special(id))
}
