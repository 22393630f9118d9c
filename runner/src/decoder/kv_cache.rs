//! The KV cache of a batch of sequences, with the operator's state and that of convolutions and recurrent layers.
//!
//! B batch, C capacity in tokens, P pages. Every buffer's first dimension is B, so a sequence is one contiguous run of
//! each.

use std::{borrow::Cow, sync::Arc};

use ort::{
    memory::Allocator,
    session::{IoBinding, Session},
    value::{DynTensor, DynValue, TensorElementType},
};
use retro_contract::graph;

use crate::{
    decoder::{
        error::{Error, Result, require},
        state_slot::{SlotKind, StateSlot},
    },
    gpu::Gpu,
    huge_pages,
    runtime::ort_error,
};

/// Keys, values and other state of a batch.
pub struct KvCache {
    batch: usize,
    capacity: usize,
    storage: Storage,
}

pub(crate) enum Storage {
    InPlace(Box<InPlace>),
    /// The outputs of the last run, in the order of the model's slots.
    Growing {
        past: Vec<DynValue>,
        kinds: Vec<SlotKind>,
    },
}

/// Buffers of fixed capacity, each bound as past and as present: updated in place.
pub(crate) struct InPlace {
    pub(crate) binding: IoBinding,
    pub(crate) buffers: Vec<StateBuffer>,
}

/// The memory of one past/present pair.
pub(crate) struct StateBuffer {
    tensor: DynTensor,
    /// A second tensor for the present, for state that nodes may still read after another has written it.
    next: Option<NextBuffer>,
    kind: SlotKind,
    bytes: usize,
    /// Where the tensor lies, if not on the host.
    gpu: Option<Arc<Gpu>>,
}

struct NextBuffer {
    tensor: DynTensor,
    past: String,
    present: String,
}

/// What going back needs beside a shorter length, for [`KvCache::restore`]: a copy of the page steps and of the state of
/// convolutions and recurrent layers, by slot.
pub struct Snapshot(Vec<Option<Vec<u8>>>);

impl KvCache {
    /// Caches that grow with every step, empty at first.
    pub(crate) fn growing(slots: &[StateSlot], allocator: &Allocator, batch: usize, capacity: usize) -> Result<Self> {
        let empty = |slot: &StateSlot| -> Result<DynValue> {
            let tensor = DynTensor::new(allocator, slot.element, dims(&slot.shape(batch, 0, 0)));
            Ok(tensor.map_err(ort_error)?.into_dyn())
        };
        let past = slots.iter().map(empty).collect::<Result<_>>()?;
        let kinds = slots.iter().map(|s| s.kind).collect();
        Ok(Self {
            batch,
            capacity,
            storage: Storage::Growing { past, kinds },
        })
    }

