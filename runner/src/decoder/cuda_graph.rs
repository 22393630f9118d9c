//! What a model on a GPU (in tests: on the CPU) is fed from: buffers that stay where they are, so that little crosses to the device and a step can be
//! captured in a CUDA graph.
//!
//! B sequences, S tokens fed, C capacity. In: token ids and, where the graph wants them, positions and budgets. The mask is
//! ones that lie there already. Out: the scores of the newest tokens.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use ort::{
    session::{IoBinding, NoSelectedOutputs, RunOptions, Session},
    value::{DynTensorValueType, TensorElementType},
};
use retro_contract::graph;

use crate::{
    Device,
    decoder::{
        device_buffers::{ALIGNMENT, DeviceBuffer, DeviceTensor, bind_input, bind_output},
        integers,
        io::{BudgetInput, ModelIo, TokenInput},
        kv_cache::Buffer,
        logits::LogitsReadback,
        model::{Feed, Logits, LogitsShape, inputs, last_rows, logits_shape},
    },
    gpu::Gpu,
    runtime::one_line,
};

/// Of one state; bound to its binding.
pub(crate) struct DeviceRunner {
    batch: usize,
    capacity: usize,
    /// For sequences of one length: ones `[C]`, of which a step is shown as many as tokens are valid.
    ones: Option<DeviceBuffer>,
    readback: LogitsReadback,
    captured: Option<CapturedStep>,
}

/// Buffers whose addresses a CUDA graph knows.
struct CapturedStep {
    id: usize,
    /// Tokens fed and how many of them are retrospective: another step needs another graph.
    fed: usize,
    retro_length: i32,
    /// The block in which ids, mask, positions and budgets lie.
    buffer: DeviceBuffer,
    ids: DeviceTensor,
    /// The mask `[B, C]`, and how many ones each row has.
    mask: Option<(DeviceTensor, Vec<usize>)>,
    positions: Option<DeviceTensor>,
    budgets: Option<DeviceTensor>,
    /// Rows are known after a run that was not captured.
    logits: Option<(DeviceTensor, LogitsShape)>,
    retro: DeviceTensor,
    /// The graph exists.
    ready: bool,
}

impl DeviceRunner {
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

