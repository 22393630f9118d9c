//! The initializers of a graph: what each is made of, and any run of its rows on demand, so that none has to exist
//! whole.

use std::collections::HashSet;

use crate::{
    config::LlamaConfig,
    dtype::Dtype,
    error::{Error, Result},
    source::{Source, Tensor},
};

/// What an initializer's elements are.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// The Hugging Face tensor as it is.
    Copy(String),
    /// Hugging Face linear layers `[out, in]`, transposed to `[in, out]` and laid side by side.
    Transposed(Vec<Part>),
    /// Vectors, one after the other.
    Joined(Vec<Part>),
    /// cos (or sin) of position times frequency, `[max_positions, D/2]`.
    Rope { sin: bool },
}

/// Some rows of a Hugging Face tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub tensor: String,
    pub first: usize,
    pub rows: usize,
    /// Rows of the whole tensor.
    pub of: usize,
}

impl Part {
    /// All rows.
    pub fn whole(tensor: String, rows: usize) -> Self {
        Self {
            tensor,
            first: 0,
            rows,
            of: rows,
        }
    }
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

/// Rows of a source that are read before they are transposed: a cache line of f32.
const TILE: usize = 16;

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

/// Checks that `source` has everything that `initializers` need and nothing that they leave out, so that nothing fails
/// half-way through writing and no part of the model is lost.
pub fn check(source: &Source, config: &LlamaConfig, initializers: &[Initializer]) -> Result<()> {
    let mut used = HashSet::new();
    for init in initializers {
        let named = |e| Error::Initializer {
            name: init.name.clone(),
            source: Box::new(e),
        };
        match &init.content {
            Content::Copy(name) => {
                source.get(name, &init.dims).map_err(named)?;
                used.insert(source.stored_name(name));
            }
            Content::Transposed(parts) => {
                for part in parts {
                    source.get(&part.tensor, &[part.of, init.rows()]).map_err(named)?;
                    used.insert(source.stored_name(&part.tensor));
                }
            }
            Content::Joined(parts) => {
                for part in parts {
                    source.get(&part.tensor, &[part.of]).map_err(named)?;
                    used.insert(source.stored_name(&part.tensor));
                }
            }
            Content::Rope { .. } => {}
        }
    }
    // Hugging Face's folders may have what can be computed: RoPE's frequencies, and the embedding a second time.
    let foreign = source.unused(|name| {
        used.contains(name)
            || name.ends_with(".rotary_emb.inv_freq")
            || name == "lm_head.weight" && config.tie_word_embeddings
    });
    foreign.map_or(Ok(()), |name| Err(Error::ForeignTensor(name)))
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
            let frequencies = config.rope_scaling.frequencies(config.rope_theta, config.head_dim);
            for row in 0..rows {
                for (j, frequency) in frequencies.iter().enumerate() {
                    // In f64 and rounded once: the tables are exact for any position.
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
        (Content::Copy(name), _) => {
            let tensor = source.get(name, &init.dims)?;
            // A vector is rows of one element here, and one row there.
            let (wide, start) = if init.dims.len() == 1 {
                (rows, first_row)
            } else {
                (columns, 0)
            };
            let mut row = vec![0.0; wide];
            for r in 0..rows * columns / wide.max(1) {
                let source_row = if init.dims.len() == 1 { 0 } else { first_row + r };
                tensor.map_or(Ok(()), |t| t.read(source_row, start, &mut row))?;
                row.iter()
                    .enumerate()
                    .for_each(|(i, x)| dtype.put(out, r * wide + i, *x));
            }
        }
        (Content::Joined(parts), _) => {
            let mut at = 0;
            for part in parts {
                let tensor = source.get(&part.tensor, &[part.of])?;
                let mut values = vec![0.0; part.rows];
                tensor.map_or(Ok(()), |t| t.read(0, part.first, &mut values))?;
                for value in values {
                    if let Some(row) = at_row(at, first_row, rows) {
                        dtype.put(out, row, value);
                    }
                    at += 1;
                }
            }
        }
        (Content::Transposed(parts), _) => {
            let mut column = 0;
            for part in parts {
                let tensor = source.get(&part.tensor, &[part.of, init.rows()])?;
                if let Some(tensor) = tensor {
                    let block = Block {
                        first_row,
                        rows,
                        column,
                        columns,
                    };
                    block.transpose(tensor, part, dtype, out)?;
                }
                column += part.rows;
            }
        }
    }
    Ok(())
}

/// The row of a run that begins with `first` at which `row` stands.
fn at_row(row: usize, first: usize, rows: usize) -> Option<usize> {
    row.checked_sub(first).filter(|r| *r < rows)
}

/// Where a part's columns stand in a run of rows.
struct Block {
    first_row: usize,
    rows: usize,
    column: usize,
    columns: usize,
}

impl Block {
    /// Source rows outermost: each is read once a call, a contiguous run.
    fn transpose(&self, tensor: Tensor<'_>, part: &Part, dtype: Dtype, out: &mut [u8]) -> Result<()> {
        let mut tile = vec![0.0; TILE * self.rows];
        for first in (0..part.rows).step_by(TILE) {
            let wide = TILE.min(part.rows - first);
            for (i, run) in tile.chunks_exact_mut(self.rows.max(1)).take(wide).enumerate() {
                tensor.read(part.first + first + i, self.first_row, run)?;
            }
            for row in 0..self.rows {
                for (i, run) in tile.chunks_exact(self.rows.max(1)).take(wide).enumerate() {
                    let value = run.get(row).copied().unwrap_or(0.0);
                    dtype.put(out, row * self.columns + self.column + first + i, value);
                }
            }
        }
        Ok(())
    }
}
