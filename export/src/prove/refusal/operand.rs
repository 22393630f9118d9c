use retro_onnx::DataType;
use std::fmt::{self, Display};

/// One of the three operands of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperandKind {
    Queries,
    Keys,
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
    #[error(
        "its {kind} come from {input}, an input that is none of tokens, mask, positions and caches (cross-attention has such)"
    )]
    ForeignInput { kind: OperandKind, input: String },
    #[error("{name} of shape {shape:?} is not {heads} heads of {head_size} in an order that is supported")]
    Layout {
        name: String,
        shape: Vec<usize>,
        heads: usize,
        head_size: usize,
    },
    #[error("with {call}, {name} has shape {shape:?}")]
    LayoutInCall {
        call: crate::prove::call_shape::CallShape,
        name: String,
        shape: Vec<usize>,
    },
    #[error("its queries of {elements} elements are not heads of {head_size} for {kv_heads} key heads")]
    QueryHeads {
        elements: usize,
        head_size: usize,
        kv_heads: usize,
    },
    #[error(
        "its keys are {key_heads} heads of {key_size}, its values {value_heads} of {value_size}; the operator needs them alike"
    )]
    KeysAndValues {
        key_heads: usize,
        key_size: usize,
        value_heads: usize,
        value_size: usize,
    },
    #[error("{input} ({name}) has {rank} dimensions, not 3 (batch, tokens, heads * size)")]
    Rank {
        input: &'static str,
        name: String,
        rank: usize,
    },
    #[error("{input} ({name}) is {}, its cache is {}", .found.label(), .cache.label())]
    Type {
        input: &'static str,
        name: String,
        found: DataType,
        cache: DataType,
    },
    #[error("head_sink has shape {shape:?}, not [{q_heads}]")]
    HeadSinkShape { shape: Vec<i64>, q_heads: i64 },
    #[error("{name} has a head size of {size}")]
    HeadSize { name: String, size: i64 },
    #[error("{first} has a head size of {first_size}, but {name} has {size}")]
    HeadSizes {
        first: String,
        first_size: i64,
        name: String,
        size: i64,
    },
    #[error("it normalises queries and keys, but nothing in the graph tells the head size")]
    HeadSizeUnknown,
    #[error("its bias {name} is not constant")]
    BiasNotConstant { name: String },
    #[error("its bias {name} is too short")]
    BiasTooShort { name: String },
}
