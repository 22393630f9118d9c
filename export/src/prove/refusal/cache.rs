use super::operand::OperandKind;
use crate::prove::call_shape::CallShape;
use retro_onnx::DataType;
use std::fmt::{self, Display};

/// Dimensions of the operator's cache.
const LAYOUT: &str = "[B, H, T, D] (batch, heads, tokens, head size)";

/// An order of a cache's dimensions other than the operator's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheDimensions {
    TokensBeforeHeads,
    TokensLast,
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
    #[error("it has no past_key and past_value: the model keeps no cache")]
    NodeHasNone,
    #[error("its cache is not complete (past_key, past_value, present_key, present_value)")]
    Incomplete,
    #[error(
        "the graph keeps no cache: it recomputes every token; export it with past key values (of split decoders, convert \
         the one with past: decoder_with_past_model.onnx)"
    )]
    GraphHasNone,
    #[error(
        "the graph keeps no cache: it recomputes every token, as encoders do (BERT) and decoders exported without a past; \
         export it with past key values (of split decoders, convert the one with past: decoder_with_past_model.onnx)"
    )]
    GraphReturnsNone,
    #[error(
        "cross-attention of an encoder-decoder: its keys come from {from}, to which the tokens fed add nothing, so that \
         there is no cache to select from"
    )]
    CrossAttention { from: String },
    #[error("its cache {past} is not an input of the graph")]
    NotAnInput { past: String },
    #[error("its cache {past} is not an input of the graph of 4 dimensions")]
    NotAnInputOf4Dimensions { past: String },
    #[error("its cache {present} is not an output of the graph")]
    NotAnOutput { present: String },
    #[error("its cache {name} is read by other nodes too")]
    OtherReaders { name: String },
    #[error("its cache {name} is read by node {node} too")]
    OtherReader { name: String, node: String },
    #[error("{past} has no declared shape")]
    NoShape { past: String },
    #[error("{past} has {rank} dimensions, not 4 (batch, heads, tokens, head size)")]
    Rank { past: String, rank: usize },
    #[error("{past} has {heads} heads, but kv_num_heads is {kv_heads}")]
    Heads { past: String, heads: i64, kv_heads: i64 },
    #[error("{past} has no declared element type")]
    NoType { past: String },
    #[error("its cache holds {}, not float32, float16 or bfloat16", .found.label())]
    Type { found: DataType },
    #[error("its cache holds {} keys and {} values", .keys.label(), .values.label())]
    KeyAndValueTypes { keys: DataType, values: DataType },
    #[error(
        "its cache comes in as {} ({past}) and goes out as {} ({present})", .past_type.label(), .present_type.label()
    )]
    TypeChanges {
        past: String,
        past_type: DataType,
        present: String,
        present_type: DataType,
    },
    #[error("{past} has shape {shape:?}")]
    Shape { past: String, shape: Vec<usize> },
    #[error("with {call}, {past} has another shape")]
    ShapeInCall { call: CallShape, past: String },
    #[error("its cache becomes {found:?}, not {expected:?}")]
    TotalShape { found: Vec<usize>, expected: [usize; 4] },
    /// `by`: the operator that makes `total`, or "an input of the graph".
    #[error(
        "its {kind} ({total}, by {by}) are not a cache of the graph followed by new ones: cross-attention, or a cache of \
         another kind"
    )]
    NotAppended {
        kind: OperandKind,
        total: String,
        by: String,
    },
    #[error("its cache {total} is not the past followed by the new tokens")]
    OtherNumbers { total: String },
    #[error(
        "its cache {past} comes in with {tokens} tokens, no other number, and goes out with more: the caller would have to \
         cut it between two calls; export it with a cache of open length"
    )]
    OneLength { past: String, tokens: i64 },
    #[error(
        "{layers} layers share the cache {cache}; layers without a cache of their own are not supported by this version"
    )]
    Shared { layers: usize, cache: String },
    #[error("{name} is its cache of keys and its cache of values")]
    OnePast { name: String },
    #[error("{name} gives back its keys and its values")]
    OnePresent { name: String },
    /// `named` is `past` or `present`, and goes with `other` by its name.
    #[error(
        "its cache comes in as {past} and goes out as {present}, but by its name {named} goes with {other}: callers, which \
         go by names, would feed another cache in its place; name them alike"
    )]
    Crossed {
        past: String,
        present: String,
        named: String,
        other: String,
    },
    #[error(
        "keys and values {}are merged in one cache, {cache}; the operator takes a cache of keys and one of values for each \
         layer, each {LAYOUT}: export it with such caches",
        if *.of_all_layers { "of all layers " } else { "" }
    )]
    Merged { cache: String, of_all_layers: bool },
    #[error(
        "its keys and values are computed from the cache {cache} by node {node} in each call (compressed caches, as in \
         DeepSeek's multi-head latent attention); the operator needs keys and values themselves, each {LAYOUT}"
    )]
    Compressed { cache: String, node: String },
    #[error(
        "its cache {cache} has a fixed capacity, which node {node} ({op_type}) writes into (a static cache); export it with \
         a cache that grows"
    )]
    Static {
        cache: String,
        node: String,
        op_type: String,
    },
    #[error(
        "its cache {cache} is laid out {dimensions}, which node {node} ({op_type}) appends to; the operator's is {LAYOUT}: \
         export it with such caches"
    )]
    Dimensions {
        cache: String,
        dimensions: CacheDimensions,
        node: String,
        op_type: String,
    },
    #[error(
        "its cache {cache} always holds {tokens} tokens, the newest: node {node} ({op_type}) cuts off what is older (a \
         sliding cache); export it with a cache that grows"
    )]
    Sliding {
        cache: String,
        tokens: i64,
        node: String,
        op_type: String,
    },
}
