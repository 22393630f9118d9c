//! Logits and their readback: the newest row of each sequence, as float32.

use std::{ops::DerefMut, sync::Arc};

use ort::value::{DynValue, TensorElementType};

use crate::{
    decoder::{
        error::{Error, Result, require},
        upcast::{upcast_bf16, upcast_f16},
    },
    gpu::Gpu,
    runtime::ort_error,
};

/// Logits of the next token, `[B, vocab]`.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    /// The rows, one after another.
    pub values: Arc<Vec<f32>>,
    /// Size of the vocabulary.
    pub vocab: usize,
}

impl Logits {
    /// The logits of one sequence; empty when there is no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        self.values.get(row * self.vocab..(row + 1) * self.vocab).unwrap_or(&[])
    }
}

/// The shape of a graph's logits, `[B, rows, vocab]`.
pub(crate) struct LogitsShape {
    /// The tokens fed, or 1 where the graph gives the newest token's alone.
    pub(crate) rows: usize,
    pub(crate) vocab: usize,
}

impl LogitsShape {
    /// The shape of a graph's output for `batch` sequences.
    pub(crate) fn of(logits: &DynValue, batch: usize) -> Result<Self> {
        let shape: Vec<usize> = logits
            .dtype()
            .tensor_shape()
            .map(|s| s.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect())
            .unwrap_or_default();
        let (rows, vocab) = match shape.as_slice() {
            [b, rows, vocab] if *b == batch => (*rows, *vocab),
            [b, vocab] if *b == batch => (1, *vocab),
            _ => return Err(Error::LogitsShape { shape, batch }),
        };
        require!(rows > 0 && vocab > 0, Error::EmptyLogits(shape));
        Ok(Self { rows, vocab })
    }

    /// The newest row of each sequence in `data`, and its place in `values`, `[B, vocab]`.
    fn newest<'a, T>(
        &self,
        data: &'a [T],
        values: &'a mut [f32],
    ) -> Result<impl Iterator<Item = (&'a [T], &'a mut [f32])>> {
        let sequences = data.chunks_exact(self.rows * self.vocab);
        require!(sequences.len() * self.vocab == values.len(), Error::ShortLogits);
        let newest = (self.rows - 1) * self.vocab;
        let rows = sequences.map(move |rows| rows.split_at(newest).1);
        Ok(rows.zip(values.chunks_exact_mut(self.vocab)))
    }
}

/// The newest row of each sequence of logits that lie on the host.
pub(crate) fn newest_rows(logits: &DynValue, element: TensorElementType, batch: usize) -> Result<Logits> {
    let shape = LogitsShape::of(logits, batch)?;
    let mut values = vec![0.0; batch * shape.vocab];
    match element {
        TensorElementType::Float32 => {
            let (_, data) = logits.try_extract_tensor::<f32>().map_err(ort_error)?;
            for (row, to) in shape.newest(data, &mut values)? {
                to.copy_from_slice(row);
            }
        }
        TensorElementType::Float16 => {
            let (_, data) = logits.try_extract_tensor::<half::f16>().map_err(ort_error)?;
            for (row, to) in shape.newest(data, &mut values)? {
                upcast_f16(row, to);
            }
        }
        TensorElementType::Bfloat16 => {
            let (_, data) = logits.try_extract_tensor::<half::bf16>().map_err(ort_error)?;
            for (row, to) in shape.newest(data, &mut values)? {
                upcast_bf16(row, to);
            }
        }
        other => return Err(Error::LogitsType(other)),
    }
    Ok(Logits {
        values: Arc::new(values),
        vocab: shape.vocab,
    })
}

/// Reads logits back from a device into memory that it reuses: for a vocabulary of 10^5 tokens, fresh memory would cost
/// more than the copy and the conversion. Each state has its own.
pub(crate) struct LogitsReadback {
    gpu: Option<Arc<Gpu>>,
    bytes: Box<dyn DerefMut<Target = [u8]>>,
    /// Two, because the caller may hold the last step's logits during the next step.
    buffers: [Arc<Vec<f32>>; 2],
}

