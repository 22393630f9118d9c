//! The operator's contract in code: attributes, shapes, lengths. docs/operator.md is the prose.
//!
//! Everything here is plain arithmetic on numbers, so that every execution provider checks the same things with the
//! same words before it writes anything.

mod attributes;
mod call_plan;
mod dims;
mod unknown;

pub use attributes::{AttributeSource, Attributes};
pub(crate) use attributes::{MANY, Reader};
pub use call_plan::{CallLengths, CallPlan, Phase, Sequence};
pub use dims::{Dims, InputShapes, Shape};
pub(crate) use unknown::{Names, refuse as refuse_unknown};

#[cfg(test)]
mod tests;
