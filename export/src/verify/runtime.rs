//! ONNX Runtime with the operator's plugin at hand, and the device that both models run on.

use anyhow::{Result, anyhow, ensure};
use ort::session::{
    Session,
    builder::{GraphOptimizationLevel, SessionBuilder},
};
use retro_runtime::{Device, PLUGIN, PLUGIN_VARIABLE, device, find_plugin, one_line};
use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

pub struct Runtime {
    loaded: &'static retro_runtime::Runtime,
    plugin: PathBuf,
    pub device: Device,
}

impl Runtime {
    /// Finds both as `retro-run` does: ONNX Runtime by `ORT_DYLIB_PATH`, beside the program, in `.cache/onnxruntime` of a folder
    /// above it, or where the system's loader does; the plugin by `RETRO_ATTENTION_PLUGIN` or beside the program.
    ///
    /// # Errors
    /// One isn't found or doesn't load, or the device isn't there; then there is nothing to compare with.
    pub fn find(device: Device) -> Result<Self> {
        let plugin = find_plugin(None)?.ok_or_else(|| {
            anyhow!("the plugin {PLUGIN} is neither named by {PLUGIN_VARIABLE} nor beside this program (make build makes it)")
        })?;
        // A process has one, and loads it once.
        static LOADED: OnceLock<Result<retro_runtime::Runtime, String>> = OnceLock::new();
        let loaded = LOADED
            .get_or_init(|| retro_runtime::Runtime::load_for(device, None).map_err(|e| format!("{e:#}")))
            .as_ref()
            .map_err(|why| anyhow!("{why}"))?;
        // Only whether it is there: tensors stay on the host, and ONNX Runtime copies them.
        device.gpu()?;
        let runtime = Self { loaded, plugin, device };
        // A plugin that doesn't load says nothing of any model.
        runtime.builder(true)?;
        Ok(runtime)
    }

    /// The library, for reports.
    pub fn library(&self) -> &Path {
        &self.loaded.path
    }

    fn builder(&self, plugin: bool) -> Result<SessionBuilder> {
        let failed = |e: String| anyhow!("ONNX Runtime makes no session: {e}");
        let mut builder = Session::builder(self.loaded.environment()).map_err(|e| failed(one_line(&e)))?;
        // As written: a fused or folded graph rounds otherwise.
        builder = builder
            .with_optimization_level(GraphOptimizationLevel::Level1)
            .map_err(|e| failed(one_line(&e)))?;
        builder = self.device.provide(builder, false).map_err(|e| failed(e.to_string()))?;
        if plugin {
            let shown = self.plugin.display();
            builder = builder
                .with_operator_library(&self.plugin)
                .map_err(|e| anyhow!("the plugin {shown} does not load: {}", one_line(&e)))?;
        }
        Ok(builder)
    }

    /// Loads a model. `plugin`: it is a converted one.
    ///
    /// # Errors
    /// ONNX Runtime doesn't load it.
    pub fn open(&self, model: &Path, plugin: bool) -> Result<Session> {
        let loaded = self.builder(plugin)?.commit_from_file(model);
        loaded.map_err(|e| anyhow!("ONNX Runtime does not load {}: {}", model.display(), one_line(&e)))
    }

    /// What of a model does not run on the device.
    ///
    /// # Errors
    /// The operator itself doesn't.
    pub fn elsewhere(&self, session: &Session) -> Result<Option<String>> {
        if self.device == Device::Cpu {
            return Ok(None);
        }
        let placed = device::placement(session)?;
        // What is to be compared is the operator's own kernels there; all else may be left to the CPU, and is named.
        let left = placed
            .iter()
            .find(|n| n.op_type == retro_contract::OP_TYPE && !n.on_gpu());
        ensure!(
            left.is_none(),
            "the operator would run on the CPU: the plugin was built without CUDA (make cuda), or the model's element type is not supported there"
        );
        Ok(device::elsewhere(&placed))
    }
}
