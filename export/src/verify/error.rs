//! Why two models can't be compared.

use ort::value::TensorElementType;
use std::{io, path::PathBuf};

/// Why two models can't be compared, or one of them doesn't run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operator's plugin is not found.
    #[error(
        "the plugin {} is neither named by {} nor beside this program (make build makes it)",
        retro_runtime::PLUGIN,
        retro_runtime::PLUGIN_VARIABLE
    )]
    NoPlugin,
    /// A file that should be the plugin can't be read.
    #[error(transparent)]
    FindPlugin(retro_runtime::Error),
    /// ONNX Runtime is not found or does not load.
    #[error("{0}")]
    Runtime(String),
    /// The device is not there, or says nothing of where nodes run.
    #[error(transparent)]
    Device(retro_runtime::Error),
    /// ONNX Runtime refuses options of a session.
    #[error("ONNX Runtime makes no session: {0}")]
    Session(String),
    /// ONNX Runtime refuses the plugin.
    #[error("the plugin {} does not load: {why}", .path.display())]
    LoadPlugin {
        /// The plugin.
        path: PathBuf,
        /// ONNX Runtime's message.
        why: String,
    },
    /// ONNX Runtime refuses a model.
    #[error("ONNX Runtime does not load {}: {why}", .path.display())]
    LoadModel {
        /// The model.
        path: PathBuf,
        /// ONNX Runtime's message.
        why: String,
    },
    /// Another device was asked for.
    #[error(
        "the operator would run on the CPU: the plugin was built without CUDA (make cuda), or the model's element type is \
         not supported there"
    )]
    OperatorOnCpu,
    /// Something is wrong with the original.
    #[error("the original")]
    Original(#[source] Box<Self>),
    /// Something is wrong with the converted model.
    #[error("the converted model")]
    Converted(#[source] Box<Self>),
    /// The original runs in none of the ways that were tried.
    #[error("{0}")]
    NothingCompared(String),
    /// A model that is needed for a comparison can't be made.
    #[error(transparent)]
    Read(#[from] retro_onnx::Error),
    /// The original with its attention rounded otherwise can't be made.
    #[error("{0}")]
    Perturb(String),
    /// A temporary model can't be written.
    #[error("cannot write a model to compare with to {}", .folder.display())]
    Write {
        /// The folder.
        folder: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// ONNX Runtime fails in running a model.
    #[error("{0}")]
    Run(String),
    /// The model has an input that can't be fed.
    #[error("the model takes {0}, which this comparison can't make")]
    UnknownInput(String),
    /// An input is a sequence, a map or an optional.
    #[error("the input {0} is no tensor")]
    InputNoTensor(String),
    /// An output is a sequence, a map or an optional.
    #[error("an output is no tensor")]
    OutputNoTensor,
    /// An output that the model declares doesn't come.
    #[error("the output {0} is missing")]
    MissingOutput(String),
    /// The model has no output `logits`.
    #[error("no output is named logits")]
    NoLogits,
    /// Logits are `[B, S, V]` or `[B, V]`.
    #[error("logits of shape {0:?}, expected [B, S, V] or [B, V]")]
    LogitsShape(Vec<usize>),
    /// Caches are `[B, H, T, D]`.
    #[error("a cache of shape {0:?}, expected [B, H, T, D]")]
    CacheShape(Vec<usize>),
    /// A tensor has an element type that is not computed with.
    #[error("tensors of {0:?} are not supported")]
    ElementType(TensorElementType),
    /// Logits are of integers.
    #[error("{0:?} instead of floats")]
    NoFloats(TensorElementType),
    /// Numbers for a tensor don't fill it.
    #[error("{actual} bytes for a tensor of shape {shape:?}, which has {expected}")]
    Bytes {
        /// The tensor's shape.
        shape: Vec<usize>,
        /// Its bytes.
        expected: usize,
        /// The bytes of the numbers.
        actual: usize,
    },
    /// ONNX Runtime makes a tensor of no size.
    #[error("an output of shape {0:?}")]
    OutputShape(Vec<i64>),
    /// ONNX Runtime doesn't make or give a tensor.
    #[error("{0}")]
    Tensor(String),
    /// One model gave logits more often.
    #[error("the two models give different numbers of logits: {expected} and {actual}")]
    LogitCounts {
        /// Rows of logits of the original.
        expected: usize,
        /// Rows of logits of the converted model.
        actual: usize,
    },
    /// The vocabularies have different sizes.
    #[error("the two models have {expected} and {actual} logits")]
    Vocabularies {
        /// Logits a row of the original.
        expected: usize,
        /// Logits a row of the converted model.
        actual: usize,
    },
}
