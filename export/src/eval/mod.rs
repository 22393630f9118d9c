//! Runs the parts of a graph that decide what an attention does: shapes, masks, positions, scales, layouts. Weights and
//! activations have shapes only, so a run costs next to nothing whatever the model's size; where numbers are known
//! (constants, masks, positions, or values that a proof substitutes) they are computed, in f64.
//!
//! - [`Program`] is a graph made ready to run, whole or in part; [`Env`] holds the values of a run, and why others are not known.
//! - [`Tensor`] is a value: a shape, and numbers that are stored (computed by `ndarray`) or on demand (`lazy`).
//! - `ops` holds the operators, in one table. An operator that it doesn't list has no shape.
//! - [`Error`] is why a value is not known; its variant tells what may be done about it.

mod constant;
mod error;
mod layout;
mod lazy;
mod node;
mod ops;
mod program;
mod tensor;

pub use error::Error;
pub use ops::{fused_scores, windows};
pub use program::{Env, GraphSlice, Program, leading_to, reads};
pub use tensor::Tensor;

/// Constants up to this many elements are read; larger ones only where no weight can be meant.
const SMALL: usize = 4096;
