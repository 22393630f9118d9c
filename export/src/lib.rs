//! Rewrites the attention nodes of ONNX graphs of language models into `ai.retro::RetroAttention`.
//!
//! [`convert`] is the whole of it; [`onnx`] reads and writes ONNX files of any size with almost no heap.

pub mod cli;
mod convert;
mod error;
mod eval;
mod files;
mod inspect;
mod logits;
mod merged;
mod prove;
mod report;
mod revert;
mod rewrite;
pub mod rules;
mod settings;
mod source;
mod spill;
mod table;
mod validate;
pub mod verify;

pub use convert::{Error, Options, SlidingCache, Unconvertible, Verify, convert, convert_bytes};
pub use files::{Error as FilesError, ExternalMode};
pub use inspect::{Error as InspectError, Inspection, ValueReport, inspect};
pub use report::*;
pub use revert::{Error as RevertError, RecordError, revert};
pub use settings::{Error as SettingsError, Settings};
pub use source::Error as SourceError;

#[cfg(test)]
mod testing;
