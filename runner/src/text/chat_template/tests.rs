use std::fs;

use serde_json::json;

use super::*;

fn template(text: &str) -> Result<ChatTemplate> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("chat_template.jinja"), text).unwrap();
    ChatTemplate::find_in(dir.path()).map(|found| found.unwrap())
}

fn render(text: &str) -> Result<String> {
    let messages = [json!({"role": "user", "content": "Hello"})];
    template(text)?.render(&messages, &RenderOptions::default())
}

#[test]
fn a_conversation_is_rendered() {
    let text = "{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}{% endfor %}";
    assert_eq!(render(text).unwrap(), "<user>Hello");
}
