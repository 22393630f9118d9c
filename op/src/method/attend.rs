//! Attention of a block of query rows over pages, with running maxima, so that partial results can be joined.

use super::element::Element;
use super::tile::{ROWS, accumulate, keys_of_tile, products};
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

dispatched! {
    fn pages_kernel<E: Element>(
        block: &Block, query: &[f32], keys: &[E], values: &[E], pages: &[PageRows], partial: &mut Partial<'_>,
    ) = pages_body
}

/// Adds pages, each to the rows from its own first one on. A row sees a page's tokens up to its own position and within
/// its sliding window; keys and values of a page are read from memory once for all rows.
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
    pages: &[PageRows],
    partial: &mut Partial<'_>,
) {
    let rows = query.len() / block.head_size;
    let mut logits = [0.0; ROWS * STRIDE];
    for (i, &(page, first_row)) in pages.iter().enumerate() {
        let next = pages.get(i + 1).map(|&(next, _)| next as usize);
        let mut tile = Tile {
            block,
            query,
            keys,
            values,
            page: page as usize,
            next,
        };
        let mut row = first_row as usize;
        while row < rows {
            // SAFETY: the caller's promise.
            unsafe {
                match rows - row {
                    1 => tile.add::<S, 1>(row, partial, &mut logits),
                    2 => tile.add::<S, 2>(row, partial, &mut logits),
                    3 => tile.add::<S, 3>(row, partial, &mut logits),
                    _ => tile.add::<S, ROWS>(row, partial, &mut logits),
                }
            }
            row += ROWS;
            // The first rows have asked for it.
            tile.next = None;
        }
    }
}

/// One page, and where the next one is.
struct Tile<'a, E> {
    block: &'a Block,
    query: &'a [f32],
    keys: &'a [E],
    values: &'a [E],
    page: usize,
    next: Option<usize>,
}

impl<E: Element> Tile<'_, E> {
    /// Adds the page to R rows.
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
        let page_end = (self.page + 1) * block.page_size;
        let (mut low, mut high) = ([0; R], [0; R]);
        let (mut start, mut end) = (usize::MAX, 0);
        for r in 0..R {
            let position = block.first_position + (row + r) / block.group;
            let oldest = block.local_window.map_or(0, |w| (position + 1).saturating_sub(w));
            low[r] = oldest.max(self.page * block.page_size);
            high[r] = page_end.min(position + 1);
            if low[r] < high[r] {
                start = start.min(low[r]);
                end = end.max(high[r]);
            }
        }
        if start >= end {
            return;
        }
        let count = end - start;
        // SAFETY: tokens `start..end` lie before the block's newest, which the cache holds; there are at most
        // PAGE_SIZE_MAX of them, so that whole tiles and vectors of logits fit in STRIDE.
        unsafe {
            if keys_of_tile::<S>() == 4 {
                self.logits::<S, R, 4>(row, start, count, logits);
            } else {
                self.logits::<S, R, 2>(row, start, count, logits);
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
                if low[r] >= high[r] {
                    line.fill(0.0);
                    continue;
                }
                line[..low[r] - start].fill(f32::NEG_INFINITY);
                line[high[r] - start..].fill(f32::NEG_INFINITY);
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
            let values = self.values[start * d..end * d].as_ptr();
            let page_bytes = block.page_size * d * size_of::<E>();
            let next = self.next.map(|next| {
                self.values
                    .as_ptr()
                    .wrapping_add(next * block.page_size * d)
                    .cast::<u8>()
            });
            let step = keys_of_tile::<S>() * S::LANES;
            accumulate::<S, E, R>(acc, shrink, logits.as_ptr(), STRIDE, values, count, d, |at| {
                if let Some(next) = next {
                    // A share of the next page at each group of columns.
                    let (from, to) = (at * page_bytes / d, ((at + step).min(d)) * page_bytes / d);
                    for line in (from..to).step_by(64) {
                        S::prefetch(next.wrapping_add(line));
                    }
                }
            });
        }
    }

    /// Logits of R rows and `count` tokens from `start` on, K tokens at a time.
    ///
    /// # Safety
    /// As [`Self::add`].
    #[inline(always)]
    unsafe fn logits<S: Simd, const R: usize, const K: usize>(
        &self,
        row: usize,
        start: usize,
        count: usize,
        logits: &mut [f32; ROWS * STRIDE],
    ) {
        let d = self.block.head_size;
        let query = self.query[row * d..][..R * d].as_ptr();
        let keys = self.keys[start * d..(start + count) * d].as_ptr();
        let next = self.next.map(|next| {
            self.keys
                .as_ptr()
                .wrapping_add(next * self.block.page_size * d)
                .cast::<u8>()
        });
        let row_bytes = d * size_of::<E>();
        for t in (0..count).step_by(K) {
            // SAFETY: the last tile repeats its last token; the rest as in `add`.
            unsafe {
                let mut k = [keys; K];
                for (j, key) in k.iter_mut().enumerate() {
                    *key = keys.add((t + j).min(count - 1) * d);
                }
                let tile = products::<S, E, R, K, false>(query, d, k, d);
                for (r, line) in tile.iter().enumerate() {
                    logits[r * STRIDE + t..][..K].copy_from_slice(line);
                }
                if let Some(next) = next {
                    for line in (t * row_bytes..(t + K) * row_bytes).step_by(64) {
                        S::prefetch(next.wrapping_add(line));
                    }
                }
            }
        }
    }
}
