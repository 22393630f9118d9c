//! A session of N attention nodes with caches and state bound in place, and its timed step.

use std::time::Instant;

use half::{f16, slice::HalfFloatSliceExt};
use ort::{
    memory::Allocator,
    session::{IoBinding, Session},
    value::{DynTensor, DynValue, Tensor, TensorElementType},
};
use retro_contract::{Mode, STATE, input, output};
use retro_models::Dtype;
use retro_runtime::alone;

use super::{
    data::{Caches, Rows, element, integer},
    graph::{model, name_of},
    operator::{AttentionShape, Operator},
};
use crate::{
    OpenOptions, Runtime,
    bench::{Error, Result, selector_state::StatePattern},
    decoder::{
        page_reads::PageMeter,
        require,
        session::{PluginUse, session_builder},
        upcast::upcast_f16,
    },
    runtime::ort_error,
};

/// A session of nodes of one operator.
pub struct Node {
    /// The operator of its nodes.
    pub operator: Operator,
    shape: AttentionShape,
    session: Session,
    binding: IoBinding,
    /// Per node: summaries, page steps, outputs, log-sum-exps.
    state: Vec<[DynTensor; 4]>,
    prompt: usize,
    nodes: usize,
    meter: PageMeter,
    /// The newest token's output of node 0.
    pub newest: Vec<f32>,
}

impl Node {
    /// A session of as many nodes as `caches` has.
    ///
    /// # Errors
    /// When ONNX Runtime refuses the graph, or the plugin is needed and missing.
    pub fn new(
        runtime: &Runtime,
        options: &OpenOptions,
        shape: &AttentionShape,
        operator: Operator,
        caches: &mut Caches,
    ) -> Result<Self> {
        let nodes = caches.nodes.len();
        let retro = match operator {
            Operator::Gqa => None,
            Operator::Retro(retro) => Some(retro),
        };
        let plugin = retro.is_some();
        require!(!plugin || options.plugin.is_some(), Error::NoPlugin);
        let plugin = if plugin { PluginUse::Load } else { PluginUse::Leave };
        let mut builder = session_builder(runtime, options, plugin)?;
        let session = alone(|| builder.commit_from_memory(&model(shape, &operator, nodes))).map_err(Error::session)?;
        let pattern = retro.map(|r| {
            let (selector, cache) = (r.selection.selector, element(shape.dtype));
            StatePattern::new(
                runtime,
                options,
                selector,
                shape.page_size,
                shape.head_size,
                shape.sketch_bits,
                cache,
            )
        });
        let pattern = pattern.transpose()?;
        let mut binding = session.create_binding().map_err(ort_error)?;
        let mut bind = |slot: usize, node: usize, tensor: &mut DynTensor| -> Result<()> {
            let (past, present) = STATE[slot];
            let past = name_of(input::NAMES[past], node);
            binding.bind_input(past, tensor).map_err(ort_error)?;
            let present = name_of(output::NAMES[present], node);
            Ok(binding.bind_output(present, tensor).map_err(ort_error)?)
        };
        let mut state = Vec::new();
        for node in 0..nodes {
            for (slot, tensor) in caches.nodes[node].iter_mut().enumerate() {
                bind(slot, node, tensor)?;
            }
            if let Some((retro, pattern)) = retro.as_ref().zip(pattern.as_ref()) {
                let mut own = caches.state(shape, retro, pattern.bytes())?;
                for (i, tensor) in own.iter_mut().enumerate() {
                    bind(2 + i, node, tensor)?;
                }
                state.push(own);
            }
        }
        Ok(Self {
            operator,
            shape: *shape,
            session,
            binding,
            state,
            prompt: caches.prompt,
            nodes,
            meter: PageMeter::new(operator.window(), shape.page_size),
            newest: Vec::new(),
        })
    }

