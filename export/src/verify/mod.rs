//! The original and the converted model on the same tokens: with a budget of all pages they must give the same logits.
//!
//! [`compare()`] takes both models through the schedules of `schedule.rs` (`feeding.rs`), measures how far their logits are apart
//! (`difference.rs`), and gives a [`Verification`].

mod compare;
mod compared_model;
mod comparison;
mod declared_sizes;
mod difference;
mod error;
mod feed;
mod feeding;
pub(crate) mod graph_facts;
mod host_tensor;
mod other_inputs;
mod outcome;
mod runtime;
mod schedule;
pub mod ulp;

pub use compare::compare;
pub use compared_model::LOGITS_TO_KEEP;
pub use comparison::{CacheFacts, Comparison, PaddingCheck};
pub use difference::Variation;
pub use error::Error;
pub(crate) use graph_facts::DYNAMIC;
pub use other_inputs::{InputFill, OtherInput, other_inputs};
pub use outcome::{Compared, Skipped, Verification};
pub use runtime::ComparisonRuntime;
