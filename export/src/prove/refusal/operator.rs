use std::fmt::{self, Display};

/// What to do about functions.
const INLINE: &str = "inline the model's functions first (onnx.inliner.inline_local_functions)";

/// What of an attention is inside a function of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FunctionPart {
    /// Keys or values.
    KeysOrValues,
    /// The mask.
    Mask,
}

impl Display for FunctionPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KeysOrValues => "its keys or values are",
            Self::Mask => "its mask is",
        })
    }
}

/// An operator that is not converted, or one in a place that is not.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OperatorRefusal {
    /// An attention operator that this version does not convert.
    #[error("{domain}::{op_type} is not supported by this version{about}")]
    Unsupported {
        /// Its domain; "ai.onnx" for ONNX's own.
        domain: String,
        /// The node's operator.
        op_type: String,
        /// What kind of attention it is, with its punctuation; may be empty.
        about: &'static str,
    },
    /// `com.microsoft.Attention`, which keeps keys and values in one tensor.
    #[error(
        "com.microsoft::Attention is not supported by this version: keys and values are merged in one cache, {cache}; export \
         it without this fusion, or with GroupQueryAttention"
    )]
    MergedCache {
        /// The cache.
        cache: String,
    },
    /// Attention of several nodes that no rule matched.
    #[error("decomposed attention (MatMul, Softmax, MatMul)")]
    Decomposed,
    /// The attention is in a subgraph of a node.
    #[error("it is in a branch of node {node} ({op_type}); only the main graph is converted")]
    InBranch {
        /// The node with the subgraph.
        node: String,
        /// The node's operator.
        op_type: String,
    },
    /// The attention is in one of the model's functions.
    #[error("it is in the model's function {function}; only the main graph is converted: {INLINE}")]
    InFunction {
        /// The function.
        function: String,
    },
    /// The Softmax of the attention is in one of the model's functions.
    #[error("its Softmax is in the model's function {function}, which this version does not analyse: {INLINE}")]
    SoftmaxInFunction {
        /// The function.
        function: String,
    },
    /// A call of one of the model's functions computes a part of the attention.
    #[error(
        "{part} made in the model's function {function} (node {node}), which this version does not analyse: {INLINE}"
    )]
    MadeInFunction {
        /// Which part.
        part: FunctionPart,
        /// The function.
        function: String,
        /// The node that calls it.
        node: String,
    },
    /// A value that the attention depends on is computed by one of the model's functions.
    #[error(
        "it depends on what the model's function {function} (node {node}) computes, which this version does not analyse: \
         {INLINE}"
    )]
    DependsOnFunction {
        /// The function.
        function: String,
        /// The node that calls it.
        node: String,
    },
    /// The model takes neither tokens nor their embeddings.
    #[error(
        "the graph takes {input} and neither input_ids nor inputs_embeds: an encoder of images or sound, or a part of a model, \
         not a decoder of text"
    )]
    NotText {
        /// The graph's first input with its shape, or "nothing".
        input: String,
    },
}
