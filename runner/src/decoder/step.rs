//! One run of the session: a decoding step, or a chunk of a prefill.
//!
//! B sequences, S tokens fed, C capacity in tokens.

use std::borrow::Cow;

use ort::{
    memory::Allocator,
    session::{Session, SessionInputValue},
    value::DynValue,
};

use crate::{
    decoder::{
        cuda_graph::{DeviceRunner, SessionParts},
        error::{Error, Result, require},
        inputs::{Feed, inputs},
        io::ModelIo,
        kv_cache::{InPlace, KvCache, Storage},
        logits::{Logits, newest_rows},
        model::Model,
        state_slot::{SlotKind, StateSlot},
    },
    runtime::ort_error,
};

/// The KV cache of a batch of sequences, and the buffers that its steps are fed from. It belongs to one model.
pub struct DecoderState {
    kv: KvCache,
    /// On a GPU, and where steps are captured: feeds them from buffers at fixed addresses.
    runner: Option<DeviceRunner>,
}

impl DecoderState {
    /// The KV cache.
    pub fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// The KV cache, to be cleared, rewound or restored.
    pub fn kv_mut(&mut self) -> &mut KvCache {
        &mut self.kv
    }
}

impl Model {
    /// A state for `batch` sequences of up to `capacity` tokens.
    ///
    /// # Errors
    /// When memory runs out, `batch` exceeds 1 on a model whose caches grow, or the graph is declared for another batch
    /// or for fewer tokens.
    pub fn new_state(&self, batch: usize, capacity: usize) -> Result<DecoderState> {
        require!(batch == 1 || self.fixed_capacity, Error::OneSequence);
        let declared = self.io.batch.unwrap_or(batch);
        require!(declared == batch, Error::DeclaredBatch { declared, asked: batch });
        let most = self.io.capacity.unwrap_or(capacity);
        let too_few = Error::DeclaredCapacity {
            declared: most,
            asked: capacity,
        };
        require!(capacity <= most, too_few);
        // Buffers of declared size have it, whatever capacity is asked for.
        let kv = self.new_cache(batch, most)?;
        let runner = self
            .feeds_from_buffers()
            .then(|| DeviceRunner::new(self.gpu.as_ref(), &self.io, batch, most))
            .transpose()?;
        Ok(DecoderState { kv, runner })
    }

    /// Bytes of the caches and other state that [`Self::new_state`] would allocate; `None`: more than can be counted.
    pub fn state_bytes(&self, batch: usize, capacity: usize) -> Option<usize> {
        let capacity = self.io.capacity.unwrap_or(capacity);
        let pages = self.pages(capacity);
        let bytes = |slot: &StateSlot| {
            let shape = slot.shape(batch, capacity, pages);
            let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
            // State that nodes may read after its successor is written has two buffers.
            let buffers = if slot.kind == SlotKind::Recurrent { 2 } else { 1 };
            slot.element.byte_size(elements)?.checked_mul(buffers)
        };
        let mut slots = self.io.slots.iter();
        slots.try_fold(0usize, |sum, slot| sum.checked_add(bytes(slot)?))
    }

    fn new_cache(&self, batch: usize, capacity: usize) -> Result<KvCache> {
        let allocator = self.device().allocator(&self.session)?;
        if self.fixed_capacity {
            let pages = self.pages(capacity);
            return KvCache::in_place(
                &self.session,
                &self.io.slots,
                &allocator,
                self.gpu.as_ref(),
                batch,
                capacity,
                pages,
            );
        }
        require!(self.gpu.is_none(), Error::GrowingOnGpu);
        KvCache::growing(&self.io.slots, &allocator, batch, capacity)
    }

