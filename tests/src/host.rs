//! A real ONNX Runtime: sessions with the plugin loaded, runs through bound buffers.

use std::{ffi::CStr, path::Path, ptr, sync::OnceLock};

use ort::{
    AsPointer,
    environment::Environment,
    session::{IoBinding, Session, builder::SessionBuilder},
};

use crate::{paths, tensor::Tens};

/// The process's environment; the first call loads ONNX Runtime.
pub fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let library = paths::onnxruntime();
        ort::init_from(&library)
            .map(|builder| builder.with_name("retro-tests").build())
            .unwrap_or_else(|e| panic!("{} does not load: {e}", library.display()))
            .expect("an ONNX Runtime environment")
    })
}

fn builder(plugin: bool) -> Result<SessionBuilder, String> {
    let builder = Session::builder(environment()).map_err(|e| e.to_string())?;
    let builder = builder.with_intra_threads(2).map_err(|e| e.to_string())?;
    if plugin {
        builder
            .with_operator_library(paths::plugin())
            .map_err(|e| e.to_string())
    } else {
        Ok(builder)
    }
}

/// A session on a model in memory, with the plugin.
pub fn open(model: &[u8]) -> Result<Session, String> {
    let _one = one_at_a_time();
    builder(true)?.commit_from_memory(model).map_err(|e| e.to_string())
}

/// A session on a model file, with the plugin or without.
pub fn open_file(model: &Path, plugin: bool) -> Result<Session, String> {
    let _one = one_at_a_time();
    builder(plugin)?.commit_from_file(model).map_err(|e| e.to_string())
}

/// Runs with inputs and outputs bound to the caller's buffers. A buffer of `in_place` is bound as both.
///
/// `ort` runs a session through `&mut`; ONNX Runtime itself lets many threads run one, and so must the plugin.
pub fn run(
    session: &Session,
    inputs: &[(&str, &Tens)],
    outputs: &mut [(&str, &mut Tens)],
    in_place: &mut [(&str, &str, &mut Tens)],
) -> Result<(), String> {
    let mut binding = session.create_binding().map_err(|e| e.to_string())?;
    for (name, tensor) in inputs {
        binding.bind_input(*name, tensor.value()).map_err(|e| e.to_string())?;
    }
    for (name, tensor) in outputs {
        binding
            .bind_output(*name, tensor.value_mut())
            .map_err(|e| e.to_string())?;
    }
    for (past, present, tensor) in in_place {
        binding.bind_input(*past, tensor.value()).map_err(|e| e.to_string())?;
        binding
            .bind_output(*present, tensor.value_mut())
            .map_err(|e| e.to_string())?;
    }
    run_binding(session, &binding)
}

fn run_binding(session: &Session, binding: &IoBinding) -> Result<(), String> {
    let api = ort::api();
    // SAFETY: both objects are alive and belong together; OrtApi::RunWithBinding may be called from several threads on one
    // session as long as each has its own binding, and this one is borrowed here alone.
    let status = unsafe { (api.RunWithBinding)(session.ptr().cast_mut(), ptr::null(), binding.ptr()) };
    if status.0.is_null() {
        return Ok(());
    }
    // SAFETY: a status that is not null is ours until released; its message lives as long as it does.
    let message = unsafe { CStr::from_ptr((api.GetErrorMessage)(status.0)) }
        .to_string_lossy()
        .into_owned();
    // SAFETY: ours, released once, not used afterwards.
    unsafe { (api.ReleaseStatus)(status.0) };
    Err(message)
}

/// ORT 1.31 adds a custom domain to a table of the process with a check and an insertion that are not one: two sessions
/// opened at the same moment may both find it missing, and the second fails.
fn one_at_a_time() -> std::sync::MutexGuard<'static, ()> {
    static OPENING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    OPENING.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
