//! What a source pattern is.

use crate::prove::{AttentionMatch, Refusal, SampleCalls};
use retro_onnx::{NodeProto, graph::GraphView};

/// A source pattern.
pub trait Rule: Sync {
    /// How reports call it.
    fn name(&self) -> &'static str;
    /// What this node is to the rule.
    fn match_node<'a>(&self, view: &GraphView<'a>, samples: &SampleCalls<'a>, node: &'a NodeProto) -> MatchResult;
}

/// What a rule says about a node.
pub enum MatchResult {
    /// Not an attention of this kind.
    NotMine,
    /// One that can be converted.
    Match(Box<AttentionMatch>),
    /// One that can't, and why.
    Refused(Refusal),
}

impl From<Result<AttentionMatch, Refusal>> for MatchResult {
    fn from(found: Result<AttentionMatch, Refusal>) -> Self {
        match found {
            Ok(matched) => Self::Match(Box::new(matched)),
            Err(why) => Self::Refused(why),
        }
    }
}
