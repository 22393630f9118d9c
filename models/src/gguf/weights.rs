//! The tensors of a GGUF file under Hugging Face's names and in Hugging Face's order of rows.

use retro_gguf::{Codes, Gguf, TensorType};

use crate::{
    config::{Family, LlamaConfig},
    error::{Error, Result},
    gguf::names::gguf_name,
};

/// RoPE's divisors, which the configuration has taken.
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// A file's tensors.
pub struct GgufWeights {
    file: Gguf,
    head_dim: usize,
    /// Rows of queries and keys are in the order in which neighbours are turned together.
    interleaved: bool,
}

/// One tensor.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    stored: retro_gguf::Tensor<'a>,
    /// The head size D, where the rows of each head are interleaved.
    interleaved: Option<usize>,
}

impl GgufWeights {
    pub fn new(file: Gguf, config: &LlamaConfig) -> Self {
        Self {
            file,
            head_dim: config.head_dim,
            // llama.cpp turns neighbouring elements in models of the architecture "llama", and its converter orders
            // the rows so. All others are as Hugging Face has them.
            interleaved: matches!(config.family, Family::Llama | Family::Mistral),
        }
    }

    /// llama.cpp's names of the tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.file.tensors().map(|t| t.name.as_str());
        names.filter(|name| *name != ROPE_FREQS)
    }

    /// The type of the tensor of a Hugging Face name, if it is there.
    pub fn kind(&self, name: &str) -> Option<TensorType> {
        let tensor = self.file.tensor(&gguf_name(name)).ok()?;
        Some(tensor.kind())
    }

    /// The tensor of a Hugging Face name, which must have exactly `shape`.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let ours = gguf_name(name);
        if !self.file.has(&ours) {
            return Err(Error::NoTensor(ours));
        }
        let stored = self.file.tensor(&ours).map_err(|source| Error::Tensor {
            tensor: ours.clone(),
            source,
        })?;
        if stored.shape() != shape {
            return Err(Error::TensorShape {
                tensor: ours,
                got: stored.shape().to_vec(),
                expected: shape.to_vec(),
            });
        }
        let turned = ["self_attn.q_proj.weight", "self_attn.k_proj.weight"];
        let interleaved = self.interleaved && turned.iter().any(|end| name.ends_with(end));
        Ok(Tensor {
            stored,
            interleaved: interleaved.then_some(self.head_dim),
        })
    }
}

impl Tensor<'_> {
    /// Writes the elements of Hugging Face's `row`, of `columns` elements, from `start` on to `out`.
    pub fn read(&self, row: usize, start: usize, columns: usize, out: &mut [f32]) -> Result<(), retro_gguf::Error> {
        let row = self.interleaved.map_or(row, |head_dim| stored_row(row, head_dim));
        self.stored.read(row * columns + start, out)
    }

    pub fn kind(&self) -> TensorType {
        self.stored.kind()
    }

    /// Adds the codes of Hugging Face's `row`, of `columns` elements, to `out`.
    pub fn read_codes(&self, row: usize, columns: usize, out: &mut Codes) -> Result<(), retro_gguf::Error> {
        let row = self.interleaved.map_or(row, |head_dim| stored_row(row, head_dim));
        self.stored.read_codes(row * columns, columns, out)
    }
}

/// The row in the file of a row of Hugging Face's, which turns element i of a head with element i + D/2: there they
/// are rows 2i and 2i + 1.
fn stored_row(row: usize, head_dim: usize) -> usize {
    let (head, element) = (row / head_dim, row % head_dim);
    let (half, index) = (element / (head_dim / 2), element % (head_dim / 2));
    head * head_dim + 2 * index + half
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `permute` of llama.cpp's convert_hf_to_gguf.py: reshape to [heads, 2, D/2], swap, flatten.
    #[test]
    fn rows_are_those_that_the_converter_moved() {
        let (heads, head_dim) = (3, 8);
        let mut stored = Vec::new();
        for head in 0..heads {
            for index in 0..head_dim / 2 {
                for half in 0..2 {
                    stored.push(head * head_dim + half * head_dim / 2 + index);
                }
            }
        }
        for row in 0..heads * head_dim {
            assert_eq!(stored[stored_row(row, head_dim)], row);
        }
    }
}
