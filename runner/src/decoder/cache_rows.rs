//! The caches of several sequences in one batch, any of which run together where they lie side by side.
//!
//! B rows, S tokens fed. Each buffer's first dimension is B, so rows that lie side by side are a tensor of their own:
//! a chunk of one prompt and a decoding step of others use the same memory, and nothing is copied when a sequence joins
//! or leaves.
//!
//! Where the model captures steps, those of one shape are captured as CUDA graphs, one for each range of rows and number
//! of retrospective tokens.

use std::{collections::HashMap, ops::Range, sync::Arc};

use ort::session::IoBinding;
use retro_contract::{StateElement, graph};

use crate::{
    decoder::{
        cuda_graph::{CapturedStep, NO_GRAPH, ReplacedState, SessionParts, options},
        device_buffers::{self, DeviceBuffer, DeviceTensor, bind_input, bind_output},
        error::{Error, Result, require},
        inputs::{Feed, inputs},
        kv_cache::Storage,
        logits::{Logits, LogitsReadback, LogitsShape},
        model::Model,
        state_slot::{SlotKind, StateSlot},
    },
    gpu::Gpu,
    runtime::ort_error,
};

/// Tokens that a capacity is rounded up to a multiple of, so that each row's keys and values begin at an aligned place.
const CAPACITY_STEP: usize = 64;

/// The most steps that are captured: each takes memory of the GPU for as long as the model is open.
const MOST_CAPTURED: usize = 64;

/// A model, and the caches of B sequences.
pub struct CacheRows {
    model: Model,
    rows: usize,
    capacity: usize,
    /// The memory of each slot of [`ModelIo::slots`](crate::decoder::io::ModelIo::slots).
    buffers: Vec<DeviceBuffer>,
    /// Bindings of rows that lie side by side, made when they first run together.
    views: HashMap<Range<usize>, View>,
    /// Steps that are captured, by their rows and by the retrospective tokens of each row.
    captured: HashMap<(Range<usize>, i32), CapturedStep>,
    /// Steps that ran as captured.
    captured_steps: u64,
    logits: LogitsPlace,
}

/// A binding of some rows.
struct View {
    binding: IoBinding,
    /// What is bound: the binding must not outlive it.
    _tensors: Vec<DeviceTensor>,
}

/// Where a run puts its logits.
struct LogitsPlace {
    buffer: DeviceBuffer,
    readback: LogitsReadback,
    vocab: usize,
    /// The graph gives the newest token's logits alone.
    newest_alone: bool,
}

