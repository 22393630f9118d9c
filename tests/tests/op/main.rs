//! The operator in a real ONNX Runtime session. One binary, so that one link serves all.

mod attention;
mod attributes;
mod batch;
mod bindings;
mod broken;
mod drive;
mod errors;
mod golden;
mod inputs;
mod matmul_nbits;
mod prefill;
mod rewind;
mod rotary;
mod selection;
mod threads;
mod unaligned;
