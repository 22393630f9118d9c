//! How the scores of a query group's heads become a page's (attribute `group_score`).

use std::ops::Range;

use retro_contract::GroupScore;

use crate::selector::{PageSelector, Scoring};
use crate::simd::{Simd, dispatched, exp, ln_1p};

dispatched! {
    /// The group's score of every candidate page, `scores` `[pages.len()]`, from its heads' (`[g, pages.len()]`, as
    /// [`PageSelector::score_heads`] leaves them; changed here).
    ///
    /// With `GroupScore::Softmax` it is the logarithm of the sum over heads of each head's softmax: the same order,
    /// without pages far below the best all rounding to 0, or those that have all but nothing of a head to 1. Of heads
    /// that look up a page each, the one that is surest comes first.
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
            let (mut top, mut rest) = unsafe { top_and_rest::<S>(head) };
            if top == f32::INFINITY {
                // Beyond f32's range: such pages cannot be scored either.
                head.iter_mut()
                    .filter(|s| **s == f32::INFINITY)
                    .for_each(|s| *s = f32::NAN);
                // SAFETY: the caller's promise.
                (top, rest) = unsafe { top_and_rest::<S>(head) };
            }
            let rest = rest.ln_1p();
            head.iter_mut().for_each(|s| *s = (*s - top) - rest);
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

/// The largest number among the values, and the sum of e^(s - largest) over the others: a page that cannot be scored
/// leaves the others' shares alone. Without the largest, so that what little the others have is not lost beside its 1.
/// Zeros where all are -inf or NaN; of an infinite one nothing but itself.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn top_and_rest<S: Simd>(values: &[f32]) -> (f32, f32) {
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
        return (0.0, 0.0);
    }
    if top == f32::INFINITY {
        return (top, 0.0);
    }
    // SAFETY: as above.
    unsafe {
        let (shift, lowest) = (S::splat(top), S::splat(f32::NEG_INFINITY));
        let mut sums = Sums::<S>::new();
        for piece in whole.chunks_exact(S::LANES) {
            // -inf where there is a NaN.
            let numbers = S::max(S::load(piece.as_ptr()), lowest);
            sums.add(S::sub(numbers, shift));
        }
        let numbers = S::max(S::load(rest.as_ptr()), lowest);
        sums.add(S::sub(numbers, shift));
        let zero = S::splat(0.0);
        let [below, equal, ..] = S::sums([sums.below, sums.equal, zero, zero]);
        (top, below + (equal - 1.0))
    }
}

/// Sums of e^x over numbers that are 0 or below, those that are 0 counted apart.
struct Sums<S: Simd> {
    below: S::V,
    equal: S::V,
}

impl<S: Simd> Sums<S> {
    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn new() -> Self {
        // SAFETY: the caller's promise.
        let zero = unsafe { S::splat(0.0) };
        Self {
            below: zero,
            equal: zero,
        }
    }

    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn add(&mut self, x: S::V) {
        // SAFETY: the caller's promise.
        unsafe {
            let power = exp::<S>(x);
            let one = S::unless_below(x, S::splat(0.0), power);
            self.below = S::add(self.below, S::sub(power, one));
            self.equal = S::add(self.equal, one);
        }
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
            let mut sums = Sums::<S>::new();
            for head in heads.chunks_exact(count) {
                sums.add(S::sub(load(&head[at..]), best));
            }
            let others = S::add(sums.below, S::sub(sums.equal, S::splat(1.0)));
            S::store(buffer.as_mut_ptr(), ln_1p::<S>(others));
        }
        for (score, ln) in scores[at..at + n].iter_mut().zip(buffer) {
            *score += if *score == f32::NEG_INFINITY { 0.0 } else { ln };
        }
        at += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selector::Sketch;
    use crate::simd::Isa;

    fn by_softmax(heads: &[[f32; 4]]) -> Vec<Vec<f32>> {
        let scoring = Scoring {
            group_score: GroupScore::Softmax,
            scale: 1.0,
            lambda: 0.0,
            correlation: 0.0,
            page_size: 8,
            head_size: 8,
            len: 32,
            softcap: 0.0,
            local_window: None,
            sketch_bits: 2,
        };
        let of = |&isa: &Isa| {
            let (mut all, mut scores) = (heads.concat(), vec![f32::NAN; 4]);
            group_scores::<Sketch>(isa, &scoring, &mut all, 0..4, &mut scores);
            scores
        };
        Isa::all().iter().map(of).collect()
    }

    /// A NaN, or a score beyond f32's range.
    #[test]
    fn a_page_without_a_score_comes_first_and_leaves_the_others_theirs() {
        let less = f32::NEG_INFINITY;
        let expected = by_softmax(&[[less, 1.0, 5.0, 2.0], [less, 3.0, 0.0, 0.0]]);
        for broken in [f32::NAN, f32::INFINITY] {
            for other in [broken, less] {
                let found = by_softmax(&[[broken, 1.0, 5.0, 2.0], [other, 3.0, 0.0, 0.0]]);
                for (found, expected) in found.iter().zip(&expected) {
                    assert_eq!(found[0], f32::INFINITY, "{broken} {other}");
                    assert_eq!(found[1..], expected[1..], "{broken} {other}");
                }
            }
        }
    }
}
