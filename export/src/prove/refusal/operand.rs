use retro_onnx::DataType;
use std::fmt::{self, Display};

/// One of the three operands of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperandKind {
    /// `[B, S, Hq*D]`, or the same by heads.
    Queries,
    /// `[B, T, Hkv*D]`, or the same by heads.
    Keys,
    /// `[B, T, Hkv*D]`, or the same by heads.
    Values,
}

impl Display for OperandKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queries => "queries",
            Self::Keys => "keys",
            Self::Values => "values",
        })
    }
}

/// Queries, keys or values that are not as the operator takes them.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OperandRefusal {
    /// They are computed from an input that the tokens do not decide.
    #[error(
        "its {kind} come from {input}, an input that is none of tokens, mask, positions and caches (cross-attention has such)"
    )]
    ForeignInput {
        /// Queries, keys or values.
        kind: OperandKind,
        /// The input.
        input: String,
    },
    /// The shape is not that of heads in a supported order.
    #[error("{name} of shape {shape:?} is not {heads} heads of {head_size} in an order that is supported")]
    Layout {
        /// The value.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Heads that its cache has.
        heads: usize,
        /// Elements of a head.
        head_size: usize,
    },
    /// The shape of a call is not the one that another call showed.
    #[error("with {call}, {name} has shape {shape:?}")]
    LayoutInCall {
        /// The call.
        call: crate::prove::call_shape::CallShape,
        /// The value.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The queries are not a whole number of heads for each key head.
    #[error("its queries of {elements} elements are not heads of {head_size} for {kv_heads} key heads")]
    QueryHeads {
        /// Elements of all heads.
        elements: usize,
        /// Elements of a head.
        head_size: usize,
        /// Key and value heads.
        kv_heads: usize,
    },
    /// Keys and values have different numbers of heads or head sizes.
    #[error(
        "its keys are {key_heads} heads of {key_size}, its values {value_heads} of {value_size}; the operator needs them alike"
    )]
    KeysAndValues {
        /// Heads of the keys.
        key_heads: usize,
        /// Head size of the keys.
        key_size: usize,
        /// Heads of the values.
        value_heads: usize,
        /// Head size of the values.
        value_size: usize,
    },
    /// An input of the node has another rank than `[B, S, H*D]`.
    #[error("{input} ({name}) has {rank} dimensions, not 3 (batch, tokens, heads * size)")]
    Rank {
        /// The name that the operator gives it.
        input: &'static str,
        /// The value.
        name: String,
        /// Its dimensions.
        rank: usize,
    },
    /// An input of the node has another element type than the cache.
    #[error("{input} ({name}) is {}, its cache is {}", .found.label(), .cache.label())]
    Type {
        /// The name that the operator gives it.
        input: &'static str,
        /// The value.
        name: String,
        /// Its element type.
        found: DataType,
        /// The cache's element type.
        cache: DataType,
    },
    /// The head sinks are not one number a query head.
    #[error("head_sink has shape {shape:?}, not [{q_heads}]")]
    HeadSinkShape {
        /// Its shape.
        shape: Vec<i64>,
        /// Query heads.
        q_heads: i64,
    },
    /// The head size is not positive.
    #[error("{name} has a head size of {size}")]
    HeadSize {
        /// The value.
        name: String,
        /// Its head size.
        size: i64,
    },
    /// Two tensors have different head sizes.
    #[error("{first} has a head size of {first_size}, but {name} has {size}")]
    HeadSizes {
        /// A tensor.
        first: String,
        /// Its head size.
        first_size: i64,
        /// The tensor that differs.
        name: String,
        /// Its head size.
        size: i64,
    },
    /// The node normalises each head, whose size is not known.
    #[error("it normalises queries and keys, but nothing in the graph tells the head size")]
    HeadSizeUnknown,
    /// The bias of queries, keys and values is computed.
    #[error("its bias {name} is not constant")]
    BiasNotConstant {
        /// The bias.
        name: String,
    },
    /// The bias of queries, keys and values has fewer numbers than they have elements.
    #[error("its bias {name} is too short")]
    BiasTooShort {
        /// The bias.
        name: String,
    },
}
