//! Attention of a block of query rows over pages, with running maxima, so that partial results can be joined.

use std::ops::Range;

use super::element::Element;
use super::tile::{Ahead, ROWS, accumulate, keys_of_tile, products};
use crate::simd::{Isa, Simd, dispatched, exp};

/// Softmax attention over the tokens seen so far, for a block of rows. Row `i` is query head `i % group` of token
/// `i / group`; tokens stand at consecutive positions.
pub struct Partial<'a> {
    /// Running maximum of the logits, `rows`: -inf before a row has seen any token, at least `f32::MIN` from then on.
    pub max: &'a mut [f32],
    /// Sum of e^(logit - max), `rows`.
    pub sum: &'a mut [f32],
    /// Sum of e^(logit - max) * value, `rows * D`.
    pub acc: &'a mut [f32],
}

impl Partial<'_> {
    /// Forgets everything: nothing has been seen.
    pub fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.acc.fill(0.0);
    }

    /// Whether a row has seen any token.
    pub fn has_seen(&self, row: usize) -> bool {
        self.max[row] > f32::NEG_INFINITY
    }

    /// Log-sum-exp of a row; -inf when it has seen nothing, or logits of -inf alone.
    pub fn lse(&self, row: usize) -> f32 {
        if self.sum[row] == 0.0 {
            f32::NEG_INFINITY
        } else {
            self.max[row] + self.sum[row].ln()
        }
    }
}

/// What a block of rows has in common.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Query heads a KV head, g.
    pub group: usize,
    /// D.
    pub head_size: usize,
    pub page_size: usize,
    /// Position of the block's first token.
    pub first_position: usize,
    /// 0: off.
    pub softcap: f32,
    /// Tokens that a query sees, itself included.
    pub local_window: Option<usize>,
}

/// A page to attend to, and the first of the block's rows that does.
pub type PageRows = (u32, u32);

/// Longest page, and room for whole tiles and vectors behind it.
const STRIDE: usize = retro_contract::limits::PAGE_SIZE_MAX + 16;

/// Tokens of a tile, of shorter pages as many as this many tokens fill: keys and values of so many rows of 128 floats
/// are as much as a first-level cache holds.
const TILE: usize = 32;

dispatched! {
    fn pages_kernel<E: Element>(
        block: &Block, query: &[f32], keys: &[E], values: &[E], pages: &[PageRows], partial: &mut Partial<'_>,
    ) = pages_body
}

/// Adds pages, each to the rows from its own first one on. A row sees a page's tokens up to its own position and within
/// its sliding window; keys and values of a page are read from memory once for all rows. Pages that are neighbours in
/// the list and have the same first row are read together: order them by it.
///
/// `query`: `rows * D`, after RoPE and scaled; `keys`, `values`: one KV head's cache, `[C, D]`. Panics when a page
/// holds tokens of the block's that lie outside the cache.
pub fn attend_pages<E: Element>(
    isa: Isa,
    block: &Block,
    query: &[f32],
    keys: &[E],
    values: &[E],
    pages: &[PageRows],
    partial: &mut Partial<'_>,
) {
    let (d, rows) = (block.head_size, query.len() / block.head_size);
    let tokens = block.first_position + rows / block.group;
    assert!(
        block.page_size <= retro_contract::limits::PAGE_SIZE_MAX
            && tokens * d <= keys.len()
            && tokens * d <= values.len()
            && partial.max.len() == rows
            && partial.sum.len() == rows
            && partial.acc.len() == rows * d,
        "attention outside its buffers"
    );
    pages_kernel(isa.for_rows(d), block, query, keys, values, pages, partial);
}

