//! The loops of the product: a strip of columns times packed rows.
//!
//! With few rows, a vector of weights is decoded in registers and multiplied with every row there. With many, a strip is
//! decoded into a buffer, a piece at a time, and all rows read that. Both add in one order.

use std::ops::Range;

use crate::cpu::Lines;
use crate::simd::{Simd, dispatched};

/// Rows that a tile multiplies at once.
pub const TILE: usize = 4;
/// Rows up to which weights are decoded for each tile anew.
const FEW: usize = 4 * TILE;
/// Columns of a strip: whole tiles of every instruction set.
pub const STRIP: usize = 8;
/// Weights of a column that are decoded at once for many rows: those of a strip, and the rows' elements beside them,
/// stay in a first-level cache.
const DECODED: usize = 1024;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Buffers for many rows.
#[derive(Default)]
pub struct ManyBuffers {
    /// A piece of a strip.
    decoded: Lines,
    /// A vector for each row and column of a strip.
    sums: Lines,
}

/// Columns of packed weights.
pub struct Columns<'a> {
    pub bits: usize,
    pub block_size: usize,
    pub blocks: usize,
    pub count: usize,
    /// `[count, blocks, block_size * bits / 8]`.
    pub codes: &'a [u8],
    /// `[count, blocks]`.
    pub scales: &'a [f32],
    /// `[count, blocks]`; empty: all are 2^(bits - 1).
    pub zeros: &'a [f32],
    /// The block of each of the K weights of a column; empty: the one that it lies in.
    pub g_idx: &'a [i32],
}

dispatched! {
    /// The products of packed rows and columns: `out` is `[rows, columns]`.
    pub fn products(columns: &Columns<'_>, rows: &[f32], many: &mut ManyBuffers, out: &mut [f32]) = products_body
}

dispatched! {
    /// Floats of a vector: steps of the loops are two.
    pub fn lanes() -> usize = lanes_body
}

/// # Safety
/// The machine has the instruction set of `S`, as [`dispatched`] sees to.
#[inline(always)]
unsafe fn lanes_body<S: Simd>() -> usize {
    S::LANES
}

/// # Safety
/// The machine has the instruction set of `S`, as [`dispatched`] sees to. The sizes are checked here.
#[inline(always)]
unsafe fn products_body<S: Simd>(columns: &Columns<'_>, rows: &[f32], many: &mut ManyBuffers, out: &mut [f32]) {
    let numbers = columns.count * columns.blocks;
    assert!(
        columns.block_size.is_multiple_of(2 * S::LANES)
            && columns.codes.len() == numbers * columns.block_size * columns.bits / 8
            && columns.scales.len() == numbers
            && (columns.zeros.is_empty() || columns.zeros.len() == numbers)
            && columns.count > 0
            && out.len() / columns.count * columns.blocks * columns.block_size == rows.len(),
        "a product's sizes"
    );
    // SAFETY: the caller's promise, and the sizes just checked.
    unsafe {
        match (columns.bits, columns.zeros.is_empty()) {
            (4, true) => products_of::<S, 4, false>(columns, rows, many, out),
            (4, false) => products_of::<S, 4, true>(columns, rows, many, out),
            (_, true) => products_of::<S, 8, false>(columns, rows, many, out),
            (_, false) => products_of::<S, 8, true>(columns, rows, many, out),
        }
    }
}

/// # Safety
/// The machine has the instruction set of `S`, and the sizes are those that [`products_body`] checks.
#[inline(always)]
unsafe fn products_of<S: Simd, const BITS: usize, const ZEROS: bool>(
    columns: &Columns<'_>,
    rows: &[f32],
    many: &mut ManyBuffers,
    out: &mut [f32],
) {
    let tile = TILE * columns.blocks * columns.block_size;
    // SAFETY: the caller's promise; tiles and columns are inside.
    unsafe {
        if out.len() > FEW * columns.count || !columns.g_idx.is_empty() {
            return products_of_many::<S, BITS, ZEROS>(columns, rows, many, out);
        }
        for first in (0..columns.count).step_by(STRIP) {
            let end = (first + STRIP).min(columns.count);
            for (rows, out) in rows.chunks(tile).zip(out.chunks_mut(TILE * columns.count)) {
                let (a, out) = (rows.as_ptr(), out.as_mut_ptr());
                match rows.len() * TILE / tile {
                    1 => strip::<S, BITS, ZEROS, 1>(columns, first, end, a, out),
                    2 => strip::<S, BITS, ZEROS, 2>(columns, first, end, a, out),
                    3 => strip::<S, BITS, ZEROS, 3>(columns, first, end, a, out),
                    _ => strip::<S, BITS, ZEROS, 4>(columns, first, end, a, out),
                }
            }
        }
    }
}

/// Columns `first..end` times `M` rows: as many columns at once as there are registers for.
///
/// # Safety
/// As [`products_of`], which counts the `M` rows and the columns: sizes are those that [`products_body`] checks.
#[inline(always)]
unsafe fn strip<S: Simd, const BITS: usize, const ZEROS: bool, const M: usize>(
    columns: &Columns<'_>,
    first: usize,
    end: usize,
    a: *const f32,
    out: *mut f32,
) {
    let mut column = first;
    // SAFETY: the caller's promise.
    unsafe {
        if S::LANES == 16 && M == 1 {
            while column + 8 <= end {
                few::<S, BITS, ZEROS, M, 8>(columns, column, a, out);
                column += 8;
            }
        } else if S::LANES == 16 || M <= 2 {
            while column + 4 <= end {
                few::<S, BITS, ZEROS, M, 4>(columns, column, a, out);
                column += 4;
            }
        } else {
            while column + 2 <= end {
                few::<S, BITS, ZEROS, M, 2>(columns, column, a, out);
                column += 2;
            }
        }
        while column < end {
            few::<S, BITS, ZEROS, M, 1>(columns, column, a, out);
            column += 1;
        }
    }
}

/// Two vectors of weights: with 4 bits those of the lower and of the upper halves of bytes.
///
/// # Safety
/// The machine has the instruction set of `S`. `codes` has two vectors of codes: [`few`] and [`decode_piece`] stay inside
/// the columns, whose length [`products_body`] checks.
#[inline(always)]
unsafe fn decode<S: Simd, const BITS: usize>(codes: *const u8, zero: S::V, scale: S::V) -> [S::V; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        if BITS == 4 {
            S::decode_halves(codes, zero, scale)
        } else {
            let weight = |codes| S::mul(S::sub(S::load_byte(codes), zero), scale);
            [weight(codes), weight(codes.add(S::LANES))]
        }
    }
}

