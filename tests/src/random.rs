//! Numbers for tests: the same in every run.

use rand::{RngExt, SeedableRng, rngs::StdRng};

pub struct Random(StdRng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// Multiples of 1/64 in [-2, 2): exact in float16, and so are products of two of them in float32.
    pub fn exact(&mut self, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| self.0.random_range(-128i32..128) as f32 / 64.0)
            .collect()
    }

    pub fn uniform(&mut self, count: usize, low: f32, high: f32) -> Vec<f32> {
        (0..count).map(|_| self.0.random_range(low..high)).collect()
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.0.random_range(0..bound)
    }
}
