//! Configuration files. They come from many tools and versions: a value of another form than expected counts as not
//! given.

use std::{fs, io, path::Path};

use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::error::Error;

/// A configuration file as it is; none if there is no such file, an empty object if it holds no object.
///
/// # Errors
/// The file can't be read, or is not JSON.
pub fn read_json(path: &Path) -> Result<Option<Value>, Error> {
    Ok(read::<Map<String, Value>>(path)?.map(Value::Object))
}

/// A file's content; none if there is no such file. What is no object says nothing.
pub(crate) fn read<T: DeserializeOwned + Default>(path: &Path) -> Result<Option<T>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => {}
        // Opening a pipe would wait for whoever writes to it.
        Ok(_) => return Err(failed(io::Error::other("it is not a file"))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    }
    let text = fs::read(path).map_err(failed)?;
    let json = serde_json::from_slice::<Value>(&without_python_numbers(&text)).and_then(object);
    let json = json.map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(json))
}

/// Python writes numbers that JSON has no word for: Infinity in the configuration of Mamba's layers. They become null.
fn without_python_numbers(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let (mut in_string, mut at) = (false, 0);
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        let word = ["-Infinity", "Infinity", "NaN"]
            .into_iter()
            .find(|w| rest.starts_with(w.as_bytes()));
        if let Some(word) = word.filter(|_| !in_string) {
            out.extend_from_slice(b"null");
            at += word.len();
            continue;
        }
        let taken = if in_string && rest.first() == Some(&b'\\') {
            2
        } else {
            1
        };
        in_string ^= rest.first() == Some(&b'"');
        out.extend_from_slice(rest.get(..taken).unwrap_or(rest));
        at += taken;
    }
    out
}

/// A positive number.
pub(crate) fn count<'de, D: Deserializer<'de>>(from: D) -> Result<Option<usize>, D::Error> {
    let n = Value::deserialize(from)?.as_u64();
    Ok(n.filter(|n| (1..=u64::from(u32::MAX)).contains(n)).map(|n| n as usize))
}

/// Any number.
pub(crate) fn number<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    Ok(Value::deserialize(from)?.as_f64())
}

/// A token's id.
pub(crate) fn id<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    Ok(as_id(&Value::deserialize(from)?))
}

/// One id or a list of them; null, negative and repeated ones left out.
pub(crate) fn ids<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u32>, D::Error> {
    let found: Vec<u32> = match Value::deserialize(from)? {
        Value::Array(list) => list.iter().filter_map(as_id).collect(),
        one => as_id(&one).into_iter().collect(),
    };
    let mut ids = Vec::new();
    for id in found {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// A token's text, alone or as the content of an object.
pub(crate) fn token<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let value = Value::deserialize(from)?;
    let text = value.get("content").unwrap_or(&value).as_str();
    Ok(text.filter(|t| !t.is_empty()).map(str::to_owned))
}

pub(crate) fn text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(Value::deserialize(from)?.as_str().map(str::to_owned))
}

pub(crate) fn truth<'de, D: Deserializer<'de>>(from: D) -> Result<Option<bool>, D::Error> {
    Ok(Value::deserialize(from)?.as_bool())
}

/// An object; anything else counts as an empty one.
pub(crate) fn object<'de, T: DeserializeOwned + Default, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    let value = Value::deserialize(from)?;
    if !value.is_object() {
        return Ok(T::default());
    }
    serde_json::from_value(value).map_err(serde::de::Error::custom)
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|n| u32::try_from(n).ok())
}
