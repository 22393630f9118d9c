//! A context and batch: its tensors, bound to sessions.

use anyhow::Result;
use ort::{session::Session, value::TensorElementType};
use retro_contract::{Budget, limits, pages_for, ring_slots};
use retro_run::decoder::device_buffers::{Arena, Bindings, View};

use crate::{
    fill,
    graph::{self, Feeding, Kind, of_layer},
    host::Host,
    plan::Plan,
};

pub struct Group<'a> {
    pub host: &'a Host<'a>,
    pub arena: &'a Arena,
    pub plan: Plan,
}

impl Group<'_> {
    /// Pages that a budget loads.
    pub fn pages_of(&self, budget: Option<Budget>) -> usize {
        let (context, page) = (self.plan.context, self.host.shape.page);
        budget.map_or(pages_for(context, page), |b| {
            b.pages(limits::BUDGET_MIN_PAGES, context, page)
        })
    }

    /// An earlier group may have had other things here: queries, keys and values fed, RoPE's angles and output caches.
    pub fn refill(&self) -> Result<()> {
        let (plan, dtype) = (&self.plan, self.host.shape.dtype);
        fill::normals(self.arena, plan.bank, plan.output - plan.bank, dtype)?;
        fill::normals(self.arena, plan.rotary[0], plan.state[0][0] - plan.rotary[0], dtype)?;
        for state in &plan.state {
            self.arena.fill(state[2], state[3] - state[2], 0)?;
        }
        Ok(())
    }

    pub fn set_lengths(&self, last: i32) -> Result<()> {
        self.arena.write(self.plan.lengths, &ints(&vec![last; self.plan.batch]))
    }

    pub fn set_budget(&self, pages: i32) -> Result<()> {
        self.arena.write(self.plan.budget, &ints(&vec![pages; self.plan.batch]))
    }

    /// A tensor of the model's type.
    pub fn tensor(&self, offset: usize, shape: &[usize]) -> Result<View> {
        self.arena.tensor(offset, self.host.args.dtype.element(), shape)
    }

    /// A number for each sequence.
    fn numbers(&self, offset: usize) -> Result<View> {
        self.arena.tensor(offset, TensorElementType::Int32, &[self.plan.batch])
    }

    /// Binds everything that a session of this kind has; the tensors returned are only in these bindings.
    pub fn bind(
        &self,
        session: &Session,
        kind: Kind,
        feeding: Feeding,
        tokens: usize,
        total: usize,
    ) -> Result<(Bindings, Vec<View>)> {
        let (s, plan) = (&self.host.shape, &self.plan);
        let mut bindings = Bindings::new(session)?;
        self.bind_state(kind, &mut bindings)?;
        match feeding {
            Feeding::Direct => {
                bindings.input("qkv", &self.tensor(plan.bank, &[plan.batch, tokens, s.packed()])?)?;
                bindings.input("seqlens_k", &self.numbers(plan.lengths)?)?;
            }
            Feeding::Steps => self.bind_steps(tokens, &mut bindings)?,
        }
        let output = self.tensor(plan.output, &[plan.batch, tokens, s.heads * s.size])?;
        for layer in 0..s.layers {
            bindings.output(&of_layer("output", layer), &output)?;
        }
        let mut own = vec![host_int(total as i32)?];
        bindings.input("total_sequence_length", &own[0])?;
        if kind != Kind::Gqa {
            own.push(host_int(match feeding {
                Feeding::Direct => -1,
                Feeding::Steps => tokens as i32 - 1,
            })?);
            bindings.input("retro_length", &own[1])?;
            bindings.input("page_budget", &self.numbers(plan.budget)?)?;
        }
        Ok((bindings, own))
    }

    /// Binds a step's counter and picking of rows alone: the session has no attention node.
    pub fn bind_overhead(&self, session: &Session) -> Result<(Bindings, View)> {
        let (packed, plan) = (self.host.shape.packed(), &self.plan);
        let mut bindings = Bindings::new(session)?;
        self.bind_steps(1, &mut bindings)?;
        bindings.output("qkv", &self.tensor(plan.output, &[plan.batch, 1, packed])?)?;
        let total = host_int(plan.context as i32)?;
        bindings.input("total_sequence_length", &total)?;
        Ok((bindings, total))
    }

    fn bind_steps(&self, tokens: usize, bindings: &mut Bindings) -> Result<()> {
        let bank = self.tensor(self.plan.bank, &[graph::BANK, tokens, self.host.shape.packed()])?;
        bindings.input("bank", &bank)?;
        bindings.in_place("lengths", "seqlens_k", &self.numbers(self.plan.lengths)?)
    }

    /// Binds caches and state, all in place.
    fn bind_state(&self, kind: Kind, bindings: &mut Bindings) -> Result<()> {
        let (s, plan, element) = (&self.host.shape, &self.plan, self.host.args.dtype.element());
        let batch = plan.batch;
        for (layer, (caches, state)) in plan.caches.iter().zip(&plan.state).enumerate() {
            for (names, &offset) in [("past_key", "present_key"), ("past_value", "present_value")]
                .iter()
                .zip(caches)
            {
                let view = self.tensor(offset, &[batch, s.kv_heads, plan.capacity, s.size])?;
                bindings.in_place(&of_layer(names.0, layer), &of_layer(names.1, layer), &view)?;
            }
            if let Kind::Retro { window, .. } = kind {
                let ring = ring_slots(window);
                let tensors: [(TensorElementType, Vec<usize>); 4] = [
                    (element, vec![batch, s.kv_heads, plan.pages, 2, s.size]),
                    (TensorElementType::Int32, vec![batch, s.kv_heads, plan.pages]),
                    (TensorElementType::Float32, vec![batch, ring, s.heads, s.size]),
                    (TensorElementType::Float32, vec![batch, ring, s.heads]),
                ];
                for ((names, (element, shape)), &offset) in graph::STATE.iter().zip(&tensors).zip(state) {
                    let view = self.arena.tensor(offset, *element, shape)?;
                    bindings.in_place(&of_layer(names.0, layer), &of_layer(names.1, layer), &view)?;
                }
            }
        }
        if s.rotary {
            for (name, &offset) in ["cos", "sin"].iter().zip(&plan.rotary) {
                bindings.input(name, &self.tensor(offset, &[plan.capacity, s.size / 2])?)?;
            }
        }
        Ok(())
    }
}

fn host_int(value: i32) -> Result<View> {
    let view = Arena::new(None, 4)?.tensor(0, TensorElementType::Int32, &[1])?;
    view.write(0, &value.to_le_bytes())?;
    Ok(view)
}

fn ints(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
