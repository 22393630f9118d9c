//! ONNX Runtime with the operator's plugin at hand, and the device that both models run on.

use super::error::Error;
use crate::error::chain;
use ort::session::{
    Session,
    builder::{GraphOptimizationLevel, SessionBuilder},
};
use retro_runtime::{Device, alone, device, find_plugin, one_line};
use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// ONNX Runtime and the plugin, and where both models run.
pub struct ComparisonRuntime {
    loaded: &'static retro_runtime::Runtime,
    plugin: PathBuf,
    /// Where both models run.
    pub device: Device,
}

impl ComparisonRuntime {
    /// Finds both as `retro-run` does: ONNX Runtime by `ORT_DYLIB_PATH`, beside the program, in `.cache/onnxruntime` of a folder
    /// above it, or where the system's loader does; the plugin by `RETRO_ATTENTION_PLUGIN` or beside the program.
    ///
    /// # Errors
    /// One isn't found or doesn't load, or the device isn't there; then there is nothing to compare with.
    pub fn find(device: Device) -> Result<Self, Error> {
        let plugin = find_plugin(None).map_err(Error::FindPlugin)?;
        let plugin = plugin.ok_or(Error::NoPlugin)?;
        // A process has one, and loads it once.
        static LOADED: OnceLock<Result<retro_runtime::Runtime, String>> = OnceLock::new();
        let loaded = LOADED
            .get_or_init(|| retro_runtime::Runtime::load_for(device, None).map_err(|e| chain(&e)))
            .as_ref()
            .map_err(|why| Error::Runtime(why.clone()))?;
        // Only whether it is there: tensors stay on the host, and ONNX Runtime copies them.
        device.gpu().map_err(Error::Device)?;
        let runtime = Self { loaded, plugin, device };
        // A plugin that doesn't load says nothing of any model.
        runtime.builder(true)?;
        Ok(runtime)
    }

    /// The library, for reports.
    pub fn library(&self) -> &Path {
        &self.loaded.path
    }

    fn builder(&self, plugin: bool) -> Result<SessionBuilder, Error> {
        let mut builder = Session::builder(self.loaded.environment()).map_err(|e| Error::Session(one_line(&e)))?;
        // As written: a fused or folded graph rounds otherwise.
        builder = builder
            .with_optimization_level(GraphOptimizationLevel::Level1)
            .map_err(|e| Error::Session(one_line(&e)))?;
        builder = self
            .device
            .provide(builder, false)
            .map_err(|e| Error::Session(e.to_string()))?;
        if plugin {
            builder = builder
                .with_operator_library(&self.plugin)
                .map_err(|e| Error::LoadPlugin {
                    path: self.plugin.clone(),
                    why: one_line(&e),
                })?;
        }
        Ok(builder)
    }

    /// Loads a model. `plugin`: it is a converted one.
    ///
    /// # Errors
    /// ONNX Runtime doesn't load it.
    pub(super) fn open(&self, model: &Path, plugin: bool) -> Result<Session, Error> {
        let mut builder = self.builder(plugin)?;
        let loaded = alone(|| builder.commit_from_file(model));
        loaded.map_err(|e| Error::LoadModel {
            path: model.to_owned(),
            why: one_line(&e),
        })
    }

    /// What of a model does not run on the device.
    ///
    /// # Errors
    /// The operator itself doesn't.
    pub(super) fn elsewhere(&self, session: &Session) -> Result<Option<String>, Error> {
        if self.device == Device::Cpu {
            return Ok(None);
        }
        let placed = device::placement(session).map_err(Error::Device)?;
        // What is to be compared is the operator's own kernels there; all else may be left to the CPU, and is named.
        let left = placed
            .iter()
            .find(|n| n.op_type == retro_contract::OP_TYPE && !n.on_gpu());
        if left.is_some() {
            return Err(Error::OperatorOnCpu);
        }
        Ok(device::elsewhere(&placed))
    }
}