impl CacheRows {
    /// Caches for `rows` sequences of up to `capacity` tokens.
    ///
    /// # Errors
    /// When the model's caches grow, its state cannot go back, it is declared for another batch or for fewer tokens, or
    /// memory runs out.
    pub fn new(mut model: Model, rows: usize, capacity: usize) -> Result<Self> {
        require!(model.fixed_capacity, Error::RowsOfGrowing);
        let recurrent = model.io.slots.iter().any(|s| s.kind == SlotKind::Recurrent);
        require!(!recurrent, Error::RowsOfRecurrent);
        require!(!model.keeps_window(), Error::RowsOfWindow);
        if let Some(declared) = model.io.batch {
            return Err(Error::DeclaredBatch { declared, asked: rows });
        }
        let capacity = match model.io.capacity {
            Some(declared) => {
                let asked = capacity;
                require!(asked <= declared, Error::DeclaredCapacity { declared, asked });
                declared
            }
            None => capacity.next_multiple_of(CAPACITY_STEP),
        };
        let logits = LogitsPlace::of(&mut model)?;
        let pages = model.pages(capacity);
        let mut buffers = Vec::with_capacity(model.io.slots.len());
        for slot in &model.io.slots {
            let shape = slot.shape(rows, capacity, pages);
            let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            let bytes = elements.and_then(|n| slot.element.byte_size(n));
            let bytes = bytes.ok_or_else(|| Error::TooLarge {
                what: format!("the buffer {}", slot.past),
                shape,
            })?;
            let buffer = DeviceBuffer::new(model.gpu.as_ref(), bytes)?;
            // Memory of the host is zeros already, and takes room only once it is used.
            if model.gpu.is_some() {
                buffer.fill(0, bytes, 0)?;
            }
            buffers.push(buffer);
        }
        Ok(Self {
            model,
            rows,
            capacity,
            buffers,
            views: HashMap::new(),
            captured: HashMap::new(),
            captured_steps: 0,
            logits,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Tokens that each row holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        self.buffers.iter().map(DeviceBuffer::bytes).sum()
    }

    /// Whether steps of one shape are captured ([`Feed::graph_capturable`]).
    pub(crate) fn captures(&self) -> bool {
        self.model.last_graph.is_some()
    }

    /// Steps so far that ran as captured.
    pub(crate) fn captured_steps(&self) -> u64 {
        self.captured_steps
    }

    /// Runs a step, or a chunk of a prompt, of the sequences in these rows: one of [`Feed::lengths`] each. Returns the
    /// newest tokens' logits, `[rows, vocab]`.
    ///
    /// # Errors
    /// When the feed contradicts itself or ONNX Runtime fails.
    pub fn run(&mut self, rows: Range<usize>, feed: &Feed) -> Result<Logits> {
        require!(rows.end <= self.rows, Error::NoSuchSequence);
        let batch = rows.len();
        let (tokens, lengths) = (feed.ids.len(), feed.lengths.len());
        let whole = batch > 0 && lengths == batch && tokens > 0 && tokens.is_multiple_of(batch);
        require!(whole, Error::Feed { tokens, lengths, batch });
        let (longest, capacity) = (feed.longest(), self.capacity);
        let tokens = longest;
        require!(longest <= capacity, Error::DoesNotFit { tokens, capacity });
        if !self.views.contains_key(&rows) {
            let view = self.view(&rows)?;
            self.views.insert(rows.clone(), view);
        }
        let alike = feed.graph_capturable && feed.retro_lengths.is_none();
        if alike
            && self.captures()
            && let Some(logits) = self.run_captured(&rows, feed)?
        {
            return Ok(logits);
        }
        let no_graph = self.captures().then_some(NO_GRAPH);
        let view = self.views.get_mut(&rows).ok_or(Error::NoSuchSequence)?;
        let Model { session, io, gpu, .. } = &mut self.model;
        for (name, value) in &inputs(io, batch, feed, true)? {
            view.binding.bind_input(*name, value).map_err(ort_error)?;
        }
        let shape = self.logits.shape(feed.ids.len() / batch);
        let tensor = self.logits.tensor(gpu.as_ref(), io.logits_type, batch, &shape)?;
        bind_output(&view.binding, &io.logits, &tensor)?;
        device_buffers::run(session, &view.binding, &options(no_graph)?)?;
        let read = |at: usize, row: &mut [u8]| tensor.read(at, row);
        self.logits.readback.newest(io.logits_type, batch, &shape, read)
    }

    /// Replays the step's CUDA graph; captures it if its shape came before. `None`: it is not captured yet, and is to be
    /// run as any other.
    fn run_captured(&mut self, rows: &Range<usize>, feed: &Feed) -> Result<Option<Logits>> {
        let batch = rows.len();
        let shape = self.logits.shape(feed.ids.len() / batch);
        let view = self.views.get_mut(rows).ok_or(Error::NoSuchSequence)?;
        let Model {
            session,
            io,
            gpu,
            last_graph,
            ..
        } = &mut self.model;
        let io = &*io;
        let mut parts = SessionParts {
            gpu: gpu.as_ref(),
            session,
            io,
            binding: &mut view.binding,
        };
        let key = (rows.clone(), feed.retro_length);
        let Some(step) = self.captured.get_mut(&key) else {
            // The first run of a shape binds what is the same in all of them, and lets memory grow that a capture cannot.
            if let Some(id) = last_graph.as_mut().filter(|_| self.captured.len() < MOST_CAPTURED) {
                *id += 1;
                let mut step = CapturedStep::new(&parts, batch, self.capacity, feed, *id)?;
                step.take_shape(&parts, batch, shape)?;
                self.captured.insert(key, step);
            }
            return Ok(None);
        };
        let mut state = StateOfRows {
            slots: &io.slots,
            buffers: &self.buffers,
            rows: rows.clone(),
            all: self.rows,
        };
        let logits = step.step(&mut parts, feed, &mut self.logits.readback, &mut state)?;
        self.captured_steps += 1;
        Ok(Some(logits))
    }

    /// Gives a row what another holds of its first tokens, for a prefill to go on behind them.
    ///
    /// # Errors
    /// When there is no such row, or a GPU fails.
    pub fn copy(&mut self, from: usize, to: usize, tokens: usize) -> Result<()> {
        require!(from.max(to) < self.rows && from != to, Error::NoSuchSequence);
        let capacity = self.capacity;
        require!(tokens <= capacity, Error::DoesNotFit { tokens, capacity });
        let (pages, used) = (self.model.pages(capacity), self.model.pages(tokens));
        for (slot, buffer) in self.model.io.slots.iter().zip(&self.buffers) {
            let count = match slot.kind {
                SlotKind::Cache => tokens,
                SlotKind::Retro(graph::State::PageSummary) if slot.is_sketch() => {
                    StateElement::Byte.entries(tokens, used)
                }
                SlotKind::Retro(graph::State::PageSummary | graph::State::PageSteps) => used,
                // A prefill closes the window: outputs of before are not read after it.
                SlotKind::Retro(graph::State::Outputs | graph::State::Lse) | SlotKind::Recurrent | SlotKind::Window => {
                    continue;
                }
            };
            let &[_, heads, entries, ..] = slot.shape(self.rows, capacity, pages).as_slice() else {
                continue;
            };
            let row = buffer.bytes() / self.rows;
            let Some(entry) = row.checked_div(heads * entries) else {
                continue;
            };
            for head in 0..heads {
                let at = head * entries * entry;
                buffer.copy(to * row + at, from * row + at, count.min(entries) * entry)?;
            }
        }
        Ok(())
    }

    fn view(&self, rows: &Range<usize>) -> Result<View> {
        let binding = self.model.session.create_binding().map_err(ort_error)?;
        let pages = self.model.pages(self.capacity);
        let mut tensors = Vec::with_capacity(self.buffers.len());
        for (slot, buffer) in self.model.io.slots.iter().zip(&self.buffers) {
            let shape = slot.shape(rows.len(), self.capacity, pages);
            let row = buffer.bytes() / self.rows;
            let tensor = buffer.tensor_at(rows.start * row, slot.element, &shape)?;
            bind_input(&binding, &slot.past, &tensor)?;
            bind_output(&binding, &slot.present, &tensor)?;
            tensors.push(tensor);
        }
        Ok(View {
            binding,
            _tensors: tensors,
        })
    }

    /// The page steps of the first `pages` pages of a row, one KV head after another, of a slot of
    /// [`Model::page_step_slots`]; empty for any other slot.
    pub(crate) fn page_steps(&self, slot: usize, row: usize, pages: usize) -> Result<Vec<Vec<i32>>> {
        let kind = SlotKind::Retro(graph::State::PageSteps);
        let found = self.model.io.slots.get(slot).filter(|s| s.kind == kind);
        let Some((slot, buffer)) = found.zip(self.buffers.get(slot)) else {
            return Ok(Vec::new());
        };
        let shape = slot.shape(self.rows, self.capacity, self.model.pages(self.capacity));
        let &[_, heads, all] = shape.as_slice() else {
            return Ok(Vec::new());
        };
        let head = |h: usize| {
            let mut bytes = vec![0; 4 * pages.min(all)];
            buffer.read(4 * (row * heads + h) * all, &mut bytes)?;
            let steps = bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b));
            Ok(steps.collect())
        };
        (0..heads).map(head).collect()
    }
}

