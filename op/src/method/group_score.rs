//! How the scores of a query group's heads become a page's (attribute `group_score`).

use std::ops::Range;

use retro_contract::GroupScore;

use crate::selector::{PageSelector, Scoring};
use crate::simd::{Simd, dispatched, exp, ln};

dispatched! {
    /// The group's score of every candidate page, `scores` `[pages.len()]`, from its heads' (`[g, pages.len()]`, as
    /// [`PageSelector::score_heads`] leaves them; changed here).
    ///
    /// With `GroupScore::Softmax` it is the logarithm of the sum over heads of each head's softmax: the same order,
    /// without pages far below the best all rounding to 0.
    pub fn group_scores<P: PageSelector>(
        scoring: &Scoring, heads: &mut [f32], pages: Range<usize>, scores: &mut [f32],
    ) = group_body
}

/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn group_body<S: Simd, P: PageSelector>(
    scoring: &Scoring,
    heads: &mut [f32],
    pages: Range<usize>,
    scores: &mut [f32],
) {
    let count = pages.len();
    if count == 0 {
        return;
    }
    for head in heads.chunks_exact_mut(count) {
        P::finish_scores(scoring, head, pages.clone());
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
        // A page that cannot be scored (a NaN among its keys, or a number beyond f32's range) is read first, so that
        // what is wrong with it shows, as with dense attention. Adding 0 turns -0 into 0, so that the two tie.
        *score = if score.is_nan() { f32::INFINITY } else { *score + 0.0 };
    }
}

/// The logarithm of the sum of e^s over the numbers among the values: a page that cannot be scored leaves the others'
/// shares alone. 0 where all are -inf or NaN.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn log_sum_exp<S: Simd>(values: &[f32]) -> f32 {
    let (whole, left) = values.split_at(values.len() - values.len() % S::LANES);
    let mut rest = [f32::NEG_INFINITY; 16];
    rest[..left.len()].copy_from_slice(left);
    // SAFETY: pieces have LANES elements, the padded one too.
    let top = unsafe {
        let (one, mut both) = (S::load(rest.as_ptr()), [S::splat(f32::NEG_INFINITY); 2]);
        // Of a NaN and a number, the number.
        both[0] = S::max(one, both[0]);
        let mut pairs = whole.chunks_exact(2 * S::LANES);
        for pair in &mut pairs {
            both[0] = S::max(S::load(pair.as_ptr()), both[0]);
            both[1] = S::max(S::load(pair[S::LANES..].as_ptr()), both[1]);
        }
        for piece in pairs.remainder().chunks_exact(S::LANES) {
            both[0] = S::max(S::load(piece.as_ptr()), both[0]);
        }
        S::largest(S::max(both[0], both[1]))
    };
    if top == f32::NEG_INFINITY {
        return 0.0;
    }
    if top == f32::INFINITY {
        return top;
    }
    // SAFETY: as above.
    unsafe {
        let (shift, lowest, mut sum) = (S::splat(top), S::splat(f32::NEG_INFINITY), S::splat(0.0));
        for piece in whole.chunks_exact(S::LANES) {
            // -inf where there is a NaN.
            let numbers = S::max(S::load(piece.as_ptr()), lowest);
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
            S::store(buffer.as_mut_ptr(), ln::<S>(sum));
        }
        for (score, ln) in scores[at..at + n].iter_mut().zip(buffer) {
            *score += if *score == f32::NEG_INFINITY { 0.0 } else { ln };
        }
        at += n;
    }
}
