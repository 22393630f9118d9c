//! Benchmarks: samples and their statistics, memory bandwidth, synthetic caches, tables.

pub mod args;
mod error;
pub mod memory;
pub mod op;
pub mod room;
pub mod selector_state;
pub mod synthetic_cache;
pub mod table;

pub use error::{Error, Result};

/// Samples of repeated measurements.
#[derive(Clone, Debug, Default)]
pub struct Samples(pub Vec<f64>);

impl Samples {
    /// Mean; 0 without samples.
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len().max(1) as f64
    }

    /// Sample standard deviation; 0 for fewer than two samples.
    pub fn deviation(&self) -> f64 {
        if self.0.len() < 2 {
            return 0.0;
        }
        let mean = self.mean();
        let squares: f64 = self.0.iter().map(|x| (x - mean) * (x - mean)).sum();
        (squares / (self.0.len() - 1) as f64).sqrt()
    }

    /// Minimum.
    pub fn best(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// Median; 0 without samples.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => 0.0,
            n if n.is_multiple_of(2) => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted[middle],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_deviation_and_median() {
        let s = Samples(vec![1.0, 2.0, 3.0, 10.0]);
        assert_eq!((s.mean(), s.median()), (4.0, 2.5));
        assert!((s.deviation() - (50.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(Samples(vec![7.0]).deviation(), 0.0);
        assert_eq!(Samples(vec![3.0, 1.0, 2.0]).median(), 2.0);
    }
}