    /// Caches of fixed capacity, bound to a session's inputs and outputs.
    pub(crate) fn in_place(
        session: &Session,
        slots: &[StateSlot],
        allocator: &Allocator,
        gpu: Option<&Arc<Gpu>>,
        batch: usize,
        capacity: usize,
        pages: usize,
    ) -> Result<Self> {
        let mut binding = session.create_binding().map_err(ort_error)?;
        let mut buffers = Vec::with_capacity(slots.len());
        for slot in slots {
            let shape = slot.shape(batch, capacity, pages);
            buffers.push(StateBuffer::bound(slot, &shape, allocator, gpu, &mut binding)?);
        }
        Ok(Self {
            batch,
            capacity,
            storage: Storage::InPlace(Box::new(InPlace { binding, buffers })),
        })
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Capacity of a sequence in tokens.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn storage_mut(&mut self) -> &mut Storage {
        &mut self.storage
    }

    fn buffers(&self) -> &[StateBuffer] {
        match &self.storage {
            Storage::InPlace(bound) => &bound.buffers,
            Storage::Growing { .. } => &[],
        }
    }

    /// Resets all buffers: zeros, and page steps of -1 (no page was ever loaded).
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn clear(&mut self) -> Result<()> {
        match &mut self.storage {
            Storage::InPlace(bound) => bound.buffers.iter_mut().try_for_each(StateBuffer::clear),
            // Growing caches are reset by making a new state.
            Storage::Growing { .. } => Ok(()),
        }
    }

    /// Bytes of keys and values, and bytes of other state.
    pub fn sizes(&self) -> (usize, usize) {
        let sum = |cache: bool| {
            self.buffers()
                .iter()
                .filter(|b| (b.kind == SlotKind::Cache) == cache)
                .map(|b| b.bytes)
                .sum()
        };
        match &self.storage {
            Storage::InPlace(_) => (sum(true), sum(false)),
            Storage::Growing { past, kinds } => {
                let bytes = |v: &DynValue| {
                    let elements = v.dtype().tensor_shape().map_or(0, |s| s.num_elements());
                    v.dtype().tensor_type().and_then(|t| t.byte_size(elements)).unwrap_or(0)
                };
                let sum = |cache: bool| {
                    let of_kind = past
                        .iter()
                        .zip(kinds)
                        .filter(|(_, k)| (**k == SlotKind::Cache) == cache);
                    of_kind.map(|(v, _)| bytes(v)).sum()
                };
                (sum(true), sum(false))
            }
        }
    }

    /// Copies one sequence of `from`, a cache of the same model and capacity, over one of this cache.
    ///
    /// # Errors
    /// When the two differ in layout, a row does not exist, or the caches grow.
    pub fn copy_row(&mut self, row: usize, from: &KvCache, from_row: usize) -> Result<()> {
        require!(row < self.batch && from_row < from.batch, Error::NoSuchSequence);
        let (batch, from_batch) = (self.batch, from.batch);
        let Storage::InPlace(bound) = &mut self.storage else {
            return Err(Error::Growing("cannot be copied"));
        };
        require!(
            bound.buffers.len() == from.buffers().len(),
            Error::OtherModel("state to copy is")
        );
        for (to, from) in bound.buffers.iter_mut().zip(from.buffers()) {
            let size = to.bytes / batch;
            require!(size == from.bytes / from_batch, Error::OtherCapacity("states differ"));
            if let Some(gpu) = to.gpu.clone() {
                gpu.tensor(&mut to.tensor)?
                    .copy_tensor(row * size, &from.tensor, from_row * size, size)?;
                continue;
            }
            let source = from.bytes().get(from_row * size..(from_row + 1) * size);
            let target = to.bytes_mut().get_mut(row * size..(row + 1) * size);
            let (target, source) = target
                .zip(source)
                .ok_or(Error::Internal("a state buffer is too short"))?;
            target.copy_from_slice(source);
        }
        Ok(())
    }

    /// The way back to the tokens that the cache holds now, for [`Self::restore`]. Rows of tokens and pages are not
    /// copied: what is decoded after these tokens leaves them alone, and each row behind them is written before it is
    /// read.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let copied = |b: &StateBuffer| {
            let kinds = [
                SlotKind::Recurrent,
                SlotKind::Window,
                SlotKind::Retro(graph::State::PageSteps),
            ];
            kinds.contains(&b.kind)
        };
        let copies = self.buffers().iter().map(|b| copied(b).then(|| b.to_vec()).transpose());
        copies.collect::<Result<_>>().map(Snapshot)
    }

    /// A copy of what the buffer of a slot holds, `slot` counted as in [`ModelIo::slots`](super::io::ModelIo::slots).
    ///
    /// # Errors
    /// When the caches grow, there is no such slot, or a GPU fails.
    pub fn contents(&self, slot: usize) -> Result<Vec<u8>> {
        let no_slot = Error::Internal("no such slot, or caches that grow");
        self.buffers().get(slot).ok_or(no_slot)?.to_vec()
    }

    /// The buffers, to be filled by other means than a step.
    ///
    /// # Errors
    /// When the caches grow.
    pub(crate) fn buffers_mut(&mut self) -> Result<&mut [StateBuffer]> {
        match &mut self.storage {
            Storage::InPlace(cache) => Ok(&mut cache.buffers),
            Storage::Growing { .. } => Err(Error::Growing("cannot be filled")),
        }
    }

    /// Whether feeding shorter lengths goes back to fewer tokens. Caches that grow keep what they hold, and state of
    /// convolutions and recurrent layers has no way back: a state begins anew then.
    pub fn can_go_back(&self) -> bool {
        match &self.storage {
            Storage::InPlace(bound) => bound.buffers.iter().all(|b| b.kind != SlotKind::Recurrent),
            Storage::Growing { .. } => false,
        }
    }

    /// Goes back to the first `depth` tokens, as after a prefill. Rows after them are stale, and each is written before
    /// it is read. State of convolutions and recurrent layers cannot go back and is zeroed: fit for benchmarks, not for
    /// text.
    ///
    /// # Errors
    /// When `depth` exceeds the capacity, the caches grow, or a GPU fails.
    pub fn rewind(&mut self, depth: usize) -> Result<()> {
        let does_not_fit = Error::DoesNotFit {
            tokens: depth,
            capacity: self.capacity,
        };
        require!(depth <= self.capacity, does_not_fit);
        let Storage::InPlace(bound) = &mut self.storage else {
            return Err(Error::Growing("cannot be rewound"));
        };
        let newest = (i32::try_from(depth).map_err(|_| does_not_fit)? - 1)
            .to_le_bytes()
            .repeat(1024);
        bound.buffers.iter_mut().try_for_each(|b| match b.kind {
            SlotKind::Retro(graph::State::PageSteps) => b.tile(&newest),
            SlotKind::Recurrent | SlotKind::Window => b.clear(),
            _ => Ok(()),
        })
    }

    /// Goes back to the tokens of a snapshot of this cache, which holds them and others after them.
    ///
    /// # Errors
    /// When the snapshot is of another layout.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let Storage::InPlace(bound) = &mut self.storage else {
            return Err(Error::Growing("have no snapshots"));
        };
        require!(
            bound.buffers.len() == snapshot.0.len(),
            Error::OtherModel("snapshot is")
        );
        for (buffer, bytes) in bound.buffers.iter_mut().zip(&snapshot.0) {
            let Some(bytes) = bytes else { continue };
            require!(buffer.bytes == bytes.len(), Error::OtherCapacity("snapshot differs"));
            buffer.load(bytes)?;
        }
        Ok(())
    }

    /// Page steps of a slot and their shape `[B, Hkv, P]`; `None` if the slot holds something else.
    pub(crate) fn page_steps(&self, slot: usize) -> Option<(Cow<'_, [i32]>, [usize; 3])> {
        let buffer = self
            .buffers()
            .get(slot)
            .filter(|b| b.kind == SlotKind::Retro(graph::State::PageSteps))?;
        let &[b, heads, pages] = &buffer.tensor.shape()[..] else {
            return None;
        };
        let data = match &buffer.gpu {
            Some(_) => {
                let bytes = buffer.to_vec().ok()?;
                let steps = bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b));
                Cow::Owned(steps.collect())
            }
            None => Cow::Borrowed(buffer.tensor.try_extract_tensor::<i32>().ok()?.1),
        };
        Some((
            data,
            [
                usize::try_from(b).ok()?,
                usize::try_from(heads).ok()?,
                usize::try_from(pages).ok()?,
            ],
        ))
    }
}

