//! The bytes of initializers of quantised weights, any run of their rows.

use retro_gguf::Codes;

use super::{
    packed::{Format, Half, Packed, What},
    round,
};
use crate::{
    dtype::Dtype,
    error::Result,
    part::Part,
    random::RandomWeights,
    source::{Source, Tensor},
};

/// Fills `out` with `rows` rows from `first_row` on, with numbers of type `dtype`.
pub fn fill(
    source: &Source,
    packed: &Packed,
    dtype: Dtype,
    (first_row, rows): (usize, usize),
    out: &mut [u8],
) -> Result<()> {
    match packed.what {
        What::Codes(half) | What::Table(half) => {
            let write = |codes: &Codes, row: &mut [u8]| put_codes(packed.format, half, &codes.codes, row);
            by_rows(source, packed, first_row, rows, out, write)
        }
        What::Scales(half) => {
            let step = if half == Half::High { 16.0 } else { 1.0 };
            let write = |codes: &Codes, row: &mut [u8]| put_floats(&codes.scales, step, dtype, row);
            by_rows(source, packed, first_row, rows, out, write)
        }
        What::TableMins => {
            let write = |codes: &Codes, row: &mut [u8]| put_floats(&codes.mins, 1.0, dtype, row);
            by_rows(source, packed, first_row, rows, out, write)
        }
        What::Mins => mins(source, packed, dtype, (first_row, rows), out),
    }
}

/// Writes rows of the initializer, each from the same row of the weights.
fn by_rows(
    source: &Source,
    packed: &Packed,
    first_row: usize,
    rows: usize,
    out: &mut [u8],
    write: impl Fn(&Codes, &mut [u8]),
) -> Result<()> {
    let mut reader = Reader::new(packed);
    let mut out = out.chunks_exact_mut((out.len() / rows.max(1)).max(1));
    let mut first = 0;
    for part in &packed.parts {
        let from = first_row.max(first);
        let to = (first_row + rows).min(first + part.rows);
        let weights = Weights::of(source, packed, part)?;
        for row in from..to {
            let codes = reader.read(&weights, part.first + row - first)?;
            if let Some(out) = out.next() {
                write(codes, out);
            }
        }
        first += part.rows;
    }
    Ok(())
}

/// Rows are groups: each takes one number of every row of the weights.
fn mins(
    source: &Source,
    packed: &Packed,
    dtype: Dtype,
    (first_row, rows): (usize, usize),
    out: &mut [u8],
) -> Result<()> {
    let mut reader = Reader::new(packed);
    let outer: usize = packed.parts.iter().map(|part| part.rows).sum();
    let mut column = 0;
    for part in &packed.parts {
        let weights = Weights::of(source, packed, part)?;
        for row in 0..part.rows {
            let codes = reader.read(&weights, part.first + row)?;
            for (i, min) in codes.mins.iter().skip(first_row).take(rows).enumerate() {
                dtype.put(out, i * outer + column, *min);
            }
            column += 1;
        }
    }
    Ok(())
}

fn put_floats(values: &[f32], times: f32, dtype: Dtype, out: &mut [u8]) {
    for (i, value) in values.iter().enumerate() {
        dtype.put(out, i, value * times);
    }
}

/// Low nibbles first, as MatMulNBits and 4-bit tensors of ONNX have them.
fn put_codes(format: Format, half: Half, codes: &[i8], out: &mut [u8]) {
    let stored = |code: i8| match half {
        Half::Both if format.0.four_bits => (code + 8) as u8,
        Half::Both => (code as u8) ^ 0x80,
        Half::High => ((code >> 4) + 8) as u8,
        Half::Low => code as u8 & 15,
    };
    if format.stored_bits(half) == 8 {
        out.iter_mut().zip(codes).for_each(|(byte, code)| *byte = stored(*code));
    } else {
        let (pairs, _) = codes.as_chunks::<2>();
        for (byte, [low, high]) in out.iter_mut().zip(pairs) {
            *byte = stored(*low) | stored(*high) << 4;
        }
    }
}

/// Where rows come from.
enum Weights<'a> {
    Stored(Tensor<'a>),
    Random {
        weights: &'a RandomWeights,
        tensor: u64,
        deviation: f32,
    },
}

impl<'a> Weights<'a> {
    fn of(source: &'a Source, packed: &Packed, part: &Part) -> Result<Self> {
        let tensor = source.get(&part.tensor, &[part.of, packed.inner])?;
        Ok(match (tensor, source) {
            (Some(tensor), _) => Self::Stored(tensor),
            (None, Source::Random(weights)) => Self::Random {
                weights,
                tensor: number(&part.tensor),
                deviation: 1.0 / (packed.inner as f32).sqrt(),
            },
            (None, _) => return Err(crate::error::Error::Internal("a tensor without a source")),
        })
    }
}