    /// Runs a step or a chunk of a prompt.
    #[allow(
        clippy::too_many_arguments,
        reason = "the parts of a model and of a state, which borrow apart"
    )]
    pub(crate) fn run(
        &mut self,
        gpu: Option<&Arc<Gpu>>,
        session: &mut Session,
        io: &ModelIo,
        binding: &mut IoBinding,
        buffers: &mut [Buffer],
        feed: &Feed,
        graphs: &mut Option<usize>,
    ) -> Result<Logits> {
        let logits = self.step(gpu, session, io, binding, buffers, feed, graphs)?;
        buffers.iter_mut().try_for_each(Buffer::carry)?;
        Ok(logits)
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "the parts of a model and of a state, which borrow apart"
    )]
    fn step(
        &mut self,
        gpu: Option<&Arc<Gpu>>,
        session: &mut Session,
        io: &ModelIo,
        binding: &mut IoBinding,
        buffers: &mut [Buffer],
        feed: &Feed,
        graphs: &mut Option<usize>,
    ) -> Result<Logits> {
        let fed = feed.ids.len() / self.batch;
        let Some(number) = graphs else {
            return self.run_once(gpu, session, io, binding, feed, None);
        };
        if !feed.graph_capturable {
            return self.run_once(gpu, session, io, binding, feed, Some("-1"));
        }
        let known = self.captured.as_ref();
        if known.is_none_or(|c| c.fed != fed || c.retro_length != feed.retro_length) {
            *number += 1;
            self.captured = Some(CapturedStep::new(
                gpu,
                io,
                self.batch,
                self.capacity,
                fed,
                feed,
                *number,
            )?);
        }
        // The shape of the logits is the graph's to say: the first capturable step is an ordinary one.
        if self.captured.as_ref().is_some_and(|c| c.logits.is_none()) {
            let (logits, shape) = self.run_shaped(gpu, session, io, binding, feed, Some("-1"))?;
            if let Some(captured) = &mut self.captured {
                captured.take_shape(gpu, io, self.batch, shape)?;
            }
            return Ok(logits);
        }
        let captured = self.captured.as_mut().context("set above")?;
        if !captured.ready {
            // To capture a graph ONNX Runtime runs it once as it is and once more as what was captured. The second time the
            // oldest token's place in the output cache is the newest one's already: go back, and do the step itself after.
            let memory = buffers.iter().filter(|b| b.is_memory_of_steps()).map(Buffer::to_vec);
            let memory = memory.collect::<Result<Vec<_>>>()?;
            // Where nothing is captured (in tests on the CPU) a second run makes up for it.
            for _ in 0..if gpu.is_some() { 1 } else { 2 } {
                captured.run(session, io, binding, feed, &mut self.readback)?;
            }
            let buffers = buffers.iter_mut().filter(|b| b.is_memory_of_steps());
            buffers
                .zip(&memory)
                .try_for_each(|(buffer, bytes)| buffer.load(bytes))?;
            captured.ready = true;
        }
        captured.run(session, io, binding, feed, &mut self.readback)
    }

    fn run_once(
        &mut self,
        gpu: Option<&Arc<Gpu>>,
        session: &mut Session,
        io: &ModelIo,
        binding: &mut IoBinding,
        feed: &Feed,
        graph_id: Option<&str>,
    ) -> Result<Logits> {
        self.run_shaped(gpu, session, io, binding, feed, graph_id)
            .map(|(logits, _)| logits)
    }

    /// Not captured: the logits stay on the GPU but for the newest tokens'.
    fn run_shaped(
        &mut self,
        gpu: Option<&Arc<Gpu>>,
        session: &mut Session,
        io: &ModelIo,
        binding: &mut IoBinding,
        feed: &Feed,
        graph_id: Option<&str>,
    ) -> Result<(Logits, LogitsShape)> {
        let error = |e: ort::Error| anyhow!("{}", one_line(&e));
        let device = gpu.map_or(Device::Cpu, |gpu| Device::Cuda(gpu.id()));
        let longest = feed.lengths.iter().copied().max().unwrap_or(0);
        let mask = match (&self.ones, &io.attention_mask) {
            (Some(ones), Some(mask)) => Some((&mask.name, ones.tensor(0, mask.element, &[1, longest])?)),
            _ => None,
        };
        let inputs = inputs(io, self.batch, longest, feed, mask.is_none())?;
        for (name, value) in &inputs {
            binding.bind_input(*name, value).map_err(error)?;
        }
        if let Some((name, view)) = &mask {
            bind_input(binding, name, view)?;
        }
        // Bound anew each time: its shape changes with S, and a binding remembers the last output.
        binding
            .bind_output_to_device(&io.logits, &device.memory()?)
            .map_err(error)?;
        let options = options(graph_id)?;
        let mut outputs = session.run_binding_with_options(binding, &options).map_err(error)?;
        let logits = outputs.remove(&io.logits).context("the graph gave no logits")?;
        let shape = logits_shape(&logits, self.batch)?;
        let Some(gpu) = gpu else {
            return Ok((last_rows(&logits, io.logits_type, self.batch)?, shape));
        };
        let tensor = logits.downcast::<DynTensorValueType>().map_err(error)?;
        let read = |at: usize, row: &mut [u8]| gpu.read_tensor(&tensor, at, row);
        let logits = self.readback.newest(io.logits_type, self.batch, &shape, read)?;
        Ok((logits, shape))
    }
}

fn options(graph_id: Option<&str>) -> Result<RunOptions<NoSelectedOutputs>> {
    let mut options = RunOptions::new().map_err(|e| anyhow!("{}", one_line(&e)))?;
    if let Some(id) = graph_id {
        options
            .set("gpu_graph_id", id)
            .map_err(|e| anyhow!("{}", one_line(&e)))?;
    }
    Ok(options)
}

/// Bytes of a tensor.
fn size(element: TensorElementType, shape: &[usize]) -> Result<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let bytes = elements.and_then(|n| element.byte_size(n));
    bytes.with_context(|| format!("a tensor of {element} {shape:?} is too large"))
}

