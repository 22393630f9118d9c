use super::input::InputRefusal;
use crate::prove::call_shape::CallShape;
use retro_onnx::DataType;

/// A mask that the operator can't do, or scores that get more than a mask.
///
/// Tokens are counted from 0, padding included.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MaskRefusal {
    #[error(
        "its mask is made by the caller: {input}, {}, {rank} dimensions, may hide or weigh anything; export it with an \
         attention_mask of 2 dimensions (batch, tokens), ones and zeros",
        .data_type.map_or("", DataType::label)
    )]
    MadeByCaller {
        input: String,
        data_type: Option<DataType>,
        rank: usize,
    },
    #[error(
        "its mask depends on the input {input}, of which nothing is known; export it with a mask that is made of \
         attention_mask and position_ids"
    )]
    OtherInput { input: String },
    #[error("what computes its mask mentions {count} numbers, too many to try each as a window")]
    TooManyNumbers { count: usize },
    #[error("its mask can't be read: {why}")]
    Unread { why: Unread },
    #[error("its mask can't be read at {call}: {why}")]
    UnreadAt { call: CallShape, why: Unread },
    /// `alibi`: it grows evenly from key to key.
    #[error(
        "its scores get a bias of {value} for query {query} and key {key} in head {head}{}; only masks are supported",
        if *.alibi { ", which grows evenly with the distance (ALiBi)" } else { "" }
    )]
    Bias {
        value: f64,
        query: usize,
        key: usize,
        head: usize,
        alibi: bool,
    },
    #[error(
        "with {call}, its scores are multiplied with {factor} where others are with {other}: the operator has one factor for \
         all heads and positions"
    )]
    Factors { call: CallShape, factor: f64, other: f64 },
    #[error(
        "with {call}, token {query} sees token {key}, which comes after it: its mask is not causal (bidirectional, prefix or \
         cross-attention)"
    )]
    NotCausal { call: CallShape, query: usize, key: usize },
    #[error("with {call}, token {query} does not see token {key}: its mask is neither causal nor a sliding window")]
    NotAWindow { call: CallShape, query: usize, key: usize },
    #[error(
        "with {call}, token {query} does not see token {key}: besides the last {last} tokens it sees the first {first} \
         (attention sinks in the mask), which the operator doesn't do; its mask is neither causal nor a sliding window"
    )]
    Sinks {
        call: CallShape,
        query: usize,
        key: usize,
        first: usize,
        last: usize,
    },
    #[error("its mask is none that is supported (causal, sliding window, padding on the left)")]
    Other,
    #[error("with padding on the left its mask is neither causal nor causal without the padding: {why}")]
    Padding { why: Box<MaskRefusal> },
}

/// Why what is added to the scores of a call was not read.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Unread {
    /// The model itself doesn't take such a call.
    #[error("the model doesn't take so many tokens")]
    Beyond,
    /// It takes too many steps.
    #[error("it takes more steps than are done")]
    Long,
    /// It is not computed from masks and positions alone.
    #[error("{name} depends on more than masks and positions")]
    DependsOnMore { name: String },
    /// The scores are not `[B, Hq, S, T]`.
    #[error("{name} has shape {shape:?}")]
    Shape { name: String, shape: Vec<usize> },
    /// The call can't be made.
    #[error(transparent)]
    Input(#[from] InputRefusal),
    /// It can't be computed.
    #[error("{0}")]
    Unknown(String),
}

/// What the evaluator says.
impl From<String> for Unread {
    fn from(why: String) -> Self {
        // Shapes or indices don't fit: ONNX Runtime doesn't run such a call either.
        const BEYOND: [&str; 2] = ["do not go together", "out of range"];
        if BEYOND.iter().any(|e| why.contains(e)) {
            Self::Beyond
        } else {
            Self::Unknown(why)
        }
    }
}
