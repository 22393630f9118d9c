//! The selectors `adamas` and `adamas_rms` as docs/method.md writes them, in float64.

use retro_contract::Selector;

use super::sketch::rotated;
use super::{Row, dot};

/// A vector's codes.
pub struct Codes {
    codes: Row,
    /// How far its elements are from the thresholds at least, in root mean squares. Rounding in float32 moves them by
    /// about 1e-7.
    pub clear: f64,
}

impl Codes {
    pub fn of(vector: &[f64], selector: Selector) -> Self {
        let y = rotated(vector);
        let rms = (dot(&y, &y) / y.len() as f64).sqrt();
        let outer = if selector == Selector::Adamas { 10.0 } else { 0.6 * rms };
        let thresholds = [-outer, 0.0, outer];
        let code = |y: &f64| thresholds.iter().filter(|threshold| y > *threshold).count() as f64;
        let gaps = y
            .iter()
            .flat_map(|y| thresholds.map(|threshold| (y - threshold).abs() / rms));
        Self {
            codes: y.iter().map(code).collect(),
            // 0 comes of numbers with few digits, whose sums are exact in float32 too.
            clear: gaps.filter(|&gap| gap > 0.0).fold(f64::INFINITY, f64::min),
        }
    }

    /// The sum of the differences of the codes.
    pub fn distance(&self, other: &Self) -> f64 {
        let pairs = self.codes.iter().zip(&other.codes);
        pairs.map(|(a, b)| (a - b).abs()).sum()
    }
}
