//! What a template can call, beside the engine's own: transformers' functions and filters, and Jinja's filters and tests
//! where the engine's answer differs.

use std::fmt::Write as _;

use jiff::Zoned;
use minijinja::{
    Environment, Error, ErrorKind, Output, State,
    value::{Kwargs, Value},
};

use crate::text::chat_template::{json, python};

/// A template's own error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// Adds them to an environment.
pub fn add(environment: &mut Environment<'_>) {
    environment.add_function("raise_exception", raise_exception);
    minijinja_contrib::add_to_environment(environment);
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("indent", indent);
    environment.add_filter("string", string);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.set_formatter(write);
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

/// Writes a value as Python does.
fn write(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match python_float(value) {
        Some(text) => Ok(out.write_str(&text)?),
        None => minijinja::escape_formatter(out, state, value),
    }
}

fn string(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    if value.as_str().is_some() {
        return Ok(value.clone());
    }
    if let Some(text) = python_float(value) {
        return Ok(text.into());
    }
    let mut paid = Paid(state, String::new());
    // A few steps make a list that is endless as text.
    write!(paid, "{value}").map_err(|_| Error::from(ErrorKind::OutOfFuel))?;
    Ok(paid.1.into())
}

/// Text that is paid for as it grows.
struct Paid<'a>(&'a State<'a, 'a>, String);

impl std::fmt::Write for Paid<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0
            .consume_fuel(1 + text.len() as u64 / 16)
            .map_err(|_| std::fmt::Error)?;
        self.1.push_str(text);
        Ok(())
    }
}

/// HTML as Jinja's escapes it.
fn escape(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    let text = string(state, value)?.to_string();
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    Ok(text.replace('\'', "&#39;").replace('"', "&#34;"))
}

/// `int(value, default=0, base=10)`: the default for what is no number.
fn int(value: &Value, default: Option<Value>, base: Option<u32>, options: Kwargs) -> Result<Value, Error> {
    let default = default.map_or_else(|| options.get("default"), |v| Ok(Some(v)))?;
    let base = base.map_or_else(|| options.get("base"), |v| Ok(Some(v)))?.unwrap_or(10);
    options.assert_all_used()?;
    if !(2..=36).contains(&base) {
        return Err(Error::new(ErrorKind::InvalidOperation, "int: the base is 2 to 36"));
    }
    let number = match value.as_str() {
        Some(text) => i128::from_str_radix(text.trim(), base)
            .ok()
            .or_else(|| truncated(text.trim().parse().ok()?)),
        None if value.is_integer() => return Ok(value.clone()),
        None if value.is_number() => truncated(f64::try_from(value.clone())?),
        None => bool::try_from(value.clone()).ok().map(i128::from),
    };
    Ok(number.map_or_else(|| default.unwrap_or_else(|| 0.into()), Value::from))
}

fn truncated(number: f64) -> Option<i128> {
    number.is_finite().then_some(number as i128)
}

/// `float(value, default=0.0)`, likewise.
fn float(value: &Value, default: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let default = default.map_or_else(|| options.get("default"), |v| Ok(Some(v)))?;
    options.assert_all_used()?;
    let number = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None => f64::try_from(value.clone()).ok(),
    };
    Ok(number.map_or_else(|| default.unwrap_or_else(|| 0.0.into()), Value::from))
}

fn python_float(value: &Value) -> Option<String> {
    let float = !value.is_integer() && value.is_number();
    float.then(|| f64::try_from(value.clone()).ok().map(python::float))?
}

/// `indent(s, width=4, first=False, blank=False)`: unlike the engine's, it keeps a newline at the end.
fn indent(
    state: &State<'_, '_>,
    text: &str,
    width: Option<Value>,
    first: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let width = width.map_or_else(|| options.get("width"), |v| Ok(Some(v)))?;
    let first = first.map_or_else(|| options.get("first"), |v| Ok(Some(v)))?;
    let blank: Option<bool> = options.get("blank")?;
    options.assert_all_used()?;
    let width = width.unwrap_or_else(|| 4.into());
    let indent = match width.as_str() {
        Some(text) => text.to_owned(),
        None => python::repeat(state, " ", i64::try_from(width)?)?,
    };
    // Jinja's own does so: a newline at the end then is a line of its own, without text.
    let text = [text, "\n"].concat();
    let mut out = String::new();
    for (i, (line, _)) in python::split_lines(&text).enumerate() {
        state.consume_fuel(1 + indent.len() as u64 / 16)?;
        let wanted = if i == 0 {
            first
        } else {
            Some(blank == Some(true) || !line.is_empty())
        };
        out.push_str(if i == 0 { "" } else { "\n" });
        out.push_str(if wanted == Some(true) { &indent } else { "" });
        out.push_str(line);
    }
    Ok(out)
}

/// As in Python, text and mappings have a length and elements.
fn is_sequence(value: &Value) -> bool {
    use minijinja::value::ValueKind::{Map, Seq, String, Undefined};
    matches!(value.kind(), String | Seq | Map | Undefined)
}

fn is_iterable(value: &Value) -> bool {
    value.as_str().is_some() || !value.is_none() && value.try_iter().is_ok()
}
