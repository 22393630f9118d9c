//! What can go wrong between a model's folder and its tokens.

use std::path::PathBuf;

use ort::value::TensorElementType;
use retro_contract::OPSET_VERSION;
use retro_export::WidthMatters;
use retro_runtime::OrtError;

use crate::{
    Device,
    runtime::{PLUGIN, PLUGIN_VARIABLE},
    text,
};

/// The result of the decoder's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Each is one line that says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Error {
    /// The folder has no model that can be told.
    #[error(transparent)]
    Folder(#[from] retro_model_io::Error),
    /// ONNX Runtime, the plugin or the GPU fail.
    #[error(transparent)]
    Runtime(#[from] retro_runtime::Error),
    /// The tokenizer fails.
    #[error(transparent)]
    Text(#[from] text::Error),
    #[error("cannot run {graph}")]
    CannotRun { graph: PathBuf, source: Box<Error> },
    #[error("cannot run {graph} on {device}")]
    CannotRunOn {
        graph: PathBuf,
        device: Device,
        source: Box<retro_runtime::Error>,
    },
    /// A mistake of this program.
    #[error("{0}")]
    Internal(&'static str),

    // Opening a model.
    #[error(
        "{0} was converted and needs the plugin {PLUGIN}, which is not beside this program: build it with `cargo build \
         --release`, or name it with --plugin or {PLUGIN_VARIABLE}"
    )]
    NeedsPlugin(PathBuf),
    #[error("the plugin {plugin} does not load: {error}")]
    Plugin { plugin: PathBuf, error: OrtError },
    #[error("--cuda-graph: the steps of {graph} cannot be captured: {why}; run it without --cuda-graph")]
    NotCapturable { graph: PathBuf, why: Box<NotCapturable> },
    #[error("cannot load {graph}: {reason}")]
    Load { graph: PathBuf, reason: String },
    #[error("--cuda-graph needs a GPU: give --device cuda")]
    CaptureWithoutGpu,
    #[error("a decoding step could not be captured as a CUDA graph: {0}; --no-cuda-graph runs without")]
    Capture(Box<Error>),

    // The graph's inputs and outputs.
    #[error("the graph has no input {name:?}: it is no text decoder{hint}")]
    NoTokenInput { name: String, hint: &'static str },
    #[error("the graph takes token ids or a mask of three dimensions: retro-run feeds [sequences, tokens]")]
    TokenPlanes,
    #[error("the graph is declared for {0} tokens per call: retro-run needs one token, or any number")]
    TokensPerCall(usize),
    #[error("the graph has no output {0:?}")]
    NoOutput(String),
    #[error("the inputs {first:?} and {second:?} both match the output {output:?}")]
    TwoInputsOneOutput {
        first: String,
        second: String,
        output: String,
    },
    #[error("the logits are no tensor")]
    LogitsNotATensor,
    #[error("the graph's input {0:?} is no tensor")]
    NotATensor(String),
    #[error("the graph's input {0:?} is no tensor and no input that retro-run knows")]
    UnknownNotATensor(String),
    #[error("the graph's input {name:?} is {got}: retro-run feeds {expected}")]
    InputType {
        name: String,
        got: TensorElementType,
        expected: String,
    },
    #[error("the graph's input {name:?} has {got} dimensions: retro-run feeds [sequences, tokens]")]
    InputRank { name: String, got: usize },
    #[error("the graph's inputs are declared for batches of {0} and of {1}")]
    TwoBatches(usize, usize),
    #[error("the graph's input {0:?} is unknown to retro-run, and no output returns it as a cache")]
    UnknownInput(String),
    #[error("input {name:?} has {got} dimensions, expected {expected}")]
    StateRank { name: String, got: usize, expected: usize },
    #[error("dimension {axis} of input {name:?} is neither in the graph nor in the folder's configuration")]
    UnknownDimension { name: String, axis: usize },
    #[error("the input {past:?} is {got:?}, but its output {present:?} is of another type")]
    PresentType {
        past: String,
        got: Option<TensorElementType>,
        present: String,
    },
    #[error(
        "the input {past:?} is declared as {past_shape:?}, but its output {present:?} as {present_shape:?}: retro-run needs \
         both of one shape"
    )]
    PresentShape {
        past: String,
        past_shape: Vec<i64>,
        present: String,
        present_shape: Vec<i64>,
    },

    // Metadata of a converted model.
    #[error("cannot read the model's metadata: {0}")]
    Metadata(OrtError),
    #[error("the model was converted for version {0} of the operator, this program knows version {OPSET_VERSION}")]
    OperatorVersion(String),
    #[error("the model's metadata {key} is {got:?}, expected a positive number")]
    MetadataNumber { key: String, got: String },
    #[error("the model's metadata {key} cannot be used: {reason}")]
    MetadataChoice { key: String, reason: String },

    // What a model is asked for.
    #[error("--window 0: the smallest window is 1 (Quest, without correction)")]
    NoWindow,
    #[error(
        "--window {asked}: the model was converted for windows up to {most}; convert it again with retro-export --window {asked}"
    )]
    Window { asked: usize, most: usize },
    #[error(
        "--window {asked}: the model's graph keeps a window of {window} by itself; convert it again with retro-export --window \
         {asked}, or without --window-in-graph"
    )]
    WindowInGraph { asked: usize, window: usize },
    #[error("--window {0}: the model was not converted; convert it with retro-export --window {0}")]
    WindowOfUnconverted(usize),
    #[error("--rectify 0: a rectifying pass rewrites at least one token")]
    RectifyNothing,
    #[error("--rectify {asked}: a context of {context} tokens has no room for so many between two passes")]
    RectifyContext { asked: usize, context: usize },
    #[error(
        "--rectify {0}: the model was not converted, so its attention is dense and leaves nothing to rectify; convert it \
         with retro-export"
    )]
    RectifyUnconverted(usize),
    #[error("--rectify {0}: the model has state of convolutions or recurrent layers, which cannot go back")]
    RectifyRecurrent(usize),
    #[error("--budget: the model was not converted; convert it with retro-export")]
    BudgetOfUnconverted,
    #[error("--budget: this model takes no budget at run time; convert it again with retro-export --budget")]
    NoBudgetInput,
    #[error("--dense-below: the model was not converted, and reads everything; convert it with retro-export")]
    DenseBelowOfUnconverted,
    #[error("--dense-below: this model takes no budget at run time; convert it again with retro-export")]
    DenseBelowWithoutBudget,
    #[error("{option} {got}: expected {expected}")]
    Sampling {
        option: &'static str,
        got: f32,
        expected: &'static str,
    },
    #[error("-c {asked} exceeds the model's context of {most} tokens")]
    Context { asked: usize, most: usize },
    #[error("-n 0: ask for at least one token")]
    NoTokens,
    #[error("-c 0: a context has at least one token")]
    NoContext,
    #[error("a prompt of {prompt} tokens and {new} more (-n) exceed {what}, {limit} tokens")]
    OutputExceeds {
        prompt: usize,
        new: usize,
        what: &'static str,
        limit: usize,
    },
    #[error("a prompt of {prompt} tokens leaves no room in {what}, {limit} tokens")]
    NoRoom {
        prompt: usize,
        what: &'static str,
        limit: usize,
    },
    #[error("-n is too large")]
    TooManyTokens,
    #[error("the model's context length is unknown: give -n or -c")]
    UnknownContext,
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("--chunk 0: a chunk has at least one token")]
    EmptyChunk,
    #[error(
        "--chunk 1: the model's graph keeps its window by itself, and takes a single token for a step; give at least 2"
    )]
    ChunkOfOne,

    // Caches and steps.
    #[error("this model's caches grow with every step: it decodes one sequence at a time")]
    OneSequence,
    #[error(
        "this model's caches grow with every step, so it cannot hold several sequences: convert it with retro-export, or \
         set past_present_share_buffer in genai_config.json if the graph allows it"
    )]
    RowsOfGrowing,
    #[error(
        "this model has state of convolutions or recurrent layers, which cannot go back to an earlier token: retro-run \
         decodes one sequence of it at a time"
    )]
    RowsOfRecurrent,
    #[error(
        "this model's graph keeps its window by itself, for sequences that begin together: retro-run serves it converted without \
         --window-in-graph"
    )]
    RowsOfWindow,
    #[error(
        "this model takes one retro_length for a whole batch, and sequences that began at different times need one each: \
         convert it again with retro-export, or give --window 1"
    )]
    OneRetroLength,
    #[error(
        "on a GPU at most {most} sequences decode together with a window of their own each, not {asked}: ask for fewer \
         with --parallel"
    )]
    RowsOnGpu { asked: usize, most: usize },
    #[error("this model is declared for batches of {declared}, not of {asked}")]
    DeclaredBatch { declared: usize, asked: usize },
    #[error("this model's caches are declared for {declared} tokens, not {asked}")]
    DeclaredCapacity { declared: usize, asked: usize },
    #[error(
        "this model's caches grow with every step, which retro-run does not support on a GPU: set \
         past_present_share_buffer in genai_config.json if the graph allows it, convert the model with retro-export, or \
         use --device cpu"
    )]
    GrowingOnGpu,
    #[error("growing caches {0}")]
    Growing(&'static str),
    #[error("no such sequence in the batch")]
    NoSuchSequence,
    #[error("the {0} of another model")]
    OtherModel(&'static str),
    #[error("the {0} in capacity")]
    OtherCapacity(&'static str),
    #[error("{tokens} tokens do not fit a cache of {capacity}")]
    DoesNotFit { tokens: usize, capacity: usize },
    #[error("{tokens} tokens exceed the attention mask, which is declared for {width}")]
    ExceedsMask { tokens: usize, width: usize },
    #[error("a step of {tokens} tokens and {lengths} lengths does not fit a batch of {batch}")]
    Feed {
        tokens: usize,
        lengths: usize,
        batch: usize,
    },
    #[error("{prompts} prompts for a batch of {batch}")]
    Prompts { prompts: usize, batch: usize },
    #[error("no memory for {what} of shape {shape:?}; a smaller context (-c) needs less: {error}")]
    NoMemory {
        what: String,
        shape: Vec<usize>,
        error: OrtError,
    },
    #[error("no memory for {0} bytes")]
    NoHostMemory(usize),
    #[error("{what} of shape {shape:?} is too large")]
    TooLarge { what: String, shape: Vec<usize> },
    #[error("a tensor at offset {0}, which is not aligned")]
    Misaligned(usize),
    #[error("retro-run cannot feed integers as {0}")]
    IntegerType(TensorElementType),
    #[error("the graph gave no logits")]
    NoLogits,
    #[error("the graph did not give all its present outputs")]
    NoPresent,
    #[error(
        "the output {present} has shape {shape:?}, which its input {past} is not declared for: retro-run needs both of one shape"
    )]
    OutputShape {
        present: String,
        shape: Vec<i64>,
        past: String,
    },
    #[error("the logits have shape {shape:?} for a batch of {batch}")]
    LogitsShape { shape: Vec<usize>, batch: usize },
    #[error("the logits have shape {0:?}: nothing is in them")]
    EmptyLogits(Vec<usize>),
    #[error("the logits are shorter than their shape")]
    ShortLogits,
    #[error("the logits are {0}, expected float32, float16 or bfloat16")]
    LogitsType(TensorElementType),
    #[error("the answer cannot follow what was asked for: {0}")]
    Constraint(String),
    #[error("the model gave no finite score for any token")]
    NoFiniteScore,
}

/// Why the decoding steps of a model cannot be captured as a CUDA graph.
#[derive(Debug, thiserror::Error)]
pub enum NotCapturable {
    /// The model was converted to take masks as wide as there are tokens.
    #[error("it takes the sequence length from the width of the attention mask, which changes with every step")]
    MaskWidth,
    /// Its graph does not show that the mask's width is no matter.
    #[error(transparent)]
    Graph(#[from] WidthMatters),
    /// Its graph cannot be looked at.
    #[error("its graph cannot be read ({0})")]
    Unreadable(retro_onnx::Error),
    /// ONNX Runtime refuses the session.
    #[error("ONNX Runtime does not capture it ({0})")]
    Refused(OrtError),
    /// A step that was tried when the model was opened failed.
    #[error("the first try failed ({0})")]
    Tried(String),
}

impl From<OrtError> for Error {
    fn from(error: OrtError) -> Self {
        Self::Runtime(error.into())
    }
}

/// Returns an error unless a condition holds.
macro_rules! require {
    ($condition:expr, $error:expr) => {
        if !$condition {
            return Err($error.into());
        }
    };
}
pub(crate) use require;
