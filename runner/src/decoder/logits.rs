//! Where the scores of a step land on the host, time and again: at 10^5 tokens, fresh memory from the system would cost more than the copy
//! and the conversion.

use std::{ops::DerefMut, sync::Arc};

use anyhow::{Context, Result, anyhow};
use half::bf16;
use ort::value::TensorElementType;

use crate::{
    decoder::{
        model::{Logits, LogitsShape},
        upcast::upcast_f16,
    },
    gpu::Gpu,
};

/// Of one state.
pub(crate) struct LogitsReadback {
    gpu: Option<Arc<Gpu>>,
    bytes: Box<dyn DerefMut<Target = [u8]>>,
    /// The caller may hold the last step's scores while it makes the next ones.
    rooms: [Arc<Vec<f32>>; 2],
}

impl LogitsReadback {
    pub(crate) fn new(gpu: Option<&Arc<Gpu>>) -> Self {
        Self {
            gpu: gpu.cloned(),
            bytes: Box::new(Vec::new()),
            rooms: Default::default(),
        }
    }

    /// The newest row of each sequence of logits of this shape: `read(first byte, row)`.
    pub(crate) fn newest(
        &mut self,
        element: TensorElementType,
        batch: usize,
        shape: &LogitsShape,
        read: impl Fn(usize, &mut [u8]) -> Result<()>,
    ) -> Result<Logits> {
        let &LogitsShape { rows, vocab } = shape;
        let size = element.byte_size(vocab).context("logits of no size")?;
        for (b, row) in self.bytes(batch * size)?.chunks_mut(size).enumerate() {
            read(((b + 1) * rows - 1) * size, row)?;
        }
        Ok(Logits {
            values: self.floats(element)?,
            vocab,
        })
    }

    /// Room for that many bytes as they come from the device.
    fn bytes(&mut self, count: usize) -> Result<&mut [u8]> {
        if self.bytes.len() != count {
            self.bytes = match &self.gpu {
                Some(gpu) => Box::new(gpu.pinned(count)?),
                None => Box::new(vec![0; count]),
            };
        }
        Ok(&mut self.bytes)
    }

    /// The numbers that [`Self::bytes`] was filled with, as f32.
    fn floats(&mut self, element: TensorElementType) -> Result<Arc<Vec<f32>>> {
        let free = self.rooms.iter().position(|room| Arc::strong_count(room) == 1);
        let room = &mut self.rooms[free.unwrap_or(0)];
        if free.is_none() {
            *room = Arc::default();
        }
        let bytes = &self.bytes[..];
        let to = Arc::make_mut(room);
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
                to.clear();
                to.extend(
                    bytes
                        .as_chunks::<2>()
                        .0
                        .iter()
                        .map(|b| bf16::from_le_bytes(*b).to_f32()),
                );
            }
            other => return Err(anyhow!("the logits are {other}, expected float32, float16 or bfloat16")),
        }
        Ok(Arc::clone(room))
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

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
