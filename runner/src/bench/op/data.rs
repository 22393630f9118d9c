//! Random caches, the rows fed, and the operator's state as after a prefill.

use anyhow::{Result, anyhow, bail};
use half::{f16, slice::HalfFloatSliceExt};
use ort::{
    memory::Allocator,
    value::{DynTensor, TensorElementType},
};
use retro_contract::{Selector, pages_for, ring_slots};
use retro_models::Dtype;

use super::operator::{AttentionShape, RetroVariant};
use crate::{
    decoder::upcast::upcast_f16,
    runtime::{one_line, ort_error},
};

/// xorshift64*: fast, and random enough for benchmarks.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Uniform with mean 0 and variance 1.
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let bits = (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32;
        (bits / (1u64 << 23) as f32 - 1.0) * 1.732_050_8
    }
}

/// Queries, keys and values of the tokens decoded after the prompt, in order of position.
pub struct Rows {
    /// `[steps, Hq*D]`.
    pub query: Vec<f32>,
    /// `[steps, Hkv*D]`.
    pub key: Vec<f32>,
    /// `[steps, Hkv*D]`.
    pub value: Vec<f32>,
}

impl Rows {
    /// `drift`: change of the query from token to token, 0 (none) to 1 (another random query).
    pub fn new(shape: &AttentionShape, steps: usize, drift: f32) -> Self {
        let mut random = Random::new(1);
        let width = shape.heads * shape.head_size;
        let keep = (1.0 - drift * drift).max(0.0).sqrt();
        let mut query: Vec<f32> = (0..width).map(|_| random.next()).collect();
        for at in width..steps * width {
            query.push(keep * query[at - width] + drift * random.next());
        }
        let mut rows = || {
            (0..steps * shape.kv_heads * shape.head_size)
                .map(|_| random.next())
                .collect()
        };
        Self {
            query,
            key: rows(),
            value: rows(),
        }
    }
}

/// Keys and values of every node, `[1, Hkv, C, D]`, shared by all operators.
pub struct Caches {
    /// Tokens before the first step.
    pub prompt: usize,
    /// Tokens that a cache has room for.
    pub capacity: usize,
    /// Keys and values of each node, `[1, Hkv, C, D]`.
    pub nodes: Vec<[DynTensor; 2]>,
}

impl Caches {
    /// Caches of `prompt` random tokens, with room for `steps` more.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(shape: &AttentionShape, nodes: usize, prompt: usize, steps: usize) -> Result<Self> {
        let capacity = prompt + steps;
        let dims = [1, shape.kv_heads, capacity, shape.head_size];
        let tensor = |seed: usize| -> Result<DynTensor> {
            let mut random = Random::new(seed as u64 + 2);
            let mut tensor = allocate(element(shape.dtype), &dims)?;
            fill(&mut tensor, shape.dtype, capacity * shape.head_size, |_, part| {
                part.fill_with(|| random.next());
            })?;
            Ok(tensor)
        };
        let nodes = (0..nodes).map(|node| Ok([tensor(2 * node)?, tensor(2 * node + 1)?]));
        Ok(Self {
            prompt,
            capacity,
            nodes: nodes.collect::<Result<_>>()?,
        })
    }

    /// The state of `node` as after a prefill: page summaries, page steps, an empty output cache and its log-sum-exps.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn state(&self, shape: &AttentionShape, retro: &RetroVariant, node: usize) -> Result<[DynTensor; 4]> {
        let (pages, d) = (pages_for(self.capacity, shape.page_size), shape.head_size);
        let keys = &self.nodes[node][0];
        let mut summary = allocate(element(shape.dtype), &[1, shape.kv_heads, pages, 2, d])?;
        let mut rows = vec![0.0; shape.page_size * d];
        fill(&mut summary, shape.dtype, 2 * d, |index, out| {
            let (head, page) = (index / pages, index % pages);
            let (from, to) = (page * shape.page_size, ((page + 1) * shape.page_size).min(self.prompt));
            if from < to {
                let rows = &mut rows[..(to - from) * d];
                if read(keys, shape.dtype, (head * self.capacity + from) * d, rows).is_ok() {
                    summarize(retro.selection.selector, rows, d, out);
                }
            }
        })?;
        let mut steps = allocate(TensorElementType::Int32, &[1, shape.kv_heads, pages])?;
        let (_, data) = steps.try_extract_tensor_mut::<i32>().map_err(ort_error)?;
        data.fill(self.prompt as i32 - 1);
        let ring = ring_slots(retro.window);
        let outputs = allocate(TensorElementType::Float32, &[1, ring, shape.heads, d])?;
        let lse = allocate(TensorElementType::Float32, &[1, ring, shape.heads])?;
        Ok([summary, steps, outputs, lse])
    }
}

