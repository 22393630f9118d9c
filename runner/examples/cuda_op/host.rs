//! What all variants need: ONNX Runtime, the plugin, the device, and the sizes of the nodes.

use std::sync::Arc;

use anyhow::Result;
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use retro_contract::Selector;
use retro_run::{OpenOptions, bench::selector_state::StatePattern, gpu::Gpu};

use crate::{
    args::Args,
    common::session_host::SessionHost,
    graph::{self, Feeding, NodeKind, NodeShape},
};

pub struct Host<'a> {
    pub args: &'a Args,
    pub sessions: SessionHost,
    pub shape: NodeShape,
}

impl<'a> Host<'a> {
    pub fn new(args: &'a Args) -> Result<Self> {
        let sessions = SessionHost::new(args.device, args.ort.as_deref(), args.plugin.as_deref(), None)?;
        sessions.plugin()?;
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
        Ok(Self { args, sessions, shape })
    }

    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.sessions.gpu.as_ref()
    }

    pub fn session(&self, kind: NodeKind, feeding: Feeding, layers: usize, cuda_graph: bool) -> Result<Session> {
        let shape = NodeShape {
            layers,
            rotary: self.shape.rotary && layers > 0,
            ..self.shape
        };
        let model = graph::model(kind, feeding, &shape);
        self.sessions.session(&model, true, cuda_graph)
    }

    /// What random state of a selector is repeated from.
    pub fn state_pattern(&self, selector: Selector) -> Result<StatePattern> {
        let options = OpenOptions {
            plugin: Some(self.sessions.plugin()?.to_owned()),
            ..OpenOptions::default()
        };
        let (s, cache) = (&self.shape, self.args.dtype.element());
        Ok(StatePattern::new(
            &self.sessions.runtime,
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
        self.sessions.run_options(self.args.sync, cuda_graph)
    }

    pub fn free_memory(&self) -> Result<usize> {
        Ok(self.gpu().map_or(Ok(usize::MAX), |gpu| gpu.free_memory())?)
    }

    /// Device and sizes, as text and for JSON.
    pub fn about(&self, bandwidth: f64) -> Result<serde_json::Value> {
        let device = self.sessions.name()?;
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
