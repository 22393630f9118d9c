//! The attentions of a model, converted or not.

use crate::prove::{AttentionMatch, Refusal};
use retro_contract::Mode;

/// An attention node of a model.
pub struct Attention {
    /// Number from the name of its cache, else its place among the attentions.
    pub layer: usize,
    /// Index in the main graph; none in a subgraph or function.
    pub node: Option<usize>,
    /// The node's name.
    pub name: String,
    /// The node's operator.
    pub op_type: String,
    /// The rule that matched or refused it.
    pub rule: Option<&'static str>,
    /// What the rule made of it, or why it stays as it is.
    pub found: Result<Box<AttentionMatch>, Refusal>,
    /// Whether the node as it is gives right results when tokens that are in its cache are fed again with a total length
    /// that counts them once: GQA with a cache of fixed capacity does, and attention to what an encoder gave.
    pub takes_tokens_again: bool,
}

/// An attention that is converted, and how.
pub struct Conversion<'a> {
    /// The attention.
    pub attention: &'a Attention,
    /// What the rule made of it.
    pub matched: &'a AttentionMatch,
    /// Index in the main graph.
    pub node: usize,
    /// How the operator works in this layer.
    pub mode: Mode,
}
