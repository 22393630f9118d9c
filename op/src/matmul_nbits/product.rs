//! The product on plain slices: a few columns of weights are widened to f32 at a time and multiplied with all rows, so
//! that weights are read once, and widened once, whatever the number of rows.
//!
//! A number of the output is one sum in one order, whatever is computed beside it: a row's numbers are the same alone
//! and among others.

use retro_contract::matmul_nbits::limits;

use super::Attributes;
use crate::cpu::{Pool, ScratchPool, Shared};
use crate::method::element::Element;
use crate::ort::{Result, require};
use crate::simd::{Isa, Simd, dispatched};

/// Weights of a node, as it has them: their lengths are those of [`super::check_weights`].
pub struct Product<'a, T> {
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

/// Columns whose sums are made side by side.
const SIDE_BY_SIDE: usize = 4;
/// Columns that are widened before they are multiplied: their weights stay in the second-level cache.
const WIDENED: usize = 8;
/// Weights of the largest block.
const LARGEST_BLOCK: usize = {
    let [.., largest] = limits::BLOCK_SIZES;
    largest
};
/// Columns of a task.
const TASK: usize = 4 * WIDENED;

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

    /// A column's weights of a block, of `block_size * bits / 8` bytes.
    fn block(&self, column: usize, block: usize) -> &[u8] {
        let bytes = self.attributes.block_bytes();
        let start = (column * self.attributes.blocks() + block) * bytes;
        &self.codes[start..start + bytes]
    }

    /// Scales and zero points of a column.
    fn read_blocks(&self, column: usize, scales: &mut [f32], zeros: &mut [f32]) {
        let blocks = self.attributes.blocks();
        let of_column = |all: &'_ [T], to: &mut [f32]| T::widen_into(&all[column * blocks..][..blocks], to);
        of_column(self.scales, scales);
        match self.zero_points {
            ZeroPoints::Middle => zeros.fill((1 << (self.attributes.bits - 1)) as f32),
            ZeroPoints::Numbers(numbers) => of_column(numbers, zeros),
            ZeroPoints::Packed(bytes) => {
                let row = self.attributes.zero_point_bytes();
                let bytes = &bytes[column * row..][..row];
                for (g, zero) in zeros.iter_mut().enumerate() {
                    *zero = f32::from(code(bytes, g, self.attributes.bits));
                }
            }
        }
    }
}

/// Code `i` of packed ones, the first in the lowest bits.
fn code(bytes: &[u8], i: usize, bits: usize) -> u8 {
    match bits {
        4 => bytes[i / 2] >> (i % 2 * 4) & 15,
        _ => bytes[i],
    }
}

/// Where the widened weight `i` of a block lies: of two codes in a byte, the lower ones come first, then the upper ones.
fn place(i: usize, attributes: &Attributes) -> usize {
    match attributes.bits {
        4 => i / 2 + i % 2 * (attributes.block_size / 2),
        _ => i,
    }
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
    scratch: &ScratchPool,
) -> Result<()> {
    let (k, n, padded) = (product.attributes.k, product.attributes.n, product.padded());
    let rows = a.len() / k;
    if rows == 0 {
        return Ok(());
    }
    scratch.with_call(|call| {
        let wide = call.query.fit(rows * padded);
        let shared = Shared::new(wide);
        pool.run(rows, &|row| {
            // SAFETY: each task has a row of its own.
            let to = unsafe { shared.range_mut(row * padded, padded) };
            scratch.with_task(|task| arrange(product.attributes, &a[row * k..][..k], task.rows.fit(padded), to));
        })?;
        let wide = &call.query.fit(rows * padded)[..];
        pool.run(n.div_ceil(TASK), &|task| {
            let columns = task * TASK..n.min((task + 1) * TASK);
            scratch.with_task(|task| {
                let weights = task.rows.fit(WIDENED * padded);
                let (scales, zeros) = task
                    .partial
                    .fit(2 * product.attributes.blocks())
                    .split_at_mut(product.attributes.blocks());
                for first in columns.clone().step_by(WIDENED) {
                    let count = WIDENED.min(columns.end - first);
                    multiply_columns(isa, product, first, count, wide, out, weights, scales, zeros);
                }
            });
        })
    })
}

