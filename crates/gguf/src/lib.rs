//! Reads GGUF files of version 2 and 3, as
//! [ggml's description of the format](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) has them: the
//! metadata, and tensors of the common types, dequantised as ggml does it.
//!
//! Nothing is believed: a count, length or offset that the file does not cover is an error before anything is allocated
//! or read for it. What is parsed are slices of the file's bytes; a tensor's elements are made when they are asked for,
//! any run of them.

#![warn(missing_docs)]
#![forbid(unsafe_code)]

mod codes;
mod cursor;
mod dequantise;
mod error;
mod file;
mod metadata;
mod tensor;
mod tensor_type;
mod write;

pub use bytes::Bytes;
pub use codes::{CodeLayout, Codes};
pub use error::Error;
pub use file::Gguf;
pub use metadata::{Array, Metadata, Value, ValueType};
pub use tensor::{Tensor, TensorInfo};
pub use tensor_type::TensorType;
pub use write::Writer;
