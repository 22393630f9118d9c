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
    let calls = message.get_mut("tool_calls").filter(|c| !c.is_null());
    let calls = calls.map(arguments_as_values).transpose()?.is_some();
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

/// Arguments of calls as values, which templates expect; clients send them as text.
fn arguments_as_values(calls: &mut Value) -> Result<(), String> {
    let calls = calls.as_array_mut().ok_or("its tool_calls are no list")?;
    for call in calls {
        let function = call.get_mut("function").and_then(Value::as_object_mut);
        let function = function.ok_or("one of its tool_calls has no function")?;
        if let Some(Value::String(text)) = function.get("arguments") {
            let value: Value =
                serde_json::from_str(text).map_err(|e| format!("the arguments of a call are no JSON: {e}"))?;
            function.insert("arguments".to_owned(), value);
        }
    }
    Ok(())
}

/// For templates that know no tools: what they are, in the system's message, and calls and their results as text.
pub fn with_tools_as_text(messages: Vec<Value>, instructions: &str) -> Vec<Value> {
    let mut told = Vec::with_capacity(messages.len() + 1);
    let mut rest = messages.into_iter().peekable();
    let content = |m: &Value| m.get("content").and_then(Value::as_str).unwrap_or_default().to_owned();
    let system = rest.next_if(|m| m.get("role").and_then(Value::as_str) == Some("system"));
    let own = system.map(|m| content(&m) + "\n\n").unwrap_or_default();
    told.push(json!({"role": "system", "content": own + instructions}));
    for message in rest {
        let calls = message
            .get("tool_calls")
            .and_then(Value::as_array)
            .filter(|c| !c.is_empty());
        let role = message.get("role").and_then(Value::as_str);
        told.push(match (role, calls) {
            (Some("tool"), _) => {
                let text = format!("<tool_response>\n{}\n</tool_response>", content(&message));
                json!({"role": "user", "content": text})
            }
            (_, Some(calls)) => {
                let call = |call: &Value| {
                    let function = call.get("function").unwrap_or(&Value::Null);
                    let (name, arguments) = (function.get("name"), function.get("arguments"));
                    let call = json!({"name": name, "arguments": arguments});
                    format!("<tool_call>\n{call}\n</tool_call>")
                };
                let said = Some(content(&message)).filter(|text| !text.is_empty());
                let parts: Vec<String> = said.into_iter().chain(calls.iter().map(call)).collect();
                json!({"role": role, "content": parts.join("\n")})
            }
            _ => message,
        });
    }
    told
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
    fn arguments_are_values_and_calls_become_text() {
        let body = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "two"}]}"#;
        let found = of(body).unwrap();
        assert_eq!(found[1]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        let text = with_tools_as_text(found, "TOOLS");
        assert_eq!(text[0], json!({"role": "system", "content": "TOOLS"}));
        let call = "<tool_call>\n{\"name\":\"f\",\"arguments\":{\"x\":1}}\n</tool_call>";
        assert_eq!(text[2], json!({"role": "assistant", "content": call}));
        assert_eq!(text[3]["content"], "<tool_response>\ntwo\n</tool_response>");
        let bad = r#"{"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}"#;
        assert_eq!(of(bad).unwrap_err().param.as_deref(), Some("messages[0]"));
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
