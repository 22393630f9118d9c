use super::operand::OperandKind;
use crate::prove::call_shape::CallShape;
use retro_onnx::DataType;
use std::fmt::{self, Display};

/// Dimensions of the operator's cache.
const LAYOUT: &str = "[B, H, T, D] (batch, heads, tokens, head size)";

/// An order of a cache's dimensions other than the operator's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheDimensions {
    /// `[B, T, H, D]`.
    TokensBeforeHeads,
    /// `[B, H, D, T]`: transposed keys.
    TokensLast,
    /// `[T, B, H, D]`.
    TokensFirst,
    /// Heads side by side, three dimensions.
    Flat,
    /// Three dimensions in another order.
    Three,
}

impl Display for CacheDimensions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TokensBeforeHeads => "[B, T, H, D] (tokens before heads)",
            Self::TokensLast => "[B, H, D, T] (tokens last: transposed keys)",
            Self::TokensFirst => "[T, B, H, D] (tokens first)",
            Self::Flat => "[B, T, H*D] (heads side by side)",
            Self::Three => "in 3 dimensions",
        })
    }
}

/// A cache that is not the operator's: `[B, Hkv, C, D]`, of the graph, growing by the tokens fed.
///
/// `cache` is a value with its declared shape, as "past.0 [batch, 8, past, 64]"; `past`, `present` and `name` are names
/// alone.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CacheRefusal {
    /// The node has neither a past key nor a past value.
    #[error("it has no past_key and past_value: the model keeps no cache")]
    NodeHasNone,
    /// The node has some of past key, past value, present key and present value, not all.
    #[error("its cache is not complete (past_key, past_value, present_key, present_value)")]
    Incomplete,
    /// The graph has no input that could be a past.
    #[error(
        "the graph keeps no cache: it recomputes every token; export it with past key values (of split decoders, convert \
         the one with past: decoder_with_past_model.onnx)"
    )]
    GraphHasNone,
    /// The graph has no output that could be a present.
    #[error(
        "the graph keeps no cache: it recomputes every token, as encoders do (BERT) and decoders exported without a past; \
         export it with past key values (of split decoders, convert the one with past: decoder_with_past_model.onnx)"
    )]
    GraphReturnsNone,
    /// The keys are of another sequence, which the tokens fed do not lengthen.
    #[error(
        "cross-attention of an encoder-decoder: its keys come from {from}, to which the tokens fed add nothing, so that \
         there is no cache to select from"
    )]
    CrossAttention {
        /// What the keys are computed from.
        from: String,
    },
    /// The past is computed in the graph.
    #[error("its cache {past} is not an input of the graph")]
    NotAnInput {
        /// The past.
        past: String,
    },
    /// The past is computed in the graph, or has other dimensions than a cache.
    #[error("its cache {past} is not an input of the graph of 4 dimensions")]
    NotAnInputOf4Dimensions {
        /// The past.
        past: String,
    },
    /// The present stays in the graph: the caller could not feed it again.
    #[error("its cache {present} is not an output of the graph")]
    NotAnOutput {
        /// The present.
        present: String,
    },
    /// The past or the present is used by more than the attention.
    #[error("its cache {name} is read by other nodes too")]
    OtherReaders {
        /// The past or the present.
        name: String,
    },
    /// The past or the present is used by another node.
    #[error("its cache {name} is read by node {node} too")]
    OtherReader {
        /// The past or the present.
        name: String,
        /// The other reader.
        node: String,
    },
    /// The past is declared without a shape.
    #[error("{past} has no declared shape")]
    NoShape {
        /// The past.
        past: String,
    },
    /// The past has another rank than a cache.
    #[error("{past} has {rank} dimensions, not 4 (batch, heads, tokens, head size)")]
    Rank {
        /// The past.
        past: String,
        /// Its dimensions.
        rank: usize,
    },
    /// The past has another number of heads than the node.
    #[error("{past} has {heads} heads, but kv_num_heads is {kv_heads}")]
    Heads {
        /// The past.
        past: String,
        /// Heads of the past.
        heads: i64,
        /// Key and value heads.
        kv_heads: i64,
    },
    /// The past is declared without an element type.
    #[error("{past} has no declared element type")]
    NoType {
        /// The past.
        past: String,
    },
    /// The past has an element type that the operator does not have.
    #[error("its cache holds {}, not float32, float16 or bfloat16", .found.label())]
    Type {
        /// Element type of the cache.
        found: DataType,
    },
    /// The pasts of keys and values have different element types.
    #[error("its cache holds {} keys and {} values", .keys.label(), .values.label())]
    KeyAndValueTypes {
        /// Element type of the keys.
        keys: DataType,
        /// Element type of the values.
        values: DataType,
    },
    /// A present has another element type than its past.
    #[error(
        "its cache comes in as {} ({past}) and goes out as {} ({present})", .past_type.label(), .present_type.label()
    )]
    TypeChanges {
        /// The past.
        past: String,
        /// Its element type.
        past_type: DataType,
        /// The present.
        present: String,
        /// Its element type.
        present_type: DataType,
    },
    /// The past has a shape that no cache has.
    #[error("{past} has shape {shape:?}")]
    Shape {
        /// The past.
        past: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The past does not have B sequences of as many tokens as the call says.
    #[error("with {call}, {past} has another shape")]
    ShapeInCall {
        /// The call.
        call: CallShape,
        /// The past.
        past: String,
    },
    /// Past and new keys or values together have another shape than a cache with the new tokens appended.
    #[error("its cache becomes {found:?}, not {expected:?}")]
    TotalShape {
        /// Their shape.
        found: Vec<usize>,
        /// `[B, Hkv, past + S, D]`.
        expected: [usize; 4],
    },
    /// The keys or values are not the past with the new ones appended.
    #[error(
        "its {kind} ({total}, by {by}) are not a cache of the graph followed by new ones: cross-attention, or a cache of \
         another kind"
    )]
    NotAppended {
        /// Keys or values.
        kind: OperandKind,
        /// Past and new ones together.
        total: String,
        /// The operator that computes it, or "an input of the graph".
        by: String,
    },
    /// Past and new keys or values together have the right shape, and other numbers than the two have.
    #[error("its cache {total} is not the past followed by the new tokens")]
    OtherNumbers {
        /// Past and new ones together.
        total: String,
    },
    /// The past is declared with a fixed length, the present is longer.
    #[error(
        "its cache {past} comes in with {tokens} tokens, no other number, and goes out with more: the caller would have to \
         cut it between two calls; export it with a cache of open length"
    )]
    OneLength {
        /// The past.
        past: String,
        /// Its length in tokens.
        tokens: i64,
    },
    /// Several layers read one cache.
    #[error(
        "{layers} layers share the cache {cache}; layers without a cache of their own are not supported by this version"
    )]
    Shared {
        /// Layers that read it.
        layers: usize,
        /// The cache.
        cache: String,
    },
    /// Keys and values have one past.
    #[error("{name} is its cache of keys and its cache of values")]
    OnePast {
        /// The past.
        name: String,
    },
    /// Keys and values have one present.
    #[error("output {name} is the cache of both its keys and its values")]
    OnePresent {
        /// The present.
        name: String,
    },
    /// By its name the past or the present goes with another value than by the nodes.
    #[error(
        "its cache comes in as {past} and goes out as {present}, but by its name {named} goes with {other}: callers, which \
         go by names, would feed another cache in its place; name them alike"
    )]
    Crossed {
        /// The past.
        past: String,
        /// The present.
        present: String,
        /// The past or the present: the one whose name says otherwise.
        named: String,
        /// What it goes with by its name.
        other: String,
    },
    /// Keys and values, or all layers, are in one tensor.
    #[error(
        "keys and values {}are merged in one cache, {cache}; the operator takes a cache of keys and one of values for each \
         layer, each {LAYOUT}: export it with such caches",
        if *.of_all_layers { "of all layers " } else { "" }
    )]
    Merged {
        /// The cache.
        cache: String,
        /// Whether it holds the keys and values of all layers.
        of_all_layers: bool,
    },
    /// The cache holds what keys and values are computed from.
    #[error(
        "its keys and values are computed from the cache {cache} by node {node} in each call (compressed caches, as in \
         DeepSeek's multi-head latent attention); the operator needs keys and values themselves, each {LAYOUT}"
    )]
    Compressed {
        /// The cache.
        cache: String,
        /// The node that computes keys and values.
        node: String,
    },
    /// The cache has a fixed capacity, and new tokens are written into it.
    #[error(
        "its cache {cache} has a fixed capacity, which node {node} ({op_type}) writes into (a static cache); export it with \
         a cache that grows"
    )]
    Static {
        /// The cache.
        cache: String,
        /// The node that writes into it.
        node: String,
        /// The node's operator.
        op_type: String,
    },
    /// The cache has its dimensions in another order than the operator's.
    #[error(
        "its cache {cache} is laid out {dimensions}, which node {node} ({op_type}) appends to; the operator's is {LAYOUT}: \
         export it with such caches"
    )]
    Dimensions {
        /// The cache.
        cache: String,
        /// Their order.
        dimensions: CacheDimensions,
        /// The node that appends to it.
        node: String,
        /// The node's operator.
        op_type: String,
    },
    /// The cache holds the newest tokens only.
    #[error(
        "its cache {cache} always holds {tokens} tokens, the newest: node {node} ({op_type}) cuts off what is older (a \
         sliding cache); export it with a cache that grows"
    )]
    Sliding {
        /// The cache.
        cache: String,
        /// Its length in tokens.
        tokens: i64,
        /// The node that cuts off older tokens.
        node: String,
        /// The node's operator.
        op_type: String,
    },
}
