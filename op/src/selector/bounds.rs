//! Selector `bounds` (the paper's, Quest's): elementwise minimum and maximum of the page's keys, an upper bound of
//! every product with the query.
//!
//! Source: Tang et al., "Quest", ICML 2024.

use std::ops::Range;

use super::{GroupScore, PageVectors, Scoring, Selector};
use crate::method::element::Element;
use crate::method::tile::{Ahead, products};
use crate::simd::Simd;

/// kmin and kmax; the score of a head is `sum_d max(q_d kmin_d, q_d kmax_d)`.
pub struct Bounds;

impl PageVectors for Bounds {
    const ID: Selector = Selector::Bounds;

    fn summarize(keys: &[f32], lowest: &mut [f32], highest: &mut [f32], scratch: &mut [f32]) {
        let d = lowest.len();
        let (first, others) = keys.split_at(d);
        lowest.copy_from_slice(first);
        highest.copy_from_slice(first);
        let (sums, _) = scratch.split_at_mut(d);
        sums.copy_from_slice(first);
        for row in others.chunks_exact(d) {
            let bounds = lowest.iter_mut().zip(highest.iter_mut()).zip(sums.iter_mut());
            for (((lo, hi), sum), &x) in bounds.zip(row) {
                *lo = if x < *lo { x } else { *lo };
                *hi = if x > *hi { x } else { *hi };
                *sum += x;
            }
        }
        // A NaN among the keys makes both bounds NaN, and so the page's score. Comparisons pass over it, sums do not.
        for (i, _) in sums.iter().enumerate().filter(|(_, sum)| sum.is_nan()) {
            if keys[i..].iter().step_by(d).any(|x| x.is_nan()) {
                (lowest[i], highest[i]) = (f32::NAN, f32::NAN);
            }
        }
    }

    /// `sum_d max(q kmin, q kmax) = min(q, 0) . kmin + max(q, 0) . kmax`
    fn prepare_head(query: &[f32], prepared: &mut Vec<f32>) {
        prepared.extend(query.iter().map(|q| q.min(0.0)));
        prepared.extend(query.iter().map(|q| q.max(0.0)));
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, E: Element, const R: usize, const K: usize>(
        scoring: &Scoring,
        query: *const f32,
        stored: [*const E; K],
    ) -> [[f32; K]; R] {
        // The two products are one of twice the length.
        let both = 2 * scoring.head_size;
        // SAFETY: the caller's promise.
        unsafe { products::<S, E, R, K, false>(query, both, stored, both, Ahead::NONE) }
    }

    /// Only a softmax over pages needs them scaled.
    #[inline(always)]
    fn finish_scores(scoring: &Scoring, scores: &mut [f32], _: Range<usize>) {
        if scoring.group_score == GroupScore::Softmax {
            scores.iter_mut().for_each(|s| *s *= scoring.scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::page_vectors::summarize;
    use super::*;

    #[test]
    fn of_three_rows() {
        let rows = [1.0f32, -2.0, 4.0, 0.0, 1.0, 5.0];
        let (mut s, mut scratch) = ([9.0f32; 4], Vec::new());
        summarize::<Bounds, f32>(&rows, &mut s, &mut scratch);
        assert_eq!(s, [1.0, -2.0, 4.0, 5.0]);
        // A NaN in any row shows in its element.
        for at in [0, 2, 4] {
            let mut rows = rows;
            rows[at] = f32::NAN;
            summarize::<Bounds, f32>(&rows, &mut s, &mut scratch);
            assert!(
                s[0].is_nan() && s[2].is_nan() && s[1] == -2.0 && s[3] == 5.0,
                "row {at}: {s:?}"
            );
        }
    }
}
