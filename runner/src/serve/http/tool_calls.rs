//! Calls of functions in what a model wrote, in the forms that models are trained on.
//!
//! - `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen, SmolLM2 (a list inside the tags too)
//! - `<function=NAME>{...}</function>`: Llama's own
//! - `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`: Mistral
//! - JSON alone, `{"name": ..., "parameters": {...}}`, one or several: Llama 3

use serde_json::{Value, json};

/// Where calls may begin. A text that begins with JSON is one from its start.
const MARKS: [&str; 3] = ["<tool_call>", "<function=", "[TOOL_CALLS]"];

/// A call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    /// JSON, as text.
    pub arguments: String,
}

impl Call {
    /// As OpenAI's API has it, with a place in a stream or without.
    pub fn json(&self, index: Option<usize>) -> Value {
        let id = format!("call_{:016x}", rand::random::<u64>());
        let mut call = json!({
            "id": id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        });
        if let (Some(index), Some(call)) = (index, call.as_object_mut()) {
            call.insert("index".to_owned(), json!(index));
        }
        call
    }

    /// A call of one of these functions.
    fn of(value: &Value, names: &[String]) -> Option<Self> {
        let inner = value.get("function").filter(|f| f.is_object()).unwrap_or(value);
        let name = inner.get("name")?.as_str()?;
        if !names.iter().any(|n| n == name) {
            return None;
        }
        let arguments = inner.get("arguments").or_else(|| inner.get("parameters"));
        let arguments = match arguments {
            None | Some(Value::Null) => "{}".to_owned(),
            // Arguments as text are JSON already, as in OpenAI's API.
            Some(Value::String(text)) => serde_json::from_str::<Value>(text).ok()?.to_string(),
            Some(value) => value.to_string(),
        };
        Some(Self {
            name: name.to_owned(),
            arguments,
        })
    }
}

/// A text taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// What is said beside the calls.
    pub content: String,
    pub calls: Vec<Call>,
}

/// Takes a text apart. What is no call of one of these functions is content.
pub fn parse(text: &str, names: &[String]) -> Parsed {
    let found = tagged(text, names)
        .or_else(|| functions(text, names))
        .or_else(|| after_mark(text, names))
        .or_else(|| Some((0, values(text, names)?)));
    match found {
        Some((start, calls)) => Parsed {
            content: text.get(..start).unwrap_or_default().trim_end().to_owned(),
            calls,
        },
        None => Parsed {
            content: text.to_owned(),
            calls: Vec::new(),
        },
    }
}

/// Calls between tags, and where the first begins.
fn tagged(text: &str, names: &[String]) -> Option<(usize, Vec<Call>)> {
    let start = text.find("<tool_call>")?;
    let blocks = text.get(start..)?.split("<tool_call>").skip(1);
    let mut calls = Vec::new();
    for block in blocks {
        let inner = block.split("</tool_call>").next().unwrap_or_default();
        calls.extend(values(inner, names)?);
    }
    Some((start, calls))
}

fn functions(text: &str, names: &[String]) -> Option<(usize, Vec<Call>)> {
    let start = text.find("<function=")?;
    let mut calls = Vec::new();
    for block in text.get(start..)?.split("<function=").skip(1) {
        let (name, rest) = block.split_once('>')?;
        let inner = rest.split("</function>").next().unwrap_or_default();
        let arguments: Value = serde_json::from_str(inner).ok()?;
        calls.push(Call::of(&json!({"name": name, "arguments": arguments}), names)?);
    }
    Some((start, calls))
}

fn after_mark(text: &str, names: &[String]) -> Option<(usize, Vec<Call>)> {
    let (before, after) = text.split_once("[TOOL_CALLS]")?;
    Some((before.len(), values(after, names)?))
}

/// Calls that are all of a text: JSON values one after another, objects or lists of them.
fn values(text: &str, names: &[String]) -> Option<Vec<Call>> {
    let mut calls = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ';');
        if rest.is_empty() {
            break;
        }
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        match stream.next()?.ok()? {
            Value::Array(list) => {
                for value in &list {
                    calls.push(Call::of(value, names)?);
                }
            }
            value => calls.push(Call::of(&value, names)?),
        }
        rest = rest.get(stream.byte_offset()..)?;
    }
    (!calls.is_empty()).then_some(calls)
}

/// Finds calls in a text that comes piece by piece: what may belong to one is held back.
#[derive(Debug, Default)]
pub struct CallFinder {
    text: String,
    /// Bytes of the text that came out.
    sent: usize,
}

