//! Source patterns: the ways in which exporters write attention, one rule a file.
//!
//! A [`Rule`] looks at one node and says that it is not its business ([`MatchResult::NotMine`]), or what it found
//! ([`AttentionMatch`]), or why it can't be converted ([`Refusal`]). Rules for an operator that is close to
//! `ai.retro::RetroAttention` read its inputs and attributes (`gqa`); all others name what they think are queries, keys,
//! values and scores (an `AttentionCandidate`) and leave the rest to [`crate::prove`].
//!
//! To add a rule:
//! 1. Write a file with a type that implements [`Rule`], and its tests: graphs of the pattern that match, and each change
//!    of them that must not.
//! 2. Name it in [`RULES`], before any rule that would take its nodes.
//! 3. Give each new reason for a refusal a variant of [`Refusal`].
//! 4. Put a graph of the exporter into `tests/data/zoo-graphs`, and name it in `tests/tests/converted/exports.rs`.
//!
//! [`find_attention`] runs the rules over a model. Where all refuse, `explain` names the cause as a user knows it.

mod attention;
mod cache_names;
mod carried_state;
mod cross_attention;
mod decomposed;
mod explain;
mod find;
mod functions;
pub(crate) mod gqa;
mod mha;
mod onnx_attention;
mod rule;
mod shown;
mod unsupported;

pub use crate::prove::{
    ATTENTION_MASK, AttentionMatch, HeadLayout, INPUT_IDS, INPUTS_EMBEDS, LengthSource, POSITION_IDS, QkNorm, Refusal,
    Rope, SampleCalls, Size, named_sizes, noise, sizes, width,
};
pub use attention::{Attention, Conversion};
pub use carried_state::{all_carried, carried};
pub use explain::none_found;
pub use find::{RULES, find_attention};
pub use rule::{MatchResult, Rule};
