//! The metadata: keys and values, slices of the file's bytes.

use std::{collections::HashMap, fmt};

use bytes::Bytes;

use crate::{cursor::Cursor, error::Error};

/// Types of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the format's names")]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The fewest bytes that a value takes; a number always takes these.
    const fn smallest(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Bool => "boolean",
            Self::String => "string",
            Self::Array => "list",
            Self::F32 | Self::F64 => "floating-point number",
            _ => "whole number",
        };
        f.write_str(name)
    }
}

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Unsigned whole numbers of all widths.
    Unsigned(u64),
    /// Signed whole numbers of all widths.
    Signed(i64),
    /// Floating-point numbers of both widths.
    Float(f64),
    /// true or false.
    Bool(bool),
    /// Text.
    String(String),
    /// Values of one type.
    Array(Array),
}

/// Values of one type, read when they are asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    element: ValueType,
    count: usize,
    bytes: Bytes,
}

/// Lists in lists: the format allows them, no model has them. They are passed over, down to this depth.
const DEPTH: usize = 2;
/// No file has as many keys.
const MAX_KEYS: u64 = 1 << 16;

/// Keys and values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    values: HashMap<String, Value>,
}

impl Metadata {
    /// Reads the number of keys, which stands apart from the keys.
    pub(crate) fn count(cursor: &mut Cursor<'_>) -> Result<usize, Error> {
        // A key's length, its value's type, a value.
        cursor.count(8 + 4 + 1, MAX_KEYS, "keys")
    }

    pub(crate) fn read(cursor: &mut Cursor<'_>, count: usize) -> Result<Self, Error> {
        let mut values = HashMap::new();
        for _ in 0..count {
            let key = cursor.string("a key")?;
            let value = Value::read(cursor, &key)?;
            if values.contains_key(&key) {
                return Err(Error::KeyTwice(key));
            }
            values.insert(key, value);
        }
        Ok(Self { values })
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// The whole number, not negative, of a key; `None`: there is no such key.
    ///
    /// # Errors
    /// The value is something else.
    pub fn integer(&self, key: &str) -> Result<Option<u64>, Error> {
        self.typed(key, "a whole number", |value| match value {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        })
    }

    /// The number of a key.
    ///
    /// # Errors
    /// The value is something else.
    pub fn float(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a number", |value| match value {
            Value::Float(x) => Some(*x),
            Value::Unsigned(n) => Some(*n as f64),
            Value::Signed(n) => Some(*n as f64),
            _ => None,
        })
    }

    /// The boolean of a key.
    ///
    /// # Errors
    /// The value is something else.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// The text of a key.
    ///
    /// # Errors
    /// The value is something else.
    pub fn string(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "text", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// The list of a key.
    ///
    /// # Errors
    /// The value is something else.
    pub fn array(&self, key: &str) -> Result<Option<&Array>, Error> {
        self.typed(key, "a list", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        take: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        take(value).map(Some).ok_or_else(|| Error::WrongValue {
            key: key.to_owned(),
            got: value.kind(),
            expected,
        })
    }
}

impl Value {
    fn read(cursor: &mut Cursor<'_>, key: &str) -> Result<Self, Error> {
        let kind = kind(cursor, key)?;
        Ok(match kind {
            ValueType::String => Self::String(cursor.string("a value")?),
            ValueType::Array => Self::Array(Array::read(cursor, key, DEPTH)?),
            number => {
                let bytes = cursor.take(number.smallest() as u64, "a value")?;
                // Taken with the type's own length.
                scalar(number, &bytes).unwrap_or(Self::Unsigned(0))
            }
        })
    }

    /// The widest type of its kind, for messages.
    fn kind(&self) -> ValueType {
        match self {
            Self::Unsigned(_) => ValueType::U64,
            Self::Signed(_) => ValueType::I64,
            Self::Float(_) => ValueType::F64,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
        }
    }
}

fn kind(cursor: &mut Cursor<'_>, key: &str) -> Result<ValueType, Error> {
    let id = cursor.u32("a value's type")?;
    let kind = usize::try_from(id).ok().and_then(|i| ValueType::ALL.get(i));
    kind.copied().ok_or_else(|| Error::UnknownValueType {
        key: key.to_owned(),
        id,
    })
}

/// A number of the type and of as many bytes as the type has.
fn scalar(kind: ValueType, bytes: &[u8]) -> Option<Value> {
    macro_rules! number {
        ($t:ty) => {
            <$t>::from_le_bytes(bytes.try_into().ok()?).into()
        };
    }
    Some(match kind {
        ValueType::U8 => Value::Unsigned(number!(u8)),
        ValueType::U16 => Value::Unsigned(number!(u16)),
        ValueType::U32 => Value::Unsigned(number!(u32)),
        ValueType::U64 => Value::Unsigned(number!(u64)),
        ValueType::I8 => Value::Signed(number!(i8)),
        ValueType::I16 => Value::Signed(number!(i16)),
        ValueType::I32 => Value::Signed(number!(i32)),
        ValueType::I64 => Value::Signed(number!(i64)),
        ValueType::F32 => Value::Float(number!(f32)),
        ValueType::F64 => Value::Float(number!(f64)),
        ValueType::Bool => Value::Bool(bytes.first().is_some_and(|b| *b != 0)),
        ValueType::String | ValueType::Array => return None,
    })
}

impl Array {
    fn read(cursor: &mut Cursor<'_>, key: &str, depth: usize) -> Result<Self, Error> {
        let element = kind(cursor, key)?;
        let smallest = element.smallest() as u64;
        let count = cursor.count(smallest, u64::MAX, "a list")?;
        let mut rest = cursor.fork();
        match element {
            ValueType::String => {
                for _ in 0..count {
                    rest.text("a string of a list")?;
                }
            }
            ValueType::Array => {
                let depth = depth.checked_sub(1).ok_or_else(|| Error::TooDeep(key.to_owned()))?;
                for _ in 0..count {
                    Self::read(&mut rest, key, depth)?;
                }
            }
            _ => drop(rest.take(count as u64 * smallest, "a list")?),
        }
        let bytes = cursor.take((rest.at() - cursor.at()) as u64, "a list")?;
        Ok(Self { element, count, bytes })
    }

    /// How many values.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The values' type.
    pub fn element(&self) -> ValueType {
        self.element
    }

    /// The numbers or booleans of the list; nothing for a list of anything else.
    pub fn numbers(&self) -> impl Iterator<Item = Value> + '_ {
        let scalar_of = |chunk| scalar(self.element, chunk);
        self.bytes.chunks_exact(self.element.smallest()).map_while(scalar_of)
    }

    /// The strings of the list, each an error where it is not UTF-8; nothing for a list of anything else.
    pub fn strings(&self) -> impl Iterator<Item = Result<&str, Error>> + '_ {
        let mut rest: &[u8] = match self.element {
            ValueType::String => &self.bytes,
            _ => &[],
        };
        std::iter::from_fn(move || {
            let (length, after) = rest.split_first_chunk::<8>()?;
            // Checked when the file was parsed.
            let (text, after) = after.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
            let at = self.bytes.len() - rest.len();
            rest = after;
            let what = "a string of a list";
            Some(std::str::from_utf8(text).map_err(|_| Error::NotUtf8 { what, at }))
        })
    }
}
