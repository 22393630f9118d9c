//! Why a graph can't be rewritten.

use crate::rules::{INPUT_IDS, INPUTS_EMBEDS};

/// Each is one line that says what is wrong, and where.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the model has no graph")]
    NoGraph,

    /// The conversion is not one of this graph.
    #[error("an attention's node is gone")]
    NoAttention,

    /// The logits readback was found in another graph.
    #[error("the lm_head is gone")]
    NoLmHead,

    #[error("the model has a value named {0} already, which a converted model needs")]
    NameTaken(String),

    #[error("{0} has no declared shape of 4 dimensions")]
    CacheShape(String),

    /// Slice takes its bounds as inputs, Equal takes floats and Gather negative indices from opset 11 on.
    #[error("opset {0} is too old to convert attention of several nodes; export with 11 or newer")]
    OldOpset(i64),

    #[error("some layers mask padding and others don't")]
    MixedPadding,

    #[error("the graph has no input {INPUT_IDS} or {INPUTS_EMBEDS} that tells how many tokens are fed")]
    NoTokens,

    #[error("node {node} reads the cache {cache} too, beside the attention: what it needs isn't understood")]
    CacheReadElsewhere { node: String, cache: String },
}
