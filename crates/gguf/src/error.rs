//! What can be wrong with a GGUF file.

use crate::{metadata::ValueType, tensor_type::TensorType};

/// Each is one line that says what is wrong. The caller adds which file it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Error {
    #[error("it does not begin with \"GGUF\"")]
    NoMagic,
    #[error("it is in big-endian byte order, only little-endian files are read")]
    BigEndian,
    #[error("its version is {0}, versions 2 and 3 are read")]
    Version(u32),
    #[error("it is cut short: {what} at byte {at} needs {needed} bytes, {left} are left")]
    CutShort {
        what: &'static str,
        at: usize,
        needed: u64,
        left: usize,
    },
    #[error("it declares {count} {what}, more than {limit}")]
    TooMany { what: &'static str, count: u64, limit: u64 },
    #[error("text at byte {at} is not UTF-8: {what}")]
    NotUtf8 { what: &'static str, at: usize },
    #[error("key {0:?} occurs twice")]
    KeyTwice(String),
    #[error("tensor {0:?} occurs twice")]
    TensorTwice(String),
    #[error("the value of {key:?} has the unknown type {id}")]
    UnknownValueType { key: String, id: u32 },
    #[error("the value of {0:?} is a list of lists of lists")]
    TooDeep(String),
    #[error("general.alignment is {0}, expected a power of two")]
    Alignment(String),
    #[error("key {0:?} is missing")]
    NoKey(String),
    #[error("the value of {key:?} is a {got}, expected {expected}")]
    WrongValue {
        key: String,
        got: ValueType,
        expected: &'static str,
    },
    #[error("tensor {name:?} has {dims} dimensions, expected 1 to 4")]
    Rank { name: String, dims: u32 },
    #[error("tensor {name:?} has the size {dims:?}, which no tensor can have")]
    Dims { name: String, dims: Vec<u64> },
    #[error("rows of tensor {name:?} have {columns} elements, {kind} has blocks of {block}")]
    Block {
        name: String,
        columns: u64,
        kind: TensorType,
        block: usize,
    },
    #[error("tensor {name:?} starts at {offset}, which is not a multiple of {alignment}")]
    Unaligned { name: String, offset: u64, alignment: u64 },
    #[error("it is cut short: tensor {name:?} takes bytes {start} to {end}, the file has {len}")]
    TensorOutside {
        name: String,
        start: u64,
        end: u64,
        len: usize,
    },
    #[error("there is no tensor {0:?}")]
    NoTensor(String),
    #[error("tensor {name:?} is of type {kind}; those that are read are {known}", known = TensorType::list())]
    TensorType { name: String, kind: String },
    #[error("elements {start} to {end} of a tensor of {len}")]
    ElementsOutside { start: usize, end: usize, len: usize },
}
