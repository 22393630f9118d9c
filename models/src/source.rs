//! Where weights come from, under the names that Hugging Face's models give them.

use retro_gguf::{CodeLayout, Codes};

use crate::{
    error::{Error, Result},
    gguf::{self, GgufWeights},
    random::RandomWeights,
    safetensors::{self, Weights},
};

/// Where weights come from.
pub enum Source {
    Safetensors(Weights),
    Gguf(GgufWeights),
    Random(RandomWeights),
}

/// A tensor of one or two dimensions, read by runs of a row.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    columns: usize,
    elements: Elements<'a>,
}

#[derive(Clone, Copy)]
enum Elements<'a> {
    Safetensors(safetensors::Tensor<'a>),
    Gguf(gguf::Tensor<'a>),
}

impl Source {
    /// The tensor of a Hugging Face name, which must have exactly `shape`; `None`: weights are random.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor<'_>>> {
        let elements = match self {
            Self::Random(_) => return Ok(None),
            Self::Safetensors(weights) => Elements::Safetensors(weights.get(name, shape)?),
            Self::Gguf(weights) => Elements::Gguf(weights.get(name, shape)?),
        };
        let columns = shape.last().copied().unwrap_or(1);
        Ok(Some(Tensor { columns, elements }))
    }

    /// How many tensors there are; `None`: as many as one likes.
    pub fn count(&self) -> Option<usize> {
        match self {
            Self::Random(_) => None,
            Self::Safetensors(weights) => Some(weights.names().count()),
            Self::Gguf(weights) => Some(weights.names().count()),
        }
    }

    /// How the elements of the tensor of a Hugging Face name are made of codes; `None`: they are plain numbers, or it
    /// is not there.
    pub fn code_layout(&self, name: &str) -> Option<CodeLayout> {
        match self {
            Self::Gguf(weights) => weights.kind(name)?.code_layout(),
            Self::Safetensors(_) | Self::Random(_) => None,
        }
    }

    /// What the files call the type of the tensor of a Hugging Face name; `None`: weights are random, or it is not
    /// there.
    pub fn type_name(&self, name: &str) -> Option<String> {
        match self {
            Self::Gguf(weights) => weights.kind(name).map(|kind| kind.to_string()),
            Self::Safetensors(weights) => weights.type_name(name).map(str::to_owned),
            Self::Random(_) => None,
        }
    }

    /// The name that the tensor of a Hugging Face name has in the files.
    pub fn stored_name(&self, name: &str) -> String {
        match self {
            Self::Gguf(_) => gguf::gguf_name(name),
            Self::Safetensors(_) | Self::Random(_) => name.to_owned(),
        }
    }

    /// The first tensor, by its name in the files, that is not among `used`.
    pub fn unused(&self, used: impl Fn(&str) -> bool) -> Option<String> {
        let first = match self {
            Self::Random(_) => None,
            Self::Safetensors(weights) => weights.names().filter(|name| !used(name)).min(),
            Self::Gguf(weights) => weights.names().filter(|name| !used(name)).min(),
        };
        first.map(str::to_owned)
    }
}

impl Tensor<'_> {
    /// Writes the elements of `row` from `start` on to `out`, as many as it has room for.
    pub fn read(&self, row: usize, start: usize, out: &mut [f32]) -> Result<()> {
        match &self.elements {
            Elements::Safetensors(tensor) => {
                tensor.read(row * self.columns + start, out);
                Ok(())
            }
            Elements::Gguf(tensor) => {
                let read = tensor.read(row, start, self.columns, out);
                read.map_err(|_| Error::Internal("a run that is not inside its tensor"))
            }
        }
    }
    /// Adds the codes of `row` to `out`; false: the type has none.
    pub fn read_codes(&self, row: usize, out: &mut Codes) -> Result<bool> {
        match &self.elements {
            Elements::Gguf(tensor) if tensor.kind().code_layout().is_some() => {
                let read = tensor.read_codes(row, self.columns, out);
                read.map_err(|_| Error::Internal("a row that is not inside its tensor"))?;
                Ok(true)
            }
            Elements::Gguf(_) | Elements::Safetensors(_) => Ok(false),
        }
    }
}
