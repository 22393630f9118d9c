use super::input::InputRefusal;
use crate::{eval::Error, prove::call_shape::CallShape};
use retro_onnx::DataType;

/// A mask that the operator can't do, or scores that get more than a mask.
///
/// Tokens are counted from 0, padding included.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MaskRefusal {
    /// The mask is an input of the graph, of any numbers.
    #[error(
        "its mask is made by the caller: {input}, {}, {rank} dimensions, may hide or weigh anything; export it with an \
         attention_mask of 2 dimensions (batch, tokens), ones and zeros",
        .data_type.map_or("", DataType::label)
    )]
    MadeByCaller {
        /// The input.
        input: String,
        /// Its element type, if declared.
        data_type: Option<DataType>,
        /// Its dimensions.
        rank: usize,
    },
    /// The mask is computed from an input that the caller may set to anything.
    #[error(
        "its mask depends on the input {input}, of which nothing is known; export it with a mask that is made of \
         attention_mask and position_ids"
    )]
    OtherInput {
        /// The input.
        input: String,
    },
    /// The nodes that compute the mask have more constants than are tried as the length of a sliding window.
    #[error("its mask is computed from {count} constants, too many to try each as the length of a sliding window")]
    TooManyNumbers {
        /// How many.
        count: usize,
    },
    /// What is added to the scores is not known.
    #[error("its mask can't be read: {why}")]
    Unread {
        /// Why not.
        why: Unread,
    },
    /// What is added to the scores is not known in one call.
    #[error("its mask can't be read at {call}: {why}")]
    UnreadAt {
        /// The call.
        call: CallShape,
        /// Why not.
        why: Unread,
    },
    /// A number other than 0 and minus infinity is added to a score.
    #[error(
        "its scores get a bias of {value} for query {query} and key {key} in head {head}{}; only masks are supported",
        if *.alibi { ", which grows evenly with the distance (ALiBi)" } else { "" }
    )]
    Bias {
        /// The number.
        value: f64,
        /// Position of the token.
        query: usize,
        /// Position of the key.
        key: usize,
        /// Query head.
        head: usize,
        /// Whether it grows evenly from key to key (ALiBi).
        alibi: bool,
    },
    /// The scores of different heads, positions or calls are multiplied by different factors.
    #[error(
        "with {call}, its scores are multiplied with {factor} where others are with {other}: the operator has one factor for \
         all heads and positions"
    )]
    Factors {
        /// The call.
        call: CallShape,
        /// One factor.
        factor: f64,
        /// Another factor.
        other: f64,
    },
    /// A token attends to one that comes after it.
    #[error(
        "with {call}, token {query} sees token {key}, which comes after it: its mask is not causal (bidirectional, prefix or \
         cross-attention)"
    )]
    NotCausal {
        /// The call.
        call: CallShape,
        /// Position of the token.
        query: usize,
        /// Position of the key.
        key: usize,
    },
    /// A token does not attend to an earlier one, and no sliding window explains it.
    #[error("with {call}, token {query} does not see token {key}: its mask is neither causal nor a sliding window")]
    NotAWindow {
        /// The call.
        call: CallShape,
        /// Position of the token.
        query: usize,
        /// Position of the key.
        key: usize,
    },
    /// Tokens attend to the newest ones and to the first of the sequence.
    #[error(
        "with {call}, token {query} does not see token {key}: besides the last {last} tokens it sees the first {first} \
         (attention sinks in the mask), which the operator doesn't do; its mask is neither causal nor a sliding window"
    )]
    Sinks {
        /// The call.
        call: CallShape,
        /// Position of the token.
        query: usize,
        /// Position of the key.
        key: usize,
        /// How many of the first tokens.
        first: usize,
        /// How many of the newest tokens.
        last: usize,
    },
    /// The mask is of another kind.
    #[error("its mask is none that is supported (causal, sliding window, padding on the left)")]
    Other,
    /// The mask is not supported where a sequence is padded on the left.
    #[error("with padding on the left its mask is neither causal nor causal without the padding: {why}")]
    Padding {
        /// What the mask does there.
        why: Box<MaskRefusal>,
    },
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
    DependsOnMore {
        /// The value.
        name: String,
    },
    /// The scores are not `[B, Hq, S, T]`.
    #[error("{name} has shape {shape:?}")]
    Shape {
        /// The value.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The call can't be made.
    #[error(transparent)]
    Input(#[from] InputRefusal),
    /// It can't be computed.
    #[error(transparent)]
    Unknown(Error),
}

impl Unread {
    /// Whether the call's sizes don't fit the model.
    pub fn is_size_conflict(&self) -> bool {
        match self {
            Self::Beyond => true,
            Self::Unknown(why) => why.is_size_conflict(),
            _ => false,
        }
    }
}

/// A call at fault is excused: ONNX Runtime doesn't run it either.
impl From<Error> for Unread {
    fn from(why: Error) -> Self {
        if why.is_invalid_call() {
            Self::Beyond
        } else {
            Self::Unknown(why)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A failure of a node whose name says what excuses a failure.
    fn at_node(source: Error) -> Error {
        Error::Node {
            label: "shapes do not go together, out of range".to_owned(),
            op_type: "Gather".to_owned(),
            source: Box::new(source),
        }
    }

    #[test]
    fn a_failure_is_excused_by_its_variant_alone() {
        let shapes = Error::Broadcast {
            left: vec![2],
            right: vec![3],
        };
        let index = Error::IndexOutOfRange { index: 128, len: 128 };
        for excused in [shapes, index] {
            let masked = Error::Mask(Box::new(excused.clone()));
            for error in [excused.clone(), at_node(excused), at_node(masked)] {
                assert_eq!(Unread::from(error), Unread::Beyond);
            }
        }
        let words = "shapes do not go together, out of range";
        for error in [
            Error::Axis { axis: 2, rank: 2 },
            Error::NegativeSize(-1),
            Error::TooManyElements(vec![1 << 50]),
            Error::TooManyNumbers(1 << 30),
            Error::TooManyDimensions(65),
            Error::TooMuchWork,
            Error::TooDeep(16),
            Error::Reshape {
                from: vec![2],
                into: vec![3],
            },
            Error::Split { sizes: vec![1], len: 2 },
            Error::Concat {
                first: vec![1],
                other: vec![2],
                axis: 0,
            },
            Error::MatMul {
                left: vec![1, 2],
                right: vec![3, 1],
            },
            Error::NotComputed(words.to_owned()),
            Error::Shape {
                what: words,
                actual: vec![],
            },
            Error::Sizes(words.to_owned()),
            Error::Attribute {
                name: words.to_owned(),
                value: words.to_owned(),
            },
            Error::InputAbsent(0),
            Error::InputUnknown(words.to_owned()),
            Error::ValueUnknown(words.to_owned()),
            Error::OutputUnknown(words.to_owned()),
            Error::NumbersUnknown,
            Error::NotSupported {
                domain: "out of range".to_owned(),
                op_type: "do not go together".to_owned(),
            },
            Error::Invalid(words),
        ] {
            for error in [error.clone(), at_node(error)] {
                assert_eq!(Unread::from(error.clone()), Unread::Unknown(error));
            }
        }
    }
}
