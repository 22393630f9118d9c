//! Steps fed from buffers at fixed addresses, so that little crosses to a GPU and a step can be captured as a CUDA
//! graph.
//!
//! B sequences, S tokens fed, C capacity. In: token ids and, where the graph takes them, positions and budgets. The
//! mask is ones that lie on the device already. Out: the scores of the newest tokens. Tests run the same on the CPU,
//! where nothing is captured.

use std::sync::Arc;

use ort::{
    session::{IoBinding, NoSelectedOutputs, RunOptions, Session},
    value::{DynTensorValueType, TensorElementType},
};
use retro_contract::graph;

use crate::{
    Device,
    decoder::{
        device_buffers::{self, ALIGNMENT, DeviceBuffer, DeviceTensor, bind_input, bind_output},
        error::{Error, Result, require},
        inputs::{Feed, inputs},
        integers,
        io::{ModelIo, TokenInput},
        kv_cache::StateBuffer,
        logits::{Logits, LogitsReadback, LogitsShape, newest_rows},
    },
    gpu::Gpu,
    runtime::ort_error,
};

/// The graph's number with which ONNX Runtime runs a session without capturing or replaying.
pub(crate) const NO_GRAPH: &str = "-1";

/// What a run needs of a model and of a cache.
pub(crate) struct SessionParts<'a> {
    pub(crate) gpu: Option<&'a Arc<Gpu>>,
    pub(crate) session: &'a mut Session,
    pub(crate) io: &'a ModelIo,
    pub(crate) binding: &'a mut IoBinding,
}

/// What steps read and replace (`SlotKind::is_replaced_by_steps`): it is saved while a step is captured.
pub(crate) trait ReplacedState {
    /// Its bytes.
    fn save(&self) -> Result<Vec<Vec<u8>>>;

    /// Puts back what was saved.
    fn restore(&mut self, saved: &[Vec<u8>]) -> Result<()>;
}

impl ReplacedState for [StateBuffer] {
    fn save(&self) -> Result<Vec<Vec<u8>>> {
        let replaced = self.iter().filter(|b| b.kind().is_replaced_by_steps());
        replaced.map(StateBuffer::to_vec).collect()
    }

    fn restore(&mut self, saved: &[Vec<u8>]) -> Result<()> {
        let mut replaced = self.iter_mut().filter(|b| b.kind().is_replaced_by_steps()).zip(saved);
        replaced.try_for_each(|(buffer, bytes)| buffer.load(bytes))
    }
}

/// Runs the steps of one state.
pub(crate) struct DeviceRunner {
    batch: usize,
    capacity: usize,
    /// For batch 1: ones `[C]`, the first of which are a step's mask.
    ones: Option<DeviceBuffer>,
    readback: LogitsReadback,
    captured: Option<CapturedStep>,
}

/// A step of one shape, and the buffers at the addresses in its CUDA graph.
pub(crate) struct CapturedStep {
    id: usize,
    /// Tokens fed, and how many of them are retrospective. Another number needs another graph.
    fed: usize,
    retro_length: i32,
    /// Holds ids, mask, positions and budgets.
    buffer: DeviceBuffer,
    ids: DeviceTensor,
    /// The mask `[B, C]`, and how many ones each row has.
    mask: Option<(DeviceTensor, Vec<usize>)>,
    positions: Option<DeviceTensor>,
    budgets: Option<DeviceTensor>,
    /// `None` before a run that was not captured: its output tells the shape.
    logits: Option<(DeviceTensor, LogitsShape)>,
    retro_length_tensor: DeviceTensor,
    /// The graph is captured.
    ready: bool,
}

