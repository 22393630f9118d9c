//! Benchmark of the operator alone against ONNX Runtime's GroupQueryAttention, on the same caches and rows.
//!
//! Caches and the selector's state hold random numbers instead of a prefill's; page steps are those of a prompt. Then
//! tokens are decoded one by one, so that retrospective rows, page steps and the output cache are as
//! in a generation.

pub mod data;
pub mod graph;
pub mod node;
pub mod operator;