/// The summary of a page (docs/method.md, "Selectors").
fn summarize(selector: Selector, rows: &[f32], d: usize, out: &mut [f32]) {
    let (first, second) = out.split_at_mut(d);
    let count = (rows.len() / d) as f32;
    for (i, (a, b)) in first.iter_mut().zip(second).enumerate() {
        let column = || rows.iter().skip(i).step_by(d).copied();
        (*a, *b) = match selector {
            Selector::Bounds => (
                column().fold(f32::INFINITY, f32::min),
                column().fold(f32::NEG_INFINITY, f32::max),
            ),
            Selector::Moments | Selector::SignedMoments => {
                let mean = column().sum::<f32>() / count;
                let variance = column().map(|x| (x - mean) * (x - mean)).sum::<f32>() / count;
                // Random keys have no principal direction: any of them gives the signs.
                let below = selector == Selector::SignedMoments && column().next().is_some_and(|x| x < mean);
                (mean, if below { -variance.sqrt() } else { variance.sqrt() })
            }
        };
    }
}

/// The element type as ONNX Runtime names it.
pub fn element(dtype: Dtype) -> TensorElementType {
    match dtype {
        Dtype::F32 => TensorElementType::Float32,
        Dtype::F16 => TensorElementType::Float16,
    }
}

/// A zeroed tensor in ONNX Runtime's memory, which can be bound as input and as output.
///
/// # Errors
/// When memory runs out.
pub fn allocate(element: TensorElementType, dims: &[usize]) -> Result<DynTensor> {
    let shape: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
    DynTensor::new(&Allocator::default(), element, shape)
        .map_err(|e| anyhow!("no memory for a buffer of shape {dims:?}: {}", one_line(&e)))
}

/// Writes a tensor in parts of `part` elements: `make(index of the part, its elements in f32)`.
fn fill(tensor: &mut DynTensor, dtype: Dtype, part: usize, mut make: impl FnMut(usize, &mut [f32])) -> Result<()> {
    match dtype {
        Dtype::F32 => {
            let (_, data) = tensor.try_extract_tensor_mut::<f32>().map_err(ort_error)?;
            data.chunks_mut(part).enumerate().for_each(|(i, out)| make(i, out));
        }
        Dtype::F16 => {
            let (_, data) = tensor.try_extract_tensor_mut::<f16>().map_err(ort_error)?;
            let mut buffer = vec![0.0; part];
            for (i, out) in data.chunks_mut(part).enumerate() {
                let buffer = &mut buffer[..out.len()];
                make(i, buffer);
                out.convert_from_f32_slice(buffer);
            }
        }
    }
    Ok(())
}

/// Reads `out.len()` elements from `start` on, as f32.
///
/// # Errors
/// When the tensor ends before.
pub fn read(tensor: &DynTensor, dtype: Dtype, start: usize, out: &mut [f32]) -> Result<()> {
    let range = start..start + out.len();
    match dtype {
        Dtype::F32 => {
            let (_, data) = tensor.try_extract_tensor::<f32>().map_err(ort_error)?;
            let Some(part) = data.get(range) else {
                bail!("a tensor is too short")
            };
            out.copy_from_slice(part);
        }
        Dtype::F16 => {
            let (_, data) = tensor.try_extract_tensor::<f16>().map_err(ort_error)?;
            let Some(part) = data.get(range) else {
                bail!("a tensor is too short")
            };
            upcast_f16(part, out);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_have_mean_0_and_variance_1() {
        let mut random = Random::new(3);
        let list: Vec<f64> = (0..100_000).map(|_| f64::from(random.next())).collect();
        let mean = list.iter().sum::<f64>() / 1e5;
        let variance = list.iter().map(|x| x * x).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
    }

    #[test]
    fn summaries_are_those_of_the_method() {
        let rows = [1.0, -2.0, 4.0, 0.0, 1.0, 5.0];
        let mut out = [0.0; 4];
        summarize(Selector::Bounds, &rows, 2, &mut out);
        assert_eq!(out, [1.0, -2.0, 4.0, 5.0]);
        summarize(Selector::Moments, &rows, 2, &mut out);
        assert_eq!(out[..2], [2.0, 1.0]);
        assert!((out[2] - 2f32.sqrt()).abs() < 1e-6 && (out[3] - (26.0f32 / 3.0).sqrt()).abs() < 1e-6);
        summarize(Selector::SignedMoments, &rows, 2, &mut out);
        assert!((out[2] + 2f32.sqrt()).abs() < 1e-6 && (out[3] + (26.0f32 / 3.0).sqrt()).abs() < 1e-6);
    }

    #[test]
    fn queries_turn_as_asked() {
        let shape = AttentionShape {
            heads: 64,
            kv_heads: 1,
            head_size: 64,
            page_size: 16,
            dtype: Dtype::F32,
        };
        for drift in [0.0f32, 0.6, 1.0] {
            let rows = Rows::new(&shape, 2, drift);
            let (a, b) = rows.query.split_at(64 * 64);
            let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
            let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
            assert!(
                (cosine - (1.0 - drift * drift).sqrt()).abs() < 0.05,
                "{drift}: {cosine}"
            );
        }
    }
}