    /// Runs a step or a chunk of a prompt: updates the caches and the operator's state, returns the newest tokens'
    /// logits, `[B, vocab]`.
    ///
    /// # Errors
    /// When the feed contradicts itself or ONNX Runtime fails.
    pub fn run(&mut self, state: &mut DecoderState, feed: &Feed) -> Result<Logits> {
        let DecoderState { kv, runner } = state;
        check(feed, kv)?;
        let Self {
            session,
            io,
            gpu,
            last_graph,
            ..
        } = self;
        match (kv.storage_mut(), runner) {
            (Storage::InPlace(cache), Some(runner)) => {
                let InPlace { binding, buffers } = &mut **cache;
                let mut parts = SessionParts {
                    gpu: gpu.as_ref(),
                    session,
                    io,
                    binding,
                };
                runner.run(&mut parts, buffers, feed, last_graph)
            }
            (Storage::InPlace(cache), None) => run_in_place(session, io, cache, feed),
            (Storage::Growing { past, .. }, _) => run_growing(session, io, past, feed),
        }
    }
}

fn check(feed: &Feed, kv: &KvCache) -> Result<()> {
    let batch = kv.batch();
    let (tokens, lengths) = (feed.ids.len(), feed.lengths.len());
    let whole = batch > 0 && lengths == batch && tokens > 0 && tokens.is_multiple_of(batch);
    require!(whole, Error::Feed { tokens, lengths, batch });
    let (tokens, capacity) = (feed.longest(), kv.capacity());
    require!(tokens <= capacity, Error::DoesNotFit { tokens, capacity });
    Ok(())
}

/// Runs on caches that are bound as past and as present.
fn run_in_place(session: &mut Session, io: &ModelIo, cache: &mut InPlace, feed: &Feed) -> Result<Logits> {
    let batch = feed.lengths.len();
    let InPlace { binding, buffers } = cache;
    let inputs = inputs(io, batch, feed, true)?;
    for (name, value) in &inputs {
        binding.bind_input(*name, value).map_err(ort_error)?;
    }
    // Bound in every step: its shape changes with S, and a binding keeps the last output.
    let cpu = Allocator::default();
    binding
        .bind_output_to_device(&io.logits, &cpu.memory_info().to_owned())
        .map_err(ort_error)?;
    let outputs = session.run_binding(binding).map_err(ort_error)?;
    let logits = outputs.get(&io.logits).ok_or(Error::NoLogits)?;
    let logits = newest_rows(logits, io.logits_type, batch)?;
    drop(outputs);
    buffers.iter_mut().try_for_each(|b| b.take_turns(binding))?;
    Ok(logits)
}

/// Runs on caches that grow: the outputs are the next inputs.
fn run_growing(session: &mut Session, io: &ModelIo, past: &mut Vec<DynValue>, feed: &Feed) -> Result<Logits> {
    let batch = feed.lengths.len();
    let inputs = inputs(io, batch, feed, true)?;
    let fed = inputs
        .iter()
        .map(|(name, value)| (Cow::from(*name), SessionInputValue::from(value)));
    let past_values = io.slots.iter().zip(past.iter());
    let past_values = past_values.map(|(slot, v)| (Cow::from(slot.past.as_str()), v.into()));
    let all: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = fed.chain(past_values).collect();
    let mut outputs = session.run(all).map_err(ort_error)?;
    let logits = outputs.get(&io.logits).ok_or(Error::NoLogits)?;
    let logits = newest_rows(logits, io.logits_type, batch)?;
    let next: Option<Vec<DynValue>> = io.slots.iter().map(|slot| outputs.remove(&slot.present)).collect();
    drop(outputs);
    let next = next.ok_or(Error::NoPresent)?;
    for (slot, value) in io.slots.iter().zip(&next) {
        keeps_its_size(slot, value)?;
    }
    *past = next;
    Ok(logits)
}

/// Checks that an output has the declared dimensions of its input.
fn keeps_its_size(slot: &StateSlot, value: &DynValue) -> Result<()> {
    let shape = value.dtype().tensor_shape().map(|s| s.to_vec()).unwrap_or_default();
    let fits = |(want, have): (&Option<usize>, &i64)| want.is_none_or(|want| usize::try_from(*have) == Ok(want));
    if shape.len() == slot.dims.len() && slot.dims.iter().zip(&shape).all(fits) {
        return Ok(());
    }
    Err(Error::OutputShape {
        present: slot.present.clone(),
        shape,
        past: slot.past.clone(),
    })
}
