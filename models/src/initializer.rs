//! The initializers of a graph: what each is made of, and any run of its rows on demand, so that none has to exist
//! whole.

use std::collections::HashSet;

use retro_onnx::DataType;

use crate::{
    config::LlamaConfig,
    dtype::Dtype,
    error::{Error, Result},
    part::Part,
    quantised::{self, Packed},
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
    /// Codes, scales or minimums of quantised linear layers.
    Packed(Packed),
    /// Elements of this type that have this byte everywhere.
    Constant(DataType, u8),
}

/// One initializer: rows of equal width, `[rows]` or `[rows, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Initializer {
    pub name: String,
    pub dims: Vec<usize>,
    pub content: Content,
    /// Standard deviation when the weights are random; `None`: all ones (the scales of a norm).
    pub std: Option<f32>,
    /// The initializer, of other dimensions or another type, that has the same bytes: they are in the file once.
    pub same_as: Option<String>,
}

/// Rows of a source that are read before they are transposed: a cache line of f32.
const TILE: usize = 16;

impl Initializer {
    pub fn rows(&self) -> usize {
        match self.content {
            // Rows of 4-bit numbers need not end with a byte.
            Content::Constant(..) => 1,
            _ => self.dims.first().copied().unwrap_or(0),
        }
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        match self.content {
            Content::Constant(..) => self.dims.iter().product(),
            _ => self.dims.iter().skip(1).product(),
        }
    }

    /// ONNX's element type where activations are `dtype`.
    pub fn data_type(&self, dtype: Dtype) -> DataType {
        match &self.content {
            Content::Constant(data_type, _) => *data_type,
            Content::Packed(packed) => packed.data_type(dtype),
            _ => dtype.onnx(),
        }
    }

    pub fn row_bytes(&self, dtype: Dtype) -> usize {
        match self.data_type(dtype) {
            DataType::Uint4 => self.columns().div_ceil(2),
            DataType::Uint8 => self.columns(),
            _ => self.columns() * dtype.size(),
        }
    }

    pub fn bytes(&self, dtype: Dtype) -> usize {
        self.rows() * self.row_bytes(dtype)
    }

