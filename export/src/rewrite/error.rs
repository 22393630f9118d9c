//! Why a graph can't be rewritten.

use crate::rules::{INPUT_IDS, INPUTS_EMBEDS};
use retro_contract::Selector;

/// Each is one line that says what is wrong, and where.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model has no graph.
    #[error("the model has no graph")]
    NoGraph,

    /// The conversion is not one of this graph.
    #[error("the node of an attention is not in the graph (a fault of this program)")]
    NoAttention,

    /// The logits readback was found in another graph.
    #[error("the lm_head is not in the graph (a fault of this program)")]
    NoLmHead,

    /// A name of the operator's contract is a value of the model.
    #[error("the model has a value named {0} already, which a converted model needs")]
    NameTaken(String),

    /// A past cache is not declared as `[B, H, T, D]`.
    #[error("{0} has no declared shape of 4 dimensions")]
    CacheShape(String),

    /// The selector's state packs a whole number of bytes a key.
    #[error(
        "{cache} has heads of {head_size} elements, and the selector {selector} needs a multiple of {multiple} with {bits} \
         bits an element; convert with --selector signed_moments"
    )]
    HeadSize {
        cache: String,
        head_size: usize,
        selector: Selector,
        bits: usize,
        multiple: usize,
    },

    /// The state of a selector with codes is declared in bytes, which depend on the size of a head.
    #[error(
        "{cache} does not tell the size of its heads, which the selector {selector} needs; convert with --selector \
         signed_moments"
    )]
    UnknownHeadSize { cache: String, selector: Selector },

    /// Slice takes its bounds as inputs, Equal takes floats and Gather negative indices from opset 11 on.
    #[error("opset {0} is too old to convert attention of several nodes; export with 11 or newer")]
    OldOpset(i64),

    /// There is one check of the attention mask for all layers.
    #[error("some layers mask padding and others don't")]
    MixedPadding,

    /// How many tokens are fed can't be told.
    #[error("the graph has no input {INPUT_IDS} or {INPUTS_EMBEDS} that tells how many tokens are fed")]
    NoTokens,

    /// The cache has its capacity's shape now, which that node does not expect.
    #[error("node {node} reads the cache {cache} too, beside the attention: what it needs isn't supported")]
    CacheReadElsewhere { node: String, cache: String },
}
