//! Benchmark of the operator alone against ONNX Runtime's GroupQueryAttention, on the same caches and rows.
//!
//! Caches hold random keys and values instead of a prompt's, the selector's state is what the operator makes of such
//! keys, and page steps are those of a prompt. Then tokens are decoded one by one, so that retrospective rows, page
//! steps and the output cache are as in a generation.

pub mod data;
pub mod graph;
pub mod node;
pub mod operator;