fn dims(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&d| d as i64).collect()
}

impl StateBuffer {
    /// Allocates the buffer of a slot and binds it as past and as present.
    fn bound(
        slot: &StateSlot,
        shape: &[usize],
        allocator: &Allocator,
        gpu: Option<&Arc<Gpu>>,
        binding: &mut IoBinding,
    ) -> Result<Self> {
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bytes = elements.and_then(|n| slot.element.byte_size(n));
        let bytes = bytes.ok_or_else(|| Error::TooLarge {
            what: format!("the buffer {}", slot.past),
            shape: shape.to_vec(),
        })?;
        let allocate = || {
            // `new` zeroes the memory of the host, and only that.
            DynTensor::new(allocator, slot.element, dims(shape)).map_err(|e| Error::NoMemory {
                what: slot.past.clone(),
                shape: shape.to_vec(),
                error: ort_error(e),
            })
        };
        let mut tensor = allocate()?;
        // The operator and GroupQueryAttention update caches in place; other nodes may not.
        let mut next = None;
        if slot.kind == SlotKind::Recurrent {
            next = Some(NextBuffer {
                tensor: allocate()?,
                past: slot.past.clone(),
                present: slot.present.clone(),
            });
        }
        binding.bind_input(&slot.past, &tensor).map_err(ort_error)?;
        let output = next.as_mut().map_or(&mut tensor, |next| &mut next.tensor);
        binding.bind_output(&slot.present, output).map_err(ort_error)?;
        let mut buffer = Self {
            tensor,
            next,
            kind: slot.kind,
            bytes,
            gpu: gpu.cloned(),
        };
        // Empty for a buffer on a GPU.
        huge_pages::advise(buffer.bytes_mut());
        if buffer.counts_from_minus_one() || buffer.gpu.is_some() {
            buffer.clear()?;
        }
        Ok(buffer)
    }

    pub(crate) fn kind(&self) -> SlotKind {
        self.kind
    }

    pub(crate) fn element(&self) -> TensorElementType {
        *self.tensor.data_type()
    }

