//! Selectors whose state is a page summary: two vectors of D a page, `[B, Hkv, P, 2, D]` in the cache's type, and a
//! score that comes from products with them.

use std::ops::Range;

use super::{CacheSize, PageSelector, Scoring, Selector, Written};
use crate::method::element::Element;
use crate::method::tile::{ROWS, keys_of_tile};
use crate::simd::{Isa, Simd, dispatched};

/// A selector with two vectors a page.
pub trait PageVectors: Send + Sync + 'static {
    /// Its name in models.
    const ID: Selector;

    /// Makes the two vectors of a page from its valid keys, `[n, D]` with n at least 1. `first` and `second` hold
    /// zeros,
    /// `scratch` has `2 D` floats.
    fn summarize(keys: &[f32], first: &mut [f32], second: &mut [f32], scratch: &mut [f32]);

    /// Appends the two vectors of a head's query, `D` each, whose products with the page's two make its score.
    fn prepare_head(query: &[f32], prepared: &mut Vec<f32>);

    /// Scores of R heads and K pages, before [`Self::finish_scores`].
    ///
    /// # Safety
    /// `query` points to R heads that [`Self::prepare_head`] made, each of `stored` to a page's two vectors of D; the
    /// machine has the instruction set.
    unsafe fn tile<S: Simd, E: Element, const R: usize, const K: usize>(
        scoring: &Scoring,
        query: *const f32,
        stored: [*const E; K],
    ) -> [[f32; K]; R];

    /// As [`PageSelector::finish_scores`].
    fn finish_scores(scoring: &Scoring, scores: &mut [f32], pages: Range<usize>);
}

impl<V: PageVectors> PageSelector for V {
    const ID: Selector = V::ID;
    type State<E: Element> = E;

    fn update<E: Element>(size: &CacheSize, written: Written, keys: &[E], state: &mut [E], scratch: &mut Vec<f32>) {
        let (d, page_size) = (size.head_size, size.page_size);
        for page in written.from / page_size..=(written.len - 1) / page_size {
            let (start, end) = (page * page_size, ((page + 1) * page_size).min(written.len));
            summarize::<V, E>(&keys[start * d..end * d], &mut state[page * 2 * d..][..2 * d], scratch);
        }
    }

    fn is_finite<E: Element>(size: &CacheSize, len: usize, state: &[E], scratch: &mut Vec<f32>) -> bool {
        let d = size.head_size;
        scratch.resize(scratch.len().max(d), 0.0);
        state[..len.div_ceil(size.page_size) * 2 * d]
            .chunks_exact(d)
            .all(|vector| {
                let vector = E::widen(vector, &mut scratch[..d]);
                vector.iter().fold(true, |all, x| all & x.is_finite())
            })
    }

    fn prepare(scoring: &Scoring, query: &[f32], prepared: &mut Vec<f32>) {
        prepared.clear();
        for head in query.chunks_exact(scoring.head_size) {
            V::prepare_head(head, prepared);
        }
    }

    fn score_heads<E: Element>(
        isa: Isa,
        scoring: &Scoring,
        prepared: &[f32],
        state: &[E],
        pages: Range<usize>,
        scores: &mut [f32],
    ) {
        let heads = prepared.len() / (2 * scoring.head_size);
        assert!(
            scores.len() == heads * pages.len() && pages.end * 2 * scoring.head_size <= state.len(),
            "scores outside their buffers"
        );
        heads_kernel::<E, V>(isa.for_rows(scoring.head_size), scoring, prepared, state, pages, scores);
    }

    fn finish_scores(scoring: &Scoring, scores: &mut [f32], pages: Range<usize>) {
        V::finish_scores(scoring, scores, pages);
    }
}