/// A row of activations in f32 in the order of widened weights, with zeros behind it.
fn arrange<T: Element>(attributes: &Attributes, row: &[T], buffer: &mut [f32], to: &mut [f32]) {
    let (given, rest) = buffer.split_at_mut(row.len());
    T::widen_into(row, given);
    rest.fill(0.0);
    let size = attributes.block_size;
    match attributes.bits {
        4 => {
            for (from, to) in buffer.chunks_exact(size).zip(to.chunks_exact_mut(size)) {
                let (lower, upper) = to.split_at_mut(size / 2);
                let pairs = from.as_chunks::<2>().0;
                for ((pair, lower), upper) in pairs.iter().zip(lower).zip(upper) {
                    [*lower, *upper] = *pair;
                }
            }
        }
        _ => to.copy_from_slice(buffer),
    }
}

dispatched! {
    /// Columns `first..first + count` of the product, [`WIDENED`] at most.
    fn multiply_columns<T: Element>(
        product: &Product<'_, T>,
        first: usize,
        count: usize,
        rows: &[f32],
        out: &Shared<'_, T>,
        weights: &mut [f32],
        scales: &mut [f32],
        zeros: &mut [f32],
    ) = multiply_columns_body
}

#[expect(clippy::too_many_arguments, reason = "what the macro's function takes")]
#[inline(always)]
unsafe fn multiply_columns_body<S: Simd, T: Element>(
    product: &Product<'_, T>,
    first: usize,
    count: usize,
    rows: &[f32],
    out: &Shared<'_, T>,
    weights: &mut [f32],
    scales: &mut [f32],
    zeros: &mut [f32],
) {
    let (padded, n) = (product.padded(), product.attributes.n);
    for (i, column) in weights.chunks_exact_mut(padded).enumerate() {
        if i < count {
            product.read_blocks(first + i, scales, zeros);
            // SAFETY: the caller's promise.
            unsafe { widen::<S, T>(product, first + i, scales, zeros, column) };
        } else {
            column.fill(0.0);
        }
    }
    let store = |row: usize, at: usize, sums: [f32; SIDE_BY_SIDE]| {
        let columns = SIDE_BY_SIDE.min(count - at);
        // SAFETY: each task writes columns of its own.
        let to = unsafe { out.range_mut(row * n + first + at, columns) };
        for (i, (to, sum)) in to.iter_mut().zip(sums).enumerate() {
            let bias = product.bias.get(first + at + i).map_or(0.0, |b| b.to_f32());
            *to = T::from_f32(sum + bias);
        }
    };
    for (pair, rows) in rows.chunks(2 * padded).enumerate() {
        let groups = weights.chunks_exact(SIDE_BY_SIDE * padded).enumerate();
        for (group, weights) in groups.take(count.div_ceil(SIDE_BY_SIDE)) {
            let at = group * SIDE_BY_SIDE;
            // SAFETY: the instruction set is the caller's promise; the slices are whole rows and columns.
            unsafe {
                if rows.len() == 2 * padded {
                    let [one, two] = sums::<S, 2>(rows, weights, padded);
                    store(2 * pair, at, one);
                    store(2 * pair + 1, at, two);
                } else {
                    let [one] = sums::<S, 1>(rows, weights, padded);
                    store(2 * pair, at, one);
                }
            }
        }
    }
}

