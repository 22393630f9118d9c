use std::fmt::{self, Display};

/// What to do about functions.
const INLINE: &str = "inline the model's functions first (onnx.inliner.inline_local_functions)";

/// What of an attention is inside a function of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FunctionPart {
    KeysOrValues,
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
    /// `domain`: "ai.onnx" for ONNX's own. `about`: what kind of attention it is, with its punctuation; may be "".
    #[error("{domain}::{op_type} is not supported by this version{about}")]
    Unsupported {
        domain: String,
        op_type: String,
        about: &'static str,
    },
    #[error(
        "com.microsoft::Attention is not supported by this version: keys and values are merged in one cache, {cache}; export \
         it without this fusion, or with GroupQueryAttention"
    )]
    MergedCache { cache: String },
    #[error("decomposed attention (MatMul, Softmax, MatMul)")]
    Decomposed,
    #[error("it is in a branch of node {node} ({op_type}); only the main graph is converted")]
    InBranch { node: String, op_type: String },
    #[error("it is in the model's function {function}; only the main graph is converted: {INLINE}")]
    InFunction { function: String },
    #[error("its Softmax is in the model's function {function}, which is not looked into: {INLINE}")]
    SoftmaxInFunction { function: String },
    #[error("{part} made in the model's function {function} (node {node}), which is not looked into: {INLINE}")]
    MadeInFunction {
        part: FunctionPart,
        function: String,
        node: String,
    },
    /// `input`: the graph's first input with its shape, or "nothing".
    #[error(
        "the graph takes {input} and neither input_ids nor inputs_embeds: an encoder of images or sound, or a part of a model, \
         not a decoder of text"
    )]
    NotText { input: String },
}
