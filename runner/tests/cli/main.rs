//! The real program on real models: everything here starts `retro-run` in a process of its own.
//!
//! It needs ONNX Runtime and, for converted models, the plugin beside the program; `make test` provides both.

mod bench;
mod chat;
mod converted;
mod cuda;
mod dense;
mod ends;
mod errors;
mod eval;
mod questions;
mod support;
