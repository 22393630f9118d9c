//! Why a value, or its numbers, can't be computed.

/// Why a value, or its numbers, can't be computed.
///
/// What a caller does about a failure depends on the variant of its [`cause`](Error::cause), never on the words of the message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Shapes that don't broadcast (multidirectional broadcasting of ONNX).
    #[error("shapes {left:?} and {right:?} do not go together")]
    Broadcast { left: Vec<usize>, right: Vec<usize> },

    /// An index outside of the axis, or the data, that it counts in.
    #[error("index {index} of {len} is out of range")]
    IndexOutOfRange { index: i64, len: usize },

    /// An axis that the rank doesn't have.
    #[error("axis {axis} of {rank}")]
    Axis { axis: i64, rank: usize },

    /// A dimension, or another count of elements, that is negative.
    #[error("a size is {0}")]
    NegativeSize(i64),

    /// A shape of more elements than any model has.
    #[error("the shape {0:?} has more elements than any model's")]
    TooManyElements(Vec<usize>),

    /// A tensor of more numbers than are stored.
    #[error("{0} numbers are more than are computed")]
    TooManyNumbers(usize),

    /// More dimensions than any model has.
    #[error("{0} dimensions")]
    TooManyDimensions(usize),

    /// A run computed as many numbers as it may.
    #[error("its masks and positions take more numbers than are computed")]
    TooMuchWork,

    /// Graphs inside graphs, more than are followed.
    #[error("more than {0} graphs inside one another")]
    TooDeep(usize),

    /// A shape that doesn't become another, as in Reshape. `into` may hold -1 and 0.
    #[error("{from:?} does not become {into:?}")]
    Reshape { from: Vec<usize>, into: Vec<i64> },

    /// Sizes that don't add up to the axis that is split.
    #[error("{sizes:?} is not a split of {len}")]
    Split { sizes: Vec<usize>, len: usize },

    /// Shapes that differ in more than the axis they are concatenated along.
    #[error("{first:?} and {other:?} are put together along axis {axis}")]
    Concat {
        first: Vec<usize>,
        other: Vec<usize>,
        axis: usize,
    },

    /// Matrices whose inner sizes differ.
    #[error("{left:?} times {right:?}")]
    MatMul { left: Vec<usize>, right: Vec<usize> },

    /// A case of an operator that the evaluator doesn't compute.
    #[error("{0}")]
    NotComputed(String),

    /// A shape other than an input must have.
    #[error("{what} has shape {actual:?}")]
    Shape { what: &'static str, actual: Vec<usize> },

    /// Two counts that must be equal, or must divide one another.
    #[error("{0}")]
    Sizes(String),

    /// An attribute with a value that isn't supported.
    #[error("its {name} is {value}")]
    Attribute { name: String, value: String },

    /// An input that the operator needs and the node doesn't have.
    #[error("input {0} is absent")]
    InputAbsent(usize),

    /// An input whose shape isn't known, though no node before it failed.
    #[error("its input {0} is not known")]
    InputUnknown(String),

    /// A value that nothing has computed.
    #[error("{0} is not known")]
    ValueUnknown(String),

    /// A node that was computed, but not this output of it.
    #[error("output {0} is not known")]
    OutputUnknown(String),

    /// An input whose shape is known where its numbers are needed.
    #[error("its numbers are not known")]
    NumbersUnknown,

    /// An operator that the evaluator doesn't compute.
    #[error("the operator {} is not supported", qualified(.domain, .op_type))]
    NotSupported { domain: String, op_type: String },

    /// A node that breaks its operator's rules, or uses what isn't computed of them.
    #[error("{0}")]
    Invalid(&'static str),

    /// An input that failed, and what it is.
    #[error("its mask: {0}")]
    Mask(#[source] Box<Error>),

    /// The node at which an evaluation stopped. Values computed from its outputs fail with the same error.
    #[error("node {label} ({op_type}): {source}")]
    Node {
        label: String,
        op_type: String,
        source: Box<Error>,
    },
}

fn qualified(domain: &str, op_type: &str) -> String {
    if domain.is_empty() {
        op_type.to_owned()
    } else {
        format!("{domain}::{op_type}")
    }
}

impl Error {
    /// What went wrong, without the nodes and inputs that it is told of.
    pub fn cause(&self) -> &Error {
        match self {
            Self::Mask(source) | Self::Node { source, .. } => source.cause(),
            own => own,
        }
    }

    /// The node at which the evaluation stopped, if it is told with one.
    pub fn node(&self) -> Option<&str> {
        match self {
            Self::Node { label, source, .. } => source.node().or(Some(label)),
            Self::Mask(source) => source.node(),
            _ => None,
        }
    }

    /// Whether the call itself is at fault: its shapes don't broadcast, or an index leaves a table. ONNX Runtime refuses such a
    /// call too, so that nothing needs to be true of it.
    pub fn is_invalid_call(&self) -> bool {
        matches!(self.cause(), Self::Broadcast { .. } | Self::IndexOutOfRange { .. })
    }
}

impl Error {
    /// Whether sizes don't fit each other in the call at hand, as where a model takes several tokens only without a past.
    /// ONNX Runtime refuses such a call too. What the evaluator itself can't compute is never among them.
    pub fn is_size_conflict(&self) -> bool {
        let sizes = |error: &Self| {
            matches!(
                error,
                Self::Reshape { .. } | Self::Split { .. } | Self::Concat { .. } | Self::MatMul { .. } | Self::Sizes(_)
            )
        };
        self.is_invalid_call() || sizes(self.cause())
    }
}

/// Fixed words of what a node does wrong.
impl From<&'static str> for Error {
    fn from(what: &'static str) -> Self {
        Self::Invalid(what)
    }
}

/// For callers that only tell the reason.
impl From<Error> for String {
    fn from(error: Error) -> Self {
        error.to_string()
    }
}