/// Widens a column, in the order of [`place`].
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
unsafe fn widen<S: Simd, T: Element>(
    product: &Product<'_, T>,
    column: usize,
    scales: &[f32],
    zeros: &[f32],
    to: &mut [f32],
) {
    let size = product.attributes.block_size;
    if !product.g_idx.is_empty() {
        return widen_in_order(product, column, scales, zeros, to);
    }
    let mut split = [0; LARGEST_BLOCK];
    let blocks = to.chunks_exact_mut(size).zip(scales.iter().zip(zeros)).enumerate();
    for (g, (to, (&scale, &zero))) in blocks {
        let mut codes = product.block(column, g);
        if product.attributes.bits == 4 {
            codes = split_nibbles(codes, &mut split);
        }
        // SAFETY: a block has as many codes as numbers, a multiple of every vector's length; the instruction set is the
        // caller's promise.
        unsafe {
            let (zero, scale) = (S::splat(zero), S::splat(scale));
            for at in (0..size).step_by(S::LANES) {
                let codes = S::load_byte(codes[at..at + S::LANES].as_ptr());
                let weights = S::mul(S::sub(codes, zero), scale);
                S::store(to[at..at + S::LANES].as_mut_ptr(), weights);
            }
        }
    }
}

/// The lower codes of a block's bytes, then the upper ones.
#[inline(always)]
fn split_nibbles<'a>(bytes: &[u8], split: &'a mut [u8; LARGEST_BLOCK]) -> &'a [u8] {
    const LOWER: u64 = 0x0f0f_0f0f_0f0f_0f0f;
    let half = bytes.len();
    let (lower, upper) = split[..2 * half].split_at_mut(half);
    let places = lower.as_chunks_mut().0.iter_mut().zip(upper.as_chunks_mut().0);
    for (bytes, (lower, upper)) in bytes.as_chunks().0.iter().zip(places) {
        let word = u64::from_le_bytes(*bytes);
        *lower = (word & LOWER).to_le_bytes();
        *upper = (word >> 4 & LOWER).to_le_bytes();
    }
    &split[..2 * half]
}

/// As [`widen`], where each row of weights names its block. What lies behind K is 0.
fn widen_in_order<T: Element>(product: &Product<'_, T>, column: usize, scales: &[f32], zeros: &[f32], to: &mut [f32]) {
    let attributes = product.attributes;
    let size = attributes.block_size;
    for (block, to) in to.chunks_exact_mut(size).enumerate() {
        let bytes = product.block(column, block);
        for i in 0..size {
            let k = block * size + i;
            let weight = match product.g_idx.get(k).filter(|_| k < attributes.k) {
                Some(&g) => (f32::from(code(bytes, i, attributes.bits)) - zeros[g as usize]) * scales[g as usize],
                None => 0.0,
            };
            to[place(i, attributes)] = weight;
        }
    }
}

/// Sums of `R` rows and [`SIDE_BY_SIDE`] columns of `padded` elements, which is a multiple of every vector's length.
///
/// # Safety
/// The machine has the instruction set of `S`; the slices have `R` and `SIDE_BY_SIDE` times `padded` elements.
#[inline(always)]
unsafe fn sums<S: Simd, const R: usize>(rows: &[f32], weights: &[f32], padded: usize) -> [[f32; SIDE_BY_SIDE]; R] {
    debug_assert!(
        rows.len() == R * padded && weights.len() == SIDE_BY_SIDE * padded && padded.is_multiple_of(S::LANES)
    );
    // SAFETY: every load is inside of a row or a column by the caller's promise.
    unsafe {
        // By the column, then by the row.
        let mut sums = [[S::splat(0.0); R]; SIDE_BY_SIDE];
        for at in (0..padded).step_by(S::LANES) {
            let mut x = [S::splat(0.0); R];
            for (r, x) in x.iter_mut().enumerate() {
                *x = S::load(rows.as_ptr().add(r * padded + at));
            }
            for (c, sums) in sums.iter_mut().enumerate() {
                let w = S::load(weights.as_ptr().add(c * padded + at));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = S::fma(x, w, *sum);
                }
            }
        }
        std::array::from_fn(|r| S::sums(sums.map(|of_column| of_column[r])))
    }
}
