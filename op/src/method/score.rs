//! Scores of pages from their summaries: the arithmetic behind [`super::select`].

use std::ops::Range;

use retro_contract::{GroupScore, Selector};

use super::element::Element;
use super::select::Scoring;
use super::tile::{ROWS, keys_of_tile, products};
use crate::simd::{Isa, Simd, dispatched, exp};

/// Two vectors a head, `2 * D`, that turn its score into products with the page's two stored vectors.
/// Bounds: sum_d max(q kmin, q kmax) = min(q, 0) . kmin + max(q, 0) . kmax; moments, signed or not: q . mean and q^2 . sd^2.
pub fn prepare(selector: Selector, query: &[f32], head_size: usize, prepared: &mut Vec<f32>) {
    prepared.clear();
    for head in query.chunks_exact(head_size) {
        match selector {
            Selector::Bounds => {
                prepared.extend(head.iter().map(|q| q.min(0.0)));
                prepared.extend(head.iter().map(|q| q.max(0.0)));
            }
            Selector::Moments | Selector::SignedMoments => {
                prepared.extend_from_slice(head);
                prepared.extend(head.iter().map(|q| q * q));
            }
        }
    }
}

dispatched! {
    fn heads_kernel<E: Element>(
        scoring: &Scoring, prepared: &[f32], summary: &[E], pages: Range<usize>, out: &mut [f32],
    ) = heads_body
}

/// Scores of every head for the pages `pages`, not yet scaled, head-major: `out` has `g * pages.len()`.
/// Equal summaries have equal scores, wherever they stand.
pub fn score_heads<E: Element>(
    isa: Isa,
    scoring: &Scoring,
    prepared: &[f32],
    summary: &[E],
    pages: Range<usize>,
    out: &mut [f32],
) {
    let heads = prepared.len() / (2 * scoring.head_size);
    assert!(
        out.len() == heads * pages.len() && pages.end * 2 * scoring.head_size <= summary.len(),
        "scores outside their buffers"
    );
    heads_kernel(isa.for_rows(scoring.head_size), scoring, prepared, summary, pages, out);
}

/// # Safety
/// [`score_heads`] has checked the lengths; the machine has the instruction set.
#[inline(always)]
unsafe fn heads_body<S: Simd, E: Element>(
    scoring: &Scoring,
    prepared: &[f32],
    summary: &[E],
    pages: Range<usize>,
    out: &mut [f32],
) {
    // SAFETY: passed on.
    unsafe {
        if keys_of_tile::<S>() == 4 {
            heads_tiled::<S, E, 4>(scoring, prepared, summary, pages, out);
        } else {
            heads_tiled::<S, E, 2>(scoring, prepared, summary, pages, out);
        }
    }
}

/// # Safety
/// As [`heads_body`].
#[inline(always)]
unsafe fn heads_tiled<S: Simd, E: Element, const K: usize>(
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
                    1 => tile::<S, E, 1, K>(scoring, query, stored, p, count, out),
                    2 => tile::<S, E, 2, K>(scoring, query, stored, p, count, out),
                    3 => tile::<S, E, 3, K>(scoring, query, stored, p, count, out),
                    _ => tile::<S, E, ROWS, K>(scoring, query, stored, p, count, out),
                }
                head += ROWS;
            }
        }
    }
}

/// Scores of R heads and K pages.
///
/// # Safety
/// As [`heads_body`]; `query` points to R prepared heads.
#[inline(always)]
unsafe fn tile<S: Simd, E: Element, const R: usize, const K: usize>(
    scoring: &Scoring,
    query: *const f32,
    stored: [*const E; K],
    p: usize,
    count: usize,
    out: &mut [f32],
) {
    let d = scoring.head_size;
    // SAFETY: the caller's promise.
    let scores = unsafe {
        match scoring.selector {
            // The two products are one of twice the length.
            Selector::Bounds => products::<S, E, R, K, false>(query, 2 * d, stored, 2 * d),
            Selector::Moments | Selector::SignedMoments => {
                let mut scores = products::<S, E, R, K, false>(query, 2 * d, stored, d);
                let mut deviations = stored;
                for page in &mut deviations {
                    *page = page.add(d);
                }
                let mut variances = products::<S, E, R, K, true>(query.add(d), 2 * d, deviations, d);
                if scoring.selector == Selector::SignedMoments {
                    let along = products::<S, E, R, K, false>(query, 2 * d, deviations, d);
                    let rho = scoring.correlation;
                    for r in 0..R {
                        for j in 0..K {
                            variances[r][j] = rho * along[r][j] * along[r][j] + (1.0 - rho) * variances[r][j];
                        }
                    }
                }
                for r in 0..R {
                    for j in 0..K {
                        scores[r][j] += scoring.lambda * variances[r][j].sqrt();
                    }
                }
                scores
            }
        }
    };
    let n = K.min(count - p);
    for (r, line) in scores.iter().enumerate() {
        out[r * count + p..][..n].copy_from_slice(&line[..n]);
    }
}