    /// Runs a step at `position` with as many retrospective tokens as the window has by then; returns the session's
    /// time per node in seconds.
    ///
    /// # Errors
    /// When ONNX Runtime fails.
    pub fn step(&mut self, rows: &Rows, position: usize) -> Result<f64> {
        let shape = self.shape;
        let at = position - self.prompt;
        let retro = at.min(self.operator.window() - 1);
        let fed = retro + 1;
        let part = |data: &[f32], width: usize| -> Result<DynValue> {
            let rows = data.get((at - retro) * width..(at + 1) * width).ok_or(Error::NoRow)?;
            floats(shape.dtype, [1, fed, width], rows)
        };
        let kv_width = shape.kv_heads * shape.head_size;
        let mut inputs = vec![
            ("query", part(&rows.query, shape.heads * shape.head_size)?),
            ("key", part(&rows.key, kv_width)?),
            ("value", part(&rows.value, kv_width)?),
            ("seqlens_k", integer(position as i32)?),
            ("total_sequence_length", integer(position as i32 + 1)?),
        ];
        if self.operator != Operator::Gqa {
            inputs.push(("retro_length", integer(retro as i32)?));
        }
        for (name, value) in &inputs {
            self.binding.bind_input(*name, value).map_err(ort_error)?;
        }
        let memory = Allocator::default().memory_info().to_owned();
        for node in 0..self.nodes {
            let name = name_of(output::NAMES[output::OUTPUT], node);
            self.binding.bind_output_to_device(name, &memory).map_err(ort_error)?;
        }
        let start = Instant::now();
        let outputs = self.session.run_binding(&self.binding).map_err(ort_error)?;
        let seconds = start.elapsed().as_secs_f64() / self.nodes as f64;

        let output = outputs
            .get(name_of(output::NAMES[output::OUTPUT], 0))
            .ok_or(Error::NoOutput)?;
        self.newest = newest_row(output, shape.dtype, shape.heads * shape.head_size)?;
        if let Some([_, steps, ..]) = self.state.first() {
            let (dims, data) = steps.try_extract_tensor::<i32>().map_err(ort_error)?;
            let pages = dims.last().map_or(1, |&p| p as usize);
            for (head, own) in data.chunks(pages).enumerate() {
                self.meter.take(head, own, position);
            }
        }
        Ok(seconds)
    }

    /// Mean pages read per KV head and step, of node 0; `None` for GroupQueryAttention.
    pub fn pages(&self) -> Option<f64> {
        self.meter.reading.pages()
    }

    /// Effective exposure; `None` for a window of 1.
    pub fn exposure(&self) -> Option<f64> {
        self.meter.reading.exposure().filter(|_| self.operator.window() > 1)
    }

    /// Whether the newest token attends to every page: then its output must be that of GroupQueryAttention.
    pub fn is_dense(&self, len: usize) -> bool {
        match self.operator {
            Operator::Gqa => true,
            Operator::Retro(r) => match r.mode {
                Mode::Dense => true,
                Mode::Streaming | Mode::Periodic => false,
                Mode::Retro => !self.operator.scores(&self.shape, len),
            },
        }
    }
}

fn floats(dtype: Dtype, dims: [usize; 3], data: &[f32]) -> Result<DynValue> {
    let tensor = match dtype {
        Dtype::F32 => Tensor::from_array((dims, data.to_vec())).map(Tensor::into_dyn),
        Dtype::F16 => {
            let mut narrow = vec![f16::ZERO; data.len()];
            narrow.convert_from_f32_slice(data);
            Tensor::from_array((dims, narrow)).map(Tensor::into_dyn)
        }
    };
    Ok(tensor.map_err(ort_error)?)
}

/// The last `width` elements, as f32.
fn newest_row(output: &DynValue, dtype: Dtype, width: usize) -> Result<Vec<f32>> {
    fn last<T>(data: &[T], width: usize) -> Result<&[T]> {
        let start = data.len().checked_sub(width).ok_or(Error::ShortOutput)?;
        Ok(&data[start..])
    }
    match element(dtype) {
        TensorElementType::Float16 => {
            let (_, data) = output.try_extract_tensor::<f16>().map_err(ort_error)?;
            let mut row = vec![0.0; width];
            upcast_f16(last(data, width)?, &mut row);
            Ok(row)
        }
        _ => {
            let (_, data) = output.try_extract_tensor::<f32>().map_err(ort_error)?;
            Ok(last(data, width)?.to_vec())
        }
    }
}