impl DeviceRunner {
    /// For a state of `batch` sequences of up to `capacity` tokens.
    pub(crate) fn new(gpu: Option<&Arc<Gpu>>, io: &ModelIo, batch: usize, capacity: usize) -> Result<Self> {
        let mask = io.attention_mask.as_ref();
        let ones = mask
            .filter(|mask| batch == 1 && mask.width.is_none())
            .map(|mask| -> Result<DeviceBuffer> {
                let ones = integers::bytes(mask.element, std::iter::repeat_n(1, capacity))?;
                let buffer = DeviceBuffer::new(gpu, ones.len())?;
                buffer.write(0, &ones)?;
                Ok(buffer)
            })
            .transpose()?;
        Ok(Self {
            batch,
            capacity,
            ones,
            readback: LogitsReadback::new(gpu),
            captured: None,
        })
    }

    /// Runs a step or a chunk of a prompt. `last_graph`: number of the model's last graph; `None` to capture none.
    pub(crate) fn run(
        &mut self,
        parts: &mut SessionParts<'_>,
        buffers: &mut [StateBuffer],
        feed: &Feed,
        last_graph: &mut Option<usize>,
    ) -> Result<Logits> {
        let logits = match last_graph {
            None => self.run_plain(parts, feed, None)?.0,
            Some(_) if !feed.graph_capturable => self.run_plain(parts, feed, Some(NO_GRAPH))?.0,
            Some(last_graph) => self.run_captured(parts, buffers, feed, last_graph)?,
        };
        buffers.iter_mut().try_for_each(StateBuffer::carry)?;
        Ok(logits)
    }

    /// Replays the CUDA graph of the step; captures it first if there is none.
    fn run_captured(
        &mut self,
        parts: &mut SessionParts<'_>,
        buffers: &mut [StateBuffer],
        feed: &Feed,
        last_graph: &mut usize,
    ) -> Result<Logits> {
        let fed = feed.ids.len() / self.batch;
        let known = self.captured.as_ref();
        if known.is_none_or(|c| c.fed != fed || c.retro_length != feed.retro_length) {
            *last_graph += 1;
            self.captured = Some(CapturedStep::new(parts, self.batch, self.capacity, feed, *last_graph)?);
        }
        // Only a run tells the shape of the logits: the first capturable step is not captured.
        if self.captured.as_ref().is_some_and(|c| c.logits.is_none()) {
            let (logits, shape) = self.run_plain(parts, feed, Some(NO_GRAPH))?;
            if let Some(captured) = &mut self.captured {
                captured.take_shape(parts, self.batch, shape)?;
            }
            return Ok(logits);
        }
        let captured = self
            .captured
            .as_mut()
            .ok_or(Error::Internal("a step without its buffers"))?;
        captured.step(parts, feed, &mut self.readback, buffers)
    }

    /// Runs without capturing. On a GPU only the newest tokens' logits are copied back.
    fn run_plain(
        &mut self,
        parts: &mut SessionParts<'_>,
        feed: &Feed,
        graph_id: Option<&str>,
    ) -> Result<(Logits, LogitsShape)> {
        let SessionParts {
            gpu,
            session,
            io,
            binding,
        } = parts;
        let device = gpu.map_or(Device::Cpu, |gpu| Device::Cuda(gpu.id()));
        let mask = match (&self.ones, &io.attention_mask) {
            (Some(ones), Some(mask)) => Some((&mask.name, ones.tensor(0, mask.element, &[1, feed.longest()])?)),
            _ => None,
        };
        let inputs = inputs(io, self.batch, feed, mask.is_none())?;
        for (name, value) in &inputs {
            binding.bind_input(*name, value).map_err(ort_error)?;
        }
        if let Some((name, tensor)) = &mask {
            bind_input(binding, name, tensor)?;
        }
        // Bound in every step: its shape changes with S, and a binding keeps the last output.
        binding
            .bind_output_to_device(&io.logits, &device.memory()?)
            .map_err(ort_error)?;
        let options = options(graph_id)?;
        let mut outputs = session.run_binding_with_options(binding, &options).map_err(ort_error)?;
        let logits = outputs.remove(&io.logits).ok_or(Error::NoLogits)?;
        let shape = LogitsShape::of(&logits, self.batch)?;
        let Some(gpu) = gpu else {
            return Ok((newest_rows(&logits, io.logits_type, self.batch)?, shape));
        };
        let tensor = logits.downcast::<DynTensorValueType>().map_err(ort_error)?;
        let read = |at: usize, row: &mut [u8]| Ok(gpu.read_tensor(&tensor, at, row)?);
        let logits = self.readback.newest(io.logits_type, self.batch, &shape, read)?;
        Ok((logits, shape))
    }
}

