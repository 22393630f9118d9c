//! What all variants need: ONNX Runtime, the plugin, the device.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, Result, anyhow};
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use retro_contract::Selector;
use retro_run::{OpenOptions, Runtime, bench::selector_state::StatePattern, device::left_to_cpu, gpu::Gpu, runtime};

use crate::{
    args::Args,
    graph::{self, Feeding, NodeKind, NodeShape},
};

pub struct Host<'a> {
    pub args: &'a Args,
    runtime: Runtime,
    plugin: PathBuf,
    pub gpu: Option<Arc<Gpu>>,
    pub shape: NodeShape,
}

impl<'a> Host<'a> {
    pub fn new(args: &'a Args) -> Result<Self> {
        let runtime = Runtime::load_for(args.device, args.ort.as_deref())?;
        let plugin = runtime::find_plugin(args.plugin.as_deref())?
            .context("no plugin: build it with `cargo build --release`, or name it with --plugin")?;
        let gpu = args.device.gpu()?;
        let shape = NodeShape {
            layers: args.layers,
            heads: args.heads,
            kv_heads: args.kv_heads,
            size: args.head_size,
            page: args.page_size,
            sketch_bits: args.sketch_bits,
            rotary: args.rotary,
            dtype: args.dtype.onnx(),
        };
        Ok(Self {
            args,
            runtime,
            plugin,
            gpu,
            shape,
        })
    }

    pub fn session(&self, kind: NodeKind, feeding: Feeding, layers: usize, cuda_graph: bool) -> Result<Session> {
        let shape = NodeShape {
            layers,
            rotary: self.shape.rotary && layers > 0,
            ..self.shape
        };
        let model = graph::model(kind, feeding, &shape);
        let text = |e: &dyn std::fmt::Display| anyhow!("{e}");
        let builder = Session::builder(self.runtime.environment()).map_err(|e| text(&e))?;
        let builder = self.args.device.provide(builder, cuda_graph).map_err(|e| text(&e))?;
        let mut builder = builder.with_operator_library(&self.plugin).map_err(|e| text(&e))?;
        let session = builder.commit_from_memory(&model).map_err(|e| text(&e))?;
        if self.gpu.is_some()
            && let Some(left) = left_to_cpu(&session)?
        {
            return Err(anyhow!("{left}"));
        }
        Ok(session)
    }

    /// What random state of a selector is repeated from.
    pub fn state_pattern(&self, selector: Selector) -> Result<StatePattern> {
        let options = OpenOptions {
            plugin: Some(self.plugin.clone()),
            ..OpenOptions::default()
        };
        let (s, cache) = (&self.shape, self.args.dtype.element());
        Ok(StatePattern::new(
            &self.runtime,
            &options,
            selector,
            s.page,
            s.size,
            s.sketch_bits,
            cache,
        )?)
    }

    /// Options of a run that is timed, captured as a CUDA graph where it has a number.
    pub fn run_options(&self, cuda_graph: Option<usize>) -> Result<RunOptions<NoSelectedOutputs>> {
        let mut options = RunOptions::new().map_err(|e| anyhow!("{e}"))?;
        if !self.args.sync {
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

    pub fn free_memory(&self) -> Result<usize> {
        Ok(self.gpu.as_ref().map_or(Ok(usize::MAX), |gpu| gpu.free_memory())?)
    }

    /// Device and sizes, as text and for JSON.
    pub fn about(&self, bandwidth: f64) -> Result<serde_json::Value> {
        let device = match &self.gpu {
            Some(gpu) => gpu.describe()?.0,
            None => "CPU".to_owned(),
        };
        let s = &self.shape;
        let text = format!(
            "{device}; {} nodes, {} / {} heads of {}, {:?}, pages of {}; a copy moves {:.0} GB/s (read and written)",
            s.layers,
            s.heads,
            s.kv_heads,
            s.size,
            s.dtype,
            s.page,
            bandwidth / 1e9
        );
        Ok(serde_json::json!({ "device": device, "copy_bytes_per_second": bandwidth, "text": text }))
    }
}
