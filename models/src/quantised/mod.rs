//! Weights of 4 and 8 bits, as ONNX Runtime's MatMulNBits and GatherBlockQuantized take them.
//!
//! An element is `code * scale + min`. Files that have such codes keep them; other weights are rounded to them. In the
//! graph:
//!
//! - MatMulNBits multiplies with `code * scale`. It computes products of f32 activations and 8-bit codes by widening all
//!   weights in every call, which takes a hundred times as long as 4-bit codes do. There, a code is
//!   `16 * high + low`: two products with 4-bit codes.
//! - Minimums would be its zero points if these were no whole numbers. It takes such zero points, but again widens all
//!   weights in every call. Therefore the sums of the activations over each group are multiplied with the minimums.

mod fill;
mod packed;
mod round;

pub use fill::fill;
pub use packed::{Activations, Format, Half, Packed, What};