/// Options of a run with the CUDA graph of a number; `None` where steps are not captured.
pub(crate) fn options(graph_id: Option<&str>) -> Result<RunOptions<NoSelectedOutputs>> {
    let mut options = RunOptions::new().map_err(ort_error)?;
    if let Some(id) = graph_id {
        options.set("gpu_graph_id", id).map_err(ort_error)?;
    }
    Ok(options)
}

/// Size of a tensor in bytes.
fn size(element: TensorElementType, shape: &[usize]) -> Result<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let bytes = elements.and_then(|n| element.byte_size(n));
    bytes.ok_or_else(|| Error::TooLarge {
        what: format!("a tensor of {element}"),
        shape: shape.to_vec(),
    })
}

impl CapturedStep {
    /// The buffers of steps like `feed`, whose graph is to have the number `id`.
    pub(crate) fn new(parts: &SessionParts<'_>, batch: usize, capacity: usize, feed: &Feed, id: usize) -> Result<Self> {
        let io = parts.io;
        let fed = feed.ids.len() / batch;
        let mut next = 0usize;
        let mut take = |bytes: usize| {
            let at = next;
            next = (next + bytes).next_multiple_of(ALIGNMENT);
            at
        };
        let mut place = |input: &TokenInput, tokens: usize| -> Result<_> {
            let shape = input.shape(batch, tokens);
            Ok((take(size(input.element, &shape)?), input.element, shape))
        };
        let ids = place(&io.input_ids, fed)?;
        let positions = io.position_ids.as_ref().map(|p| place(p, fed)).transpose()?;
        let mask = io.attention_mask.as_ref();
        let mask = mask.map(|m| place(m, m.width.unwrap_or(capacity))).transpose()?;
        let budgets_at = take(4 * batch);
        let budgets = io.page_budget.map(|takes| feed.page_budgets(takes).len());
        let buffer = DeviceBuffer::new(parts.gpu, next)?;
        buffer.fill(0, next, 0)?;
        let tensor = |(at, element, shape): (usize, TensorElementType, Vec<usize>)| buffer.tensor(at, element, &shape);
        let host = DeviceBuffer::new(None, 4)?;
        let retro_length_tensor = host.tensor(0, TensorElementType::Int32, &[1])?;
        retro_length_tensor.write(0, &feed.retro_length.to_le_bytes())?;
        Ok(Self {
            id,
            fed,
            retro_length: feed.retro_length,
            ids: tensor(ids)?,
            mask: mask.map(|m| tensor(m).map(|t| (t, vec![0; batch]))).transpose()?,
            positions: positions.map(tensor).transpose()?,
            budgets: budgets
                .map(|n| buffer.tensor(budgets_at, TensorElementType::Int32, &[n]))
                .transpose()?,
            logits: None,
            retro_length_tensor,
            buffer,
            ready: false,
        })
    }

    /// A place for logits of this shape, which only a run tells.
    pub(crate) fn take_shape(&mut self, parts: &SessionParts<'_>, batch: usize, shape: LogitsShape) -> Result<()> {
        let dims = [batch, shape.rows, shape.vocab];
        let size = parts.io.logits_type.byte_size(dims.iter().product());
        let buffer = DeviceBuffer::new(parts.gpu, size.ok_or(Error::LogitsType(parts.io.logits_type))?)?;
        self.logits = Some((buffer.tensor(0, parts.io.logits_type, &dims)?, shape));
        Ok(())
    }

