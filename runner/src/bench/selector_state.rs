//! A selector's state for synthetic caches, made by the operator itself from random keys.
//!
//! Noise is no state: its minima exceed its maxima, and its deviations are negative, which no prefill leaves behind.
//! How state is computed is the plugin's affair alone, so the plugin computes it, and new selectors need nothing here.

use half::f16;
use ort::{session::SessionInputValue, value::TensorElementType};
use rand::{SeedableRng, rngs::StdRng};
use retro_contract::{Budget, Mode, STATE, Selector, graph::State, input, limits, output};
use retro_models::Dtype;
use retro_runtime::alone;

use super::{
    Error, Result,
    args::PageSelection,
    op::{
        data::{allocate, element, fill, integer},
        graph::{model, name_of},
        operator::{AttentionShape, Operator, RetroVariant},
    },
    synthetic_cache::{encode, normal, state_type},
};
use crate::{
    Device, Model, OpenOptions, Runtime,
    decoder::{
        session::{PluginUse, Steps, session_builder},
        state_slot::{SlotKind, StateSlot},
    },
    runtime::ort_error,
};

/// KV heads of the prompt that the state is made of. Attention grows with the square of a head's tokens, so many short
/// heads cost little. A prime, so that repetitions are not aligned with the heads of a cache.
const HEADS: usize = 127;
/// Tokens of each: whole pages of every size.
const TOKENS: usize = 256;

/// The state of a selector as a prefill of random keys leaves it, to repeat over a cache's.
pub struct StatePattern(Vec<u8>);

impl StatePattern {
    /// The state of 127 heads of 256 tokens, in caches of type `cache` with pages of `page_size` tokens and D =
    /// `head_size`, sketches in `sketch_bits` bits an element. The operator runs on the CPU, wherever the caches are.
    ///
    /// # Errors
    /// The plugin is missing, or ONNX Runtime fails.
    pub fn new(
        runtime: &Runtime,
        options: &OpenOptions,
        selector: Selector,
        page_size: usize,
        head_size: usize,
        sketch_bits: usize,
        cache: TensorElementType,
    ) -> Result<Self> {
        let shape = AttentionShape {
            sketch_bits,
            ..shape(page_size, head_size, cache)
        };
        Self::of_shape(runtime, options, selector, &shape, cache)
    }

    fn of_shape(
        runtime: &Runtime,
        options: &OpenOptions,
        selector: Selector,
        shape: &AttentionShape,
        cache: TensorElementType,
    ) -> Result<Self> {
        let operator = Operator::Retro(RetroVariant {
            window: 1,
            budget: Budget::Ratio(1.0),
            mode: Mode::Retro,
            selection: PageSelection {
                selector,
                ..PageSelection::default()
            },
        });
        if options.plugin.is_none() {
            return Err(Error::NoPlugin);
        }
        let options = OpenOptions {
            device: Device::Cpu,
            steps: Steps::Plain,
            ..options.clone()
        };
        let mut builder = session_builder(runtime, &options, PluginUse::Load)?;
        let mut session = alone(|| builder.commit_from_memory(&model(shape, &operator, 1))).map_err(Error::session)?;
        let outputs = session.run(prompt(shape, selector)?).map_err(ort_error)?;
        let state = name_of(output::NAMES[output::PRESENT_PAGE_SUMMARY], 0);
        let state = outputs.get(state).ok_or(Error::NoOutput)?;
        Ok(Self(if let Ok((_, codes)) = state.try_extract_tensor::<u8>() {
            codes.to_vec()
        } else if let Ok((_, numbers)) = state.try_extract_tensor::<f16>() {
            encode(cache, numbers.iter().map(|x| x.to_f32()))?
        } else {
            let (_, numbers) = state.try_extract_tensor::<f32>().map_err(ort_error)?;
            encode(cache, numbers.iter().copied())?
        }))
    }