/// What steps of some rows read and replace.
struct StateOfRows<'a> {
    slots: &'a [StateSlot],
    /// Of all rows.
    buffers: &'a [DeviceBuffer],
    rows: Range<usize>,
    all: usize,
}

impl StateOfRows<'_> {
    /// The buffers, with the place of these rows in each.
    fn places(&self) -> impl Iterator<Item = (&DeviceBuffer, usize, usize)> {
        let replaced = self.slots.iter().zip(self.buffers);
        let replaced = replaced.filter(|(slot, _)| slot.kind.is_replaced_by_steps());
        replaced.map(|(_, buffer)| {
            let row = buffer.bytes() / self.all;
            (buffer, self.rows.start * row, self.rows.len() * row)
        })
    }
}

impl ReplacedState for StateOfRows<'_> {
    fn save(&self) -> Result<Vec<Vec<u8>>> {
        let read = |(buffer, at, bytes): (&DeviceBuffer, usize, usize)| {
            let mut saved = vec![0; bytes];
            buffer.read(at, &mut saved)?;
            Ok(saved)
        };
        self.places().map(read).collect()
    }

    fn restore(&mut self, saved: &[Vec<u8>]) -> Result<()> {
        let mut places = self.places().zip(saved);
        places.try_for_each(|((buffer, at, _), bytes)| buffer.write(at, bytes))
    }
}

