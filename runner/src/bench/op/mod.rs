//! Benchmark of the operator alone against ONNX Runtime's GroupQueryAttention, on the same caches and rows.
//!
//! Caches hold random keys and values instead of a prefill; page summaries are computed from them, page steps are those
//! of a prompt. Then tokens are decoded one by one, so that retrospective rows, page steps and the output cache are as
//! in a generation.

pub mod data;
pub mod graph;
pub mod node;
pub mod operator;
