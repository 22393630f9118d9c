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
    scratch.resize(rows.len() + 2 * d, 0.0);
    let (a, rest) = scratch.split_at_mut(d);
    let (b, buffer) = rest.split_at_mut(d);
    let rows = E::widen(rows, buffer);
    let (first, others) = rows.split_at(d);
    match selector {
        Selector::Bounds => {
            a.copy_from_slice(first);
            b.copy_from_slice(first);
            for row in others.chunks_exact(d) {
                for ((lo, hi), &x) in a.iter_mut().zip(b.iter_mut()).zip(row) {
                    *lo = lo.min(x);
                    *hi = hi.max(x);
                }
            }
        }
        Selector::Moments => {
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
        }
    }
    let (out_a, out_b) = summary.split_at_mut(d);
    E::narrow(a, out_a);
    E::narrow(b, out_b);
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
    }
}
