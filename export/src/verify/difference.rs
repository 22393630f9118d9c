//! How far two runs' logits are apart.

use super::error::Error;
use serde::{Serialize, Serializer};
use std::fmt;

/// A difference between two runs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LogitDifference {
    /// The largest of any logit.
    pub largest: f32,
    /// Of each position the largest: the median over all positions.
    pub median: f32,
    /// Positions with the same most likely token.
    pub same_token: usize,
}

impl LogitDifference {
    /// Between what is expected and what came, position by position.
    pub fn between(expected: &[Vec<f32>], got: &[Vec<f32>]) -> Result<Self, Error> {
        if expected.len() != got.len() {
            return Err(Error::LogitCounts {
                expected: expected.len(),
                actual: got.len(),
            });
        }
        let (mut by_position, mut same_token) = (Vec::new(), 0);
        for (a, b) in expected.iter().zip(got) {
            if a.len() != b.len() {
                return Err(Error::Vocabularies {
                    expected: a.len(),
                    actual: b.len(),
                });
            }
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
            same_token += usize::from(best(a) == best(b));
        }
        by_position.sort_by(f32::total_cmp);
        Ok(Self {
            largest: by_position.last().copied().unwrap_or(0.0),
            median: by_position.get(by_position.len() / 2).copied().unwrap_or(0.0),
            same_token,
        })
    }

    /// The worse of two, figure by figure.
    pub fn worst(self, other: Self) -> Self {
        Self {
            largest: self.largest.max(other.largest),
            median: self.median.max(other.median),
            same_token: self.same_token.min(other.same_token),
        }
    }
}

fn best(logits: &[f32]) -> Option<usize> {
    let by = |a: &(usize, &f32), b: &(usize, &f32)| a.1.total_cmp(b.1);
    logits.iter().enumerate().max_by(by).map(|(i, _)| i)
}

/// What changes between two runs of the original that differ by no fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variation {
    /// Its attention is rounded otherwise.
    RoundedOtherwise,
    /// So many tokens are fed together in a step, where activations are quantised by what is fed together.
    FedTogether(usize),
    /// Each sequence is fed alone.
    SequencesAlone,
    /// Padding has other tokens.
    OtherPadding,
}

impl fmt::Display for Variation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RoundedOtherwise => f.write_str("rounded otherwise"),
            Self::FedTogether(tokens) => write!(f, "fed {tokens} together"),
            Self::SequencesAlone => f.write_str("fed each sequence alone"),
            Self::OtherPadding => f.write_str("with other tokens in its padding"),
        }
    }
}

impl Serialize for Variation {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How far the original is from itself where only what is no fault changes, and what that was.
#[derive(Clone, Debug, Default)]
pub struct OwnDifference {
    pub largest: f32,
    pub median: f32,
    /// What made the largest one; none: nothing was measured.
    pub cause: Option<Variation>,
}

impl OwnDifference {
    /// Adds a measurement.
    pub fn include(&mut self, difference: &LogitDifference, cause: Variation) {
        self.median = self.median.max(difference.median);
        if self.cause.is_none() || difference.largest > self.largest {
            self.largest = difference.largest;
            self.cause = Some(cause);
        }
    }

    /// Adds what was measured elsewhere.
    pub fn include_all(&mut self, other: &Self) {
        let difference = LogitDifference {
            largest: other.largest,
            median: other.median,
            same_token: 0,
        };
        if let Some(cause) = other.cause {
            self.include(&difference, cause);
        }
    }

    /// Whether a difference may be the same thing once more, in each of the two models. The largest ones are luck; a fault moves
    /// most positions: in the middle there is little more than the original's own.
    pub fn explains(&self, difference: &LogitDifference, tolerance: f32) -> bool {
        difference.largest <= self.largest_allowed(tolerance) && difference.median <= self.median_allowed(tolerance)
    }

    /// The largest median over positions that is no fault.
    pub fn median_allowed(&self, tolerance: f32) -> f32 {
        tolerance.max(1.5 * self.median)
    }

    /// The largest difference that is no fault.
    pub fn largest_allowed(&self, tolerance: f32) -> f32 {
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
        let difference = LogitDifference::between(&expected, &got).unwrap();
        assert_eq!(
            difference,
            LogitDifference {
                largest: 2.0,
                median: 0.0,
                same_token: 4
            }
        );
        got[0] = vec![f32::NAN, 1.0];
        assert_eq!(
            LogitDifference::between(&expected, &got).unwrap().largest,
            f32::INFINITY
        );
        assert!(LogitDifference::between(&expected, &got[1..]).is_err());
    }

    #[test]
    fn a_few_positions_may_be_rounding_but_not_most() {
        let mut own = OwnDifference::default();
        let few = LogitDifference {
            largest: 0.1,
            median: 1e-6,
            same_token: 0,
        };
        own.include(&few, Variation::RoundedOtherwise);
        own.include(&LogitDifference { largest: 0.05, ..few }, Variation::FedTogether(2));
        assert_eq!(own.cause, Some(Variation::RoundedOtherwise));
        let tolerance = 0.02;
        assert!(own.explains(&LogitDifference { largest: 0.2, ..few }, tolerance));
        assert!(!own.explains(&LogitDifference { largest: 0.3, ..few }, tolerance));
        let most = LogitDifference {
            largest: 0.2,
            median: 0.1,
            same_token: 0,
        };
        assert!(!own.explains(&most, tolerance));
    }
}
