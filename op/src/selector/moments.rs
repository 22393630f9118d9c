//! Selector `moments`: mean and standard deviation of the page's keys, elementwise.

use std::ops::Range;

use super::{PageVectors, Scoring, Selector};
use crate::method::element::Element;
use crate::method::tile::{Ahead, products};
use crate::simd::Simd;

/// Mean mu and standard deviation sd; the score of a head is the page's estimated log mass,
/// `scale (q . mu + lambda sqrt(sum_d q_d^2 sd_d^2)) + ln n`, n valid tokens.
pub struct Moments;

impl PageVectors for Moments {
    const ID: Selector = Selector::Moments;

    fn summarize(keys: &[f32], mean: &mut [f32], deviation: &mut [f32], _: &mut [f32]) {
        let d = mean.len();
        let inverse = 1.0 / (keys.len() / d) as f32;
        for row in keys.chunks_exact(d) {
            for (mean, &x) in mean.iter_mut().zip(row) {
                *mean += x;
            }
        }
        for mean in mean.iter_mut() {
            *mean *= inverse;
        }
        for row in keys.chunks_exact(d) {
            for ((var, &mean), &x) in deviation.iter_mut().zip(mean.iter()).zip(row) {
                *var += (x - mean) * (x - mean);
            }
        }
        for var in deviation.iter_mut() {
            *var = (*var * inverse).sqrt();
        }
    }

    /// `q . mu` and `q^2 . sd^2`.
    fn prepare_head(query: &[f32], prepared: &mut Vec<f32>) {
        prepared.extend_from_slice(query);
        prepared.extend(query.iter().map(|q| q * q));
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, E: Element, const R: usize, const K: usize>(
        scoring: &Scoring,
        query: *const f32,
        stored: [*const E; K],
    ) -> [[f32; K]; R] {
        let d = scoring.head_size;
        // SAFETY: the caller's promise.
        unsafe {
            let means = products::<S, E, R, K, false>(query, 2 * d, stored, d, Ahead::NONE);
            let variances =
                products::<S, E, R, K, true>(query.add(d), 2 * d, stored.map(|page| page.add(d)), d, Ahead::NONE);
            with_spread(means, variances, scoring.lambda)
        }
    }

    #[inline(always)]
    fn finish_scores(scoring: &Scoring, scores: &mut [f32], pages: Range<usize>) {
        to_log_mass(scoring, scores, pages);
    }
}

/// `means + lambda sqrt(variances)`
#[inline(always)]
pub(super) fn with_spread<const R: usize, const K: usize>(
    mut means: [[f32; K]; R],
    variances: [[f32; K]; R],
    lambda: f32,
) -> [[f32; K]; R] {
    for r in 0..R {
        for j in 0..K {
            means[r][j] += lambda * variances[r][j].sqrt();
        }
    }
    means
}

/// A page's log mass: its scaled logit plus the logarithm of how many tokens it holds. All but the last are full.
#[inline(always)]
pub(super) fn to_log_mass(scoring: &Scoring, scores: &mut [f32], pages: Range<usize>) {
    let full = (scoring.page_size as f32).ln();
    let (others, last) = scores.split_at_mut(pages.len() - 1);
    others.iter_mut().for_each(|s| *s = scoring.scale * *s + full);
    let tokens = (scoring.len - (pages.end - 1) * scoring.page_size).min(scoring.page_size);
    last.iter_mut()
        .for_each(|s| *s = scoring.scale * *s + (tokens as f32).ln());
}

#[cfg(test)]
mod tests {
    use super::super::page_vectors::summarize;
    use super::*;

    #[test]
    fn of_three_rows_and_of_one() {
        let rows = [1.0f32, -2.0, 4.0, 0.0, 1.0, 5.0];
        let (mut s, mut scratch) = ([9.0f32; 4], Vec::new());
        summarize::<Moments, f32>(&rows, &mut s, &mut scratch);
        assert_eq!(s.map(|v| (v * 1e4).round() / 1e4)[..2], [2.0, 1.0]);
        assert!(
            (s[2] - 2f32.sqrt()).abs() < 1e-6 && (s[3] - (26.0f32 / 3.0).sqrt()).abs() < 1e-6,
            "{s:?}"
        );
        summarize::<Moments, f32>(&rows[..2], &mut s, &mut scratch);
        assert_eq!(s, [1.0, -2.0, 0.0, 0.0]);
    }
}
