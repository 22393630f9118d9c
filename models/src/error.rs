//! What can be wrong with weights, with the shape that they are to fill, or with writing a model.

use std::{io, path::PathBuf};

use crate::{config::Family, rope::KINDS};

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
    #[error("{} is no model that can be built", .path.display())]
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
    #[error("{} is no GGUF file that can be read", .path.display())]
    Gguf { path: PathBuf, source: retro_gguf::Error },
    #[error("the model in {} cannot be built", .path.display())]
    GgufModel { path: PathBuf, source: ConfigError },
    #[error("the tokenizer in {} cannot be written as a tokenizer.json", .path.display())]
    GgufTokenizer { path: PathBuf, source: TokenizerError },
    #[error("{} is one of {parts} parts of a model: join them with llama.cpp's llama-gguf-split --merge", .path.display())]
    SplitGguf { path: PathBuf, parts: u64 },
    #[error("the configuration has {layers} layers, the weights have {tensors} tensors")]
    Layers { layers: usize, tensors: usize },
    #[error("the weights lack the tensor {0}")]
    NoTensor(String),
    #[error("the weights have a tensor {0} that this kind of model does not have")]
    ForeignTensor(String),
    #[error("tensor {tensor}")]
    Tensor { tensor: String, source: retro_gguf::Error },
    #[error("tensor {tensor} has shape {got:?}, the configuration makes it {expected:?}")]
    TensorShape {
        tensor: String,
        got: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("tensor {0} lies outside its file")]
    OutsideFile(String),
    #[error("its rows have {inner} elements, 4-bit weights come in groups of {group}: build with --dtype f32 or f16")]
    Groups { inner: usize, group: usize },
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
    #[error("the architecture is {0:?}; those that are built are {list}", list = Family::list())]
    Architecture(String),
    #[error("{key} asks for {kind:?}; the kinds of RoPE that are built are {KINDS}")]
    Rope { key: String, kind: String },
    #[error("the longest context is {got} tokens, more than {limit}")]
    Positions { got: usize, limit: usize },
    #[error("{name} is {got}, expected a positive 32-bit number")]
    Count { name: &'static str, got: usize },
    #[error("{heads} heads are not a multiple of {kv_heads} key/value heads")]
    Heads { heads: usize, kv_heads: usize },
    #[error("head size {0} is odd, RoPE needs pairs")]
    OddHeadSize(usize),
    #[error("rope_freqs has shape {got:?}, expected {expected} numbers")]
    Divisors { got: Vec<usize>, expected: usize },
    #[error(transparent)]
    Gguf(#[from] retro_gguf::Error),
}

/// Why a GGUF file's tokenizer cannot be written as a tokenizer.json.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum TokenizerError {
    #[error(transparent)]
    Gguf(#[from] retro_gguf::Error),
    #[error(
        "its kind (tokenizer.ggml.model) is {0:?}, expected \"gpt2\" or \"llama\"; give a tokenizer.json with --tokenizer"
    )]
    Kind(String),
    #[error(
        "its pre-tokenizer (tokenizer.ggml.pre) is {got:?}; those that are known are {known}; give a tokenizer.json \
         with --tokenizer"
    )]
    PreTokenizer { got: String, known: String },
    #[error("{key} has {got} entries, tokenizer.ggml.tokens has {tokens}")]
    Length {
        key: &'static str,
        got: usize,
        tokens: usize,
    },
    #[error("it has {tokens} tokens, the embedding has {rows} rows")]
    TooManyTokens { tokens: usize, rows: usize },
    #[error("token {0:?} occurs twice")]
    TokenTwice(String),
    #[error("token {id} has {bytes} bytes, more than {limit}")]
    LongToken { id: usize, bytes: usize, limit: usize },
    #[error("merge {0:?} is not of two tokens that make a third")]
    Merge(String),
    #[error("{key} is {id}, which is no token")]
    NoToken { key: &'static str, id: u64 },
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
