//! The messages of a conversation, checked, as templates take them.

use serde_json::{Value, json};

use super::{
    error::{ApiError, Result},
    fields::Fields,
};

/// The most messages of a conversation.
const MOST: usize = 4096;

/// Takes the field `messages`.
///
/// # Errors
/// When it is missing, or a message is none.
pub fn messages(fields: &mut Fields) -> Result<Vec<Value>> {
    let mut messages: Vec<Value> = fields.demand("messages")?;
    if messages.is_empty() || messages.len() > MOST {
        return Err(ApiError::field("messages", format!("expected 1 to {MOST} messages")));
    }
    for (i, message) in messages.iter_mut().enumerate() {
        check(message).map_err(|why| ApiError::field(&format!("messages[{i}]"), why))?;
    }
    Ok(messages)
}

fn check(message: &mut Value) -> Result<(), String> {
    let Some(message) = message.as_object_mut() else {
        return Err("a message is an object".to_owned());
    };
    let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
    match role {
        "system" | "user" | "assistant" | "tool" => {}
        // What OpenAI's newer models call the system's messages.
        "developer" => _ = message.insert("role".to_owned(), json!("system")),
        "" => return Err("it has no role".to_owned()),
        other => {
            return Err(format!(
                "its role is {other:?}: expected system, developer, user, assistant or tool"
            ));
        }
    }
    let calls = message.get("tool_calls").is_some_and(|c| !c.is_null());
    let content = match message.get("content") {
        None | Some(Value::Null) if calls => return Ok(()),
        None | Some(Value::Null) => return Err("it has no content".to_owned()),
        Some(Value::String(_)) => return Ok(()),
        Some(Value::Array(parts)) => text(parts)?,
        Some(_) => return Err("its content is neither a text nor a list of parts".to_owned()),
    };
    message.insert("content".to_owned(), Value::String(content));
    Ok(())
}

/// The text of parts: many templates know no others.
fn text(parts: &[Value]) -> Result<String, String> {
    let text = |part: &Value| {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
        let text = part.get("text").and_then(Value::as_str);
        match (kind, text) {
            ("text", Some(text)) => Ok(text.to_owned()),
            _ => Err(format!("a part of its content is {kind:?}: the model reads text alone")),
        }
    };
    let texts: Vec<String> = parts.iter().map(text).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(body: &str) -> Result<Vec<Value>> {
        messages(&mut Fields::parse(body.as_bytes()).unwrap())
    }

    #[test]
    fn parts_become_text_and_developers_the_system() {
        let body = r#"{"messages": [{"role": "developer", "content": "a"}, {"role": "user", "content":
            [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
            {"role": "assistant", "content": null, "tool_calls": []}]}"#;
        let found = of(body).unwrap();
        assert_eq!(found[0], json!({"role": "system", "content": "a"}));
        assert_eq!(found[1]["content"], "b\nc");
    }

    #[test]
    fn what_is_no_message_is_named() {
        for (messages, param, why) in [
            (r#"[{"role": "user", "content": "a"}, 3]"#, "messages[1]", "object"),
            (r#"[{"content": "a"}]"#, "messages[0]", "no role"),
            (r#"[{"role": "human", "content": "a"}]"#, "messages[0]", "human"),
            (r#"[{"role": "user"}]"#, "messages[0]", "no content"),
            (
                r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#,
                "messages[0]",
                "image_url",
            ),
            ("[]", "messages", "1 to"),
        ] {
            let error = of(&format!("{{\"messages\": {messages}}}")).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{messages}");
            assert!(error.message.contains(why), "{}", error.message);
        }
    }
}