/// # Safety
/// [`attend_pages`] has checked the lengths; the machine has the instruction set.
#[inline(always)]
unsafe fn pages_body<S: Simd, E: Element>(
    block: &Block,
    query: &[f32],
    keys: &[E],
    values: &[E],
    mut pages: &[PageRows],
    partial: &mut Partial<'_>,
) {
    let rows = query.len() / block.head_size;
    let mut logits = [0.0; ROWS * STRIDE];
    let (mut tile, mut next) = (NONE, NONE);
    pages = tile.take(block, pages);
    while tile.count > 0 {
        pages = next.take(block, pages);
        let mut attention = Tile {
            block,
            query,
            keys,
            values,
            tokens: &tile,
            next: &next,
        };
        let mut row = tile.first_row;
        while row < rows {
            // SAFETY: the caller's promise.
            unsafe {
                match rows - row {
                    1 => attention.add::<S, 1>(row, partial, &mut logits),
                    2 => attention.add::<S, 2>(row, partial, &mut logits),
                    3 => attention.add::<S, 3>(row, partial, &mut logits),
                    _ => attention.add::<S, ROWS>(row, partial, &mut logits),
                }
            }
            row += ROWS;
            // The first rows have asked for it.
            attention.next = &NONE;
        }
        std::mem::swap(&mut tile, &mut next);
    }
}

/// The tokens of a tile's pages.
struct Tokens {
    /// Positions, `count`, and where their rows begin in the cache.
    positions: [u32; STRIDE],
    starts: [usize; STRIDE],
    count: usize,
    /// The least of the positions, and one more than the largest.
    span: (u32, u32),
    /// The first of the block's rows that they are for.
    first_row: usize,
}

const NONE: Tokens = Tokens {
    positions: [0; STRIDE],
    starts: [0; STRIDE],
    count: 0,
    span: (u32::MAX, 0),
    first_row: 0,
};

impl Tokens {
    /// Becomes those of the first pages, as many as a tile has; the rest of the pages.
    #[inline(always)]
    fn take<'a>(&mut self, block: &Block, pages: &'a [PageRows]) -> &'a [PageRows] {
        let first_row = pages.first().map_or(0, |&(_, row)| row);
        let most = (TILE / block.page_size).max(1);
        let taken = pages
            .iter()
            .take(most)
            .take_while(|&&(_, row)| row == first_row)
            .count();
        (self.count, self.span) = (0, NONE.span);
        for &(page, _) in &pages[..taken] {
            let first = page as usize * block.page_size;
            let (positions, starts) = (&mut self.positions[self.count..], &mut self.starts[self.count..]);
            for (i, (position, start)) in positions.iter_mut().zip(starts).take(block.page_size).enumerate() {
                (*position, *start) = ((first + i) as u32, (first + i) * block.head_size);
            }
            self.count += block.page_size;
            self.widen(first as u32, (first + block.page_size) as u32);
        }
        self.first_row = first_row as usize;
        &pages[taken..]
    }

    #[inline(always)]
    fn positions(&self) -> &[u32] {
        &self.positions[..self.count]
    }

    #[inline(always)]
    fn starts(&self) -> &[usize] {
        &self.starts[..self.count]
    }

    /// Those in a range.
    #[inline(always)]
    fn within(&self, range: &Range<usize>) -> Self {
        let mut some = NONE;
        for (&position, &start) in self.positions().iter().zip(self.starts()) {
            if range.contains(&(position as usize)) {
                (some.positions[some.count], some.starts[some.count]) = (position, start);
                some.count += 1;
                some.widen(position, position + 1);
            }
        }
        some
    }

    #[inline(always)]
    fn widen(&mut self, first: u32, end: u32) {
        self.span = (self.span.0.min(first), self.span.1.max(end));
    }

    /// Whether they are all in a range.
    #[inline(always)]
    fn are_within(&self, range: &Range<usize>) -> bool {
        range.start <= self.span.0 as usize && self.span.1 as usize <= range.end
    }
}

/// One tile, and the one that comes next.
struct Tile<'a, E> {
    block: &'a Block,
    query: &'a [f32],
    keys: &'a [E],
    values: &'a [E],
    tokens: &'a Tokens,
    next: &'a Tokens,
}