    /// Runs a step: replays its graph, and captures it before if there is none yet. `state` is what it reads and replaces.
    pub(crate) fn step(
        &mut self,
        parts: &mut SessionParts<'_>,
        feed: &Feed,
        readback: &mut LogitsReadback,
        state: &mut (impl ReplacedState + ?Sized),
    ) -> Result<Logits> {
        if !self.ready {
            // To capture a graph ONNX Runtime runs the step twice. The second run would read an output cache in which
            // the newest token has replaced the oldest one: restore the state, and run the step itself after.
            let saved = state.save()?;
            // On the CPU (in tests) nothing is captured: run twice, as a capture does.
            let runs = if parts.gpu.is_some() { 1 } else { 2 };
            let captured = (0..runs).try_for_each(|_| self.run(parts, feed, readback).map(drop));
            let restored = state.restore(&saved);
            captured.map_err(|error| Error::Capture(Box::new(error)))?;
            restored?;
            self.ready = true;
        }
        self.run(parts, feed, readback)
    }

    /// Fills the buffers and replays the graph; the first run captures it.
    fn run(&mut self, parts: &mut SessionParts<'_>, feed: &Feed, readback: &mut LogitsReadback) -> Result<Logits> {
        let batch = feed.lengths.len();
        let SessionParts {
            session, io, binding, ..
        } = parts;
        let input = &io.input_ids;
        let ids = integers::bytes(input.element, feed.ids.iter().copied())?;
        let mut changes = vec![self.ids.part(0, ids)?];
        bind_input(binding, &input.name, &self.ids)?;
        if let Some((input, (mask, ones))) = io.attention_mask.as_ref().zip(self.mask.as_ref()) {
            changes.extend(mask_changes(input, mask, ones, &feed.lengths)?);
            bind_input(binding, &input.name, mask)?;
        }
        if let Some((input, positions)) = io.position_ids.as_ref().zip(self.positions.as_ref()) {
            let bytes = integers::bytes(input.element, input.numbers(feed.positions()).into_iter())?;
            changes.push(positions.part(0, bytes)?);
            bind_input(binding, &input.name, positions)?;
        }
        if io.retro_length {
            bind_input(binding, graph::RETRO_LENGTH, &self.retro_length_tensor)?;
        }
        if let Some((takes, tensor)) = io.page_budget.zip(self.budgets.as_ref()) {
            let numbers = feed.page_budgets(takes);
            changes.push(tensor.part(0, numbers.iter().flat_map(|n| n.to_le_bytes()).collect())?);
            bind_input(binding, graph::PAGE_BUDGET, tensor)?;
        }
        self.buffer.write_all(&changes)?;
        if let Some((_, ones)) = &mut self.mask {
            ones.clone_from(&feed.lengths);
        }
        let (tensor, shape) = self.logits.as_ref().ok_or(Error::Internal("logits without a place"))?;
        bind_output(binding, &io.logits, tensor)?;
        let options = options(Some(&self.id.to_string()))?;
        device_buffers::run(session, binding, &options)?;
        readback.newest(io.logits_type, batch, shape, |at, row| tensor.read(at, row))
    }
}

/// The bytes of a mask `[B, C]` that change when row b has `want[b]` ones instead of `have[b]`.
fn mask_changes(
    input: &TokenInput,
    mask: &DeviceTensor,
    have: &[usize],
    want: &[usize],
) -> Result<Vec<(usize, Vec<u8>)>> {
    let one = size(input.element, &[1])?;
    let capacity = mask.bytes() / one / want.len();
    let change = |(b, (&have, &want)): (usize, (&usize, &usize))| {
        require!(want <= capacity, Error::DoesNotFit { tokens: want, capacity });
        // Usually one more.
        let (from, to) = (have.min(want), have.max(want));
        let value = i64::from(want > have);
        let bytes = integers::bytes(input.element, std::iter::repeat_n(value, to - from))?;
        mask.part(one * (b * capacity + from), bytes)
    };
    have.iter().zip(want).enumerate().map(change).collect()
}
