//! Session options, opening a session, and what to do about its errors.

use std::path::{Path, PathBuf};

use anyhow::anyhow;
use ort::{
    logging::LogLevel,
    session::{Session, builder::SessionBuilder},
};
use retro_onnx::{external_files, folder_of, read_model};

use crate::{
    Device,
    runtime::{PLUGIN, PLUGIN_VARIABLE, Runtime, one_line},
};

/// How to open a model.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Threads of ONNX Runtime's pool; `None`: one per core.
    pub threads: Option<usize>,
    /// Path of the plugin. Only converted models load it.
    pub plugin: Option<PathBuf>,
    /// Where the model runs.
    pub device: Device,
    /// Capture decoding steps as a CUDA graph and replay it.
    pub cuda_graph: bool,
    /// Threads of the pool stop spinning after a run: where several sessions take turns, those of one would take the
    /// cores of the next.
    pub idle_between_runs: bool,
    /// Feed steps from buffers at fixed addresses, as a CUDA graph needs them. On the CPU this serves tests alone.
    pub fixed_buffers: bool,
}

/// Opens the session of a graph. Errors are text: those of `ort`'s builder carry the builder, which cannot leave the
/// thread.
pub(crate) fn open_session(runtime: &Runtime, graph: &Path, options: &OpenOptions) -> Result<Session, String> {
    let mut builder = session_builder(runtime, options, options.plugin.is_some() && may_need_plugin(graph))?;
    builder.commit_from_file(graph).map_err(|e| one_line(&e))
}

/// A session's options: log level, threads, and the plugin if it is wanted.
pub(crate) fn session_builder(
    runtime: &Runtime,
    options: &OpenOptions,
    plugin: bool,
) -> Result<SessionBuilder, String> {
    let text = |e: &dyn std::fmt::Display| one_line(e);
    let mut builder = Session::builder(runtime.environment()).map_err(|e| text(&e))?;
    // Errors come back as values and are reported once; $ORT_LOG asks for ONNX Runtime's own log.
    if std::env::var_os("ORT_LOG").is_none() {
        builder = builder.with_log_level(LogLevel::Fatal).map_err(|e| text(&e))?;
    }
    // Every step has another shape: a memory pattern for each would only cost.
    let mut builder: SessionBuilder = builder.with_memory_pattern(false).map_err(|e| text(&e))?;
    builder = options.device.provide(builder, options.cuda_graph)?;
    if let Some(threads) = options.threads {
        builder = builder.with_intra_threads(threads).map_err(|e| text(&e))?;
    }
    if options.idle_between_runs {
        builder = builder
            .with_config_entry("session.force_spinning_stop", "1")
            .map_err(|e| text(&e))?;
    }
    if let Some(plugin) = options.plugin.as_ref().filter(|_| plugin) {
        builder = builder
            .with_operator_library(plugin)
            .map_err(|e| format!("the plugin {} does not load: {}", plugin.display(), text(&e)))?;
    }
    Ok(builder)
}

/// Whether a graph imports the operator's domain; true for a graph that cannot be read here.
fn may_need_plugin(graph: &Path) -> bool {
    read_model(graph).map_or(true, |loaded| {
        loaded.model.opset_version(retro_contract::DOMAIN).is_some()
    })
}

/// The error of [`open_session`] with what to do about it.
pub(crate) fn load_error(graph: &Path, options: &OpenOptions, text: &str) -> anyhow::Error {
    let wants_plugin = text.contains(retro_contract::DOMAIN) || text.contains(retro_contract::OP_TYPE);
    if wants_plugin && options.plugin.is_none() {
        anyhow!(
            "{} was converted and needs the plugin {PLUGIN}, which is not beside this program: build it with `cargo build --release`, or name it with --plugin or {PLUGIN_VARIABLE}",
            graph.display()
        )
    } else if options.cuda_graph && text.contains("graph capture") {
        anyhow!(
            "--cuda-graph: the graph {} has CPU nodes between GPU nodes, so its steps cannot be captured; run it without --cuda-graph ({text})",
            graph.display()
        )
    } else if let Some(why) = weights_fault(graph).filter(|_| text.to_lowercase().contains("external")) {
        anyhow!("cannot load {}: {why}", graph.display())
    } else {
        anyhow!("cannot load {}: {text}", graph.display())
    }
}

/// What is wrong with a model's external data; `None` if it is complete.
fn weights_fault(graph: &Path) -> Option<String> {
    let model = read_model(graph).ok()?.model;
    external_files(&model, folder_of(graph))
        .err()
        .map(|e| format!("{:#}", anyhow::Error::from(e)))
}
