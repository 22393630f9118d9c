//! What the tests in `tests/` share: where things are, golden vectors, one-node models in a real ONNX Runtime session,
//! and an obvious f64 implementation of the method to compare with where no golden vector exists.

pub mod attrs;
pub mod compare;
pub mod decoder;
pub mod gguf;
pub mod golden;
pub mod host;
pub mod layer;
pub mod matmul_nbits;
pub mod mirror;
pub mod node;
pub mod oracle;
pub mod paths;
pub mod random;
pub mod tensor;
pub mod zoo;

use std::io::{self, Write};

/// Says on stderr what a test could not test here. What a passing test prints with `println!` is shown to nobody.
pub fn not_tested(what: &str) {
    let _ = writeln!(io::stderr(), "NOT TESTED: {what}");
}
