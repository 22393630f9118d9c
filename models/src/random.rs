//! Random weights: the same bytes for a seed, whatever the number of threads and the order in which they are made.

use half::f16;

use crate::dtype::Dtype;

/// Distinct magnitudes of a weight; a power of two, so that bits of the generator index the table.
const LEVELS: usize = 4096;
/// Table indices taken from one 64-bit draw (5 x 12 bits).
const PER_DRAW: usize = 5;

/// A source of normally distributed weights, quantised to 4096 levels: a table look-up per element keeps it at memory
/// speed.
pub struct RandomWeights {
    seed: u64,
    normal: Vec<f32>,
}

impl RandomWeights {
    pub fn new(seed: u64) -> Self {
        let normal = (0..LEVELS)
            .map(|i| normal_quantile((i as f64 + 0.5) / LEVELS as f64) as f32)
            .collect();
        Self { seed, normal }
    }

    /// Fills `out` with the elements from `start` on of tensor number `tensor`, standard deviation `std`.
    pub fn fill(&self, tensor: u64, start: usize, std: f32, dtype: Dtype, out: &mut [u8]) {
        let key = mix(self.seed ^ mix(tensor.wrapping_add(0x9e37_79b9_7f4a_7c15)));
        match dtype {
            Dtype::F32 => {
                let table: Vec<[u8; 4]> = self.normal.iter().map(|x| (x * std).to_le_bytes()).collect();
                fill_from(&table, key, start, out);
            }
            Dtype::F16 => {
                let table: Vec<[u8; 2]> = self
                    .normal
                    .iter()
                    .map(|x| f16::from_f32(x * std).to_le_bytes())
                    .collect();
                fill_from(&table, key, start, out);
            }
        }
    }
}

/// Element `i` is the table entry chosen by bits `12 * (i % 5)..` of draw `i / 5`.
fn fill_from<const N: usize>(table: &[[u8; N]], key: u64, start: usize, out: &mut [u8]) {
    let mut draw = start / PER_DRAW;
    let mut bits = mix(key ^ draw as u64);
    let mut used = start % PER_DRAW;
    bits >>= 12 * used;
    for slot in out.chunks_exact_mut(N) {
        if used == PER_DRAW {
            used = 0;
            draw += 1;
            bits = mix(key ^ draw as u64);
        }
        if let Some(value) = table.get(bits as usize % LEVELS) {
            slot.copy_from_slice(value);
        }
        bits >>= 12;
        used += 1;
    }
}

/// The finalizer of splitmix64: neighbouring inputs give unrelated outputs.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Inverse of the standard normal distribution function, by bisection over its erf series: made 4096 times, so
/// simplicity wins.
fn normal_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if normal_cdf(middle) < p {
            low = middle
        } else {
            high = middle
        }
    }
    0.5 * (low + high)
}

/// Standard normal distribution function: 1/2 + pdf(x) * (x + x^3/3 + x^5/(3*5) + ...), exact to rounding for |x| <= 8.
fn normal_cdf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for k in 1..200 {
        term *= x * x / (2 * k + 1) as f64;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(seed: u64, n: usize) -> Vec<f32> {
        let mut out = vec![0; n * 4];
        RandomWeights::new(seed).fill(3, 0, 0.5, Dtype::F32, &mut out);
        out.chunks_exact(4)
            .filter_map(|b| Some(f32::from_le_bytes(b.try_into().ok()?)))
            .collect()
    }

    #[test]
    fn pieces_equal_the_whole() {
        let whole = all(7, 100);
        for start in [0, 1, 4, 5, 37] {
            let mut out = vec![0; 23 * 4];
            RandomWeights::new(7).fill(3, start, 0.5, Dtype::F32, &mut out);
            let piece: Vec<f32> = out
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            assert_eq!(piece, whole[start..start + 23]);
        }
        assert_ne!(whole, all(8, 100));
    }

    #[test]
    fn mean_and_deviation_are_as_asked() {
        let x = all(1, 200_000);
        let n = x.len() as f32;
        let mean = x.iter().sum::<f32>() / n;
        let std = (x.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n).sqrt();
        assert!(mean.abs() < 0.005 && (std - 0.5).abs() < 0.005, "{mean} {std}");
    }
}
