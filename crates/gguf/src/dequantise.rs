//! Blocks to f32, with the operations and their order of ggml's `dequantize_row_*`
//! ([ggml-quants.c](https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c)), so that the bits are the same.

use half::{bf16, f16};

use crate::tensor_type::TensorType;

/// Elements of the largest block.
const LARGEST: usize = 256;

/// Writes the elements from `start` on to `out`. `bytes` has blocks for all of them; where it has not, `out` is left as
/// it is.
pub fn run(kind: TensorType, bytes: &[u8], start: usize, out: &mut [f32]) {
    let block = kind.block();
    let mut stored = bytes.chunks_exact(kind.block_bytes()).skip(start / block);
    // The part of the first block before `start`, and of the last one after the end, are made and dropped.
    let mut skip = start % block;
    let mut out = out;
    while !out.is_empty() {
        let Some(bytes) = stored.next() else { return };
        let take = (block - skip).min(out.len());
        let (here, rest) = out.split_at_mut(take);
        if take == block {
            one(kind, bytes, here);
        } else {
            let mut whole = [0.0; LARGEST];
            let whole = whole.get_mut(..block).unwrap_or_default();
            one(kind, bytes, whole);
            here.copy_from_slice(whole.get(skip..skip + take).unwrap_or_default());
        }
        (skip, out) = (0, rest);
    }
}

/// One block of the type.
fn one(kind: TensorType, bytes: &[u8], out: &mut [f32]) {
    match kind {
        TensorType::F32 => put(out, bytes.first_chunk().map(|b| f32::from_le_bytes(*b))),
        TensorType::F16 => put(out, bytes.first_chunk().map(|b| f16::from_le_bytes(*b).to_f32())),
        TensorType::Bf16 => put(out, bytes.first_chunk().map(|b| bf16::from_le_bytes(*b).to_f32())),
        TensorType::Q8_0 => fixed(bytes, out, q8_0),
        TensorType::Q4_0 => fixed(bytes, out, q4_0),
        TensorType::Q4_1 => fixed(bytes, out, q4_1),
        TensorType::Q5_0 => fixed(bytes, out, q5_0),
        TensorType::Q5_1 => fixed(bytes, out, q5_1),
        TensorType::Q4K => fixed(bytes, out, q4_k),
        TensorType::Q5K => fixed(bytes, out, q5_k),
        TensorType::Q6K => fixed(bytes, out, q6_k),
    }
}

fn put(out: &mut [f32], value: Option<f32>) {
    if let (Some(slot), Some(value)) = (out.first_mut(), value) {
        *slot = value;
    }
}

/// Gives the slices the lengths that their type has, with which no index below can be out of range.
fn fixed<const B: usize, const N: usize>(bytes: &[u8], out: &mut [f32], block: fn(&[u8; B], &mut [f32; N])) {
    if let (Ok(bytes), Ok(out)) = (bytes.try_into(), out.try_into()) {
        block(bytes, out);
    }
}

fn half(low: u8, high: u8) -> f32 {
    f16::from_le_bytes([low, high]).to_f32()
}

fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = half(b[0], b[1]);
    for j in 0..32 {
        y[j] = f32::from(b[2 + j] as i8) * d;
    }
}

fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(b[0], b[1]);
    for j in 0..16 {
        let q = b[2 + j];
        y[j] = (f32::from(q & 15) - 8.0) * d;
        y[j + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}

fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half(b[0], b[1]), half(b[2], b[3]));
    for j in 0..16 {
        let q = b[4 + j];
        y[j] = f32::from(q & 15) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The fifth bits of elements j and j + 16, in their place.
fn fifth(high: u32, j: usize) -> (u8, u8) {
    (((high >> j) as u8 & 1) << 4, ((high >> (j + 16)) as u8 & 1) << 4)
}

fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let d = half(b[0], b[1]);
    let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for j in 0..16 {
        let (q, (first, second)) = (b[6 + j], fifth(high, j));
        y[j] = (f32::from(q & 15 | first) - 16.0) * d;
        y[j + 16] = (f32::from(q >> 4 | second) - 16.0) * d;
    }
}

fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (half(b[0], b[1]), half(b[2], b[3]));
    let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for j in 0..16 {
        let (q, (first, second)) = (b[8 + j], fifth(high, j));
        y[j] = f32::from(q & 15 | first) * d + m;
        y[j + 16] = f32::from(q >> 4 | second) * d + m;
    }
}

/// Scale and minimum of 32 elements, of 6 bits each: four pairs in the low bits of 8 bytes, four in the high bits of
/// these and in 4 more.
pub fn scale_min(packed: &[u8; 12], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    scaled_nibbles(b, 16, y, |_, _| 0);
}

fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    scaled_nibbles(b, 48, y, |j, l| (b[16 + l] >> j & 1) << 4);
}

/// Eight groups of 32 elements, each with a scale and a minimum; the lower four bits of element l of group j from
/// `nibbles` on, its fifth from `fifth(j, l)`.
fn scaled_nibbles(b: &[u8], nibbles: usize, y: &mut [f32; 256], fifth: impl Fn(usize, usize) -> u8) {
    let (d, dmin) = (half(b[0], b[1]), half(b[2], b[3]));
    let packed: [u8; 12] = std::array::from_fn(|i| b[4 + i]);
    for j in 0..8 {
        let (scale, min) = scale_min(&packed, j);
        let (scale, min) = (d * scale, dmin * min);
        for l in 0..32 {
            let q = b[nibbles + j / 2 * 32 + l];
            let q = if j % 2 == 0 { q & 15 } else { q >> 4 };
            y[j * 32 + l] = scale * f32::from(q | fifth(j, l)) - min;
        }
    }
}

fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = half(b[208], b[209]);
    for half in 0..2 {
        for part in 0..4 {
            for l in 0..32 {
                let low = b[half * 64 + part % 2 * 32 + l];
                let low = if part < 2 { low & 15 } else { low >> 4 };
                let high = b[128 + half * 32 + l] >> (2 * part) & 3;
                let scale = b[192 + half * 8 + part * 2 + l / 16] as i8;
                let q = f32::from(low | high << 4) - 32.0;
                y[half * 128 + part * 32 + l] = d * f32::from(scale) * q;
            }
        }
    }
}
