//! Blocks as whole numbers, scales and minimums, for programs that multiply with them as they are.

use half::f16;

use crate::{dequantise::scale_min, error::Error, tensor::Tensor, tensor_type::TensorType};

/// How a type's elements are made of codes: `code * scale + min`, where elements of a group share scale and minimum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CodeLayout {
    /// Elements of a group: 32 or 16.
    pub group: usize,
    /// All codes are between -8 and 7; otherwise they are any of an i8's.
    pub four_bits: bool,
    /// Groups have a minimum; otherwise it is 0.
    pub has_min: bool,
}

impl TensorType {
    /// How its elements are made of codes; `None`: they are plain numbers.
    pub const fn code_layout(self) -> Option<CodeLayout> {
        let (group, four_bits, has_min) = match self {
            Self::F32 | Self::F16 | Self::Bf16 => return None,
            Self::Q4_0 => (32, true, false),
            Self::Q4_1 | Self::Q4K => (32, true, true),
            Self::Q8_0 | Self::Q5_0 => (32, false, false),
            Self::Q5_1 | Self::Q5K => (32, false, true),
            Self::Q6K => (16, false, false),
        };
        Some(CodeLayout {
            group,
            four_bits,
            has_min,
        })
    }
}

/// Codes, scales and minimums of a run of elements: one scale and one minimum a group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Codes {
    /// A code an element.
    pub codes: Vec<i8>,
    /// What a step of the codes is.
    pub scales: Vec<f32>,
    /// What is added to all elements of the group. It is rounded once.
    pub mins: Vec<f32>,
}

impl Codes {
    /// Takes away everything, and keeps the room.
    pub fn clear(&mut self) {
        self.codes.clear();
        self.scales.clear();
        self.mins.clear();
    }

    fn group(&mut self, codes: impl IntoIterator<Item = i8>, scale: f32, min: f32) {
        self.codes.extend(codes);
        self.scales.push(scale);
        self.mins.push(min);
    }
}

impl Tensor<'_> {
    /// Adds the codes of `count` elements from `start` on, in row-major order, to `out`. Both are whole blocks.
    ///
    /// # Errors
    /// The tensor has not as many, its type has no codes, or the run begins or ends inside a block.
    pub fn read_codes(&self, start: usize, count: usize, out: &mut Codes) -> Result<(), Error> {
        let (end, len) = (start.saturating_add(count), self.elements());
        let block = self.kind().block();
        let whole = start.is_multiple_of(block) && count.is_multiple_of(block);
        if end > len || !whole || self.kind().code_layout().is_none() {
            return Err(Error::ElementsOutside { start, end, len });
        }
        let blocks = self.bytes().chunks_exact(self.kind().block_bytes());
        for bytes in blocks.skip(start / block).take(count / block) {
            one(self.kind(), bytes, out);
        }
        Ok(())
    }
}

/// One block. Codes of types with a minimum are moved to be even around 0, and the minimum with them.
fn one(kind: TensorType, bytes: &[u8], out: &mut Codes) {
    match kind {
        TensorType::F32 | TensorType::F16 | TensorType::Bf16 => {}
        TensorType::Q8_0 => fixed::<34>(bytes, |b| {
            out.group(b[2..].iter().map(|&q| q as i8), half(b, 0), 0.0);
        }),
        TensorType::Q4_0 => fixed::<18>(bytes, |b| {
            out.group(nibbles(&b[2..]).map(|q| q as i8 - 8), half(b, 0), 0.0);
        }),
        TensorType::Q4_1 => fixed::<20>(bytes, |b| {
            let (d, m) = (half(b, 0), half(b, 2));
            out.group(nibbles(&b[4..]).map(|q| q as i8 - 8), d, moved(m, 8.0, d));
        }),
        TensorType::Q5_0 => fixed::<22>(bytes, |b| {
            let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
            out.group(with_fifth(&b[6..], high), half(b, 0), 0.0);
        }),
        TensorType::Q5_1 => fixed::<24>(bytes, |b| {
            let (d, m) = (half(b, 0), half(b, 2));
            let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
            out.group(with_fifth(&b[8..], high), d, moved(m, 16.0, d));
        }),
        TensorType::Q4K => fixed::<144>(bytes, |b| {
            for j in 0..8 {
                let (scale, min) = scale_and_min(b, j);
                let codes = (0..32).map(|l| nibble(b[16 + j / 2 * 32 + l], j % 2 == 1) as i8 - 8);
                out.group(codes, scale, moved(-min, 8.0, scale));
            }
        }),
        TensorType::Q5K => fixed::<176>(bytes, |b| {
            for j in 0..8 {
                let (scale, min) = scale_and_min(b, j);
                let codes = (0..32).map(|l| {
                    let fifth = (b[16 + l] >> j & 1) << 4;
                    (nibble(b[48 + j / 2 * 32 + l], j % 2 == 1) | fifth) as i8 - 16
                });
                out.group(codes, scale, moved(-min, 16.0, scale));
            }
        }),
        TensorType::Q6K => fixed::<210>(bytes, |b| {
            let d = half(b, 208);
            // 16 groups of 16: two halves of four parts of two groups.
            for group in 0..16 {
                let (side, part, first) = (group / 8, group / 2 % 4, group % 2 * 16);
                let codes = (first..first + 16).map(|l| {
                    let low = nibble(b[side * 64 + part % 2 * 32 + l], part >= 2);
                    let high = b[128 + side * 32 + l] >> (2 * part) & 3;
                    (low | high << 4) as i8 - 32
                });
                out.group(codes, d * f32::from(b[192 + group] as i8), 0.0);
            }
        }),
    }
}

