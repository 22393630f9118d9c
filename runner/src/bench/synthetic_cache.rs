//! Synthetic caches: filled with random numbers instead of a prefill. The speed of a step does not depend on the
//! values.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use ort::value::TensorElementType;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use retro_contract::{Selector, graph};

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

fn encode(element: TensorElementType, count: usize, make: impl Fn(&mut StdRng, usize) -> f32) -> Result<Vec<u8>> {
    let mut random = StdRng::seed_from_u64(1);
    let numbers = (0..count).map(|i| make(&mut random, i));
    Ok(match element {
        TensorElementType::Float32 => numbers.flat_map(f32::to_le_bytes).collect(),
        TensorElementType::Float16 => numbers.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        TensorElementType::Bfloat16 => numbers.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        other => bail!("caches of {other} cannot be filled with random numbers"),
    })
}

fn keys(element: TensorElementType) -> Result<Vec<u8>> {
    encode(element, NUMBERS, |random, _| normal(random))
}

/// Page summaries of two vectors of `size`, like those of pages of 16 such keys.
fn summaries(element: TensorElementType, size: usize, selector: Selector) -> Result<Vec<u8>> {
    // An odd number of pages.
    let pages = (NUMBERS / (2 * size.max(1))) | 1;
    encode(element, pages * 2 * size, |random, i| {
        summary(selector, normal(random), (i / size) % 2, i)
    })
}

/// Element `i` of the first or second vector of a page summary, from noise of N(0, 1): for pages of 16 normal keys,
/// minima and maxima are about 1.8 away from 0, means have a deviation of 1/4, and standard deviations are about 1.
pub fn summary(selector: Selector, noise: f32, vector: usize, i: usize) -> f32 {
    match (selector, vector) {
        (Selector::Bounds, 0) => (-1.77 + 0.5 * noise).min(-0.1),
        (Selector::Bounds, _) => (1.77 + 0.5 * noise).max(0.1),
        (Selector::Moments | Selector::SignedMoments, 0) => 0.25 * noise,
        (Selector::Moments, _) => (0.97 + 0.17 * noise).max(0.05),
        (Selector::SignedMoments, _) => (0.97 + 0.17 * noise).max(0.05) * if i.is_multiple_of(2) { 1.0 } else { -1.0 },
    }
}

/// Fills a cache as after a prefill of `depth` tokens: random keys and values, page summaries like those of such keys,
/// page steps of the last token. For benchmarks: what is generated from it means nothing.
///
/// # Errors
/// When `depth` exceeds the capacity, the caches grow, or a GPU fails.
pub fn fill(kv: &mut KvCache, depth: usize, selector: Selector) -> Result<()> {
    ensure!(
        (1..=kv.capacity()).contains(&depth),
        "{depth} tokens do not fit a cache of {}",
        kv.capacity()
    );
    for buffer in kv.buffers_mut()? {
        let (element, width) = (buffer.element(), buffer.width());
        match buffer.kind() {
            SlotKind::Cache => buffer.tile(&keys(element)?)?,
            SlotKind::Retro(graph::State::PageSummary) => buffer.tile(&summaries(element, width, selector)?)?,
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

/// The model's selector; the default one for a model without the operator.
pub fn selector(model: &Model) -> Selector {
    model.retro.as_ref().and_then(|r| r.selector).unwrap_or_default()
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
    fill(state.kv_mut(), depth, selector(model))?;
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
