//! Rewrites the attention nodes of ONNX graphs of language models into `ai.retro::RetroAttention`.
//!
//! [`convert`] is the whole of it; [`onnx`] reads and writes ONNX files of any size with almost no heap.

pub mod cli;
mod convert;
mod files;
pub mod graph;
mod logits;
pub mod onnx;
mod report;
mod rewrite;
pub mod rules;
mod settings;
mod validate;

pub use convert::{Options, SlidingCache, convert};
pub use files::ExternalMode;
pub use report::*;
pub use settings::Settings;

#[cfg(test)]
mod testing;
