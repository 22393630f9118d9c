//! One call: its operands by name, and where their rows lie.

use super::angle_cache::AngleCache;
use super::scratch::ScratchPool;
use super::shared::Shared;
use crate::contract::{Attributes, CallPlan, Dims};
use crate::method::element::Element;
use crate::method::rope::{Angles, rotate};
use crate::selector::{CacheSize, PageSelector};

/// Inputs that are only read.
#[derive(Clone, Copy)]
pub struct Inputs<'a, E> {
    /// `[B, S, Hq*D]`, or packed `[B, S, (Hq+2*Hkv)*D]`.
    pub query: &'a [E],
    /// `[B, S, Hkv*D]`; empty when packed.
    pub key: &'a [E],
    /// `[B, S, Hkv*D]`; empty when packed.
    pub value: &'a [E],
    /// `[M, rotary_half]`; empty without rotary embedding.
    pub cos: &'a [E],
    /// `[M, rotary_half]`; empty without rotary embedding.
    pub sin: &'a [E],
    /// `[Hq]`; empty without sinks.
    pub head_sink: &'a [E],
}

/// The present state. R is the ring's slots, `max(window - 1, 1)`.
pub struct LayerState<'a, E: Element, P: PageSelector> {
    /// `[B, Hkv, C, D]`.
    pub key: Shared<'a, E>,
    /// `[B, Hkv, C, D]`.
    pub value: Shared<'a, E>,
    /// `[B, Hkv, ...]` as the selector lays it out.
    pub pages: Shared<'a, P::State<E>>,
    /// `[B, Hkv, P]`.
    pub steps: Shared<'a, i32>,
    /// `[B, R, Hq, D]`.
    pub outputs: Shared<'a, f32>,
    /// `[B, R, Hq]`.
    pub lse: Shared<'a, f32>,
}

/// Everything that one call needs.
pub struct CpuCall<'a, E: Element, P: PageSelector> {
    pub attributes: &'a Attributes,
    pub dims: &'a Dims,
    pub plan: &'a CallPlan,
    pub inputs: Inputs<'a, E>,
    /// `[B, S, Hq, D]`.
    pub output: Shared<'a, E>,
    /// The present state, already holding the past.
    pub state: LayerState<'a, E, P>,
    pub scratch: &'a ScratchPool,
}

impl<E: Element, P: PageSelector> CpuCall<'_, E, P> {
    /// Query heads of a KV head.
    pub fn group(&self) -> usize {
        self.attributes.heads / self.attributes.kv_heads
    }

    /// The softmax scale.
    pub fn scale(&self) -> f32 {
        self.attributes
            .scale
            .unwrap_or(1.0 / (self.dims.head_size as f32).sqrt())
    }

    /// What the state's layout depends on.
    pub fn cache_size(&self) -> CacheSize {
        self.dims.cache_size(self.attributes)
    }

    /// Elements of one KV head's page state.
    pub fn pages_len(&self) -> usize {
        P::layout(&self.cache_size()).len()
    }
}

/// How the dense attention of a prefill is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dense {
    /// By our own kernels.
    Own,
    /// By the host, already: keys and values are appended and the outputs written.
    Done,
}

/// Reads rows of the inputs.
pub struct Rows<'a, E> {
    attributes: &'a Attributes,
    dims: &'a Dims,
    inputs: Inputs<'a, E>,
}

impl<'a, E: Element> Rows<'a, E> {
    pub fn new(attributes: &'a Attributes, dims: &'a Dims, inputs: Inputs<'a, E>) -> Self {
        Self {
            attributes,
            dims,
            inputs,
        }
    }

    /// Head `head` of row `s` of sequence `b`: D elements, before RoPE.
    pub fn query(&self, b: usize, s: usize, head: usize) -> &'a [E] {
        let d = self.dims.head_size;
        &self.inputs.query[self.row_start(b, s) + head * d..][..d]
    }

    /// Key of KV head `head`, before RoPE.
    pub fn key(&self, b: usize, s: usize, head: usize) -> &'a [E] {
        self.key_or_value(self.inputs.key, self.attributes.heads, b, s, head)
    }

    pub fn value(&self, b: usize, s: usize, head: usize) -> &'a [E] {
        self.key_or_value(
            self.inputs.value,
            self.attributes.heads + self.attributes.kv_heads,
            b,
            s,
            head,
        )
    }

    fn row_start(&self, b: usize, s: usize) -> usize {
        let heads = self.attributes.heads
            + if self.dims.packed {
                2 * self.attributes.kv_heads
            } else {
                0
            };
        (b * self.dims.tokens + s) * heads * self.dims.head_size
    }

    fn key_or_value(&self, separate: &'a [E], packed_head: usize, b: usize, s: usize, head: usize) -> &'a [E] {
        let d = self.dims.head_size;
        if self.dims.packed {
            &self.inputs.query[self.row_start(b, s) + (packed_head + head) * d..][..d]
        } else {
            &separate[((b * self.dims.tokens + s) * self.attributes.kv_heads + head) * d..][..d]
        }
    }

    /// Writes `source` in f32 to `target`, rotated for `position` where the node asks for it.
    pub fn rotated(&self, source: &[E], position: usize, target: &mut [f32], angles: &mut AngleCache) {
        E::widen_into(source, target);
        if !self.attributes.do_rotary {
            return;
        }
        let half = self.dims.rotary_half;
        if angles.position != Some(position) {
            angles.values.resize(2 * half, 0.0);
            let tables = [self.inputs.cos, self.inputs.sin];
            for (table, values) in tables.iter().zip(angles.values.chunks_exact_mut(half)) {
                E::widen_into(&table[position * half..][..half], values);
            }
            angles.position = Some(position);
        }
        let (cos, sin) = angles.values.split_at(half);
        rotate(
            target,
            Angles {
                cos,
                sin,
                interleaved: self.attributes.rotary_interleaved,
            },
        );
    }
}