dispatched! {
    /// The group's score of every page from its heads' (`[g, pages.len()]`, as [`score_heads`] leaves them; changed here).
    /// `len`: valid tokens.
    ///
    /// With `GroupScore::Softmax` it is the logarithm of the sum over heads of each head's softmax: the same order, without
    /// pages far below the best all rounding to 0.
    pub fn group_scores(scoring: &Scoring, heads: &mut [f32], pages: Range<usize>, len: usize, scores: &mut [f32]) = group_body
}

/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn group_body<S: Simd>(
    scoring: &Scoring,
    heads: &mut [f32],
    pages: Range<usize>,
    len: usize,
    scores: &mut [f32],
) {
    let count = pages.len();
    if count == 0 {
        return;
    }
    for head in heads.chunks_exact_mut(count) {
        if scoring.selector != Selector::Bounds {
            // The page's log mass: its scaled logit plus the logarithm of how many tokens it holds. All but the last are full.
            let full = (scoring.page_size as f32).ln();
            let (others, last) = head.split_at_mut(count - 1);
            others.iter_mut().for_each(|s| *s = scoring.scale * *s + full);
            let tokens = (len - (pages.end - 1) * scoring.page_size).min(scoring.page_size);
            last.iter_mut()
                .for_each(|s| *s = scoring.scale * *s + (tokens as f32).ln());
        } else if scoring.group_score == GroupScore::Softmax {
            head.iter_mut().for_each(|s| *s *= scoring.scale);
        }
        if scoring.group_score == GroupScore::Softmax {
            // SAFETY: the caller's promise.
            let lse = unsafe { log_sum_exp::<S>(head) };
            head.iter_mut().for_each(|s| *s -= lse);
        }
    }
    let scores = &mut scores[..count];
    scores.copy_from_slice(&heads[..count]);
    for head in heads.chunks_exact(count).skip(1) {
        for (best, &s) in scores.iter_mut().zip(head) {
            // A NaN stays.
            *best = if s > *best || s.is_nan() { s } else { *best };
        }
    }
    if scoring.group_score == GroupScore::Softmax {
        // SAFETY: the caller's promise.
        unsafe { add_spread::<S>(heads, scores) };
    }
    for score in scores.iter_mut() {
        // A page that cannot be scored (a NaN among its keys, or a number beyond f32's range) is read first, so that what is wrong
        // with it shows, as with dense attention. Adding 0 turns -0 into 0, so that the two tie.
        *score = if score.is_nan() { f32::INFINITY } else { *score + 0.0 };
    }
}

/// The logarithm of the sum of e^s over the numbers among the values: a page that cannot be scored leaves the others' shares
/// alone. 0 where all are -inf or NaN.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn log_sum_exp<S: Simd>(values: &[f32]) -> f32 {
    let top = values.iter().fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
    if top == f32::NEG_INFINITY {
        return 0.0;
    }
    if top == f32::INFINITY {
        return top;
    }
    // SAFETY: chunks have LANES elements, the padded one too.
    unsafe {
        let (shift, lowest, mut sum) = (S::splat(top), S::splat(f32::NEG_INFINITY), S::splat(0.0));
        let chunks = values.chunks_exact(S::LANES);
        let mut rest = [f32::NEG_INFINITY; 16];
        rest[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
        for chunk in chunks {
            // -inf where there is a NaN.
            let numbers = S::max(S::load(chunk.as_ptr()), lowest);
            sum = S::add(sum, exp::<S>(S::sub(numbers, shift)));
        }
        let numbers = S::max(S::load(rest.as_ptr()), lowest);
        sum = S::add(sum, exp::<S>(S::sub(numbers, shift)));
        let zero = S::splat(0.0);
        top + S::sums([sum, zero, zero, zero])[0].ln()
    }
}

/// Adds the logarithm of the sum over heads of e^(s - best) to each page's best.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn add_spread<S: Simd>(heads: &[f32], scores: &mut [f32]) {
    let count = scores.len();
    let mut at = 0;
    while at < count {
        let n = S::LANES.min(count - at);
        let mut buffer = [0.0; 16];
        // SAFETY: the buffer is as long as any vector; a whole vector is read from slices only where there is one.
        unsafe {
            let load = |from: &[f32]| {
                if n == S::LANES {
                    S::load(from[..n].as_ptr())
                } else {
                    let mut some = [0.0; 16];
                    some[..n].copy_from_slice(&from[..n]);
                    S::load(some.as_ptr())
                }
            };
            let best = load(&scores[at..]);
            let mut sum = S::splat(0.0);
            for head in heads.chunks_exact(count) {
                sum = S::add(sum, exp::<S>(S::sub(load(&head[at..]), best)));
            }
            S::store(buffer.as_mut_ptr(), sum);
        }
        for (score, sum) in scores[at..at + n].iter_mut().zip(buffer) {
            if *score != f32::NEG_INFINITY {
                *score += sum.ln();
            }
        }
        at += n;
    }
}