/// The zero point of a block, by its number among all columns' blocks.
///
/// # Safety
/// The machine has the instruction set of `S`, and with `ZEROS` there is a zero point for each block, as [`products_body`]
/// checks.
#[inline(always)]
unsafe fn zero_of<S: Simd, const BITS: usize, const ZEROS: bool>(columns: &Columns<'_>, block: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        if ZEROS {
            S::splat(*columns.zeros.get_unchecked(block))
        } else {
            S::splat((1 << (BITS - 1)) as f32)
        }
    }
}

/// `C` columns times `M` rows, decoded in registers.
///
/// # Safety
/// The machine has the instruction set of `S`, and `C` columns from `column` on and `M` rows are there, as [`strip`] counts
/// them. [`products_body`] checks the sizes.
#[inline(always)]
unsafe fn few<S: Simd, const BITS: usize, const ZEROS: bool, const M: usize, const C: usize>(
    columns: &Columns<'_>,
    column: usize,
    a: *const f32,
    out: *mut f32,
) {
    let blocks = columns.blocks;
    let steps_a_block = columns.block_size / (2 * S::LANES);
    let (steps, bytes) = (blocks * steps_a_block, S::LANES * BITS / 4);
    // Both are powers of 2. One loop over all steps: nested loops spill the sums.
    let shift = steps_a_block.trailing_zeros();
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[S::splat(0.0); C]; M];
        let codes = columns.codes.as_ptr().add(column * steps * bytes);
        let next = codes.wrapping_add(C * steps * bytes);
        for step in 0..steps {
            // Those of the columns that come next lie behind these in one piece.
            for line in 0..(C * bytes).div_ceil(LINE) {
                S::prefetch(next.wrapping_add(step * C * bytes + line * LINE));
            }
            let a = a.add(2 * M * step * S::LANES);
            for c in 0..C {
                let block = (column + c) * blocks + (step >> shift);
                let zero = zero_of::<S, BITS, ZEROS>(columns, block);
                let scale = S::splat(*columns.scales.get_unchecked(block));
                let weights = decode::<S, BITS>(codes.add((c * steps + step) * bytes), zero, scale);
                for (m, sums) in sums.iter_mut().enumerate() {
                    let a = a.add(2 * m * S::LANES);
                    sums[c] = S::fma(weights[0], S::load(a), sums[c]);
                    sums[c] = S::fma(weights[1], S::load(a.add(S::LANES)), sums[c]);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            write_sums::<S>(sums, out.add(m * columns.count + column));
        }
    }
}

/// Adds the lanes of each vector, and writes the sums side by side.
///
/// # Safety
/// The machine has the instruction set of `S`, and `out` has as many places as there are sums: a row of those that
/// [`products_body`] checks.
#[inline(always)]
unsafe fn write_sums<S: Simd>(sums: &[S::V], out: *mut f32) {
    for (four, sums) in sums.chunks(4).enumerate() {
        // SAFETY: the caller has as many places as sums.
        unsafe {
            let of = |i: usize| sums[i.min(sums.len() - 1)];
            let added = S::sums([of(0), of(1), of(2), of(3)]);
            for (i, sum) in added.iter().take(sums.len()).enumerate() {
                *out.add(4 * four + i) = *sum;
            }
        }
    }
}

