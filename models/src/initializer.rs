//! The initializers of a graph: what each is made of, and any run of its rows on demand, so that none has to exist
//! whole.

use crate::{
    config::LlamaConfig,
    dtype::Dtype,
    error::{Error, Result},
    random::RandomWeights,
    safetensors::{Tensor, Weights},
};

/// Where weights come from.
pub enum Source {
    Trained(Weights),
    Random(RandomWeights),
}

/// What an initializer's elements are.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// The Hugging Face tensor as it is.
    Copy(String),
    /// Hugging Face linear layers `[out, in]`, transposed to `[in, out]` and laid side by side.
    Transposed(Vec<(String, usize)>),
    /// cos (or sin) of position times frequency, `[max_positions, D/2]`.
    Rope { sin: bool },
}

/// One initializer: rows of equal width, `[rows]` or `[rows, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Initializer {
    pub name: String,
    pub dims: Vec<usize>,
    pub content: Content,
    /// Standard deviation when the weights are random; `None`: all ones (the scales of a norm).
    pub std: Option<f32>,
}

impl Initializer {
    pub fn rows(&self) -> usize {
        self.dims.first().copied().unwrap_or(0)
    }

    pub fn columns(&self) -> usize {
        self.dims.iter().skip(1).product()
    }

    pub fn bytes(&self, dtype: Dtype) -> usize {
        self.rows() * self.columns() * dtype.size()
    }
}

/// Checks that `source` has everything that `initializers` need, so that nothing fails half-way through writing.
pub fn check(source: &Source, initializers: &[Initializer]) -> Result<()> {
    if let Source::Trained(weights) = source {
        for init in initializers {
            match &init.content {
                Content::Copy(name) => drop(weights.get(name, &init.dims)?),
                Content::Transposed(parts) => {
                    for (name, out) in parts {
                        weights.get(name, &[*out, init.rows()])?;
                    }
                }
                Content::Rope { .. } => {}
            }
        }
    }
    Ok(())
}

/// Fills `out` with the rows of initializer number `index` from `first_row` on, as many as fit.
pub fn fill(
    source: &Source,
    config: &LlamaConfig,
    index: usize,
    init: &Initializer,
    dtype: Dtype,
    first_row: usize,
    out: &mut [u8],
) -> Result<()> {
    let columns = init.columns();
    let rows = out.len() / (columns * dtype.size()).max(1);
    match (&init.content, source) {
        (Content::Rope { sin }, _) => {
            for row in 0..rows {
                for j in 0..columns {
                    // In f64 and rounded once: the tables are exact for any position.
                    let frequency = config.rope_theta.powf(-((2 * j) as f64) / config.head_dim as f64);
                    let angle = (first_row + row) as f64 * frequency;
                    let value = if *sin { angle.sin() } else { angle.cos() };
                    dtype.put(out, row * columns + j, value as f32);
                }
            }
        }
        (_, Source::Random(random)) => match init.std {
            Some(std) => random.fill(index as u64, first_row * columns, std, dtype, out),
            None => (0..rows * columns).for_each(|i| dtype.put(out, i, 1.0)),
        },
        (Content::Copy(name), Source::Trained(weights)) => {
            let tensor = weights.get(name, &init.dims)?;
            let start = first_row * columns;
            (0..rows * columns).for_each(|i| dtype.put(out, i, tensor.at(start + i)));
        }
        (Content::Transposed(parts), Source::Trained(weights)) => {
            let inner = init.rows();
            let parts: Vec<(Tensor<'_>, usize)> = parts
                .iter()
                .map(|(name, outer)| Ok((weights.get(name, &[*outer, inner])?, *outer)))
                .collect::<Result<_>>()
                .map_err(|source| Error::Initializer {
                    name: init.name.clone(),
                    source: Box::new(source),
                })?;
            let mut column0 = 0;
            for (tensor, outer) in parts {
                // Source rows outermost: each is read once per call, a contiguous run of `rows` elements.
                for o in 0..outer {
                    for row in 0..rows {
                        dtype.put(out, row * columns + column0 + o, tensor.at(o * inner + first_row + row));
                    }
                }
                column0 += outer;
            }
        }
    }
    Ok(())
}
