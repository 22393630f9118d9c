//! The product on plain slices: rows are packed once, and tasks multiply them with the weights as they are stored.
//!
//! A number of the output is one sum in one order, whatever is computed beside it: a row's numbers are the same alone
//! and among others.

use std::cell::Cell;
use std::ops::Range;

use super::Attributes;
use super::tiles::{Columns, ManyBuffers, STRIP, TILE, code, lanes, products};
use crate::cpu::{Lines, Pool, Shared};
use crate::method::element::Element;
use crate::ort::{Result, require};
use crate::simd::Isa;

/// Weights of a node, as it has them: their lengths are those of [`super::check_weights`].
pub struct Product<'a, T> {
    /// The node's: sizes, bits and blocks.
    pub attributes: &'a Attributes,
    /// `[N, G, block_size * bits / 8]`.
    pub codes: &'a [u8],
    /// `[N, G]`.
    pub scales: &'a [T],
    pub zero_points: ZeroPoints<'a, T>,
    /// The block whose scale and zero point a column of A has; empty: the block that it lies in.
    pub g_idx: &'a [i32],
    /// `[N]`, or empty.
    pub bias: &'a [T],
}

/// The code that stands for 0, by the block.
#[derive(Clone, Copy)]
pub enum ZeroPoints<'a, T> {
    /// 2^(bits - 1).
    Middle,
    /// `[N, ceil(G * bits / 8)]`, packed as the weights.
    Packed(&'a [u8]),
    /// `[N, G]`.
    Numbers(&'a [T]),
}

/// Weights of a task: enough that starting it costs little beside them.
const TASK: usize = 1 << 18;
/// Floats that a thread keeps for its next product: those of a decoding step, not of a prompt.
const KEPT: usize = 1 << 19;

impl<T: Element> Product<'_, T> {
    /// Checks the numbers of g_idx.
    ///
    /// # Errors
    /// When one names no block.
    pub fn check_order(&self) -> Result<()> {
        let blocks = self.attributes.blocks();
        for (i, &g) in self.g_idx.iter().take(self.attributes.k).enumerate() {
            require!(
                usize::try_from(g).is_ok_and(|g| g < blocks),
                "input g_idx has {g} at {i}, expected 0..{}",
                blocks - 1
            );
        }
        Ok(())
    }

    /// K in whole blocks.
    fn padded(&self) -> usize {
        self.attributes.blocks() * self.attributes.block_size
    }

    /// The zero points of columns; none where all are in the middle.
    fn zeros(&self, columns: Range<usize>, out: &mut Vec<f32>) {
        let (blocks, bits) = (self.attributes.blocks(), self.attributes.bits);
        out.clear();
        match self.zero_points {
            ZeroPoints::Middle => {}
            ZeroPoints::Packed(codes) => {
                let row = self.attributes.zero_point_bytes();
                for column in codes[columns.start * row..columns.end * row].chunks_exact(row) {
                    out.extend((0..blocks).map(|block| f32::from(code(column, block, bits))));
                }
            }
            ZeroPoints::Numbers(numbers) => {
                let numbers = &numbers[columns.start * blocks..columns.end * blocks];
                out.resize(numbers.len(), 0.0);
                T::widen_into(numbers, out);
            }
        }
    }

    /// Writes the product of packed rows and of columns to `out`, which has N columns.
    fn multiply_columns(&self, isa: Isa, rows: &[f32], columns: Range<usize>, out: &Shared<'_, T>) {
        let (n, blocks, bytes) = (
            self.attributes.n,
            self.attributes.blocks(),
            self.attributes.block_bytes(),
        );
        let of = columns.start * blocks..columns.end * blocks;
        let mut buffers = TASK_BUFFERS.take();
        let TaskBuffers {
            scales,
            zeros,
            sums,
            many,
        } = &mut buffers;
        self.zeros(columns.clone(), zeros);
        scales.resize(of.len(), 0.0);
        let part = Columns {
            bits: self.attributes.bits,
            block_size: self.attributes.block_size,
            blocks,
            count: columns.len(),
            codes: &self.codes[of.start * bytes..of.end * bytes],
            scales: T::widen(&self.scales[of], scales),
            zeros,
            g_idx: &self.g_idx[..self.g_idx.len().min(self.attributes.k)],
        };
        sums.resize(rows.len() / self.padded() * columns.len(), 0.0);
        products(isa, &part, rows, many, sums);
        let bias = self.bias.get(columns.clone()).unwrap_or_default();
        for (row, sums) in sums.chunks_exact_mut(columns.len()).enumerate() {
            sums.iter_mut().zip(bias).for_each(|(sum, b)| *sum += b.to_f32());
            // SAFETY: tasks have columns of their own.
            T::narrow(sums, unsafe { out.range_mut(row * n + columns.start, columns.len()) });
        }
        TASK_BUFFERS.set(buffers);
    }
}