impl CallFinder {
    /// Adds a piece; gives what is content for certain.
    pub fn push(&mut self, piece: &str) -> String {
        self.text.push_str(piece);
        let begins = self.text.trim_start();
        if begins.is_empty() || begins.starts_with(['{', '[']) {
            return String::new();
        }
        let mark = MARKS.iter().filter_map(|mark| self.text.find(mark)).min();
        let half = MARKS.iter().map(|mark| overlap(&self.text, mark)).max().unwrap_or(0);
        let end = mark.unwrap_or(self.text.len() - half);
        let new = self.text.get(self.sent..end).unwrap_or_default().to_owned();
        self.sent = self.sent.max(end);
        new
    }

    /// The calls, and the content that was held back.
    pub fn finish(self, names: &[String]) -> Parsed {
        let parsed = parse(&self.text, names);
        Parsed {
            content: parsed.content.get(self.sent..).unwrap_or_default().to_owned(),
            calls: parsed.calls,
        }
    }
}

/// Length of the longest end of `text` that a mark begins with.
fn overlap(text: &str, mark: &str) -> usize {
    let lengths = (1..mark.len()).rev();
    lengths
        .into_iter()
        .find(|&n| mark.get(..n).is_some_and(|head| text.ends_with(head)))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        ["weather", "time"].map(str::to_owned).to_vec()
    }

    fn call(name: &str, arguments: &str) -> Call {
        Call {
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        }
    }

    #[test]
    fn calls_are_found_in_the_forms_of_many_models() {
        let paris = || call("weather", r#"{"city":"Paris"}"#);
        for (text, content, calls) in [
            (
                "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n\
                 <tool_call>{\"name\": \"time\", \"arguments\": {}}</tool_call>",
                "Let me see.",
                vec![paris(), call("time", "{}")],
            ),
            (
                "<tool_call>[{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]</tool_call>",
                "",
                vec![paris()],
            ),
            // The end of a turn may come in place of the closing tag.
            ("<tool_call>{\"name\": \"time\"}", "", vec![call("time", "{}")]),
            (
                "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}",
                "",
                vec![paris()],
            ),
            (
                "{\"name\": \"time\", \"parameters\": {}}; {\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}",
                "",
                vec![call("time", "{}"), paris()],
            ),
            ("<function=weather>{\"city\": \"Paris\"}</function>", "", vec![paris()]),
            (
                "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}, \"id\": \"x\"}]",
                "",
                vec![paris()],
            ),
            (
                "{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"arguments\": \"{\\\"city\\\": \\\"Paris\\\"}\"}}",
                "",
                vec![paris()],
            ),
            (
                "{\"name\": \"weather\", \"arguments\": {\"city\": \"a;b\"}}",
                "",
                vec![call("weather", r#"{"city":"a;b"}"#)],
            ),
        ] {
            let parsed = parse(text, &names());
            assert_eq!((parsed.content.as_str(), parsed.calls), (content, calls), "{text}");
        }
    }

    #[test]
    fn what_is_no_call_is_content() {
        for text in [
            "Paris.",
            "{\"name\": \"other\", \"arguments\": {}}",
            "<tool_call>nonsense</tool_call>",
            "{\"a\": 1}",
            "[1, 2]",
            "<tool_call>{\"name\": \"weather\", \"arguments\": \"no json\"}</tool_call>",
            "",
        ] {
            let parsed = parse(text, &names());
            assert_eq!((parsed.content.as_str(), parsed.calls.len()), (text, 0));
        }
    }

    #[test]
    fn a_stream_says_what_is_content_and_no_more() {
        let tell = |text: &str| {
            let mut finder = CallFinder::default();
            let mut out = String::new();
            for c in text.chars() {
                out += &finder.push(&c.to_string());
            }
            (out, finder.finish(&names()))
        };
        let (out, rest) = tell("I look. <tool_call>{\"name\": \"time\", \"arguments\": {}}</tool_call>");
        assert_eq!((out.as_str(), rest.content.as_str()), ("I look. ", ""));
        assert_eq!(rest.calls, [call("time", "{}")]);
        let (out, rest) = tell("1 < 2 and <tool bar>");
        assert_eq!(
            (out + &rest.content, rest.calls.len()),
            ("1 < 2 and <tool bar>".to_owned(), 0)
        );
        let (out, rest) = tell("{\"a\": 1}");
        assert_eq!((out.as_str(), rest.content.as_str()), ("", "{\"a\": 1}"));
        let (out, rest) = tell("a <tool_call>no</tool_call>");
        assert_eq!(out + &rest.content, "a <tool_call>no</tool_call>");
    }
}