    /// Page steps start at -1: no page was ever loaded.
    fn counts_from_minus_one(&self) -> bool {
        self.kind == SlotKind::Retro(graph::State::PageSteps)
    }

    /// Zeros; -1 for page steps.
    pub(crate) fn clear(&mut self) -> Result<()> {
        // All bits set is the int32 -1.
        let value = if self.counts_from_minus_one() { 0xff } else { 0 };
        match self.gpu.clone() {
            Some(gpu) => Ok(gpu.tensor(&mut self.tensor)?.fill(0, self.bytes, value)?),
            None => {
                self.bytes_mut().fill(value);
                Ok(())
            }
        }
    }

    /// Repeats a pattern over the whole buffer.
    pub(crate) fn tile(&mut self, pattern: &[u8]) -> Result<()> {
        let total = self.bytes;
        let first = pattern.get(..total.min(pattern.len())).unwrap_or(&[]);
        require!(total == 0 || !first.is_empty(), Error::Internal("an empty pattern"));
        match self.gpu.clone() {
            Some(gpu) => {
                let mut region = gpu.tensor(&mut self.tensor)?;
                region.write(0, first)?;
                let mut done = first.len();
                while done < total {
                    // Doubles what is there, so that patterns stay whole.
                    let count = done.min(total - done);
                    region.copy_inside(done, 0, count)?;
                    done += count;
                }
            }
            None => {
                for part in self.bytes_mut().chunks_mut(first.len().max(1)) {
                    part.copy_from_slice(first.get(..part.len()).unwrap_or(&[]));
                }
            }
        }
        Ok(())
    }

    /// After a run: swaps the two tensors in the binding, so that the next run reads what this one wrote.
    pub(crate) fn take_turns(&mut self, binding: &mut IoBinding) -> Result<()> {
        let Some(next) = &mut self.next else { return Ok(()) };
        std::mem::swap(&mut self.tensor, &mut next.tensor);
        let bound = binding.bind_input(&next.past, &self.tensor);
        let bound = bound.and_then(|()| binding.bind_output(&next.present, &mut next.tensor));
        Ok(bound.map_err(ort_error)?)
    }

    /// As [`Self::take_turns`], by a copy: the addresses in a CUDA graph are fixed.
    pub(crate) fn carry(&mut self) -> Result<()> {
        let Some(next) = &mut self.next else { return Ok(()) };
        if let Some(gpu) = self.gpu.clone() {
            let mut region = gpu.tensor(&mut self.tensor)?;
            return Ok(region.copy_tensor(0, &next.tensor, 0, self.bytes)?);
        }
        if self.bytes > 0 {
            // SAFETY: two tensors on the host, of `bytes` bytes each by one shape and type; both are borrowed
            // exclusively, and nothing runs on them.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    next.tensor.data_ptr().cast::<u8>(),
                    self.tensor.data_ptr_mut().cast::<u8>(),
                    self.bytes,
                );
            }
        }
        Ok(())
    }

    /// Replaces the contents by `bytes`, of the same size.
    pub(crate) fn load(&mut self, bytes: &[u8]) -> Result<()> {
        match self.gpu.clone() {
            Some(gpu) => Ok(gpu.tensor(&mut self.tensor)?.write(0, bytes)?),
            None => {
                self.bytes_mut().copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    pub(crate) fn to_vec(&self) -> Result<Vec<u8>> {
        let Some(gpu) = &self.gpu else {
            return Ok(self.bytes().to_vec());
        };
        let mut bytes = vec![0; self.bytes];
        gpu.read_tensor(&self.tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// The contents of a buffer on the host; empty for one on a GPU.
    fn bytes(&self) -> &[u8] {
        if self.bytes == 0 || self.gpu.is_some() {
            return &[];
        }
        // SAFETY: the tensor owns `bytes` initialised bytes of CPU memory for as long as it lives, and nothing writes
        // them during this borrow: ONNX Runtime writes only inside `Model::run`, which borrows the cache mutably.
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr().cast::<u8>(), self.bytes) }
    }

    /// As [`Self::bytes`], mutable.
    fn bytes_mut(&mut self) -> &mut [u8] {
        if self.bytes == 0 || self.gpu.is_some() {
            return &mut [];
        }
        // SAFETY: as in `bytes`; the borrow is exclusive, and the binding's own handle on the tensor only reads or
        // writes inside `Model::run`.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr_mut().cast::<u8>(), self.bytes) }
    }
}
