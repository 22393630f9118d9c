//! How a prompt is fed to both models, and what a model's declared sizes leave of that.

use super::{comparison::PaddingCheck, declared_sizes::DeclaredSizes};

const PROMPT: usize = 21;
const STEPS: usize = 11;
const PADDING: usize = 3;
/// Rows of caches that the model does not size.
pub const CAPACITY: usize = PROMPT + STEPS + 5;

/// How tokens are fed: a prompt in pieces, then steps of single tokens, to which a window adds corrected ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedSchedule {
    /// Of the prompt: `whole`, `chunked` or `padded`.
    pub name: &'static str,
    /// Sequences.
    pub batch: usize,
    /// Where the prompt's pieces end, in tokens.
    pub ends: Vec<usize>,
    /// Padding at the beginning of the last sequence.
    pub padding: usize,
    /// Steps after the prompt.
    pub steps: usize,
}

impl FeedSchedule {
    /// Tokens of the prompt.
    pub fn prompt(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.prompt() + self.steps
    }

    /// The same tokens without padding.
    pub fn unpadded(&self) -> Self {
        Self {
            padding: 0,
            ..self.clone()
        }
    }
}

/// The schedules for a model whose original has these sizes.
pub fn schedules(declared: &DeclaredSizes, check: PaddingCheck) -> Vec<FeedSchedule> {
    let limit = declared.rows.unwrap_or(usize::MAX);
    // A model that takes so many tokens a call and no others is fed whole pieces, and no single tokens.
    if let Some(tokens) = declared.tokens.filter(|n| *n > 1) {
        let pieces = (PROMPT.div_ceil(tokens).max(2)).min((limit / tokens).max(1));
        let schedule = |(name, pieces, batch): (&'static str, usize, usize)| FeedSchedule {
            name,
            batch,
            ends: (1..=pieces).map(|n| n * tokens).collect(),
            padding: 0,
            steps: 0,
        };
        let mut kinds = Vec::new();
        for batch in batches(declared) {
            kinds.extend([("whole", 1, batch), ("chunked", pieces, batch)]);
        }
        return kinds.into_iter().map(schedule).collect();
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
    let schedule = |name, batch, ends: &[usize], padding| FeedSchedule {
        name,
        batch,
        ends: ends.to_vec(),
        padding,
        steps,
    };
    let mut all = vec![schedule("whole", 1, &[prompt], 0), schedule("chunked", 1, &pieces, 0)];
    for batch in batches(declared).into_iter().filter(|b| *b > 1) {
        all.push(schedule("whole", batch, &[prompt], 0));
        if declared.batch == Some(batch) {
            all.push(schedule("chunked", batch, &pieces, 0));
        }
        if check != PaddingCheck::None && !declared.mask && prompt > PADDING {
            all.push(schedule("padded", batch, &[prompt], PADDING));
        }
    }
    all
}

/// One sequence and two, and as many as the model is made for. What it does not take is skipped, and said to be.
fn batches(declared: &DeclaredSizes) -> Vec<usize> {
    let mut batches = vec![1, 2];
    batches.extend(declared.batch.filter(|b| *b > 2));
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(declared: DeclaredSizes, check: PaddingCheck) -> Vec<(&'static str, usize, Vec<usize>, usize)> {
        let schedules = schedules(&declared, check).into_iter();
        schedules.map(|w| (w.name, w.batch, w.ends, w.steps)).collect()
    }

    #[test]
    fn schedules_fit_the_sizes_that_a_model_declares() {
        let usual = summary(DeclaredSizes::default(), PaddingCheck::Both);
        assert_eq!(
            usual,
            [
                ("whole", 1, vec![21], 11),
                ("chunked", 1, vec![8, 15, 21], 11),
                ("whole", 2, vec![21], 11),
                ("padded", 2, vec![21], 11),
            ]
        );
        let four = DeclaredSizes {
            batch: Some(4),
            ..DeclaredSizes::default()
        };
        let four: Vec<_> = summary(four, PaddingCheck::None)
            .into_iter()
            .map(|w| (w.0, w.1))
            .collect();
        assert!(
            four.contains(&("whole", 4)) && four.contains(&("chunked", 4)),
            "{four:?}"
        );
        let eight = DeclaredSizes {
            tokens: Some(8),
            rows: Some(16),
            ..DeclaredSizes::default()
        };
        let eight = summary(eight, PaddingCheck::Both);
        assert_eq!(eight[1], ("chunked", 1, vec![8, 16], 0));
        let short = DeclaredSizes {
            rows: Some(12),
            ..DeclaredSizes::default()
        };
        let short = summary(short, PaddingCheck::None);
        assert_eq!(short[0], ("whole", 1, vec![8], 4));
        assert_eq!(short[1], ("chunked", 1, vec![3, 5, 8], 4));
        for rows in 1..40 {
            let declared = DeclaredSizes {
                rows: Some(rows),
                ..DeclaredSizes::default()
            };
            for schedule in schedules(&declared, PaddingCheck::Both) {
                assert!(
                    schedule.tokens() <= rows && schedule.prompt() > schedule.padding,
                    "{schedule:?}"
                );
            }
        }
    }
}
