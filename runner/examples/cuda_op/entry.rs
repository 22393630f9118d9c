//! One variant with one budget: a row to be measured.

use anyhow::Result;
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use retro_contract::Budget;
use retro_run::decoder::device_buffers::{DeviceBindings, DeviceTensor};

use crate::{graph::NodeKind, group::Group, steps::most_steps};

/// A session that is measured.
pub struct Variant {
    pub kind: NodeKind,
    pub cuda_graph: bool,
    pub session: Session,
}

/// A row to be measured.
pub struct Entry<'a> {
    pub variant: &'a Variant,
    pub tokens: usize,
    pub budget: Option<Budget>,
    pub bindings: DeviceBindings,
    pub options: RunOptions<NoSelectedOutputs>,
    pub micros: Vec<f64>,
    /// Tensors of this entry alone, kept alive.
    _own: Vec<DeviceTensor>,
}

impl<'a> Entry<'a> {
    pub fn new(
        group: &Group<'_>,
        variant: &'a Variant,
        tokens: usize,
        budget: Option<Budget>,
        graph_id: usize,
    ) -> Result<Self> {
        let (context, args) = (group.layout.context, group.host.args);
        let total = if args.prompt() {
            context
        } else {
            context + most_steps(args.runs)
        };
        let (bindings, own) = group.bind(&variant.session, variant.kind, args.feeding(), tokens, total)?;
        Ok(Self {
            variant,
            tokens,
            budget,
            bindings,
            options: group.host.run_options(variant.cuda_graph.then_some(graph_id))?,
            micros: Vec::new(),
            _own: own,
        })
    }
}
