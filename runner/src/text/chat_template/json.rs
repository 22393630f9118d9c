//! The filter `tojson`: Python's `json.dumps`, as transformers gives it to templates.

use std::fmt::Write as _;

use minijinja::{
    Error, ErrorKind, State,
    value::{Kwargs, Value, ValueKind},
};

use crate::text::chat_template::python::{float, repeat};

/// Nested values beyond this are not written. Python stops at about a thousand.
const MAX_DEPTH: usize = 200;

/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub fn tojson(
    state: &State<'_, '_>,
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    let ensure_ascii = named(ensure_ascii, &options, "ensure_ascii")?;
    let indent = named(indent, &options, "indent")?.filter(|v| !v.is_none());
    let separators = named(None, &options, "separators")?.filter(|v| !v.is_none());
    let sort_keys = named(None, &options, "sort_keys")?;
    options.assert_all_used()?;
    let indent = indent.map(|indent| indentation(state, &indent)).transpose()?;
    let separators = separators.map(|pair| pair_of_text(&pair)).transpose()?;
    let default = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    let (item, key) = separators.unwrap_or(default);
    let mut writer = Writer {
        state,
        out: String::new(),
        charged: 0,
        ensure_ascii: ensure_ascii.is_some_and(|v| v.is_true()),
        sort_keys: sort_keys.is_some_and(|v| v.is_true()),
        indent,
        item,
        key,
    };
    writer.value(value, 0)?;
    Ok(writer.out)
}

/// An argument given by place or by name.
fn named(by_place: Option<Value>, options: &Kwargs, name: &str) -> Result<Option<Value>, Error> {
    match by_place {
        Some(value) => Ok(Some(value)),
        None => options.get(name),
    }
}

fn indentation(state: &State<'_, '_>, indent: &Value) -> Result<String, Error> {
    match indent.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => repeat(state, " ", i64::try_from(indent.clone())?),
    }
}

fn pair_of_text(pair: &Value) -> Result<(String, String), Error> {
    let mut texts = pair.try_iter()?.map(|v| v.as_str().map(str::to_owned));
    match (texts.next().flatten(), texts.next().flatten(), texts.next()) {
        (Some(item), Some(key), None) => Ok((item, key)),
        _ => Err(invalid("tojson: separators are two texts")),
    }
}

struct Writer<'a> {
    state: &'a State<'a, 'a>,
    out: String,
    /// Bytes of `out` that are paid for.
    charged: usize,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    /// Between items.
    item: String,
    /// Between a key and its value.
    key: String,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        // A few steps of a template can make a value that is endless when written.
        self.state
            .consume_fuel(1 + ((self.out.len() - self.charged) / 16) as u64)?;
        self.charged = self.out.len();
        if depth > MAX_DEPTH {
            return Err(invalid("tojson: the value is nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            kind => return Err(invalid(&format!("tojson: {kind} is nothing that JSON has"))),
        }
        Ok(())
    }

    fn list(&mut self, list: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut empty = true;
        for element in list.try_iter()? {
            self.begin(empty, depth + 1)?;
            empty = false;
            self.value(&element, depth + 1)?;
        }
        self.end(empty, depth, ']')?;
        Ok(())
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        let mut entries = Vec::new();
        for key in map.try_iter()? {
            entries.push((key_text(&key)?, map.get_item(&key)?));
        }
        if self.sort_keys {
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        self.out.push('{');
        let empty = entries.is_empty();
        for (i, (key, value)) in entries.iter().enumerate() {
            self.begin(i == 0, depth + 1)?;
            self.text(key);
            self.out.push_str(&self.key);
            self.value(value, depth + 1)?;
        }
        self.end(empty, depth, '}')?;
        Ok(())
    }

    fn begin(&mut self, first: bool, depth: usize) -> Result<(), Error> {
        if !first {
            self.out.push_str(&self.item);
        }
        self.line(depth)
    }

    fn end(&mut self, empty: bool, depth: usize, bracket: char) -> Result<(), Error> {
        if !empty {
            self.line(depth)?;
        }
        self.out.push(bracket);
        Ok(())
    }

    fn line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        let space = repeat(self.state, indent, depth as i64)?;
        self.out.push('\n');
        self.out.push_str(&space);
        Ok(())
    }

    fn number(&mut self, value: &Value) {
        if value.is_integer() {
            _ = write!(self.out, "{value}");
        } else {
            self.out
                .push_str(&float(f64::try_from(value.clone()).unwrap_or(f64::NAN)));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || self.ensure_ascii && c > '~' => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A key as Python writes it: numbers, booleans and null become text.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(key.is_true().to_string()),
        ValueKind::Number if key.is_integer() => Ok(key.to_string()),
        ValueKind::Number => Ok(float(f64::try_from(key.clone()).unwrap_or(f64::NAN))),
        kind => Err(invalid(&format!("tojson: {kind} is no key"))),
    }
}

fn invalid(reason: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.to_owned())
}
