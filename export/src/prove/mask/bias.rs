//! What is added to the scores of a call, at all places or some.

use crate::{
    eval::Tensor,
    prove::{call_shape::CallShape, refusal::Unread},
};

/// A bias at most this is a mask: exporters write -inf, the type's lowest number, -1e9 or -10000.
pub const MASKED: f64 = -9999.0;

/// What is added to the scores in one call.
pub struct ScoreBias {
    /// `[B, heads, places]`; one head stands for all where they don't differ.
    pub data: Vec<f64>,
    pub heads: usize,
    pub places: ScorePlaces,
    /// The least and the most that scores are multiplied with on the way, where that is known.
    pub gain: Option<[f64; 2]>,
}

/// Reads the bias of some of a call's tokens.
pub type ReadBias<'r> = &'r dyn Fn(CallShape, ScorePlaces) -> Result<ScoreBias, Unread>;

/// Biases by the calls that they were read in.
pub type CallBiases = Vec<(CallShape, ScoreBias)>;

/// What of a call's scores is read.
#[derive(Clone)]
pub enum ScorePlaces {
    /// All keys of some of the tokens fed.
    Rows(Vec<usize>),
    /// Tokens fed and keys.
    Cells(Vec<[usize; 2]>),
}

impl ScorePlaces {
    /// All keys of all tokens fed.
    pub fn all(call: CallShape) -> Self {
        Self::Rows((0..call.s).collect())
    }

    /// Token fed and key of each place, for a call of so many tokens in all.
    pub fn each(&self, total: usize) -> Box<dyn Iterator<Item = [usize; 2]> + '_> {
        match self {
            Self::Rows(rows) => Box::new(rows.iter().flat_map(move |i| (0..total).map(|j| [*i, j]))),
            Self::Cells(cells) => Box::new(cells.iter().copied()),
        }
    }

    /// How many places there are, for a call of so many tokens in all.
    pub fn len(&self, total: usize) -> usize {
        match self {
            Self::Rows(rows) => rows.len() * total,
            Self::Cells(cells) => cells.len(),
        }
    }
}

/// The least and the most that a score of 1 becomes more than one of 0, where tokens are seen. `zeros`: what scores of 0
/// become, `ones`: what scores of 1 become.
pub fn gain(zeros: &[f64], ones: &[f64]) -> Option<[f64; 2]> {
    let seen = zeros.iter().zip(ones).filter(|(x, _)| **x > MASKED);
    let wider = |range: Option<[f64; 2]>, g: f64| Some(range.map_or([g, g], |[a, b]| [a.min(g), b.max(g)]));
    seen.map(|(x, one)| one - x).fold(None, wider)
}

/// Some of `[B, heads, S, T]` numbers; none if they are not known or take too long.
pub fn read_places(tensor: &Tensor, [b, heads, s, t]: [usize; 4], places: &ScorePlaces) -> Option<Vec<f64>> {
    let mut data = Vec::new();
    let (n, rows) = match places {
        ScorePlaces::Rows(rows) => (rows.len() * t, rows.len()),
        ScorePlaces::Cells(cells) => (cells.len(), cells.chunk_by(|a, b| a[0] == b[0]).count()),
    };
    if let Some(lazy) = &tensor.lazy
        && !lazy.is_affordable(b * heads * n, b * heads * rows)
    {
        return None;
    }
    for block in 0..b * heads {
        match places {
            ScorePlaces::Rows(rows) => {
                for from in rows.iter().map(|row| (block * s + row) * t) {
                    match (&tensor.data, &tensor.lazy) {
                        (Some(held), _) => data.extend_from_slice(held.get(from..from + t)?),
                        (_, lazy) => {
                            let lazy = lazy.as_ref()?;
                            data.extend((from..from + t).map(|at| lazy.at(at)));
                        }
                    }
                }
            }
            ScorePlaces::Cells(cells) => {
                let numbers = tensor.numbers()?;
                data.extend(cells.iter().map(|[i, j]| numbers.at((block * s + i) * t + j)));
            }
        }
    }
    Some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gains_are_read_where_tokens_are_seen() {
        let hidden = f64::NEG_INFINITY;
        assert_eq!(gain(&[0.0, 0.0, hidden], &[2.0, 3.0, 7.0]), Some([2.0, 3.0]));
        assert_eq!(gain(&[hidden], &[1.0]), None);
    }
}
