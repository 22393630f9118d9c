//! What can be wrong with weights, with the shape that they are to fill, or with writing a model.

use std::{io, path::PathBuf};

/// The result of the builder's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Each is one line that says what is wrong, and where. The cause, where there is one, is the error's source.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Error {
    /// The numbers of a shape contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The graph cannot be written.
    #[error(transparent)]
    Onnx(#[from] retro_onnx::Error),
    /// A configuration file cannot be made.
    #[error(transparent)]
    Json(#[from] serde_json::Error),

    // Reading.
    #[error("cannot read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not JSON", .path.display())]
    NotJson { path: PathBuf, source: serde_json::Error },
    #[error("{} is not valid JSON", .path.display())]
    DamagedGeneration { path: PathBuf, source: serde_json::Error },
    #[error("{} is no Llama that can be built", .path.display())]
    NoLlama { path: PathBuf, source: ConfigError },
    #[error("{} has no weight_map", .0.display())]
    NoWeightMap(PathBuf),
    #[error("{} names {shard:?}, which is not a file of the same folder", .index.display())]
    ForeignShard { index: PathBuf, shard: String },
    #[error("cannot open the weights {}", .path.display())]
    OpenWeights { path: PathBuf, source: io::Error },
    #[error("cannot map {}", .path.display())]
    Map { path: PathBuf, source: io::Error },
    #[error("{} is not a safetensors file: {reason}", .path.display())]
    NotSafetensors {
        path: PathBuf,
        reason: safetensors::SafeTensorError,
    },
    #[error("tensor {tensor} of {} is {got:?}, expected f32, f16 or bf16", .path.display())]
    ElementType {
        tensor: String,
        path: PathBuf,
        got: safetensors::Dtype,
    },
    #[error("{} is cut short in tensor {tensor}", .path.display())]
    CutShort { path: PathBuf, tensor: String },
    #[error("the weights lack the tensor {0}")]
    NoTensor(String),
    #[error("tensor {tensor} has shape {got:?}, config.json makes it {expected:?}")]
    TensorShape {
        tensor: String,
        got: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("tensor {0} lies outside its file")]
    OutsideFile(String),
    #[error("initializer {name}")]
    Initializer { name: String, source: Box<Error> },

    // Writing.
    #[error("the output folder is the weights' own ({}): give another with -o", .0.display())]
    WeightsFolder(PathBuf),
    #[error("cannot make the folder {}", .path.display())]
    MakeFolder { path: PathBuf, source: io::Error },
    #[error("cannot replace {}", .path.display())]
    Replace { path: PathBuf, source: io::Error },
    #[error("cannot write {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot make {} {bytes} bytes long", .path.display())]
    Extend {
        path: PathBuf,
        bytes: u64,
        source: io::Error,
    },
    /// A mistake of this program.
    #[error("{0}")]
    Internal(&'static str),

    #[error("0 documents: ask for at least one")]
    NoDocuments,
}

/// Why a shape is none that the builder builds.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ConfigError {
    #[error("{key} is {got:?}, expected {expected:?}")]
    Kind {
        key: &'static str,
        got: String,
        expected: &'static str,
    },
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error("{0} is missing or not a positive integer")]
    NoCount(String),
    #[error("{0} is missing or not a positive number")]
    NoNumber(String),
    #[error("{key} asks for {kind:?}, only plain RoPE is built")]
    Rope { key: &'static str, kind: String },
    #[error("{name} is {got}, expected a positive 32-bit number")]
    Count { name: &'static str, got: usize },
    #[error("{heads} heads are not a multiple of {kv_heads} key/value heads")]
    Heads { heads: usize, kv_heads: usize },
    #[error("head size {0} is odd, RoPE needs pairs")]
    OddHeadSize(usize),
}

/// Puts an error of the system, and the path that it is about, into a variant: `.map_err(at!(Read, path))`.
macro_rules! at {
    ($variant:ident, $path:expr) => {
        |source| $crate::error::Error::$variant {
            path: $path.to_owned(),
            source,
        }
    };
}
pub(crate) use at;
