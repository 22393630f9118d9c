//! Session options, opening a session, and what to do about its errors.

use std::path::{Path, PathBuf};

use ort::{
    logging::LogLevel,
    session::{Session, builder::SessionBuilder},
};
use retro_onnx::{external_files, folder_of, read_model};
use retro_runtime::{OrtError, alone};

use crate::{
    Device,
    decoder::error::{Error, NotCapturable, Result},
    runtime::{Runtime, ort_error},
};

/// How steps are fed to the session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Steps {
    /// Each by tensors of its own.
    #[default]
    Plain,
    /// From buffers at fixed addresses, as a CUDA graph needs them. For tests on the CPU.
    FixedBuffers,
    /// From such buffers, captured as a CUDA graph and replayed.
    Captured,
    /// On a GPU captured where the model allows it; else plain, and [`Model::device_line`](crate::Model::device_line)
    /// says why.
    CapturedIfPossible,
}

/// What the threads of ONNX Runtime's pool do between two runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BetweenRuns {
    /// Spin for a while: the next run of the same session starts at once.
    #[default]
    Spin,
    /// Sleep: where several sessions take turns, spinning threads of one would take the cores of the next.
    Sleep,
}

/// How to open a model.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Threads of ONNX Runtime's pool; `None`: one per core.
    pub threads: Option<usize>,
    /// Path of the plugin. Only converted models load it.
    pub plugin: Option<PathBuf>,
    /// Where the model runs.
    pub device: Device,
    /// How steps are fed.
    pub steps: Steps,
    /// What threads do between runs.
    pub between_runs: BetweenRuns,
}

/// Whether a session loads the plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PluginUse {
    /// The one that [`OpenOptions::plugin`] names.
    Load,
    /// None: the graph has no operator of ours.
    Leave,
}

/// Opens the session of a graph.
pub(crate) fn open_session(runtime: &Runtime, graph: &Path, options: &OpenOptions) -> Result<Session> {
    let plugin = match options.plugin {
        Some(_) if uses_operator(graph).unwrap_or(true) => PluginUse::Load,
        _ => PluginUse::Leave,
    };
    let mut builder = session_builder(runtime, options, plugin)?;
    alone(|| builder.commit_from_file(graph)).map_err(|e| load_error(graph, options, e.into()))
}

/// A session's options: log level, threads, and the plugin if it is wanted.
pub(crate) fn session_builder(runtime: &Runtime, options: &OpenOptions, plugin: PluginUse) -> Result<SessionBuilder> {
    let mut builder = Session::builder(runtime.environment()).map_err(ort_error)?;
    // Errors come back as values and are reported once; $ORT_LOG asks for ONNX Runtime's own log.
    if std::env::var_os("ORT_LOG").is_none() {
        builder = builder.with_log_level(LogLevel::Fatal).map_err(ort_error)?;
    }
    // Every step has another shape: a memory pattern for each would only cost.
    let mut builder: SessionBuilder = builder.with_memory_pattern(false).map_err(ort_error)?;
    builder = options.device.provide(builder, options.steps == Steps::Captured)?;
    if let Some(threads) = options.threads {
        builder = builder.with_intra_threads(threads).map_err(ort_error)?;
    }
    if options.between_runs == BetweenRuns::Sleep {
        builder = builder
            .with_config_entry("session.force_spinning_stop", "1")
            .map_err(ort_error)?;
    }
    if let Some(path) = options.plugin.as_ref().filter(|_| plugin == PluginUse::Load) {
        builder = builder.with_operator_library(path).map_err(|e| Error::Plugin {
            plugin: path.clone(),
            error: e.into(),
        })?;
    }
    Ok(builder)
}

/// Whether a graph imports the operator's domain; `None` for a graph that cannot be read here.
fn uses_operator(graph: &Path) -> Option<bool> {
    let loaded = read_model(graph).ok()?;
    Some(loaded.model.opset_version(retro_contract::DOMAIN).is_some())
}

/// Why a session does not open, by what the graph is and what was asked for.
fn load_error(graph: &Path, options: &OpenOptions, error: OrtError) -> Error {
    let path = graph.to_owned();
    if options.plugin.is_none() && uses_operator(graph) == Some(true) {
        return Error::NeedsPlugin(path);
    }
    if options.steps == Steps::Captured && speaks_of_capture(&error) {
        let why = Box::new(NotCapturable::Refused(error));
        return Error::NotCapturable { graph: path, why };
    }
    let reason = weights_fault(graph).unwrap_or(error.message);
    Error::Load { graph: path, reason }
}

/// Whether ONNX Runtime says that a graph cannot be captured. It has no code for that, only words. They choose the
/// advice that is printed, and whether a session that need not capture is tried.
fn speaks_of_capture(error: &OrtError) -> bool {
    error.message.contains("graph capture")
}

/// What is wrong with a model's external data; `None` if it is complete.
fn weights_fault(graph: &Path) -> Option<String> {
    let model = read_model(graph).ok()?.model;
    external_files(&model, folder_of(graph)).err().map(|e| format!("{e:#}"))
}