/// Gives the slice the length that its type has.
fn fixed<const B: usize>(bytes: &[u8], block: impl FnOnce(&[u8; B])) {
    if let Ok(bytes) = bytes.try_into() {
        block(bytes);
    }
}

fn half<const B: usize>(bytes: &[u8; B], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// The minimum of codes that are `by` less than the file's.
fn moved(min: f32, by: f64, scale: f32) -> f32 {
    (f64::from(min) + by * f64::from(scale)) as f32
}

fn nibble(byte: u8, high: bool) -> u8 {
    if high { byte >> 4 } else { byte & 15 }
}

/// Codes of 4 bits of 32 elements: all low halves, then all high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    [false, true]
        .into_iter()
        .flat_map(|high| bytes.iter().map(move |&byte| nibble(byte, high)))
}

/// Codes of 5 bits, less 16.
fn with_fifth(bytes: &[u8], high: u32) -> impl Iterator<Item = i8> {
    let fifth = move |j: usize| ((high >> j) as u8 & 1) << 4;
    nibbles(bytes)
        .enumerate()
        .map(move |(j, low)| (low | fifth(j)) as i8 - 16)
}

fn scale_and_min<const B: usize>(b: &[u8; B], j: usize) -> (f32, f32) {
    let packed: [u8; 12] = std::array::from_fn(|i| b[4 + i]);
    let (scale, min) = scale_min(&packed, j);
    (half(b, 0) * scale, half(b, 2) * min)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{Gguf, Writer};

    /// Two rows of blocks of every byte there is, with scales that are numbers.
    fn file(kind: TensorType) -> Gguf {
        let mut state = 12345u32;
        let blocks = 2 * 512 / kind.block();
        let mut bytes = Vec::new();
        for _ in 0..blocks {
            let mut block: Vec<u8> = (0..kind.block_bytes())
                .map(|_| {
                    state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                    (state >> 24) as u8
                })
                .collect();
            // The high byte of an f16 between 2^-11 and 2, of either sign.
            let scales: &[usize] = match kind {
                TensorType::Q6K => &[209],
                _ if kind.code_layout().is_some_and(|l| l.has_min) => &[1, 3],
                _ => &[1],
            };
            scales.iter().for_each(|&at| block[at] = block[at] & 0x9f | 0x10);
            bytes.extend(block);
        }
        let mut writer = Writer::new();
        writer.tensor("x.weight", &[2, 512], kind, &bytes);
        Gguf::parse(Bytes::from(writer.finish())).unwrap()
    }

    #[test]
    fn codes_are_what_is_dequantised() {
        for kind in TensorType::ALL {
            let Some(layout) = kind.code_layout() else { continue };
            let file = file(kind);
            let tensor = file.tensor("x.weight").unwrap();
            let mut values = vec![0.0; 512];
            tensor.read(512, &mut values).unwrap();
            let mut codes = Codes::default();
            tensor.read_codes(512, 256, &mut codes).unwrap();
            tensor.read_codes(768, 256, &mut codes).unwrap();
            assert_eq!((codes.codes.len(), codes.scales.len()), (512, 512 / layout.group));
            assert_eq!(codes.mins.iter().any(|m| *m != 0.0), layout.has_min, "{kind}");
            for (i, value) in values.iter().enumerate() {
                let (code, group) = (codes.codes[i], i / layout.group);
                assert!(!layout.four_bits || (-8..8).contains(&code), "{kind}: {code}");
                let (scale, min) = (codes.scales[group], codes.mins[group]);
                let got = f32::from(code) * scale + min;
                // Without a minimum nothing is rounded; with it, sums of numbers as large as these are.
                let largest = 32.0 * scale.abs() + min.abs();
                let allowed = if layout.has_min { largest * f32::EPSILON } else { 0.0 };
                assert!((got - value).abs() <= allowed, "{kind} at {i}: {got} for {value}");
            }
        }
    }

    #[test]
    fn parts_of_blocks_are_refused() {
        let file = file(TensorType::Q4K);
        let tensor = file.tensor("x.weight").unwrap();
        let mut codes = Codes::default();
        for (start, count) in [(32, 256), (0, 32), (768, 512), (usize::MAX, 256)] {
            assert!(tensor.read_codes(start, count, &mut codes).is_err(), "{start} {count}");
        }
        assert_eq!(codes, Codes::default());
    }
}
