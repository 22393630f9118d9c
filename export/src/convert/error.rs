//! Why a model isn't converted.

use crate::{files, revert, rewrite, settings, source, verify};
use std::path::PathBuf;

/// Each is one line, with its sources, that says what is wrong, where, and what to do. Nothing is written then, but for
/// [`Self::Comparison`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host that was named can't be made ready for.
    #[error(transparent)]
    Host(#[from] super::HostError),
    /// A setting is out of range.
    #[error(transparent)]
    Settings(#[from] settings::Error),
    /// The tolerance is no number to compare with.
    #[error("the tolerance is {0}; it must be a finite number of at least 0")]
    Tolerance(f32),
    /// There is no model, or it isn't clear which.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// No target, and no dry run.
    #[error("no output is named; give one with -o")]
    NoOutput,
    /// The output can't be written where it was asked for.
    #[error(transparent)]
    Files(#[from] files::Error),
    /// A comparison was asked for, and ONNX Runtime, the plugin or the device is missing.
    #[error(
        "the output can't be compared with the original, as --verify and --device ask; --no-verify converts without"
    )]
    NoRuntime(#[source] verify::Error),
    /// The model's file or a file of its weights can't be read, or is no ONNX model.
    #[error(transparent)]
    Read(#[from] retro_onnx::Error),
    /// The model has the operator, or the metadata of a conversion.
    #[error("{0}: the model is converted already; convert the original again to change its settings")]
    AlreadyConverted(PathBuf),
    /// A file of weights leads out of the model's folder.
    #[error("{}", .path.display())]
    WeightsOutside {
        /// The model's file.
        path: PathBuf,
        /// Which tensor, and where it leads.
        source: Box<retro_onnx::Error>,
    },
    /// The model is none that a runtime would load.
    #[error("{} is an invalid ONNX model: {why}", .path.display())]
    Invalid {
        /// The model's file.
        path: PathBuf,
        /// What is wrong with its graph.
        why: String,
    },
    /// ONNX Runtime takes no model that imports no operators.
    #[error(
        "{0}: the model imports no operator set (opset_import is empty), so that no runtime takes it; export it again"
    )]
    NoOperatorSet(PathBuf),
    /// There is no such version of ONNX's operators.
    #[error("{}: the model imports version {opset} of ONNX's operators, which there is not; export it again", .path.display())]
    OperatorSetVersion {
        /// The model's file.
        path: PathBuf,
        /// The version that it imports, below 1.
        opset: i64,
    },
    /// The model is valid, and its attention can't be converted as asked.
    #[error("{} can't be converted", .path.display())]
    Unconvertible {
        /// The model's file.
        path: PathBuf,
        /// The reason.
        source: Unconvertible,
    },
    /// The way back to the original can't be recorded.
    #[error("{}", .path.display())]
    Record {
        /// The model's file.
        path: PathBuf,
        /// The reason.
        source: Box<revert::RecordError>,
    },
    /// The output is written, and the comparison that was asked for can't be made.
    #[error("the comparison can't be made")]
    Comparison(#[source] verify::Error),
}

/// Why a valid model stays as it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unconvertible {
    /// A merged decoder whose branches can't be made one graph.
    #[error("{0}")]
    Merged(String),
    /// No attention is found. It says what was found instead.
    #[error("{0}")]
    NoAttention(String),
    /// Every attention is refused: each reason once, with its first node.
    #[error("{0}")]
    AllRefused(String),
    /// Some attention is refused, and `partial` is not set.
    #[error("{refused} of {all} attention layers can't be converted: {reasons}; --partial converts the others")]
    SomeRefused {
        /// How many.
        refused: usize,
        /// Attention layers in all.
        all: usize,
        /// Each reason once, with its first node.
        reasons: String,
    },
    /// A layer keeps a sliding-window cache, and the window is above 1.
    #[error(
        "layer {layer} (node {node}) keeps a sliding-window cache, which gives wrong results when tokens are fed again; \
         convert with --window 1 or --sliding-cache full"
    )]
    KeepsSlidingCache {
        /// The layer's number.
        layer: usize,
        /// Its node.
        node: String,
    },
    /// No layer would become the operator.
    #[error("every layer keeps a sliding-window cache: there is nothing to gain")]
    OnlySlidingCaches,
    /// A layer that stays takes every token once, and the window is above 1.
    #[error("node {node} ({op_type}) stays as it is, and tokens must not be fed to it again; convert with --window 1")]
    KeepsState {
        /// The layer's node.
        node: String,
        /// Its operator.
        op_type: String,
    },
    /// The model has state beside its caches, and the window is above 1.
    #[error(
        "the model carries {past} on to {present} beside its key and value caches, and tokens must not be fed to it again; \
         convert with --window 1"
    )]
    CarriesState {
        /// The input.
        past: String,
        /// The output that it comes back as.
        present: String,
    },
    /// A dense layer is named that isn't converted.
    #[error("--dense-layers names layer {layer}; the layers to convert are {}", list(.layers))]
    NoSuchLayer {
        /// The layer named.
        layer: usize,
        /// The layers that are converted.
        layers: Vec<usize>,
    },
    /// The model is made for one number of tokens a call, and the window is above 1.
    #[error(
        "{input} takes {count} tokens a call and no other number, but steps of a window of {window} feed 1 to {window} of \
         them; convert with --window 1, or export it with an open sequence length"
    )]
    FixedTokens {
        /// The input of tokens.
        input: &'static str,
        /// Tokens that it takes.
        count: i64,
        /// The window asked for.
        window: usize,
    },
    /// The graph has something in the way of the new nodes.
    #[error(transparent)]
    Rewrite(#[from] rewrite::Error),
    /// The converted graph is one that no runtime would load.
    #[error("the result would be an invalid ONNX model: {0}")]
    InvalidResult(String),
}

fn list(layers: &[usize]) -> String {
    layers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}
