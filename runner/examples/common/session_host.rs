//! What sessions that are timed need: ONNX Runtime, the plugin, the device.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Result, anyhow};
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use retro_run::{
    Device, Runtime, decoder::device_buffers::DeviceBuffer, device::left_to_cpu, gpu::Gpu, runtime::find_plugin,
};

/// ONNX Runtime, the plugin and the device.
pub struct SessionHost {
    pub runtime: Runtime,
    pub device: Device,
    /// `None` on the CPU.
    pub gpu: Option<Arc<Gpu>>,
    /// Threads of ONNX Runtime's pool; `None`: one per core.
    pub threads: Option<usize>,
    plugin: Option<PathBuf>,
}

impl SessionHost {
    /// `library` and `plugin`: where ONNX Runtime and the plugin are, if not where they are looked for.
    pub fn new(device: Device, library: Option<&Path>, plugin: Option<&Path>, threads: Option<usize>) -> Result<Self> {
        Ok(Self {
            runtime: Runtime::load_for(device, library)?,
            device,
            gpu: device.gpu()?,
            threads,
            plugin: find_plugin(plugin)?,
        })
    }

    pub fn plugin(&self) -> Result<&Path> {
        let plugin = self.plugin.as_deref();
        plugin.ok_or_else(|| anyhow!("no plugin: build it with `cargo build --release`, or name it with --plugin"))
    }

    /// A session of a serialized model, with the plugin if `with_plugin`. On a GPU nothing may stay on the CPU.
    pub fn session(&self, model: &[u8], with_plugin: bool, cuda_graph: bool) -> Result<Session> {
        let text = |e: &dyn Display| anyhow!("{e}");
        let builder = Session::builder(self.runtime.environment()).map_err(|e| text(&e))?;
        let mut builder = self.device.provide(builder, cuda_graph).map_err(|e| text(&e))?;
        if let Some(threads) = self.threads {
            builder = builder.with_intra_threads(threads).map_err(|e| text(&e))?;
        }
        if with_plugin {
            builder = builder.with_operator_library(self.plugin()?).map_err(|e| text(&e))?;
        }
        let session = builder.commit_from_memory(model).map_err(|e| text(&e))?;
        if self.gpu.is_some()
            && let Some(left) = left_to_cpu(&session)?
        {
            return Err(anyhow!("{left}"));
        }
        Ok(session)
    }

    /// Options of a run that is timed, captured as a CUDA graph where it has a number. `sync`: the run waits for the
    /// device.
    pub fn run_options(&self, sync: bool, cuda_graph: Option<usize>) -> Result<RunOptions<NoSelectedOutputs>> {
        let mut options = RunOptions::new().map_err(|e| anyhow!("{e}"))?;
        if !sync {
            options.disable_device_sync().map_err(|e| anyhow!("{e}"))?;
        }
        if let Some(number) = cuda_graph {
            options
                .set("gpu_graph_id", number.to_string())
                .map_err(|e| anyhow!("{e}"))?;
        }
        Ok(options)
    }

    pub fn synchronize(&self) -> Result<()> {
        Ok(self.gpu.as_ref().map_or(Ok(()), |gpu| gpu.synchronize())?)
    }

    /// The device's name.
    pub fn name(&self) -> Result<String> {
        Ok(match &self.gpu {
            Some(gpu) => gpu.describe()?.0,
            None => "CPU".to_owned(),
        })
    }

    /// Bytes read and written per second by a copy inside the buffer.
    pub fn copy_bandwidth(&self, buffer: &DeviceBuffer) -> Result<f64> {
        let bytes = (buffer.bytes() / 2).min(2 << 30);
        let mut best = f64::INFINITY;
        for _ in 0..6 {
            self.synchronize()?;
            let start = Instant::now();
            buffer.copy(bytes, 0, bytes)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(2.0 * bytes as f64 / best)
    }

    /// Seconds of a run, after `warm_up` untimed runs.
    pub fn seconds(&self, warm_up: usize, runs: usize, run: impl Fn() -> Result<()>) -> Result<f64> {
        for _ in 0..warm_up {
            run()?;
        }
        self.synchronize()?;
        let start = Instant::now();
        for _ in 0..runs {
            run()?;
        }
        self.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / runs as f64)
    }
}
