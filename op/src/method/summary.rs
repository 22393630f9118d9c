//! Page summaries: two vectors of D a page, from which a page is scored without reading its keys.

use retro_contract::Selector;

use super::element::Element;

/// Recomputes a page's summary (`[2, D]`) from its valid key rows (`n * D`, n at least 1).
///
/// From the rows, not from the old summary: a step overwrites keys, and a running minimum would keep the overwritten ones.
pub fn summarize<E: Element>(selector: Selector, rows: &[E], summary: &mut [E], scratch: &mut Vec<f32>) {
    let d = summary.len() / 2;
    let n = rows.len() / d;
    scratch.clear();
    scratch.resize(rows.len() + 4 * d, 0.0);
    let (a, rest) = scratch.split_at_mut(d);
    let (b, rest) = rest.split_at_mut(d);
    let (direction, buffer) = rest.split_at_mut(2 * d);
    let rows = E::widen(rows, buffer);
    let (first, others) = rows.split_at(d);
    match selector {
        Selector::Bounds => {
            a.copy_from_slice(first);
            b.copy_from_slice(first);
            let (sums, _) = direction.split_at_mut(d);
            sums.copy_from_slice(first);
            for row in others.chunks_exact(d) {
                let bounds = a.iter_mut().zip(b.iter_mut()).zip(sums.iter_mut());
                for (((lo, hi), sum), &x) in bounds.zip(row) {
                    *lo = if x < *lo { x } else { *lo };
                    *hi = if x > *hi { x } else { *hi };
                    *sum += x;
                }
            }
            // A NaN among the keys makes both bounds NaN, and so the page's score. Comparisons pass over it, sums do not.
            for (i, _) in sums.iter().enumerate().filter(|(_, sum)| sum.is_nan()) {
                if rows[i..].iter().step_by(d).any(|x| x.is_nan()) {
                    (a[i], b[i]) = (f32::NAN, f32::NAN);
                }
            }
        }
        Selector::Moments | Selector::SignedMoments => {
            let inverse = 1.0 / n as f32;
            for row in rows.chunks_exact(d) {
                for (mean, &x) in a.iter_mut().zip(row) {
                    *mean += x;
                }
            }
            for mean in a.iter_mut() {
                *mean *= inverse;
            }
            for row in rows.chunks_exact(d) {
                for ((var, &mean), &x) in b.iter_mut().zip(a.iter()).zip(row) {
                    *var += (x - mean) * (x - mean);
                }
            }
            for var in b.iter_mut() {
                *var = (*var * inverse).sqrt();
            }
            if selector == Selector::SignedMoments {
                let (from, to) = direction.split_at_mut(d);
                principal_direction(rows, a, from, to);
                for (sd, &x) in b.iter_mut().zip(from.iter()) {
                    // Elements of 0 but for rounding count as positive.
                    if x < -1e-5 {
                        *sd = -*sd;
                    }
                }
            }
        }
    }
    let (out_a, out_b) = summary.split_at_mut(d);
    E::narrow(a, out_a);
    E::narrow(b, out_b);
}

/// Rounds of the power iteration in [`principal_direction`].
const ROUNDS: usize = 2;

/// About the first principal direction of the rows, up to its length and sign, into `direction`: two rounds of the power
/// iteration from the row farthest from the mean. `next` is scratch. The largest element is 1 or -1; all are 0 when the rows are equal.
///
/// Only the signs of its elements are used, and two rounds settle those that matter (docs/accuracy.md).
fn principal_direction(rows: &[f32], mean: &[f32], direction: &mut [f32], next: &mut [f32]) {
    let d = mean.len();
    let (mut farthest, mut most) = (0, 0.0f32);
    for (i, row) in rows.chunks_exact(d).enumerate() {
        let distance: f32 = row.iter().zip(mean).map(|(&x, &m)| (x - m) * (x - m)).sum();
        // The first of those that are as far but for rounding, so that every execution provider starts from the same row.
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
    use super::*;

    #[test]
    fn bounds_and_moments_of_three_rows() {
        let rows = [1.0f32, -2.0, 4.0, 0.0, 1.0, 5.0];
        let mut s = [9.0f32; 4];
        let mut scratch = Vec::new();
        summarize(Selector::Bounds, &rows, &mut s, &mut scratch);
        assert_eq!(s, [1.0, -2.0, 4.0, 5.0]);
        summarize(Selector::Moments, &rows, &mut s, &mut scratch);
        assert_eq!(s.map(|v| (v * 1e4).round() / 1e4)[..2], [2.0, 1.0]);
        assert!(
            (s[2] - 2f32.sqrt()).abs() < 1e-6 && (s[3] - (26.0f32 / 3.0).sqrt()).abs() < 1e-6,
            "{s:?}"
        );
        summarize(Selector::Moments, &rows[..2], &mut s, &mut scratch);
        assert_eq!(s, [1.0, -2.0, 0.0, 0.0]);
        // A NaN in any row shows in its element.
        for at in [0, 2, 4] {
            let mut rows = rows;
            rows[at] = f32::NAN;
            summarize(Selector::Bounds, &rows, &mut s, &mut scratch);
            assert!(
                s[0].is_nan() && s[2].is_nan() && s[1] == -2.0 && s[3] == 5.0,
                "row {at}: {s:?}"
            );
        }
    }

    #[test]
    fn deviations_are_signed_by_the_principal_direction() {
        let mut s = [0.0f32; 6];
        let mut scratch = Vec::new();
        // Elements 0 and 1 move against each other, element 2 hardly, with element 0.
        let rows = [2.0f32, -1.0, 0.1, -2.0, 1.0, -0.1, 1.0, -0.5, 0.0, -1.0, 0.5, 0.0];
        summarize(Selector::SignedMoments, &rows, &mut s, &mut scratch);
        let mut plain = [0.0f32; 6];
        summarize(Selector::Moments, &rows, &mut plain, &mut scratch);
        assert_eq!(s.map(f32::abs), plain.map(f32::abs));
        assert!(s[3] * s[4] < 0.0 && s[3] * s[5] > 0.0, "{s:?}");
        // Equal rows, and one row: no spread, no direction, no NaN.
        for rows in [&[1.0f32, -2.0, 3.0, 1.0, -2.0, 3.0][..], &[1.0, -2.0, 3.0]] {
            summarize(Selector::SignedMoments, rows, &mut s, &mut scratch);
            assert_eq!(s, [1.0, -2.0, 3.0, 0.0, 0.0, 0.0]);
        }
        // Spreads beyond what a power of five would hold.
        summarize(
            Selector::SignedMoments,
            &[6e4f32, -6e4, 0.0, -6e4, 6e4, 0.0],
            &mut s,
            &mut scratch,
        );
        assert!(s.iter().all(|x| x.is_finite()) && s[3] * s[4] < 0.0, "{s:?}");
    }
}
