//! How a prompt is fed, and what a model's declared sizes leave of that.

use super::{Padding, compared_model::Fixed};

const PROMPT: usize = 21;
const STEPS: usize = 11;
const PADDING: usize = 3;
/// Rows of caches that the model does not size.
pub const CAPACITY: usize = PROMPT + STEPS + 5;

/// How a prompt is fed: name, sequences, where its pieces end, padding; then single tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    pub name: &'static str,
    pub batch: usize,
    pub ends: Vec<usize>,
    pub pad: usize,
    pub steps: usize,
}

impl Way {
    pub fn prompt(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    pub fn tokens(&self) -> usize {
        self.prompt() + self.steps
    }

    /// The same tokens without padding.
    pub fn unpadded(&self) -> Self {
        Self { pad: 0, ..self.clone() }
    }
}

/// The ways to compare a model whose original has these sizes.
pub fn ways(fixed: &Fixed, padding: Padding) -> Vec<Way> {
    let limit = fixed.rows.unwrap_or(usize::MAX);
    // A model that takes so many tokens a call and no others is fed whole pieces, and no single tokens.
    if let Some(tokens) = fixed.tokens.filter(|n| *n > 1) {
        let pieces = (PROMPT.div_ceil(tokens).max(2)).min((limit / tokens).max(1));
        let way = |(name, pieces, batch): (&'static str, usize, usize)| Way {
            name,
            batch,
            ends: (1..=pieces).map(|n| n * tokens).collect(),
            pad: 0,
            steps: 0,
        };
        let mut kinds = Vec::new();
        for batch in batches(fixed) {
            kinds.extend([("whole", 1, batch), ("chunked", pieces, batch)]);
        }
        return kinds.into_iter().map(way).collect();
    }
    let (prompt, steps) = if limit < PROMPT + STEPS {
        let prompt = (limit * 2 / 3).max(1);
        (prompt, limit.saturating_sub(prompt))
    } else {
        (PROMPT, STEPS)
    };
    let mut pieces = vec![8 * prompt / PROMPT, 15 * prompt / PROMPT, prompt];
    pieces.retain(|end| *end > 0);
    pieces.dedup();
    let way = |name, batch, ends: &[usize], pad| Way {
        name,
        batch,
        ends: ends.to_vec(),
        pad,
        steps,
    };
    let mut all = vec![way("whole", 1, &[prompt], 0), way("chunked", 1, &pieces, 0)];
    for batch in batches(fixed).into_iter().filter(|b| *b > 1) {
        all.push(way("whole", batch, &[prompt], 0));
        if fixed.batch == Some(batch) {
            all.push(way("chunked", batch, &pieces, 0));
        }
        if padding != Padding::Not && !fixed.mask && prompt > PADDING {
            all.push(way("padded", batch, &[prompt], PADDING));
        }
    }
    all
}

/// One sequence and two, and as many as the model is made for. What it does not take is skipped, and said to be.
fn batches(fixed: &Fixed) -> Vec<usize> {
    let mut batches = vec![1, 2];
    batches.extend(fixed.batch.filter(|b| *b > 2));
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(fixed: Fixed, padding: Padding) -> Vec<(&'static str, usize, Vec<usize>, usize)> {
        let ways = ways(&fixed, padding).into_iter();
        ways.map(|w| (w.name, w.batch, w.ends, w.steps)).collect()
    }

    #[test]
    fn ways_fit_the_sizes_that_a_model_declares() {
        let usual = summary(Fixed::default(), Padding::Both);
        assert_eq!(
            usual,
            [
                ("whole", 1, vec![21], 11),
                ("chunked", 1, vec![8, 15, 21], 11),
                ("whole", 2, vec![21], 11),
                ("padded", 2, vec![21], 11),
            ]
        );
        let four = Fixed {
            batch: Some(4),
            ..Fixed::default()
        };
        let four: Vec<_> = summary(four, Padding::Not).into_iter().map(|w| (w.0, w.1)).collect();
        assert!(
            four.contains(&("whole", 4)) && four.contains(&("chunked", 4)),
            "{four:?}"
        );
        let eight = Fixed {
            tokens: Some(8),
            rows: Some(16),
            ..Fixed::default()
        };
        let eight = summary(eight, Padding::Both);
        assert_eq!(eight[1], ("chunked", 1, vec![8, 16], 0));
        let short = Fixed {
            rows: Some(12),
            ..Fixed::default()
        };
        let short = summary(short, Padding::Not);
        assert_eq!(short[0], ("whole", 1, vec![8], 4));
        assert_eq!(short[1], ("chunked", 1, vec![3, 5, 8], 4));
        for rows in 1..40 {
            let fixed = Fixed {
                rows: Some(rows),
                ..Fixed::default()
            };
            for way in ways(&fixed, Padding::Both) {
                assert!(way.tokens() <= rows && way.prompt() > way.pad, "{way:?}");
            }
        }
    }
}
