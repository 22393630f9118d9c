//! The selector `sketch` as docs/method.md writes it, in float64.

use half::bf16;

use super::{Row, dot};

/// Rows that share a centre.
const BLOCK: usize = 128;

/// The first bits of the fraction of pi.
const PI: [u64; 4] = [
    0x243F_6A88_85A3_08D3,
    0x1319_8A2E_0370_7344,
    0xA409_3822_299F_31D0,
    0x082E_FA98_EC4E_6C89,
];

fn sign(d: usize) -> f64 {
    let bit = PI[d / 64 % 4] >> (63 - d % 64) & 1;
    if bit == 1 { -1.0 } else { 1.0 }
}

/// R x: signs, then a Hadamard matrix for each of the descending powers of two that D is split into.
pub fn rotated(x: &[f64]) -> Row {
    let signed: Row = x.iter().enumerate().map(|(d, x)| sign(d) * x).collect();
    let (mut out, mut start) = (Vec::new(), 0);
    while start < x.len() {
        let m = 1usize << (x.len() - start).ilog2();
        for a in 0..m {
            let hadamard = |b: usize| {
                if (a & b).count_ones().is_multiple_of(2) {
                    1.0
                } else {
                    -1.0
                }
            };
            let sum: f64 = (0..m).map(|b| hadamard(b) * signed[start + b]).sum();
            out.push(sum / (m as f64).sqrt());
        }
        start += m;
    }
    out
}

/// A key's codes and factor.
struct Sketch {
    codes: Row,
    factor: f64,
}

impl Sketch {
    fn of(key: &[f64], centre: &[f64], bits: usize) -> Self {
        let difference: Row = key.iter().zip(centre).map(|(k, c)| k - c).collect();
        let y = rotated(&difference);
        let squares = dot(&y, &y);
        let tau = (squares / y.len() as f64).sqrt();
        let code = |&y: &f64| {
            let size = if bits == 2 && y.abs() >= tau { 3.0 } else { 1.0 };
            if y >= 0.0 { size } else { -size }
        };
        let codes: Row = y.iter().map(code).collect();
        let factor = if squares == 0.0 {
            0.0
        } else {
            bf16::from_f64(squares / dot(&y, &codes)).to_f64()
        };
        Self { codes, factor }
    }
}

/// The sketches of one KV head's keys.
#[derive(Default)]
pub struct Sketches {
    rows: Vec<Sketch>,
    centres: Vec<Row>,
}

impl Sketches {
    /// Sketches the rows from `first` on, `appended` of them and the later ones new; `keys` are all, as they are now.
    pub fn write(&mut self, keys: &[&[f64]], first: usize, appended: usize, bits: usize, stored: fn(f64) -> f64) {
        let size = keys[0].len();
        self.centres.resize(keys.len().div_ceil(BLOCK), vec![0.0; size]);
        for block in 1..self.centres.len() {
            // Begun by this call.
            if block * BLOCK >= appended {
                let before = &keys[(block - 1) * BLOCK..block * BLOCK];
                let mean = |d: usize| before.iter().map(|key| key[d]).sum::<f64>() / BLOCK as f64;
                self.centres[block] = (0..size).map(|d| stored(f64::from(mean(d) as f32))).collect();
            }
        }
        self.rows.truncate(first);
        for (row, key) in keys.iter().enumerate().skip(first) {
            self.rows.push(Sketch::of(key, &self.centres[row / BLOCK], bits));
        }
    }

    /// The estimated product of a query, plain and rotated, with the key of a row.
    pub fn product(&self, row: usize, query: &[f64], turned: &[f64]) -> f64 {
        let sketch = &self.rows[row];
        dot(query, &self.centres[row / BLOCK]) + sketch.factor * dot(turned, &sketch.codes)
    }
}