    /// The pattern for a model's caches; empty for a model that was not converted.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_model(runtime: &Runtime, options: &OpenOptions, model: &Model) -> Result<Self> {
        let cache = model.io.slots.iter().find(|slot| slot.kind == SlotKind::Cache);
        let head_size = cache.and_then(|slot| slot.dims.last().copied().flatten());
        let Some(((retro, cache), head_size)) = model.retro.as_ref().zip(cache).zip(head_size) else {
            return Ok(Self(Vec::new()));
        };
        let selector = retro.selector.unwrap_or_default();
        // The metadata don't name the bits of a sketch; the declared state does, by its size.
        let summary = |slot: &&StateSlot| slot.kind == SlotKind::Retro(State::PageSummary);
        let declared = model
            .io
            .slots
            .iter()
            .find(summary)
            .and_then(|slot| slot.dims.last().copied().flatten());
        let mut shape = shape(retro.page_size, head_size, cache.element);
        let fits = |&sketch_bits: &usize| {
            let size = AttentionShape { sketch_bits, ..shape }.cache_size(TOKENS);
            selector.layout(&size).sizes().last().copied() == declared
        };
        if let Some(bits) = (1..=limits::SKETCH_BITS_MAX).rev().find(fits) {
            shape.sketch_bits = bits;
        }
        Self::of_shape(runtime, options, selector, &shape, cache.element)
    }

    /// Whole pages of a KV head's state, one behind the other.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The prompt's shape. Layouts may depend on the size of the caches' elements: bfloat16 has float16's.
fn shape(page_size: usize, head_size: usize, cache: TensorElementType) -> AttentionShape {
    AttentionShape {
        heads: HEADS,
        kv_heads: HEADS,
        head_size,
        page_size,
        dtype: match cache {
            TensorElementType::Float32 => Dtype::F32,
            _ => Dtype::F16,
        },
        sketch_bits: limits::SKETCH_BITS,
    }
}

/// The inputs of a prefill of random keys. Queries and values are zeros: the state does not depend on them.
fn prompt(shape: &AttentionShape, selector: Selector) -> Result<Vec<(String, SessionInputValue<'static>)>> {
    let (float, cached) = (TensorElementType::Float32, element(shape.dtype));
    let rows = [1, TOKENS, HEADS * shape.head_size];
    let (query, mut key, value) = (
        allocate(cached, &rows)?,
        allocate(cached, &rows)?,
        allocate(cached, &rows)?,
    );
    let mut random = StdRng::seed_from_u64(1);
    fill(&mut key, shape.dtype, HEADS * shape.head_size, |_, row| {
        row.fill_with(|| normal(&mut random));
    })?;
    let size = shape.cache_size(TOKENS);
    let layout = selector.layout(&size);
    let cache = [1, HEADS, TOKENS, shape.head_size];
    let state: Vec<usize> = [1, HEADS].iter().chain(layout.sizes()).copied().collect();
    let past = [
        allocate(cached, &cache)?,
        allocate(cached, &cache)?,
        allocate(state_type(layout.element, cached), &state)?,
        allocate(TensorElementType::Int32, &[1, HEADS, size.pages])?,
        allocate(float, &[1, 1, HEADS, shape.head_size])?,
        allocate(float, &[1, 1, HEADS])?,
    ];
    let fed = [("query", query), ("key", key), ("value", value)].map(|(name, rows)| (name.to_owned(), rows.into()));
    let lengths = [
        ("seqlens_k", TOKENS as i32 - 1),
        ("total_sequence_length", TOKENS as i32),
        ("retro_length", -1),
    ];
    let mut inputs: Vec<(String, SessionInputValue<'static>)> = fed.into();
    for (name, number) in lengths {
        inputs.push((name.to_owned(), integer(number)?.into()));
    }
    let names = STATE.map(|(past, _)| name_of(input::NAMES[past], 0));
    inputs.extend(names.into_iter().zip(past).map(|(name, tensor)| (name, tensor.into())));
    Ok(inputs)
}
