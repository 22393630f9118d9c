//! Selector `signed_moments`: as `moments`, each element of the standard deviation signed by the page's principal
//! direction, so that deviations which move together add up along the query.

use std::ops::Range;

use super::moments::{Moments, to_log_mass, with_spread};
use super::{PageVectors, Scoring, Selector};
use crate::method::element::Element;
use crate::method::tile::{Ahead, products};
use crate::simd::Simd;

/// Mean mu and signed deviation sd; as [`Moments`], with the variance along the query
/// `rho (q . sd)^2 + (1 - rho) sum_d q_d^2 sd_d^2`, rho the attribute `selector_correlation`.
pub struct SignedMoments;

impl PageVectors for SignedMoments {
    const ID: Selector = Selector::SignedMoments;

    fn summarize(keys: &[f32], mean: &mut [f32], deviation: &mut [f32], scratch: &mut [f32]) {
        Moments::summarize(keys, mean, deviation, &mut []);
        let (direction, next) = scratch.split_at_mut(mean.len());
        principal_direction(keys, mean, direction, next);
        for (sd, &x) in deviation.iter_mut().zip(direction.iter()) {
            // Elements of 0 but for rounding count as positive.
            if x < -1e-5 {
                *sd = -*sd;
            }
        }
    }

    /// As [`Moments`]; the query's product with the signed deviations needs no third vector.
    fn prepare_head(query: &[f32], prepared: &mut Vec<f32>) {
        Moments::prepare_head(query, prepared);
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, E: Element, const R: usize, const K: usize>(
        scoring: &Scoring,
        query: *const f32,
        stored: [*const E; K],
    ) -> [[f32; K]; R] {
        let (d, rho) = (scoring.head_size, scoring.correlation);
        // SAFETY: the caller's promise.
        unsafe {
            let means = products::<S, E, R, K, false>(query, 2 * d, stored, d, Ahead::NONE);
            let deviations = stored.map(|page| page.add(d));
            let mut variances = products::<S, E, R, K, true>(query.add(d), 2 * d, deviations, d, Ahead::NONE);
            let along = products::<S, E, R, K, false>(query, 2 * d, deviations, d, Ahead::NONE);
            for r in 0..R {
                for j in 0..K {
                    variances[r][j] = rho * along[r][j] * along[r][j] + (1.0 - rho) * variances[r][j];
                }
            }
            with_spread(means, variances, scoring.lambda)
        }
    }

    #[inline(always)]
    fn finish_scores(scoring: &Scoring, scores: &mut [f32], pages: Range<usize>) {
        to_log_mass(scoring, scores, pages);
    }
}

/// Rounds of the power iteration in [`principal_direction`].
const ROUNDS: usize = 2;

/// About the first principal direction of the rows, up to its length and sign, into `direction`: two rounds of the
/// power iteration from the row farthest from the mean. `next` is scratch. The largest element is 1 or -1; all are 0
/// when the rows are equal.
///
/// Only the signs of its elements are used, and two rounds settle those that matter (docs/notes/accuracy.md).
fn principal_direction(rows: &[f32], mean: &[f32], direction: &mut [f32], next: &mut [f32]) {
    let d = mean.len();
    let (mut farthest, mut most) = (0, 0.0f32);
    for (i, row) in rows.chunks_exact(d).enumerate() {
        let distance: f32 = row.iter().zip(mean).map(|(&x, &m)| (x - m) * (x - m)).sum();
        // The first of those that are as far but for rounding, so that every execution provider starts from the same
        // row.
        if distance > most * 1.00001 {
            (farthest, most) = (i, distance);
        }
    }
    let start = &rows[farthest * d..][..d];
    for ((f, &x), &m) in direction.iter_mut().zip(start).zip(mean) {
        *f = x - m;
    }
    for _ in 0..ROUNDS {
        next.fill(0.0);
        for row in rows.chunks_exact(d) {
            let mut along = 0.0;
            for ((&f, &x), &m) in direction.iter().zip(row).zip(mean) {
                along += f * (x - m);
            }
            for ((n, &x), &m) in next.iter_mut().zip(row).zip(mean) {
                *n += along * (x - m);
            }
        }
        // Kept in range: each round multiplies by a variance.
        let largest = next.iter().fold(0.0f32, |top, x| top.max(x.abs()));
        let inverse = if largest > 0.0 { 1.0 / largest } else { 0.0 };
        for (f, n) in direction.iter_mut().zip(next.iter()) {
            *f = n * inverse;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::page_vectors::summarize;
    use super::*;

    #[test]
    fn deviations_are_signed_by_the_principal_direction() {
        let mut s = [0.0f32; 6];
        let mut scratch = Vec::new();
        // Elements 0 and 1 move against each other, element 2 hardly, with element 0.
        let rows = [2.0f32, -1.0, 0.1, -2.0, 1.0, -0.1, 1.0, -0.5, 0.0, -1.0, 0.5, 0.0];
        summarize::<SignedMoments, f32>(&rows, &mut s, &mut scratch);
        let mut plain = [0.0f32; 6];
        summarize::<Moments, f32>(&rows, &mut plain, &mut scratch);
        assert_eq!(s.map(f32::abs), plain.map(f32::abs));
        assert!(s[3] * s[4] < 0.0 && s[3] * s[5] > 0.0, "{s:?}");
        // Equal rows, and one row: no spread, no direction, no NaN.
        for rows in [&[1.0f32, -2.0, 3.0, 1.0, -2.0, 3.0][..], &[1.0, -2.0, 3.0]] {
            summarize::<SignedMoments, f32>(rows, &mut s, &mut scratch);
            assert_eq!(s, [1.0, -2.0, 3.0, 0.0, 0.0, 0.0]);
        }
        // Spreads beyond what a power of five would hold.
        summarize::<SignedMoments, f32>(&[6e4f32, -6e4, 0.0, -6e4, 6e4, 0.0], &mut s, &mut scratch);
        assert!(s.iter().all(|x| x.is_finite()) && s[3] * s[4] < 0.0, "{s:?}");
    }
}
