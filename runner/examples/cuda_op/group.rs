//! A context and batch: its tensors, bound to sessions.

use anyhow::Result;
use ort::{session::Session, value::TensorElementType};
use retro_contract::{Budget, limits, pages_for, ring_slots};
use retro_run::{
    bench::synthetic_cache::state_type,
    decoder::device_buffers::{DeviceBindings, DeviceBuffer, DeviceTensor},
};

use crate::{
    common::fill,
    graph::{self, Feeding, NodeKind, of_layer},
    host::Host,
    layout::MemoryLayout,
};

pub struct Group<'a> {
    pub host: &'a Host<'a>,
    pub buffer: &'a DeviceBuffer,
    pub layout: MemoryLayout,
}

impl Group<'_> {
    /// Pages that a budget loads.
    pub fn pages_of(&self, budget: Option<Budget>) -> usize {
        let (context, page) = (self.layout.context, self.host.shape.page);
        budget.map_or(pages_for(context, page), |b| {
            b.pages(limits::BUDGET_MIN_PAGES, context, page)
        })
    }

    /// Fills what an earlier group may have overwritten: rows fed, RoPE's angles and output caches.
    pub fn refill(&self) -> Result<()> {
        let (layout, dtype) = (&self.layout, self.host.shape.dtype);
        fill::normals(self.buffer, layout.bank, layout.output - layout.bank, dtype)?;
        fill::normals(
            self.buffer,
            layout.rotary[0],
            layout.state[0][0] - layout.rotary[0],
            dtype,
        )?;
        for state in &layout.state {
            self.buffer.fill(state[2], state[3] - state[2], 0)?;
        }
        Ok(())
    }

    pub fn set_lengths(&self, last: i32) -> Result<()> {
        let lengths = ints(&vec![last; self.layout.batch]);
        Ok(self.buffer.write(self.layout.lengths, &lengths)?)
    }

    pub fn set_budget(&self, pages: i32) -> Result<()> {
        let budgets = ints(&vec![pages; self.layout.batch]);
        Ok(self.buffer.write(self.layout.budget, &budgets)?)
    }

    /// A tensor of the model's type.
    pub fn tensor(&self, offset: usize, shape: &[usize]) -> Result<DeviceTensor> {
        Ok(self.buffer.tensor(offset, self.host.args.dtype.element(), shape)?)
    }

    /// An int32 per sequence.
    fn numbers(&self, offset: usize) -> Result<DeviceTensor> {
        let shape = [self.layout.batch];
        Ok(self.buffer.tensor(offset, TensorElementType::Int32, &shape)?)
    }

    /// Binds all inputs and outputs of a session of this kind; the returned tensors belong to these bindings alone.
    pub fn bind(
        &self,
        session: &Session,
        kind: NodeKind,
        feeding: Feeding,
        tokens: usize,
        total: usize,
    ) -> Result<(DeviceBindings, Vec<DeviceTensor>)> {
        let (s, layout) = (&self.host.shape, &self.layout);
        let mut bindings = DeviceBindings::new(session)?;
        self.bind_state(kind, &mut bindings)?;
        match feeding {
            Feeding::Direct => {
                bindings.input("qkv", &self.tensor(layout.bank, &[layout.batch, tokens, s.packed()])?)?;
                bindings.input("seqlens_k", &self.numbers(layout.lengths)?)?;
            }
            Feeding::Steps => self.bind_steps(tokens, &mut bindings)?,
        }
        let output = self.tensor(layout.output, &[layout.batch, tokens, s.heads * s.size])?;
        for layer in 0..s.layers {
            bindings.output(&of_layer("output", layer), &output)?;
        }
        let mut own = vec![host_int(total as i32)?];
        bindings.input("total_sequence_length", &own[0])?;
        if kind != NodeKind::Gqa {
            own.push(host_int(match feeding {
                Feeding::Direct => -1,
                Feeding::Steps => tokens as i32 - 1,
            })?);
            bindings.input("retro_length", &own[1])?;
            bindings.input("page_budget", &self.numbers(layout.budget)?)?;
        }
        Ok((bindings, own))
    }

    /// Binds a session without attention nodes: the counter and the picking of rows.
    pub fn bind_overhead(&self, session: &Session) -> Result<(DeviceBindings, DeviceTensor)> {
        let (packed, layout) = (self.host.shape.packed(), &self.layout);
        let mut bindings = DeviceBindings::new(session)?;
        self.bind_steps(1, &mut bindings)?;
        bindings.output("qkv", &self.tensor(layout.output, &[layout.batch, 1, packed])?)?;
        let total = host_int(layout.context as i32)?;
        bindings.input("total_sequence_length", &total)?;
        Ok((bindings, total))
    }

    fn bind_steps(&self, tokens: usize, bindings: &mut DeviceBindings) -> Result<()> {
        let bank = self.tensor(self.layout.bank, &[graph::BANK, tokens, self.host.shape.packed()])?;
        bindings.input("bank", &bank)?;
        Ok(bindings.in_place("lengths", "seqlens_k", &self.numbers(self.layout.lengths)?)?)
    }

    /// Binds caches and state, all in place.
    fn bind_state(&self, kind: NodeKind, bindings: &mut DeviceBindings) -> Result<()> {
        let (s, layout, element) = (&self.host.shape, &self.layout, self.host.args.dtype.element());
        let batch = layout.batch;
        for (layer, (caches, state)) in layout.caches.iter().zip(&layout.state).enumerate() {
            for (names, &offset) in [("past_key", "present_key"), ("past_value", "present_value")]
                .iter()
                .zip(caches)
            {
                let tensor = self.tensor(offset, &[batch, s.kv_heads, layout.capacity, s.size])?;
                bindings.in_place(&of_layer(names.0, layer), &of_layer(names.1, layer), &tensor)?;
            }
            if let NodeKind::Retro { window, selection, .. } = kind {
                let ring = ring_slots(window);
                let own = layout.of(selection.selector);
                let dims = [batch, s.kv_heads].into_iter().chain(own.sizes().iter().copied());
                let tensors: [(TensorElementType, Vec<usize>); 4] = [
                    (state_type(own.element, element), dims.collect()),
                    (TensorElementType::Int32, vec![batch, s.kv_heads, layout.pages]),
                    (TensorElementType::Float32, vec![batch, ring, s.heads, s.size]),
                    (TensorElementType::Float32, vec![batch, ring, s.heads]),
                ];
                for ((names, (element, shape)), &offset) in graph::STATE.iter().zip(&tensors).zip(state) {
                    let tensor = self.buffer.tensor(offset, *element, shape)?;
                    bindings.in_place(&of_layer(names.0, layer), &of_layer(names.1, layer), &tensor)?;
                }
            }
        }
        if s.rotary {
            for (name, &offset) in ["cos", "sin"].iter().zip(&layout.rotary) {
                bindings.input(name, &self.tensor(offset, &[layout.capacity, s.size / 2])?)?;
            }
        }
        Ok(())
    }
}

fn host_int(value: i32) -> Result<DeviceTensor> {
    let tensor = DeviceBuffer::new(None, 4)?.tensor(0, TensorElementType::Int32, &[1])?;
    tensor.write(0, &value.to_le_bytes())?;
    Ok(tensor)
}

fn ints(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