/// Recomputes a page's summary (`[2, D]`) from its valid key rows (`[n, D]`, n at least 1).
///
/// From the rows, not from the old summary: a step overwrites keys, and a running minimum would keep the overwritten
/// ones.
pub fn summarize<V: PageVectors, E: Element>(rows: &[E], summary: &mut [E], scratch: &mut Vec<f32>) {
    let d = summary.len() / 2;
    scratch.clear();
    scratch.resize(rows.len() + 4 * d, 0.0);
    let (first, rest) = scratch.split_at_mut(d);
    let (second, rest) = rest.split_at_mut(d);
    let (own, buffer) = rest.split_at_mut(2 * d);
    V::summarize(E::widen(rows, buffer), first, second, own);
    let (out_first, out_second) = summary.split_at_mut(d);
    E::narrow(first, out_first);
    E::narrow(second, out_second);
}

dispatched! {
    fn heads_kernel<E: Element, V: PageVectors>(
        scoring: &Scoring, prepared: &[f32], summary: &[E], pages: Range<usize>, out: &mut [f32],
    ) = heads_body
}

/// # Safety
/// [`PageSelector::score_heads`] has checked the lengths; the machine has the instruction set.
#[inline(always)]
unsafe fn heads_body<S: Simd, E: Element, V: PageVectors>(
    scoring: &Scoring,
    prepared: &[f32],
    summary: &[E],
    pages: Range<usize>,
    out: &mut [f32],
) {
    // SAFETY: passed on.
    unsafe {
        if keys_of_tile::<S>() == 4 {
            heads_tiled::<S, E, V, 4>(scoring, prepared, summary, pages, out);
        } else {
            heads_tiled::<S, E, V, 2>(scoring, prepared, summary, pages, out);
        }
    }
}

/// # Safety
/// As [`heads_body`].
#[inline(always)]
unsafe fn heads_tiled<S: Simd, E: Element, V: PageVectors, const K: usize>(
    scoring: &Scoring,
    prepared: &[f32],
    summary: &[E],
    pages: Range<usize>,
    out: &mut [f32],
) {
    let width = 2 * scoring.head_size;
    let (heads, count) = (prepared.len() / width, pages.len());
    for p in (0..count).step_by(K) {
        // SAFETY: pages stay below `pages.end`: the last tile repeats its last page; heads below `heads`.
        unsafe {
            let mut stored = [summary.as_ptr(); K];
            for (j, page) in stored.iter_mut().enumerate() {
                *page = summary.as_ptr().add((pages.start + (p + j).min(count - 1)) * width);
            }
            // The tile after the next: far enough ahead of its use.
            let ahead = summary
                .as_ptr()
                .wrapping_add((pages.start + p + 2 * K) * width)
                .cast::<u8>();
            for line in (0..K * width * size_of::<E>()).step_by(64) {
                S::prefetch(ahead.wrapping_add(line));
            }
            let mut head = 0;
            while head < heads {
                let query = prepared.as_ptr().add(head * width);
                let out = &mut out[head * count..];
                match heads - head {
                    1 => tile::<S, E, V, 1, K>(scoring, query, stored, p, count, out),
                    2 => tile::<S, E, V, 2, K>(scoring, query, stored, p, count, out),
                    3 => tile::<S, E, V, 3, K>(scoring, query, stored, p, count, out),
                    _ => tile::<S, E, V, ROWS, K>(scoring, query, stored, p, count, out),
                }
                head += ROWS;
            }
        }
    }
}

/// Scores of R heads for tile `p` of K pages, into `out`.
///
/// # Safety
/// As [`heads_body`]; `query` points to R prepared heads.
#[inline(always)]
unsafe fn tile<S: Simd, E: Element, V: PageVectors, const R: usize, const K: usize>(
    scoring: &Scoring,
    query: *const f32,
    stored: [*const E; K],
    p: usize,
    count: usize,
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    let scores = unsafe { V::tile::<S, E, R, K>(scoring, query, stored) };
    let n = K.min(count - p);
    for (r, line) in scores.iter().enumerate() {
        out[r * count + p..][..n].copy_from_slice(&line[..n]);
    }
}
