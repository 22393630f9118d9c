//! What a template can call, beside the engine's own: transformers' functions and filters, and Jinja's tests where the
//! engine's answer differs.

use jiff::Zoned;
use minijinja::{Environment, Error, ErrorKind, value::Value};

use crate::text::chat_template::json;

/// A template's own error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// Adds them to an environment.
pub fn add(environment: &mut Environment<'_>) {
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", json::tojson);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
}

/// The date and time by a format of C's `strftime`.
pub fn strftime(now: Option<&Zoned>, format: &str) -> Result<String, Error> {
    let now = now.cloned().unwrap_or_else(Zoned::now);
    jiff::fmt::strtime::format(format, &now)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {e}")))
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let text = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, text.clone()).with_source(Refusal(text)))
}

/// As in Python, text and mappings have a length and elements.
fn is_sequence(value: &Value) -> bool {
    use minijinja::value::ValueKind::{Map, Seq, String, Undefined};
    matches!(value.kind(), String | Seq | Map | Undefined)
}

fn is_iterable(value: &Value) -> bool {
    value.as_str().is_some() || value.try_iter().is_ok()
}
