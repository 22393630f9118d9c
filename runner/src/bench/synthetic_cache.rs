//! Synthetic caches: filled with random numbers instead of a prefill. The speed of a step does not depend on the
//! values.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use ort::value::TensorElementType;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use retro_contract::{StateElement, graph};

use crate::decoder::{
    decode_loop::{Decoder, Policy},
    io::SlotKind,
    kv_cache::KvCache,
    model::Model,
    sampling::argmax,
};

/// Length of the repeated pattern. A prime, so that repetitions are not aligned with rows or pages.
const NUMBERS: usize = 4_194_301;

/// Approximately N(0, 1): a sum of three uniform numbers.
pub fn normal(random: &mut StdRng) -> f32 {
    (0..3).map(|_| random.random_range(-1.0f32..1.0)).sum()
}

/// Random codes are below this: then no float that lies among them is NaN or infinite.
pub const CODES: u8 = 0x40;

/// The bytes of `count` random elements: numbers of N(0, 1), or codes below [`CODES`] for uint8.
///
/// # Errors
/// When the element type is neither a float nor uint8.
pub fn random_bytes(element: TensorElementType, count: usize, random: &mut StdRng) -> Result<Vec<u8>> {
    if element == TensorElementType::Uint8 {
        return Ok((0..count).map(|_| random.random_range(0..CODES)).collect());
    }
    let numbers = (0..count).map(|_| normal(random));
    Ok(match element {
        TensorElementType::Float32 => numbers.flat_map(f32::to_le_bytes).collect(),
        TensorElementType::Float16 => numbers.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        TensorElementType::Bfloat16 => numbers.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        other => bail!("caches of {other} cannot be filled with random numbers"),
    })
}

/// Element type of a selector's state for caches of type `cache`.
pub fn state_type(element: StateElement, cache: TensorElementType) -> TensorElementType {
    match element {
        StateElement::Cache => cache,
        StateElement::Byte => TensorElementType::Uint8,
    }
}

/// Fills a cache as after a prefill of `depth` tokens: random keys, values and selector state, whatever its layout, and
/// page steps of the last token. For benchmarks: what is generated from it means nothing.
///
/// # Errors
/// When `depth` exceeds the capacity, the caches grow, or a GPU fails.
pub fn fill(kv: &mut KvCache, depth: usize) -> Result<()> {
    ensure!(
        (1..=kv.capacity()).contains(&depth),
        "{depth} tokens do not fit a cache of {}",
        kv.capacity()
    );
    for buffer in kv.buffers_mut()? {
        match buffer.kind() {
            SlotKind::Cache | SlotKind::Retro(graph::State::PageSummary) => {
                let mut random = StdRng::seed_from_u64(1);
                buffer.tile(&random_bytes(buffer.element(), NUMBERS, &mut random)?)?;
            }
            SlotKind::Retro(graph::State::PageSteps) => {
                let newest = i32::try_from(depth)? - 1;
                buffer.tile(&newest.to_le_bytes().repeat(1024))?;
            }
            // Zeros are as good as any values.
            SlotKind::Recurrent | SlotKind::Retro(graph::State::Outputs | graph::State::Lse) => buffer.clear()?,
        }
    }
    Ok(())
}

/// Decodes behind a synthetic cache of `depth` tokens: fills the window, runs `warm_up` steps, then `steps` timed ones;
/// returns their time.
///
/// # Errors
/// When the model fails or its context is too short.
pub fn decode_at(model: &mut Model, depth: usize, policy: Policy, warm_up: usize, steps: usize) -> Result<Duration> {
    let before = policy.window - 1 + warm_up;
    let capacity = depth + before + steps + 1;
    if let Some(most) = model.context_length() {
        ensure!(
            capacity <= most,
            "{depth} tokens and {} steps exceed the model's context of {most} tokens",
            before + steps
        );
    }
    let mut state = model.new_state(1, capacity)?;
    fill(state.kv_mut(), depth)?;
    let prompt: Vec<u32> = (0..depth as u32).map(|i| i % 251).collect();
    let mut decoder = Decoder::new(model, &mut state, &[&prompt], policy)?;
    decoder.measure_nothing();
    decoder.push(0, 1);
    let mut started = Duration::ZERO;
    for step in 0..before + steps {
        if step == before {
            started = decoder.time;
        }
        let logits = decoder.step()?;
        let token = argmax(logits.row(0)).context("the model gave no finite score for any token")?;
        decoder.push(0, token);
    }
    Ok(decoder.time - started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_elements_are_finite_in_every_type() {
        let bytes = |element| random_bytes(element, 100_000, &mut StdRng::seed_from_u64(1)).unwrap();
        let words = |list: Vec<u8>| list.as_chunks::<2>().0.to_vec();
        let floats = bytes(TensorElementType::Float32);
        let floats = floats.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        assert!(floats.clone().all(f32::is_finite) && floats.clone().any(|x| x < -1.0) && floats.count() == 100_000);
        assert!(
            words(bytes(TensorElementType::Float16))
                .iter()
                .all(|b| f16::from_le_bytes(*b).is_finite())
        );
        assert!(
            words(bytes(TensorElementType::Bfloat16))
                .iter()
                .all(|b| bf16::from_le_bytes(*b).is_finite())
        );
        let codes = bytes(state_type(StateElement::Byte, TensorElementType::Float16));
        assert_eq!((codes.len(), codes.iter().max()), (100_000, Some(&(CODES - 1))));
        let words = words(codes);
        assert!(
            words
                .iter()
                .all(|b| f16::from_le_bytes(*b).is_finite() && bf16::from_le_bytes(*b).is_finite())
        );
        let cache = state_type(StateElement::Cache, TensorElementType::Float16);
        assert_eq!(cache, TensorElementType::Float16);
    }
}
