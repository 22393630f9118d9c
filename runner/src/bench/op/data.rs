//! Random caches, the rows fed, and the operator's state as after a prefill.

use half::{f16, slice::HalfFloatSliceExt};
use ort::{
    memory::Allocator,
    value::{DynTensor, DynValue, Tensor, TensorElementType},
};
use retro_contract::{pages_for, ring_slots};
use retro_models::Dtype;

use super::operator::{AttentionShape, RetroVariant};
use crate::{
    bench::{Error, Result, synthetic_cache::state_type},
    huge_pages,
    runtime::ort_error,
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

    /// The state of a node as after a prefill: the selector's in its own layout, filled with the repeated `pattern` (of
    /// [`StatePattern`](crate::bench::selector_state::StatePattern)), page steps, an empty output cache and its
    /// log-sum-exps.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn state(&self, shape: &AttentionShape, retro: &RetroVariant, pattern: &[u8]) -> Result<[DynTensor; 4]> {
        let (pages, d) = (pages_for(self.capacity, shape.page_size), shape.head_size);
        let layout = retro.selection.selector.layout(&shape.cache_size(self.capacity));
        let dims: Vec<usize> = [1, shape.kv_heads].iter().chain(layout.sizes()).copied().collect();
        let mut selection = allocate(state_type(layout.element, element(shape.dtype)), &dims)?;
        tile(&mut selection, pattern)?;
        let mut steps = allocate(TensorElementType::Int32, &[1, shape.kv_heads, pages])?;
        let (_, data) = steps.try_extract_tensor_mut::<i32>().map_err(ort_error)?;
        data.fill(self.prompt as i32 - 1);
        let ring = ring_slots(retro.window);
        let outputs = allocate(TensorElementType::Float32, &[1, ring, shape.heads, d])?;
        let lse = allocate(TensorElementType::Float32, &[1, ring, shape.heads])?;
        Ok([selection, steps, outputs, lse])
    }
}

/// The element type as ONNX Runtime names it.
pub fn element(dtype: Dtype) -> TensorElementType {
    match dtype {
        Dtype::F32 => TensorElementType::Float32,
        Dtype::F16 => TensorElementType::Float16,
    }
}

/// A zeroed tensor in ONNX Runtime's memory, which can be bound as input and as output; in huge pages, as a model's
/// caches are.
///
/// # Errors
/// When memory runs out.
pub fn allocate(element: TensorElementType, dims: &[usize]) -> Result<DynTensor> {
    let shape: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
    let tensor = DynTensor::new(&Allocator::default(), element, shape);
    let mut tensor = tensor.map_err(|error| Error::NoMemory {
        shape: dims.to_vec(),
        error: error.into(),
    })?;
    let bytes = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let bytes = bytes.and_then(|n| element.byte_size(n)).unwrap_or(0);
    if bytes > 0 {
        // SAFETY: the tensor owns so many bytes of the host's memory, zeroed, and nothing else knows them yet.
        huge_pages::advise(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr_mut().cast::<u8>(), bytes) });
    }
    Ok(tensor)
}

/// An int32 tensor `[1]`.
///
/// # Errors
/// When memory runs out.
pub fn integer(value: i32) -> Result<DynValue> {
    let tensor = Tensor::from_array(([1usize], vec![value])).map_err(ort_error)?;
    Ok(tensor.into_dyn())
}

/// Writes a tensor in parts of `part` elements: `make(index of the part, its elements in f32)`.
///
/// # Errors
/// When it is of another type.
pub fn fill(tensor: &mut DynTensor, dtype: Dtype, part: usize, mut make: impl FnMut(usize, &mut [f32])) -> Result<()> {
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

/// Repeats the bytes of a selector's state over a tensor. Keys of the caches are others: which pages win does not
/// matter to the time, as long as they win by the scores of real state.
fn tile(tensor: &mut DynTensor, pattern: &[u8]) -> Result<()> {
    fn elements<T: Copy>(data: &mut [T], pattern: impl Iterator<Item = T> + Clone) {
        data.iter_mut().zip(pattern.cycle()).for_each(|(to, from)| *to = from);
    }
    match *tensor.data_type() {
        TensorElementType::Uint8 => {
            let (_, data) = tensor.try_extract_tensor_mut::<u8>().map_err(ort_error)?;
            elements(data, pattern.iter().copied());
        }
        TensorElementType::Float16 => {
            let (_, data) = tensor.try_extract_tensor_mut::<f16>().map_err(ort_error)?;
            elements(data, pattern.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)));
        }
        _ => {
            let (_, data) = tensor.try_extract_tensor_mut::<f32>().map_err(ort_error)?;
            elements(data, pattern.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)));
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
    fn queries_turn_as_asked() {
        let shape = AttentionShape {
            heads: 64,
            kv_heads: 1,
            head_size: 64,
            page_size: 16,
            dtype: Dtype::F32,
            sketch_bits: 2,
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
