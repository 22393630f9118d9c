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

    /// Slice and Gather of the window's nodes.
    #[error("opset {0} is too old for --window-in-graph; export with 11 or newer, or leave that flag out")]
    WindowOpset(i64),

    /// Rows that don't count would be written into its cache.
    #[error(
        "node {0} stays a GroupQueryAttention, which can't take the rows that --window-in-graph feeds; convert with --window 1, or \
         without that flag"
    )]
    WindowLayerLeft(String),

    /// The graph can't keep rows of other inputs.
    #[error(
        "{name} is not declared with {rank} dimensions, so that the graph can't keep its rows; convert without --window-in-graph"
    )]
    WindowInput { name: &'static str, rank: usize },

    /// State has its sizes from the graph's declarations.
    #[error("{INPUTS_EMBEDS} does not declare how many elements a token has, which --window-in-graph needs")]
    WindowEmbeds,

    /// Another input has a row a token, or counts those that were fed before.
    #[error(
        "the graph can't feed the input {0} again, which has a row a token or counts tokens; convert without --window-in-graph"
    )]
    WindowOtherInput(String),

    /// How many rows there are is decided by these lengths.
    #[error("node {0} computes the lengths of sequences from the tokens fed; convert without --window-in-graph")]
    LengthsOfTokens(String),

    /// The host would get rows that it has not fed.
    #[error(
        "the output {0} has a row for each token fed, which --window-in-graph can't cut; convert without that flag"
    )]
    WindowOutput(String),

    /// Its state is told by names and sizes that all layers share.
    #[error("the layers have state of different sizes, which --host genai does not take")]
    HostLayers,

    /// Its own state has the names that the window's would have.
    #[error("the model has a value named {0} already, where --host genai keeps a layer's state")]
    HostNameTaken(String),

    /// Hosts that zero state by its declaration need numbers.
    #[error(
        "the size of {0} is open, and --host genai makes state by declared sizes; convert with the selector sketch"
    )]
    HostSize(String),

    /// It has no room for embeddings.
    #[error("the model takes {INPUTS_EMBEDS}, which --host genai keeps no window of; convert with --window 1")]
    HostEmbeds,

    /// Numbers of tokens are kept as float32.
    #[error("--context is {0} tokens; with --host genai and a window of several tokens it must be below 16777216")]
    HostContext(usize),

    /// The cache has its capacity's shape now, which that node does not expect.
    #[error("node {node} reads the cache {cache} too, beside the attention: what it needs isn't supported")]
    CacheReadElsewhere { node: String, cache: String },
}
