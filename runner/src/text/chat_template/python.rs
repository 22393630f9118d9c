//! Methods of Python's types that templates call: minijinja-contrib's, and those that it lacks.

use minijinja::{
    Error, ErrorKind, State,
    value::{Tuple, Value, ValueKind, from_args},
};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Calls a method that the engine doesn't know.
pub fn method(state: &mut State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let (Some(text), "format") = (value.as_str(), method) {
        check_widths(text)?;
    }
    if let (Some(text), "split" | "rsplit" | "splitlines") = (value.as_str(), method) {
        // A piece takes more room than its text: it is paid for before it is made.
        state.consume_fuel(text.len() as u64 / 8)?;
    }
    if let Some(text) = value.as_str()
        && let Some(result) = text_method(state, text, method, args)
    {
        return result;
    }
    match (value.kind(), method) {
        (ValueKind::Seq, "index") => position(value, args),
        _ => unknown_method_callback(state, value, method, args),
    }
}

/// None for methods that are not here.
fn text_method(state: &State<'_, '_>, text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match method {
        "removeprefix" => one_text(args).map(|part| text.strip_prefix(part).unwrap_or(text).into()),
        "removesuffix" => one_text(args).map(|part| text.strip_suffix(part).unwrap_or(text).into()),
        "partition" => separator(args).map(|part| parts(text.split_once(part), part, [text, "", ""])),
        "rpartition" => separator(args).map(|part| parts(text.rsplit_once(part), part, ["", "", text])),
        "rsplit" => rsplit(text, args),
        "index" => one_text(args).and_then(|part| index(text, text.find(part))),
        "rindex" => one_text(args).and_then(|part| index(text, text.rfind(part))),
        "splitlines" => from_args(args).map(|(ends,): (Option<bool>,)| {
            let lines = split_lines(text);
            let shown = |(line, end)| {
                if ends == Some(true) {
                    [line, end].concat()
                } else {
                    String::from(line)
                }
            };
            Value::from_iter(lines.map(shown))
        }),
        "swapcase" => from_args(args).map(|()| text.chars().flat_map(swapped).collect::<String>().into()),
        "zfill" => from_args(args).and_then(|(width,)| {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let fill = fill(state, text, width, "0")?;
            Ok([sign, &fill, digits].concat().into())
        }),
        "ljust" => padded(state, text, args, |_, _| 0),
        "rjust" => padded(state, text, args, |missing, _| missing),
        // Where the missing characters are an odd number, Python puts the last to the left in an odd width.
        "center" => padded(state, text, args, |missing, width| missing / 2 + (missing & width & 1)),
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
    Tuple::from([a, b, c].map(Value::from)).into()
}

/// Lines and what ends them, by all that Python takes for the end of one.
pub fn split_lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    const ENDS: [char; 10] = [
        '\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}',
    ];
    let mut rest = text;
    std::iter::from_fn(move || {
        let (line, after) = rest.split_at(rest.find(ENDS).unwrap_or(rest.len()));
        let end = if after.starts_with("\r\n") {
            2
        } else {
            after.chars().next().map_or(0, char::len_utf8)
        };
        let (end, after) = after.split_at(end);
        let found = !rest.is_empty();
        rest = after;
        found.then_some((line, end))
    })
}

/// What fills a field of `str.format` is made before it is paid for: widths of five digits are nobody's.
fn check_widths(text: &str) -> Result<(), Error> {
    for field in text.split('{').skip(1) {
        let field = field.split('}').next().unwrap_or(field);
        if field
            .split(|c: char| !c.is_ascii_digit())
            .any(|digits| digits.len() > 4)
        {
            return Err(invalid("format: the width is above 9999"));
        }
    }
    Ok(())
}

fn swapped(c: char) -> Vec<char> {
    if c.is_uppercase() {
        c.to_lowercase().collect()
    } else {
        c.to_uppercase().collect()
    }
}

/// A text many times; none for less than one time.
pub fn repeat(state: &State<'_, '_>, text: &str, times: i64) -> Result<String, Error> {
    let times = usize::try_from(times).unwrap_or(0);
    // A number is a few characters of a template: what it asks for is paid before it is made.
    state.consume_fuel((text.len() as u64).saturating_mul(times as u64) / 16)?;
    Ok(text.repeat(times))
}

/// What a text lacks to a width.
fn fill(state: &State<'_, '_>, text: &str, width: i64, with: &str) -> Result<String, Error> {
    let present = i64::try_from(text.chars().count()).unwrap_or(i64::MAX);
    repeat(state, with, width.saturating_sub(present))
}

/// Pads a text to a width. `left` says how many of the missing characters come before it.
fn padded(
    state: &State<'_, '_>,
    text: &str,
    args: &[Value],
    left: impl Fn(usize, usize) -> usize,
) -> Result<Value, Error> {
    let (width, with): (i64, Option<&str>) = from_args(args)?;
    let with = with.unwrap_or(" ");
    if with.chars().count() != 1 {
        return Err(invalid("the fill character must be exactly one character long"));
    }
    let fill = fill(state, text, width, with)?;
    let before = left(fill.chars().count(), usize::try_from(width).unwrap_or(0)) * with.len();
    Ok([&fill[..before], text, &fill[before..]].concat().into())
}

fn position(list: &Value, args: &[Value]) -> Result<Value, Error> {
    let (what,): (&Value,) = from_args(args)?;
    let at = list.try_iter()?.position(|element| element == *what);
    at.map(Value::from)
        .ok_or_else(|| invalid("the value is not in the list"))
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

/// A float as Python's `repr`: the shortest digits, with an exponent of two digits from 1e16 on and below 1e-4.
pub fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    if value != 0.0 && !(1e-4..1e16).contains(&value.abs()) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{value:?}")
}

fn invalid(reason: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

#[cfg(test)]
mod tests {
    use super::float;

    #[test]
    fn floats_are_pythons() {
        for (value, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
            (f64::INFINITY, "Infinity"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(float(value), text);
        }
    }
}
