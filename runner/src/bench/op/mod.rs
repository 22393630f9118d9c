//! The operator alone, beside ONNX Runtime's GroupQueryAttention on the same caches and the same rows.
//!
//! Nothing is prefilled: caches hold random keys and values, page summaries are computed from them here, and page steps are
//! those of a prompt. Then tokens are decoded one after another, so that retrospective rows, page steps and the output cache
//! are what they are in a generation.

pub mod data;
pub mod graph;
pub mod node;
pub mod operator;
