//! Rewrites the attention nodes of ONNX graphs of language models into `ai.retro::RetroAttention`.
//!
//! [`convert()`] is the whole of it, [`revert()`] the way back, [`inspect()`] looks at a model without changing it. [`cli`] has
//! the flags of `retro-export`. [`verify`] compares a converted model with its original in ONNX Runtime. Each part has errors of
//! its own type, with their causes as sources.

#![warn(missing_docs)]

pub mod cli;
mod convert;
mod error;
mod eval;
mod files;
mod host_state;
mod inspect;
mod logits;
mod mask_width;
mod merged;
pub mod prove;
mod report;
mod revert;
mod rewrite;
pub mod rules;
mod settings;
mod source;
mod spill;
mod state_share;
mod table;
mod triton;
mod validate;
pub mod verify;

pub use convert::{Error, HostError, Options, SlidingCache, Unconvertible, Verify, convert, convert_bytes};
pub use files::{Error as FilesError, ExternalMode};
pub use inspect::{Error as InspectError, Inspection, PackedProductCounts, ValueReport, inspect};
pub use mask_width::{WidthMatters, takes_wide_masks};
pub use report::*;
pub use revert::{Error as RevertError, RecordError, revert};
pub use settings::{Error as SettingsError, Host, Settings};
pub use source::Error as SourceError;
pub use state_share::StateShare;
pub use triton::{Error as TritonError, Repository, write_repository};

#[cfg(test)]
mod testing;