impl LogitsReadback {
    pub(crate) fn new(gpu: Option<&Arc<Gpu>>) -> Self {
        Self {
            gpu: gpu.cloned(),
            bytes: Box::new(Vec::new()),
            buffers: Default::default(),
        }
    }

    /// The newest row of each sequence of logits of this shape; `read(offset in bytes, row)` copies one from the
    /// device.
    pub(crate) fn newest(
        &mut self,
        element: TensorElementType,
        batch: usize,
        shape: &LogitsShape,
        read: impl Fn(usize, &mut [u8]) -> Result<()>,
    ) -> Result<Logits> {
        let &LogitsShape { rows, vocab } = shape;
        let size = element.byte_size(vocab).ok_or(Error::LogitsType(element))?;
        for (b, row) in self.bytes(batch * size)?.chunks_mut(size).enumerate() {
            read(((b + 1) * rows - 1) * size, row)?;
        }
        Ok(Logits {
            values: self.floats(element)?,
            vocab,
        })
    }

    /// Pinned memory (on the CPU: any) for that many bytes from the device.
    fn bytes(&mut self, count: usize) -> Result<&mut [u8]> {
        if self.bytes.len() != count {
            self.bytes = match &self.gpu {
                Some(gpu) => Box::new(gpu.pinned(count)?),
                None => Box::new(vec![0; count]),
            };
        }
        Ok(&mut self.bytes)
    }

    /// The numbers in [`Self::bytes`], as f32.
    fn floats(&mut self, element: TensorElementType) -> Result<Arc<Vec<f32>>> {
        let free = self.buffers.iter().position(|b| Arc::strong_count(b) == 1);
        let buffer = &mut self.buffers[free.unwrap_or(0)];
        if free.is_none() {
            *buffer = Arc::default();
        }
        let bytes = &self.bytes[..];
        let to = Arc::make_mut(buffer);
        match element {
            TensorElementType::Float32 => {
                to.clear();
                to.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
            }
            TensorElementType::Float16 => {
                let halves = bytes.as_chunks::<2>().0;
                to.resize(halves.len(), 0.0);
                upcast_f16(halves, to);
            }
            TensorElementType::Bfloat16 => {
                let halves = bytes.as_chunks::<2>().0;
                to.resize(halves.len(), 0.0);
                upcast_bf16(halves, to);
            }
            other => return Err(Error::LogitsType(other)),
        }
        Ok(Arc::clone(buffer))
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn numbers_come_back_and_memory_is_used_again() {
        let mut readback = LogitsReadback::new(None);
        let numbers: Vec<f32> = (0..2051).map(|i| i as f32 / 8.0 - 100.0).collect();
        let halves: Vec<u8> = numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        readback.bytes(halves.len()).unwrap().copy_from_slice(&halves);
        let first = readback.floats(TensorElementType::Float16).unwrap();
        assert_eq!(*first, numbers);
        let wide: Vec<u8> = numbers
            .iter()
            .rev()
            .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
            .collect();
        readback.bytes(wide.len()).unwrap().copy_from_slice(&wide);
        let second = readback.floats(TensorElementType::Bfloat16).unwrap();
        let rounded: Vec<f32> = numbers.iter().rev().map(|x| bf16::from_f32(*x).to_f32()).collect();
        assert_eq!((&*first, &*second), (&numbers, &rounded));
        // Both are held: a third is new. One is given back: its memory comes again.
        let third = readback.floats(TensorElementType::Bfloat16).unwrap();
        assert_eq!((&*first, &*second, &*third), (&numbers, &rounded, &rounded));
        let at = second.as_ptr();
        drop(second);
        let floats: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        readback.bytes(floats.len()).unwrap().copy_from_slice(&floats);
        let fourth = readback.floats(TensorElementType::Float32).unwrap();
        assert_eq!(*fourth, numbers);
        assert_eq!(fourth.as_ptr(), at);
        assert!(readback.floats(TensorElementType::Int64).is_err());
    }
}