impl<E: Element> Tile<'_, E> {
    /// Adds the tile to R rows.
    ///
    /// # Safety
    /// As [`pages_body`], and the rows are the block's.
    #[inline(always)]
    unsafe fn add<S: Simd, const R: usize>(
        &self,
        row: usize,
        partial: &mut Partial<'_>,
        logits: &mut [f32; ROWS * STRIDE],
    ) {
        let block = self.block;
        let d = block.head_size;
        // The tokens that each row sees, and those that any of them does.
        let sees: [Range<usize>; R] = std::array::from_fn(|r| {
            let end = block.first_position + (row + r) / block.group + 1;
            block.local_window.map_or(0, |w| end.saturating_sub(w))..end
        });
        let all = sees[0].start..sees[R - 1].end;
        let seen;
        let tokens = if self.tokens.are_within(&all) {
            self.tokens
        } else {
            seen = self.tokens.within(&all);
            &seen
        };
        let count = tokens.count;
        if count == 0 {
            return;
        }
        // SAFETY: tokens lie before the block's newest, which the cache holds; there are at most PAGE_SIZE_MAX of
        // them, so that whole tiles and vectors of logits fit in STRIDE.
        unsafe {
            if keys_of_tile::<S>() == 4 {
                self.logits::<S, R, 4>(row, tokens.starts(), logits);
            } else {
                self.logits::<S, R, 2>(row, tokens.starts(), logits);
            }
            if block.softcap > 0.0 {
                for r in 0..R {
                    for l in &mut logits[r * STRIDE..][..count] {
                        *l = block.softcap * (*l / block.softcap).tanh();
                    }
                }
            }
            let padded = count.next_multiple_of(S::LANES);
            let mut shrink = [1.0; R];
            let mut sums = [S::splat(0.0); ROWS];
            for r in 0..R {
                let line = &mut logits[r * STRIDE..][..padded];
                line[count..].fill(f32::NEG_INFINITY);
                if !tokens.are_within(&sees[r]) {
                    let mut any = false;
                    for (logit, &position) in line.iter_mut().zip(tokens.positions()) {
                        let seen = sees[r].contains(&(position as usize));
                        any |= seen;
                        *logit = if seen { *logit } else { f32::NEG_INFINITY };
                    }
                    if !any {
                        line.fill(0.0);
                        continue;
                    }
                }
                // A NaN is never the largest; its weight is NaN, and so is the sum. Where every logit is NaN or -inf
                // the finite maximum keeps the NaNs and gives -inf the weight 0.
                let mut top = S::splat(f32::MIN);
                for at in (0..padded).step_by(S::LANES) {
                    top = S::max(S::load(line.as_ptr().add(at)), top);
                }
                let (old, top) = (partial.max[row + r], S::largest(top));
                let new = if top > old { top } else { old };
                if new > old {
                    shrink[r] = (old - new).exp();
                    partial.max[row + r] = new;
                }
                let new = S::splat(new);
                for at in (0..padded).step_by(S::LANES) {
                    let p = line.as_mut_ptr().add(at);
                    let weights = exp::<S>(S::sub(S::load(p), new));
                    S::store(p, weights);
                    sums[r] = S::add(sums[r], weights);
                }
            }
            let sums = S::sums(sums);
            for r in 0..R {
                partial.sum[row + r] = partial.sum[row + r] * shrink[r] + sums[r];
            }
            let acc = partial.acc[row * d..][..R * d].as_mut_ptr();
            let ahead = Ahead {
                cache: self.values.as_ptr(),
                rows: self.next.starts(),
            };
            accumulate::<S, E, R>(
                acc,
                shrink,
                logits.as_ptr(),
                STRIDE,
                self.values.as_ptr(),
                tokens.starts(),
                d,
                ahead,
            );
        }
    }

    /// Logits of R rows and the tokens, K at a time.
    ///
    /// # Safety
    /// As [`Self::add`].
    #[inline(always)]
    unsafe fn logits<S: Simd, const R: usize, const K: usize>(
        &self,
        row: usize,
        starts: &[usize],
        logits: &mut [f32; ROWS * STRIDE],
    ) {
        let d = self.block.head_size;
        let query = self.query[row * d..][..R * d].as_ptr();
        let next = self.next.starts();
        for t in (0..starts.len()).step_by(K) {
            // SAFETY: the last tile repeats its last token; the rest as in `add`.
            unsafe {
                let k: [*const E; K] =
                    std::array::from_fn(|j| self.keys.as_ptr().add(starts[(t + j).min(starts.len() - 1)]));
                let ahead = Ahead {
                    cache: self.keys.as_ptr(),
                    rows: &next[t.min(next.len())..],
                };
                let tile = products::<S, E, R, K, false>(query, d, k, d, ahead);
                for (r, line) in tile.iter().enumerate() {
                    logits[r * STRIDE + t..][..K].copy_from_slice(line);
                }
            }
        }
    }
}