    /// Weights that the model has here and nowhere else.
    pub fn parameters(&self) -> usize {
        match &self.content {
            _ if self.same_as.is_some() => 0,
            Content::Rope { .. } | Content::Constant(..) => 0,
            Content::Packed(packed) => packed.parameters(),
            Content::Copy(_) | Content::Transposed(_) | Content::Joined(_) => self.rows() * self.columns(),
        }
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
            Content::Packed(packed) => {
                let group = packed.format.group();
                if !packed.inner.is_multiple_of(group) {
                    let inner = packed.inner;
                    return Err(named(Error::Groups { inner, group }));
                }
                for part in &packed.parts {
                    let shape = [part.of, packed.inner];
                    source.get(&part.tensor, &shape).map_err(named)?;
                    used.insert(source.stored_name(&part.tensor));
                }
            }
            Content::Rope { .. } | Content::Constant(..) => {}
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
    let rows = out.len() / init.row_bytes(dtype).max(1);
    match (&init.content, source) {
        (Content::Constant(_, byte), _) => out.fill(*byte),
        (Content::Packed(packed), _) => quantised::fill(source, packed, dtype, (first_row, rows), out)?,
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

#[cfg(test)]
mod tests {
    use retro_gguf::{Bytes, Gguf, TensorType, Writer};

    use super::*;
    use crate::{
        config::Family,
        gguf::GgufWeights,
        quantised::{Format, Half, What},
        rope::RopeScaling,
    };

    const HIDDEN: usize = 64;

    fn config() -> LlamaConfig {
        LlamaConfig {
            family: Family::Llama,
            vocab_size: 3,
            hidden_size: HIDDEN,
            intermediate_size: 8,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            head_dim: 8,
            rms_norm_eps: 1e-5,
            rope_theta: 10000.0,
            rope_scaling: RopeScaling::Linear { factor: 2.0 },
            max_positions: 9,
            sliding_window: None,
            tie_word_embeddings: true,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
        }
    }

    /// Blocks of f16 scale 1 whose codes count up.
    fn q8_0(rows: usize) -> Vec<u8> {
        let block = |i: usize| [0x00, 0x3c].into_iter().chain((0..32).map(move |j| (i * 7 + j) as u8));
        (0..rows * HIDDEN / 32).flat_map(block).collect()
    }

    fn source() -> Source {
        let mut file = Writer::new();
        for (name, rows) in [
            ("blk.0.attn_q", 16),
            ("blk.0.attn_k", 8),
            ("token_embd", 3),
            ("blk.0.ffn_up", 16),
        ] {
            file.tensor(
                &format!("{name}.weight"),
                &[rows, HIDDEN],
                TensorType::Q8_0,
                &q8_0(rows),
            );
        }
        let q4_1 = (0..16 * 2 * 20).map(|i| [0x31, 0x2c, 0x17, 0x2e][i % 4] ^ (i / 20) as u8);
        let q4_1: Vec<u8> = q4_1.collect();
        file.tensor("blk.0.ffn_down.weight", &[16, HIDDEN], TensorType::Q4_1, &q4_1);
        let vector = (0..HIDDEN).flat_map(|i| (i as f32).to_le_bytes()).collect::<Vec<_>>();
        file.tensor("output_norm.weight", &[HIDDEN], TensorType::F32, &vector);
        let file = Gguf::parse(Bytes::from(file.finish())).unwrap();
        Source::Gguf(GgufWeights::new(file, &config()))
    }

    fn part(tensor: &str, first: usize, rows: usize, of: usize) -> Part {
        Part {
            tensor: tensor.to_owned(),
            first,
            rows,
            of,
        }
    }

    /// Two tensors side by side in the format of the first.
    fn packed(source: &Source, what: What, first: &str, second: &str) -> (Vec<usize>, Content) {
        let packed = Packed {
            parts: vec![part(first, 2, 14, 16), part(second, 0, 8, 8)],
            inner: HIDDEN,
            format: Format::of(source, first, true),
            what,
        };
        (packed.dims(), Content::Packed(packed))
    }

    /// What a thread makes of a large initializer: runs of rows that begin in the middle of blocks.
    #[test]
    fn runs_of_rows_are_pieces_of_the_whole() {
        let [q, k] = ["q", "k"].map(|p| format!("model.layers.0.self_attn.{p}_proj.weight"));
        let gate_up = "model.layers.0.mlp.gate_up_proj.weight";
        let norm = "model.norm.weight";
        let source = source();
        for (dims, content) in [
            (
                vec![HIDDEN, 24],
                Content::Transposed(vec![part(&q, 0, 16, 16), part(&k, 0, 8, 8)]),
            ),
            (vec![HIDDEN, 8], Content::Transposed(vec![part(gate_up, 8, 8, 16)])),
            (vec![3, HIDDEN], Content::Copy("model.embed_tokens.weight".to_owned())),
            (vec![HIDDEN], Content::Copy(norm.to_owned())),
            (
                vec![40],
                Content::Joined(vec![part(norm, 5, 8, HIDDEN), part(norm, 0, 32, HIDDEN)]),
            ),
            (vec![9, 4], Content::Rope { sin: true }),
            packed(&source, What::Codes(Half::High), &q, &k),
            packed(&source, What::Codes(Half::Low), &q, &k),
            packed(&source, What::Codes(Half::Both), &q, &k),
            packed(&source, What::Scales(Half::High), &q, &k),
            packed(&source, What::Mins, "model.layers.0.mlp.down_proj.weight", &k),
        ] {
            let init = Initializer {
                name: "x".to_owned(),
                dims,
                content,
                std: None,
                same_as: None,
            };
            let make = |first: usize, rows: usize| {
                let mut out = vec![0xff; rows * init.row_bytes(Dtype::F32)];
                fill(&source, &config(), 0, &init, Dtype::F32, first, &mut out).unwrap();
                out
            };
            let whole = make(0, init.rows());
            for step in [1, 3, 33] {
                let starts = (0..init.rows()).step_by(step);
                let pieces = starts.flat_map(|first| make(first, step.min(init.rows() - first)));
                assert_eq!(pieces.collect::<Vec<_>>(), whole, "{init:?} by {step}");
            }
        }
    }

    /// Elements of a slice and of a row that the file has elsewhere, worked out by hand.
    #[test]
    fn slices_and_interleaved_rows_are_found() {
        let source = source();
        let value = |content: Content, outer: usize, row: usize, column: usize| {
            let init = Initializer {
                name: "x".to_owned(),
                dims: vec![HIDDEN, outer],
                content,
                std: None,
                same_as: None,
            };
            let mut out = vec![0; HIDDEN * outer * 4];
            fill(&source, &config(), 0, &init, Dtype::F32, 0, &mut out).unwrap();
            let at = (row * outer + column) * 4;
            f32::from_le_bytes(out[at..at + 4].try_into().unwrap())
        };
        // Row 8 of the file is blocks 16 and 17: element 35 is code 17 * 7 + 3.
        let slice = part("model.layers.0.mlp.gate_up_proj.weight", 8, 8, 16);
        assert_eq!(value(Content::Transposed(vec![slice]), 8, 35, 0), 122.0);
        // Element 5 of head 1, the second of pair 1, is the file's row 8 + 3: block 22, code 22 * 7 + 1 - 256.
        let q = Part::whole("model.layers.0.self_attn.q_proj.weight".to_owned(), 16);
        assert_eq!(value(Content::Transposed(vec![q]), 16, 1, 13), -101.0);
    }
}
