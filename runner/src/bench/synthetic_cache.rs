//! Contents of caches that nobody filled by reading: what a step costs does not depend on what it reads.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use ort::value::TensorElementType;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::decoder::{
    generate::{Decoder, Policy},
    model::Model,
    sampling::argmax,
};

/// Numbers of a pattern. A prime, so that repetitions start at other places of rows and pages, and no two pages are alike.
const NUMBERS: usize = 4_194_301;

/// About N(0, 1).
fn normal(random: &mut StdRng) -> f32 {
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

pub(crate) fn keys(element: TensorElementType) -> Result<Vec<u8>> {
    encode(element, NUMBERS, |random, _| normal(random))
}

/// Two vectors of `size` a page, as 16 such keys have them: extremes, or means and standard deviations.
pub(crate) fn summaries(element: TensorElementType, size: usize, moments: bool) -> Result<Vec<u8>> {
    // An odd number of pages.
    let pages = (NUMBERS / (2 * size.max(1))) | 1;
    encode(element, pages * 2 * size, |random, i| {
        let noise = normal(random);
        match (moments, (i / size).is_multiple_of(2)) {
            (false, true) => (-1.77 + 0.5 * noise).min(-0.1),
            (false, false) => (1.77 + 0.5 * noise).max(0.1),
            (true, true) => 0.25 * noise,
            (true, false) => (0.97 + 0.17 * noise).max(0.05),
        }
    })
}

/// Decodes at a depth that was never read: `warm_up` steps after the window is full, then `steps` whose time is returned.
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
    let moments = model.retro.as_ref().is_some_and(|r| r.selector != "bounds");
    let mut state = model.new_state(1, capacity)?;
    state.pretend(depth, moments)?;
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