/// A number of a tensor, by its name (FNV-1a).
fn number(name: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Codes of a row, in memory that is used again.
struct Reader {
    format: Format,
    values: Vec<f32>,
    bytes: Vec<u8>,
    codes: Codes,
}

impl Reader {
    fn new(packed: &Packed) -> Self {
        Self {
            format: packed.format,
            values: vec![0.0; packed.inner],
            bytes: Vec::new(),
            codes: Codes::default(),
        }
    }

    fn read(&mut self, weights: &Weights<'_>, row: usize) -> Result<&Codes> {
        self.codes.clear();
        match weights {
            Weights::Stored(tensor) => {
                if tensor.read_codes(row, &mut self.codes)? {
                    return Ok(&self.codes);
                }
                tensor.read(row, 0, &mut self.values)?;
            }
            Weights::Random {
                weights,
                tensor,
                deviation,
            } => {
                let columns = self.values.len();
                self.bytes.resize(columns * 4, 0);
                weights.fill(*tensor, row * columns, *deviation, Dtype::F32, &mut self.bytes);
                let (floats, _) = self.bytes.as_chunks::<4>();
                for (value, bytes) in self.values.iter_mut().zip(floats) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
        }
        for group in self.values.chunks_exact(self.format.group()) {
            if self.format.0.four_bits {
                round::four_bits(group, &mut self.codes);
            } else {
                round::eight_bits(group, &mut self.codes);
            }
        }
        Ok(&self.codes)
    }
}

#[cfg(test)]
mod tests {
    use retro_gguf::CodeLayout;

    use super::*;

    fn packed(four_bits: bool, what: What) -> Packed {
        Packed {
            parts: vec![Part::whole("a".to_owned(), 3), Part::whole("b".to_owned(), 2)],
            inner: 64,
            format: Format(CodeLayout {
                group: 32,
                four_bits,
                has_min: false,
            }),
            what,
        }
    }

    fn bytes(four_bits: bool, what: What) -> Vec<u8> {
        let packed = packed(four_bits, what);
        let dims = packed.dims();
        let row = dims[1..].iter().product::<usize>() * if matches!(what, What::Scales(_)) { 4 } else { 1 };
        let make = |first: usize, rows: usize| {
            let mut out = vec![0; row * rows];
            let source = Source::Random(RandomWeights::new(5));
            fill(&source, &packed, Dtype::F32, (first, rows), &mut out).unwrap();
            out
        };
        let whole = make(0, dims[0]);
        assert_eq!([make(0, 2), make(2, 3)].concat(), whole, "pieces");
        whole
    }

    fn scales(four_bits: bool, half: Half) -> Vec<f32> {
        let bytes = bytes(four_bits, What::Scales(half));
        let (floats, _) = bytes.as_chunks();
        floats.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    /// Codes of 8 bits are the sum of their halves, and those of random weights are within half a step of them.
    #[test]
    fn random_weights_are_rounded() {
        let (high, low) = (scales(false, Half::High), scales(false, Half::Low));
        assert!(high.iter().zip(&low).all(|(high, low)| *high == 16.0 * low));
        assert_eq!(scales(false, Half::Both), low);
        let codes = [Half::Both, Half::High, Half::Low].map(|half| bytes(false, What::Codes(half)));
        let mut weights = vec![0; 64 * 3 * 4];
        RandomWeights::new(5).fill(number("a"), 0, 0.125, Dtype::F32, &mut weights);
        let (weights, _) = weights.as_chunks();
        for (i, byte) in codes[0].iter().enumerate() {
            let nibble = |codes: &[u8]| i32::from(codes[i / 2] >> (4 * (i % 2)) & 15);
            let code = i32::from(*byte) - 128;
            assert_eq!(16 * (nibble(&codes[1]) - 8) + nibble(&codes[2]), code);
            if let Some(weight) = weights.get(i) {
                let (weight, scale) = (f32::from_le_bytes(*weight), low[i / 32]);
                assert!((weight - code as f32 * scale).abs() <= 0.5001 * scale, "{i}");
            }
        }
    }

    /// The low nibble is the element that comes first, and a code less 8.
    #[test]
    fn codes_are_packed_in_pairs() {
        let format = packed(true, What::Mins).format;
        let mut out = [0; 2];
        put_codes(format, Half::Both, &[-8, 7, 0, -1], &mut out);
        assert_eq!(out, [0xf0, 0x78]);
        put_codes(
            packed(false, What::Mins).format,
            Half::High,
            &[-128, 127, 0, -1],
            &mut out,
        );
        assert_eq!(out, [0xf0, 0x78]);
        put_codes(
            packed(false, What::Mins).format,
            Half::Low,
            &[-128, 127, 0, -1],
            &mut out,
        );
        assert_eq!(out, [0xf0, 0xf0]);
    }
}
