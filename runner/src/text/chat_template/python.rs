//! Methods of Python's types that templates call: minijinja-contrib's, and those that it lacks.

use minijinja::{
    Error, ErrorKind, State,
    value::{Value, from_args},
};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Calls a method that the engine doesn't know.
pub fn method(state: &mut State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = text_method(text, method, args)
    {
        return result;
    }
    unknown_method_callback(state, value, method, args)
}

/// None for methods that are not here.
fn text_method(text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match method {
        "removeprefix" => one_text(args).map(|part| text.strip_prefix(part).unwrap_or(text).into()),
        "removesuffix" => one_text(args).map(|part| text.strip_suffix(part).unwrap_or(text).into()),
        "partition" => separator(args).map(|part| parts(text.split_once(part), part, [text, "", ""])),
        "rpartition" => separator(args).map(|part| parts(text.rsplit_once(part), part, ["", "", text])),
        "rsplit" => rsplit(text, args),
        "index" => one_text(args).and_then(|part| index(text, text.find(part))),
        "rindex" => one_text(args).and_then(|part| index(text, text.rfind(part))),
        "casefold" => from_args(args).map(|()| text.to_lowercase().into()),
        "isdecimal" => from_args(args).map(|()| (!text.is_empty() && text.chars().all(char::is_numeric)).into()),
        _ => return None,
    })
}

fn one_text(args: &[Value]) -> Result<&str, Error> {
    from_args::<(&str,)>(args).map(|(text,)| text)
}

fn separator(args: &[Value]) -> Result<&str, Error> {
    let text = one_text(args)?;
    if text.is_empty() {
        return Err(invalid("empty separator"));
    }
    Ok(text)
}

fn parts(found: Option<(&str, &str)>, separator: &str, otherwise: [&str; 3]) -> Value {
    let [a, b, c] = found.map_or(otherwise, |(before, after)| [before, separator, after]);
    Value::from_iter([a, b, c])
}

fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
    let pieces = limit
        .and_then(|limit| usize::try_from(limit).ok())
        .map_or(usize::MAX, |n| n.saturating_add(1));
    let mut found: Vec<&str> = match separator {
        Some("") => return Err(invalid("empty separator")),
        Some(separator) => text.rsplitn(pieces, separator).collect(),
        None => by_space(text, pieces),
    };
    found.reverse();
    Ok(Value::from_iter(found))
}

/// Words from the end on, the last piece with all that is left.
fn by_space(text: &str, pieces: usize) -> Vec<&str> {
    let mut rest = text.trim_end();
    let mut found = Vec::new();
    while !rest.is_empty() {
        let cut = if found.len() + 1 == pieces {
            None
        } else {
            rest.rfind(char::is_whitespace)
        };
        let start = cut.map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
        found.push(&rest[start..]);
        rest = rest[..start].trim_end();
    }
    found
}

fn index(text: &str, at: Option<usize>) -> Result<Value, Error> {
    let at = at.ok_or_else(|| invalid("substring not found"))?;
    Ok(text[..at].chars().count().into())
}

fn invalid(reason: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}