/// As [`products_of`], for many rows: a strip of columns is decoded once, a piece at a time, and sums wait in memory
/// meanwhile.
///
/// # Safety
/// As [`products_of`]: sizes are those that [`products_body`] checks.
#[inline(always)]
unsafe fn products_of_many<S: Simd, const BITS: usize, const ZEROS: bool>(
    columns: &Columns<'_>,
    rows: &[f32],
    many: &mut ManyBuffers,
    out: &mut [f32],
) {
    let count = out.len() / columns.count;
    for first in (0..columns.count).step_by(STRIP) {
        let end = (first + STRIP).min(columns.count);
        let sums = many.sums.fit(count * STRIP * S::LANES);
        let decoded = many.decoded.fit(DECODED * STRIP);
        // Of equal lengths, as far as blocks allow.
        let most = DECODED / columns.block_size;
        let piece = columns.blocks.div_ceil(columns.blocks.div_ceil(most));
        for block in (0..columns.blocks).step_by(piece) {
            let blocks = block..(block + piece).min(columns.blocks);
            // SAFETY: the caller's promise; a piece is at most `DECODED` weights of each column.
            unsafe {
                if S::LANES == 16 {
                    piece_of_strip::<S, BITS, ZEROS, 4>(columns, first..end, blocks, rows, decoded, sums);
                } else {
                    piece_of_strip::<S, BITS, ZEROS, 2>(columns, first..end, blocks, rows, decoded, sums);
                }
            }
        }
        for (row, sums) in sums.chunks_exact(STRIP * S::LANES).enumerate() {
            // SAFETY: a row has a vector for each column of a strip.
            unsafe {
                let of_row: [S::V; STRIP] = std::array::from_fn(|c| S::load(sums.as_ptr().add(c * S::LANES)));
                let out = out.as_mut_ptr().add(row * columns.count + first);
                write_sums::<S>(&of_row[..end - first], out);
            }
        }
    }
}

/// Decodes blocks of a strip of columns and adds their products with all rows to the sums, `C` columns at once.
///
/// # Safety
/// The machine has the instruction set of `S`. The strip and the blocks are inside the columns, and the buffers are those of
/// [`products_of_many`]. [`products_body`] checks the other sizes.
#[inline(always)]
unsafe fn piece_of_strip<S: Simd, const BITS: usize, const ZEROS: bool, const C: usize>(
    columns: &Columns<'_>,
    strip: Range<usize>,
    blocks: Range<usize>,
    rows: &[f32],
    decoded: &mut [f32],
    sums: &mut [f32],
) {
    let count = sums.len() / (STRIP * S::LANES);
    let padded = columns.blocks * columns.block_size;
    let steps = blocks.len() * columns.block_size / (2 * S::LANES);
    let piece = (steps, blocks.start == 0);
    let whole = strip.len() / C * C;
    let (decoded, sums) = (decoded.as_mut_ptr(), sums.as_mut_ptr());
    // SAFETY: the caller's promise.
    unsafe {
        for c in (0..whole).step_by(C) {
            decode_piece::<S, BITS, ZEROS, C>(columns, strip.start + c, blocks.clone(), decoded.add(c * DECODED));
        }
        for c in whole..strip.len() {
            decode_piece::<S, BITS, ZEROS, 1>(columns, strip.start + c, blocks.clone(), decoded.add(c * DECODED));
        }
        for tile in (0..count).step_by(TILE) {
            let m = TILE.min(count - tile);
            let a = rows.as_ptr().add(tile * padded + blocks.start * columns.block_size * m);
            let sums = sums.add(tile * STRIP * S::LANES);
            for c in (0..whole).step_by(C) {
                let (decoded, sums) = (decoded.add(c * DECODED), sums.add(c * S::LANES));
                match m {
                    1 => decoded_tile::<S, 1, C>(decoded, a, piece, sums),
                    2 => decoded_tile::<S, 2, C>(decoded, a, piece, sums),
                    3 => decoded_tile::<S, 3, C>(decoded, a, piece, sums),
                    _ => decoded_tile::<S, 4, C>(decoded, a, piece, sums),
                }
            }
            for c in whole..strip.len() {
                let (decoded, sums) = (decoded.add(c * DECODED), sums.add(c * S::LANES));
                match m {
                    1 => decoded_tile::<S, 1, 1>(decoded, a, piece, sums),
                    2 => decoded_tile::<S, 2, 1>(decoded, a, piece, sums),
                    3 => decoded_tile::<S, 3, 1>(decoded, a, piece, sums),
                    _ => decoded_tile::<S, 4, 1>(decoded, a, piece, sums),
                }
            }
        }
    }
}

