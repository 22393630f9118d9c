//! Synthetic caches: random keys and values, and a selector's state made of such keys, instead of a prefill. The speed
//! of a step does not depend on the values, as long as they are valid.

use std::time::Duration;

use half::{bf16, f16};
use ort::value::TensorElementType;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use retro_contract::{StateElement, graph};

use super::{Error, Result};
use crate::decoder::{
    Error as DecoderError,
    decode_loop::{Decoder, Policy},
    kv_cache::KvCache,
    model::Model,
    require,
    sampling::argmax,
    state_slot::SlotKind,
};

/// Length of the repeated pattern. A prime, so that repetitions are not aligned with rows or pages.
const NUMBERS: usize = 4_194_301;

/// Approximately N(0, 1): a sum of three uniform numbers.
pub fn normal(random: &mut StdRng) -> f32 {
    (0..3).map(|_| random.random_range(-1.0f32..1.0)).sum()
}

/// The bytes of numbers in a cache's element type.
///
/// # Errors
/// When it is no float.
pub fn encode(element: TensorElementType, numbers: impl Iterator<Item = f32>) -> Result<Vec<u8>> {
    Ok(match element {
        TensorElementType::Float32 => numbers.flat_map(f32::to_le_bytes).collect(),
        TensorElementType::Float16 => numbers.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        TensorElementType::Bfloat16 => numbers.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        other => return Err(Error::CacheType(other)),
    })
}

/// Element type of a selector's state for caches of type `cache`.
pub fn state_type(element: StateElement, cache: TensorElementType) -> TensorElementType {
    match element {
        StateElement::Cache => cache,
        StateElement::Byte => TensorElementType::Uint8,
    }
}

/// Fills a cache as after a prefill of `depth` tokens: random keys and values, the selector's state in the repeated
/// `pattern` (of [`StatePattern`](super::selector_state::StatePattern)), and page steps of the last token. For
/// benchmarks: what is generated from it means nothing.
///
/// # Errors
/// When `depth` exceeds the capacity, the caches grow, or a GPU fails.
pub fn fill(kv: &mut KvCache, depth: usize, pattern: &[u8]) -> Result<()> {
    let capacity = kv.capacity();
    let newest = i32::try_from(depth)
        .ok()
        .filter(|newest| (1..=capacity).contains(&depth) && *newest > 0);
    let newest = newest.ok_or(DecoderError::DoesNotFit {
        tokens: depth,
        capacity,
    })? - 1;
    // The same numbers in all caches: drawing them takes longer than a step.
    let mut drawn: Option<(TensorElementType, Vec<u8>)> = None;
    for buffer in kv.buffers_mut()? {
        match buffer.kind() {
            SlotKind::Cache => {
                let (_, numbers) = match drawn.take().filter(|(element, _)| *element == buffer.element()) {
                    Some(same) => drawn.insert(same),
                    None => {
                        let mut random = StdRng::seed_from_u64(1);
                        let numbers = (0..NUMBERS).map(|_| normal(&mut random));
                        drawn.insert((buffer.element(), encode(buffer.element(), numbers)?))
                    }
                };
                buffer.tile(numbers)?;
            }
            SlotKind::Retro(graph::State::PageSummary) => buffer.tile(pattern)?,
            SlotKind::Retro(graph::State::PageSteps) => buffer.tile(&newest.to_le_bytes().repeat(1024))?,
            // Zeros are as good as any values.
            SlotKind::Recurrent | SlotKind::Window | SlotKind::Retro(graph::State::Outputs | graph::State::Lse) => {
                buffer.clear()?
            }
        }
    }
    Ok(())
}

/// Decoding behind synthetic caches ([`fill`]).
#[derive(Clone, Copy, Debug)]
pub struct DecodeAtDepth {
    /// Sequences, which decode together.
    pub batch: usize,
    /// Tokens that each has before the first step.
    pub depth: usize,
    /// Untimed steps, once the window is full.
    pub warm_up: usize,
    /// Timed steps after them.
    pub steps: usize,
}

impl DecodeAtDepth {
    /// Tokens that each sequence's cache holds, with windows of up to `window` tokens.
    ///
    /// # Errors
    /// When the model's context is too short.
    pub fn capacity(&self, model: &Model, window: usize) -> Result<usize> {
        let steps = window - 1 + self.warm_up + self.steps;
        let capacity = self.depth + steps + 1;
        if let Some(most) = model.context_length() {
            let depth = self.depth;
            require!(capacity <= most, Error::Context { depth, steps, most });
        }
        Ok(capacity)
    }

    /// Fills the window, runs the untimed steps, then the timed ones; returns their time. `pattern`: as for [`fill`].
    ///
    /// # Errors
    /// When the model fails or its context is too short.
    pub fn run(&self, model: &mut Model, pattern: &[u8], policy: Policy) -> Result<Duration> {
        let capacity = self.capacity(model, policy.window)?;
        let mut state = model.new_state(self.batch, capacity)?;
        fill(state.kv_mut(), self.depth, pattern)?;
        let prompt: Vec<u32> = (0..self.depth as u32).map(|i| i % 251).collect();
        let mut decoder = Decoder::new(model, &mut state, &vec![prompt.as_slice(); self.batch], policy)?;
        decoder.measure_nothing();
        // Other tokens in each, so that the rows of a batch are not alike.
        (0..self.batch).for_each(|row| decoder.push(row, 1 + row as u32 % 250));
        let before = policy.window - 1 + self.warm_up;
        let mut started = Duration::ZERO;
        for step in 0..before + self.steps {
            if step == before {
                started = decoder.time;
            }
            let logits = decoder.step()?;
            for row in 0..self.batch {
                let token = argmax(logits.row(row)).ok_or(DecoderError::NoFiniteScore)?;
                decoder.push(row, token);
            }
        }
        Ok(decoder.time - started)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_the_caches_type() {
        let bytes = |element| encode(element, [1.0, -2.5].into_iter());
        let joined = |parts: [&[u8]; 2]| parts.concat();
        let (one, other) = (1.0f32.to_le_bytes(), (-2.5f32).to_le_bytes());
        assert_eq!(bytes(TensorElementType::Float32).unwrap(), joined([&one, &other]));
        let (one, other) = (f16::from_f32(1.0).to_le_bytes(), f16::from_f32(-2.5).to_le_bytes());
        assert_eq!(bytes(TensorElementType::Float16).unwrap(), joined([&one, &other]));
        let (one, other) = (bf16::from_f32(1.0).to_le_bytes(), bf16::from_f32(-2.5).to_le_bytes());
        assert_eq!(bytes(TensorElementType::Bfloat16).unwrap(), joined([&one, &other]));
        assert!(bytes(TensorElementType::Int64).is_err());
    }

    #[test]
    fn state_is_of_the_caches_type_or_codes() {
        let cache = TensorElementType::Float16;
        assert_eq!(state_type(StateElement::Cache, cache), cache);
        assert_eq!(state_type(StateElement::Byte, cache), TensorElementType::Uint8);
    }
}
