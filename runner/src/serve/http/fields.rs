//! The fields of a request's body, taken one by one: what is left over is unknown, and refused by its name.

use std::ops::RangeInclusive;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::{ApiError, Result};

/// A body's fields.
pub struct Fields(Map<String, Value>);

impl Fields {
    /// # Errors
    /// When the body is no JSON object.
    pub fn parse(body: &[u8]) -> Result<Self> {
        let parsed = serde_json::from_slice(body);
        let fields = parsed.map_err(|e| ApiError::request(format!("the body is no JSON object: {e}")))?;
        Ok(Self(fields))
    }

    /// A field's value; `None` where it is missing or null.
    ///
    /// # Errors
    /// When it is something else.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        match self.0.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let parsed = serde_json::from_value(value);
                parsed.map(Some).map_err(|e| ApiError::field(name, e))
            }
        }
    }

    /// As [`Self::take`], for a field that must be there.
    ///
    /// # Errors
    /// When it is missing, null or something else.
    pub fn demand<T: DeserializeOwned>(&mut self, name: &str) -> Result<T> {
        let found = self.take(name)?;
        found.ok_or_else(|| ApiError::field(name, "it is missing"))
    }

    /// A number in a range.
    ///
    /// # Errors
    /// When it is no number or outside.
    pub fn number(&mut self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>> {
        let found: Option<f32> = self.take(name)?;
        match found {
            Some(x) if !range.contains(&x) => {
                let message = format!("{x} is not in {} to {}", range.start(), range.end());
                Err(ApiError::field(name, message))
            }
            found => Ok(found),
        }
    }

    /// A count in a range.
    ///
    /// # Errors
    /// When it is no whole number or outside.
    pub fn count(&mut self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let found: Option<i64> = self.take(name)?;
        let Some(n) = found else { return Ok(None) };
        let count = usize::try_from(n).ok().filter(|n| range.contains(n));
        let most = *range.end();
        let expected = if most == usize::MAX {
            format!("{n} is less than {}", range.start())
        } else {
            format!("{n} is not in {} to {most}", range.start())
        };
        count.map(Some).ok_or_else(|| ApiError::field(name, expected))
    }

    /// Takes fields that say nothing about the answer, such as who asks.
    pub fn set_aside(&mut self, names: &[&str]) {
        for name in names {
            self.0.shift_remove(*name);
        }
    }

    /// Takes a field that may be there with one of these values alone, which are what the server does anyway.
    ///
    /// # Errors
    /// When it asks for anything else.
    pub fn only(&mut self, name: &str, values: &[Value]) -> Result<()> {
        match self.take::<Value>(name)? {
            Some(value) if !values.contains(&value) => Err(ApiError::field(
                name,
                format!("{value} is not supported by this server"),
            )),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// When a field is left that nothing asked for.
    pub fn finish(self) -> Result<()> {
        match self.0.into_iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => Err(ApiError::field(&name, "this server knows no such field")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields() -> Fields {
        Fields::parse(br#"{"a": 1.5, "b": "x", "c": null, "d": 3, "e": -1, "store": true}"#).unwrap()
    }

    #[test]
    fn fields_are_taken_checked_and_missed() {
        let mut f = fields();
        assert_eq!(f.number("a", 0.0..=2.0), Ok(Some(1.5)));
        assert_eq!(f.number("a", 0.0..=2.0), Ok(None));
        assert_eq!(f.take::<f32>("c"), Ok(None));
        assert_eq!(f.count("d", 1..=3), Ok(Some(3)));
        let error = f.take::<f32>("b").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("b"));
        assert!(error.message.starts_with("b: invalid type"), "{}", error.message);
        assert!(
            f.count("e", 0..=usize::MAX)
                .unwrap_err()
                .message
                .contains("less than 0")
        );
        assert!(f.demand::<u32>("f").unwrap_err().message.contains("missing"));
        assert_eq!(f.finish().unwrap_err().param.as_deref(), Some("store"));
        let mut f = fields();
        assert!(f.number("a", 0.0..=1.0).is_err() && f.count("d", 1..=2).is_err());
        assert!(f.only("store", &[json!(false)]).is_err());
        f.set_aside(&["b", "e"]);
        assert_eq!(f.finish(), Ok(()));
        assert!(Fields::parse(b"[1]").is_err() && Fields::parse(b"{").is_err());
    }
}