impl LogitsPlace {
    /// What a graph's logits look like: only a run tells.
    fn of(model: &mut Model) -> Result<Self> {
        let pages = model.retro.as_ref().map_or(1, |r| r.page_size);
        let mut state = model.new_state(1, CAPACITY_STEP.max(pages))?;
        // Two tokens, if the graph takes as many: then the shape shows whether each has logits.
        let fed = model.io.input_ids.width.unwrap_or(2);
        let feed = Feed {
            ids: vec![0; fed],
            lengths: vec![fed],
            retro_length: -1,
            ..Feed::default()
        };
        let no_graph = model.last_graph.map(|_| NO_GRAPH);
        let Model { session, io, gpu, .. } = &mut *model;
        let Storage::InPlace(cache) = state.kv_mut().storage_mut() else {
            return Err(Error::RowsOfGrowing);
        };
        for (name, value) in &inputs(io, 1, &feed, true)? {
            cache.binding.bind_input(*name, value).map_err(ort_error)?;
        }
        let host = ort::memory::Allocator::default().memory_info().to_owned();
        let bound = cache.binding.bind_output_to_device(&io.logits, &host);
        bound.map_err(ort_error)?;
        let outputs = session.run_binding_with_options(&cache.binding, &options(no_graph)?);
        let outputs = outputs.map_err(ort_error)?;
        let logits = outputs.get(&io.logits).ok_or(Error::NoLogits)?;
        let shape = LogitsShape::of(logits, 1)?;
        Ok(Self {
            buffer: DeviceBuffer::new(None, 0)?,
            readback: LogitsReadback::new(gpu.as_ref()),
            vocab: shape.vocab,
            newest_alone: shape.rows < fed,
        })
    }

    /// The shape of the logits of so many tokens a row.
    fn shape(&self, fed: usize) -> LogitsShape {
        LogitsShape {
            rows: if self.newest_alone { 1 } else { fed },
            vocab: self.vocab,
        }
    }

    /// Where a run leaves its logits: where it runs, as only the newest are copied to the host.
    fn tensor(
        &mut self,
        gpu: Option<&Arc<Gpu>>,
        element: ort::value::TensorElementType,
        batch: usize,
        shape: &LogitsShape,
    ) -> Result<DeviceTensor> {
        let dims = [batch, shape.rows, shape.vocab];
        let bytes = element
            .byte_size(dims.iter().product())
            .ok_or(Error::LogitsType(element))?;
        if self.buffer.bytes() < bytes {
            self.buffer = DeviceBuffer::new(gpu, bytes)?;
        }
        self.buffer.tensor(0, element, &dims)
    }
}
