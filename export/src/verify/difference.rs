//! How far two runs' logits are apart.

use anyhow::{Result, ensure};

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Difference {
    /// The largest of any logit.
    pub largest: f32,
    /// In the middle of all positions, of each the largest.
    pub median: f32,
    /// Positions with the same most likely token.
    pub same: usize,
}

impl Difference {
    /// Between what is expected and what came, position by position.
    pub fn between(expected: &[Vec<f32>], got: &[Vec<f32>]) -> Result<Self> {
        ensure!(
            expected.len() == got.len(),
            "the two models give different numbers of logits"
        );
        let (mut by_position, mut same) = (Vec::new(), 0);
        for (a, b) in expected.iter().zip(got) {
            ensure!(
                a.len() == b.len(),
                "the two models have {} and {} logits",
                a.len(),
                b.len()
            );
            let worst = a.iter().zip(b).fold(0.0f32, |worst, (a, b)| {
                // Not a number anywhere is a difference, unless both have it.
                let d = if a.is_nan() && b.is_nan() || a == b {
                    0.0
                } else {
                    (a - b).abs()
                };
                worst.max(if d.is_nan() { f32::INFINITY } else { d })
            });
            by_position.push(worst);
            same += usize::from(best(a) == best(b));
        }
        by_position.sort_by(f32::total_cmp);
        Ok(Self {
            largest: by_position.last().copied().unwrap_or(0.0),
            median: by_position.get(by_position.len() / 2).copied().unwrap_or(0.0),
            same,
        })
    }
}

fn best(logits: &[f32]) -> Option<usize> {
    let by = |a: &(usize, &f32), b: &(usize, &f32)| a.1.total_cmp(b.1);
    logits.iter().enumerate().max_by(by).map(|(i, _)| i)
}

/// How far the original is from itself where only what is no fault changes, and what that was.
#[derive(Clone, Debug, Default)]
pub struct Own {
    pub largest: f32,
    pub median: f32,
    /// What made the largest one.
    pub changed: Option<String>,
}

impl Own {
    pub fn take(&mut self, difference: &Difference, changed: &str) {
        self.median = self.median.max(difference.median);
        if self.changed.is_none() || difference.largest > self.largest {
            self.largest = difference.largest;
            self.changed = Some(changed.to_owned());
        }
    }

    pub fn difference(&self) -> Difference {
        Difference {
            largest: self.largest,
            median: self.median,
            same: 0,
        }
    }

    /// Whether a difference may be the same thing once more, in each of the two models. The largest ones are luck; a fault moves
    /// most positions: in the middle there is little more than the original's own.
    pub fn explains(&self, difference: &Difference, tolerance: f32) -> bool {
        difference.largest <= self.allows(tolerance) && difference.median <= self.allows_most(tolerance)
    }

    pub fn allows_most(&self, tolerance: f32) -> f32 {
        tolerance.max(1.5 * self.median)
    }

    pub fn allows(&self, tolerance: f32) -> f32 {
        tolerance + 2.0 * self.largest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_and_the_one_in_the_middle() {
        let expected = vec![vec![0.0, 1.0]; 5];
        let mut got = expected.clone();
        got[1] = vec![0.5, 1.0];
        got[3] = vec![0.0, -1.0];
        let difference = Difference::between(&expected, &got).unwrap();
        assert_eq!(
            difference,
            Difference {
                largest: 2.0,
                median: 0.0,
                same: 4
            }
        );
        got[0] = vec![f32::NAN, 1.0];
        assert_eq!(Difference::between(&expected, &got).unwrap().largest, f32::INFINITY);
        assert!(Difference::between(&expected, &got[1..]).is_err());
    }

    #[test]
    fn a_few_positions_may_be_rounding_but_not_most() {
        let mut own = Own::default();
        let few = Difference {
            largest: 0.1,
            median: 1e-6,
            same: 0,
        };
        own.take(&few, "rounded otherwise");
        own.take(&Difference { largest: 0.05, ..few }, "fed 2 together");
        assert_eq!(own.changed.as_deref(), Some("rounded otherwise"));
        let tolerance = 0.02;
        assert!(own.explains(&Difference { largest: 0.2, ..few }, tolerance));
        assert!(!own.explains(&Difference { largest: 0.3, ..few }, tolerance));
        let most = Difference {
            largest: 0.2,
            median: 0.1,
            same: 0,
        };
        assert!(!own.explains(&most, tolerance));
    }
}