/// Buffers of a task.
#[derive(Default)]
struct TaskBuffers {
    scales: Vec<f32>,
    zeros: Vec<f32>,
    /// `[rows, columns]`.
    sums: Vec<f32>,
    many: ManyBuffers,
}

// Of a thread, not of a node: the nodes of a model run one after another, and one's buffers serve all.
thread_local! {
    static TASK_BUFFERS: Cell<TaskBuffers> = Cell::default();
    static PACKED_ROWS: Cell<Lines> = Cell::default();
}

/// Writes the product of `a`, `[rows, K]`, to `out`, `[rows, N]`.
///
/// # Errors
/// When the pool fails.
pub fn multiply<T: Element>(
    isa: Isa,
    product: &Product<'_, T>,
    a: &[T],
    out: &Shared<'_, T>,
    pool: &dyn Pool,
) -> Result<()> {
    let (k, n, padded) = (product.attributes.k, product.attributes.n, product.padded());
    let rows = a.len() / k;
    if rows == 0 {
        return Ok(());
    }
    // The vectors of a step must not need the weights of two blocks.
    let isa = isa.for_rows(product.attributes.block_size / 2);
    let mut lines = PACKED_ROWS.take();
    let packed = lines.fit(rows * padded);
    let shared = Shared::new(packed);
    pool.run(rows.div_ceil(TILE), &|tile| {
        let rows = tile * TILE..rows.min((tile + 1) * TILE);
        // SAFETY: each task has rows of its own.
        let to = unsafe { shared.range_mut(rows.start * padded, rows.len() * padded) };
        pack_tile(isa, product.attributes, &a[rows.start * k..rows.end * k], to);
    })?;
    let packed = &lines.fit(rows * padded)[..];
    let strips = n.div_ceil(STRIP);
    let tasks = (n * padded).div_ceil(TASK).min(strips);
    let start = |task: usize| n.min(strips * task / tasks * STRIP);
    pool.run(tasks, &|task| {
        product.multiply_columns(isa, packed, start(task)..start(task + 1), out);
    })?;
    if rows * padded <= KEPT {
        PACKED_ROWS.set(lines);
    }
    Ok(())
}

/// Packs the rows of a tile as the loops read them: in f32, padded with zeros to whole blocks; of each step, that of each
/// row; and of 4-bit weights, which come in pairs, those of the lower halves before the upper ones.
fn pack_tile<T: Element>(isa: Isa, attributes: &Attributes, a: &[T], to: &mut [f32]) {
    let (k, lanes) = (attributes.k, lanes(isa));
    let rows = a.len() / k;
    let mut wide = vec![0.0; to.len() / rows];
    for (m, row) in a.chunks_exact(k).enumerate() {
        T::widen_into(row, &mut wide[..k]);
        for (step, from) in wide.chunks_exact(2 * lanes).enumerate() {
            let to = &mut to[(step * rows + m) * 2 * lanes..][..2 * lanes];
            if attributes.bits == 4 {
                let (lower, upper) = to.split_at_mut(lanes);
                for ((pair, lower), upper) in from.as_chunks::<2>().0.iter().zip(lower).zip(upper) {
                    [*lower, *upper] = *pair;
                }
            } else {
                to.copy_from_slice(from);
            }
        }
    }
}