impl CapturedStep {
    fn new(
        gpu: Option<&Arc<Gpu>>,
        io: &ModelIo,
        batch: usize,
        capacity: usize,
        fed: usize,
        feed: &Feed,
        id: usize,
    ) -> Result<Self> {
        let mut next = 0usize;
        let mut take = |bytes: usize| {
            let at = next;
            next = (next + bytes).next_multiple_of(ALIGNMENT);
            at
        };
        let budgets = io.page_budget.map(|b| match b {
            BudgetInput::PerBatch => 1,
            BudgetInput::PerSequence => batch,
        });
        let mut place = |input: &TokenInput, tokens: usize| -> Result<_> {
            let shape = input.shape(batch, tokens);
            Ok((take(size(input.element, &shape)?), input.element, shape))
        };
        let ids = place(&io.input_ids, fed)?;
        let positions = io.position_ids.as_ref().map(|p| place(p, fed)).transpose()?;
        let mask = io.attention_mask.as_ref();
        let mask = mask.map(|m| place(m, m.width.unwrap_or(capacity))).transpose()?;
        let budgets_at = take(4 * batch);
        let buffer = DeviceBuffer::new(gpu, next)?;
        buffer.fill(0, next, 0)?;
        let view = |(at, element, shape): (usize, TensorElementType, Vec<usize>)| buffer.tensor(at, element, &shape);
        let host = DeviceBuffer::new(None, 4)?;
        let retro = host.tensor(0, TensorElementType::Int32, &[1])?;
        retro.write(0, &feed.retro_length.to_le_bytes())?;
        Ok(Self {
            id,
            fed,
            retro_length: feed.retro_length,
            ids: view(ids)?,
            mask: mask.map(|m| view(m).map(|v| (v, vec![0; batch]))).transpose()?,
            positions: positions.map(view).transpose()?,
            budgets: budgets
                .map(|n| buffer.tensor(budgets_at, TensorElementType::Int32, &[n]))
                .transpose()?,
            logits: None,
            retro,
            buffer,
            ready: false,
        })
    }

    fn take_shape(&mut self, gpu: Option<&Arc<Gpu>>, io: &ModelIo, batch: usize, shape: LogitsShape) -> Result<()> {
        let dims = [batch, shape.rows, shape.vocab];
        let size = io.logits_type.byte_size(dims.iter().product());
        let buffer = DeviceBuffer::new(gpu, size.context("logits of no size")?)?;
        self.logits = Some((buffer.tensor(0, io.logits_type, &dims)?, shape));
        Ok(())
    }

    /// Feeds the buffers and replays the graph, which the first time is captured.
    fn run(
        &mut self,
        session: &mut Session,
        io: &ModelIo,
        binding: &mut IoBinding,
        feed: &Feed,
        readback: &mut LogitsReadback,
    ) -> Result<Logits> {
        let batch = feed.lengths.len();
        let input = &io.input_ids;
        let ids = integers::bytes(input.element, feed.ids.iter().copied())?;
        let mut parts = vec![self.ids.part(0, ids)?];
        bind_input(binding, &input.name, &self.ids)?;
        if let Some((input, (mask, ones))) = io.attention_mask.as_ref().zip(self.mask.as_ref()) {
            let one = size(input.element, &[1])?;
            let capacity = mask.bytes() / one / batch;
            for (b, (&have, &want)) in ones.iter().zip(&feed.lengths).enumerate() {
                ensure!(want <= capacity, "{want} tokens do not fit a cache of {capacity}");
                // Usually one more.
                let (from, to) = (have.min(want), have.max(want));
                let value = i64::from(want > have);
                let change = integers::bytes(input.element, std::iter::repeat_n(value, to - from))?;
                parts.push(mask.part(one * (b * capacity + from), change)?);
            }
            bind_input(binding, &input.name, mask)?;
        }
        if let Some((input, positions)) = io.position_ids.as_ref().zip(self.positions.as_ref()) {
            let row = |&n: &usize| (0..self.fed).map(move |i| (n + i) as i64);
            let fed = self.fed as i64;
            let of_all = feed.lengths.iter().flat_map(row).map(|p| p - fed).collect();
            let bytes = integers::bytes(input.element, input.numbers(of_all).into_iter())?;
            parts.push(positions.part(0, bytes)?);
            bind_input(binding, &input.name, positions)?;
        }
        if io.retro_length {
            bind_input(binding, graph::RETRO_LENGTH, &self.retro)?;
        }
        if let Some(view) = &self.budgets {
            // 0: as the operator's attributes say.
            let asked = feed.budgets.clone().unwrap_or_else(|| vec![0; batch]);
            let one = asked.iter().copied().max().unwrap_or(0);
            let numbers = if view.bytes() == 4 { vec![one] } else { asked };
            parts.push(view.part(0, numbers.iter().flat_map(|n| n.to_le_bytes()).collect())?);
            bind_input(binding, graph::PAGE_BUDGET, view)?;
        }
        self.buffer.write_all(&parts)?;
        if let Some((_, ones)) = &mut self.mask {
            ones.clone_from(&feed.lengths);
        }
        let (view, shape) = self.logits.as_ref().context("logits without a place")?;
        bind_output(binding, &io.logits, view)?;
        let options = options(Some(&self.id.to_string()))?;
        crate::decoder::device_buffers::run(session, binding, &options)?;
        readback.newest(io.logits_type, batch, shape, |at, row| view.read(at, row))
    }
}