/// Decodes blocks of `C` columns: of each step in turn, the two vectors of each column.
///
/// # Safety
/// The machine has the instruction set of `S`. `C` columns from `column` on and the blocks are there, as [`piece_of_strip`]
/// counts them, and `decoded` has room for them. [`products_body`] checks the sizes.
#[inline(always)]
unsafe fn decode_piece<S: Simd, const BITS: usize, const ZEROS: bool, const C: usize>(
    columns: &Columns<'_>,
    column: usize,
    blocks: Range<usize>,
    decoded: *mut f32,
) {
    if !columns.g_idx.is_empty() {
        // SAFETY: the caller's promise.
        return unsafe { decode_in_order::<S, C>(columns, column, blocks, decoded) };
    }
    let steps = columns.block_size / (2 * S::LANES);
    let bytes = S::LANES * BITS / 4;
    for (i, block) in blocks.enumerate() {
        for c in 0..C {
            let block = (column + c) * columns.blocks + block;
            // SAFETY: the caller's promise.
            unsafe {
                let zero = zero_of::<S, BITS, ZEROS>(columns, block);
                let scale = S::splat(*columns.scales.get_unchecked(block));
                for step in 0..steps {
                    let codes = columns.codes.as_ptr().add((block * steps + step) * bytes);
                    let to = decoded.add(2 * ((i * steps + step) * C + c) * S::LANES);
                    let weights = decode::<S, BITS>(codes, zero, scale);
                    S::store(to, weights[0]);
                    S::store(to.add(S::LANES), weights[1]);
                }
            }
        }
    }
}

/// As [`decode_piece`], where each weight of a column names its block. What lies behind K is 0.
///
/// # Safety
/// `decoded` has room for the blocks of `C` columns, as [`piece_of_strip`] gives it.
unsafe fn decode_in_order<S: Simd, const C: usize>(
    columns: &Columns<'_>,
    column: usize,
    blocks: Range<usize>,
    decoded: *mut f32,
) {
    let (size, lanes) = (columns.block_size, S::LANES);
    let middle = (1 << (columns.bits - 1)) as f32;
    for c in 0..C {
        let of_column = (column + c) * columns.blocks;
        for k in blocks.start * size..blocks.end * size {
            let weight = columns.g_idx.get(k).map_or(0.0, |&g| {
                let block = of_column + g as usize;
                let code = code(&columns.codes[of_column * size * columns.bits / 8..], k, columns.bits);
                let zero = columns.zeros.get(block).copied().unwrap_or(middle);
                (f32::from(code) - zero) * columns.scales[block]
            });
            let (step, i) = ((k - blocks.start * size) / (2 * lanes), k % (2 * lanes));
            let place = if columns.bits == 4 { i / 2 + i % 2 * lanes } else { i };
            // SAFETY: the caller has room for the blocks of `C` columns.
            unsafe { *decoded.add(2 * (step * C + c) * lanes + place) = weight };
        }
    }
}

/// Code `i` of packed ones, the first in the lowest bits.
pub fn code(bytes: &[u8], i: usize, bits: usize) -> u8 {
    match bits {
        4 => bytes[i / 2] >> (i % 2 * 4) & 15,
        _ => bytes[i],
    }
}

/// Adds the products of decoded weights of `C` columns and `M` rows to their sums, in the order of [`few`].
/// `begins`: there are none yet.
///
/// # Safety
/// The machine has the instruction set of `S`. There are `steps` of decoded weights and of `M` rows, and sums for each row,
/// as [`piece_of_strip`] counts them. [`products_body`] checks the rows' sizes.
#[inline(always)]
unsafe fn decoded_tile<S: Simd, const M: usize, const C: usize>(
    decoded: *const f32,
    a: *const f32,
    (steps, begins): (usize, bool),
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[S::splat(0.0); C]; M];
        if !begins {
            sums = std::array::from_fn(|m| std::array::from_fn(|c| S::load(out.add((m * STRIP + c) * S::LANES))));
        }
        for step in 0..steps {
            let (w, a) = (decoded.add(2 * step * C * S::LANES), a.add(2 * step * M * S::LANES));
            for half in 0..2 {
                let weights: [S::V; C] = std::array::from_fn(|c| S::load(w.add((2 * c + half) * S::LANES)));
                for (m, sums) in sums.iter_mut().enumerate() {
                    let a = S::load(a.add((2 * m + half) * S::LANES));
                    for (sum, weight) in sums.iter_mut().zip(weights) {
                        *sum = S::fma(weight, a, *sum);
                    }
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (c, sum) in sums.iter().enumerate() {
                S::store(out.add((m * STRIP + c) * S::LANES), *sum);
            }
        }
    }
}
