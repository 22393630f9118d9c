//! Rewrites the attention nodes of ONNX graphs of language models into `ai.retro::RetroAttention`.
//!
//! [`convert`] is the whole of it; [`retro_onnx`] reads and writes ONNX files of any size with almost no heap.

pub mod cli;
mod convert;
mod eval;
mod files;
mod inspect;
mod logits;
mod merged;
pub mod prove;
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

pub use convert::{Options, SlidingCache, Verify, convert, convert_bytes};
pub use files::ExternalMode;
pub use inspect::inspect;
pub use report::*;
pub use revert::revert;
pub use settings::Settings;

#[cfg(test)]
mod testing;
