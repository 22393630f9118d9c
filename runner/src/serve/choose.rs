//! The next token: what requests ask for beyond [`Sampling`], and log-probabilities.

use std::collections::HashMap;

use crate::{
    decoder::{
        Error, Result,
        sampling::{Sampler, Sampling},
    },
    serve::constraint::Constraint,
};

/// How the tokens of a request are chosen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choosing {
    /// Temperature and what goes with it.
    pub sampling: Sampling,
    /// Taken off the logits of tokens that were generated.
    pub presence_penalty: f32,
    /// Taken off the logits of tokens, as often as they were generated.
    pub frequency_penalty: f32,
    /// Added to the logits of tokens.
    pub bias: Vec<(u32, f32)>,
}

/// A token's log-probability, and the likeliest tokens with theirs, before penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// Likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the tokens of one request.
pub(super) struct Chooser {
    options: Choosing,
    sampler: Sampler,
    constraint: Option<Constraint>,
    /// How often each token was generated.
    counts: HashMap<u32, u32>,
}

impl Chooser {
    pub fn new(options: &Choosing, constraint: Option<Constraint>) -> Self {
        Self {
            options: options.clone(),
            sampler: Sampler::new(options.sampling),
            constraint,
            counts: HashMap::new(),
        }
    }

    /// Chooses from the logits `[vocab]`, given prompt and output.
    pub fn choose(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        let mut changed = self.changed(logits);
        if let Some(constraint) = &mut self.constraint {
            let allowed = constraint.allowed().map_err(Error::Constraint)?;
            let changed = changed.get_or_insert_with(|| logits.to_vec());
            for (token, logit) in changed.iter_mut().enumerate() {
                // Vocabularies are padded: numbers behind the last token stand for none.
                if token >= allowed.len() || !allowed.is_allowed(token as u32) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let token = self.sampler.choose(changed.as_deref().unwrap_or(logits), history)?;
        if let Some(constraint) = &mut self.constraint {
            constraint.take(token).map_err(Error::Constraint)?;
        }
        *self.counts.entry(token).or_default() += 1;
        Ok(token)
    }

    /// Whether nothing may follow what was chosen.
    pub fn is_complete(&self) -> bool {
        self.constraint.as_ref().is_some_and(Constraint::is_complete)
    }

    /// The logits with penalties and biases; `None` where there are none.
    fn changed(&self, logits: &[f32]) -> Option<Vec<f32>> {
        let Choosing {
            presence_penalty,
            frequency_penalty,
            bias,
            ..
        } = &self.options;
        let penalised = (*presence_penalty != 0.0 || *frequency_penalty != 0.0) && !self.counts.is_empty();
        if !penalised && bias.is_empty() {
            return None;
        }
        let mut changed = logits.to_vec();
        let mut add = |token: u32, x: f32| {
            if let Some(logit) = changed.get_mut(token as usize) {
                *logit += x;
            }
        };
        for (&token, &count) in self.counts.iter().filter(|_| penalised) {
            add(token, -presence_penalty - frequency_penalty * count as f32);
        }
        bias.iter().for_each(|&(token, x)| add(token, x));
        Some(changed)
    }
}

/// Log-probabilities of a token and of the `count` likeliest.
pub(super) fn logprobs(logits: &[f32], token: u32, count: usize) -> Logprobs {
    let finite = logits.iter().copied().filter(|x| x.is_finite());
    let best = finite.clone().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = finite.map(|x| f64::from(x - best).exp()).sum();
    let norm = f64::from(best) + sum.ln();
    let of = |x: f32| (f64::from(x) - norm) as f32;
    let mut top: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, &x)| (i as u32, x)).collect();
    top.retain(|(_, x)| x.is_finite());
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if count > 0 && count < top.len() {
        top.select_nth_unstable_by(count - 1, order);
    }
    top.truncate(count);
    top.sort_unstable_by(order);
    let chosen = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    Logprobs {
        chosen: of(chosen),
        top: top.into_iter().map(|(id, x)| (id, of(x))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn penalties_count_what_was_generated_and_biases_are_added() {
        let mut chooser = Chooser::new(
            &Choosing {
                presence_penalty: 0.5,
                frequency_penalty: 0.25,
                bias: vec![(2, 3.0), (99, 1.0)],
                ..Choosing::default()
            },
            None,
        );
        let logits = [4.0, 3.9, 0.5];
        // 4.0, 3.9, 3.5; then token 0 has 0.75 less, then 1 has, then 0 has 1.0 less.
        let chosen: Vec<u32> = (0..4).map(|_| chooser.choose(&logits, &[]).unwrap()).collect();
        assert_eq!(chosen, [0, 1, 2, 0]);
        assert_eq!(chooser.changed(&logits), Some(vec![3.0, 3.15, 2.75]));
        let plain = Chooser::new(&Choosing::default(), None);
        assert_eq!(plain.changed(&logits), None);
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let logits: Vec<f32> = [0.1f32, 0.4, 0.2, 0.3].iter().map(|p| p.ln() + 7.0).collect();
        let found = logprobs(&logits, 3, 2);
        assert!((found.chosen - 0.3f32.ln()).abs() < 1e-5);
        let ids: Vec<u32> = found.top.iter().map(|t| t.0).collect();
        assert_eq!(ids, [1, 3]);
        assert!((found.top[0].1 - 0.4f32.ln()).abs() < 1e-5);
        assert_eq!(logprobs(&logits, 3, 9).top.len(), 4);
        assert!(logprobs(&[f32::NAN, 1.0], 1, 0).top.is_empty());
        assert_eq!(logprobs(&[f32::NAN, 1.0], 1, 5).top, [(1, 0.0)]);
    }
}
