//! Perplexity and KL divergence from dense attention, by teacher forcing: a dense prefill, then the text token by
//! token.
//!
//! Every policy is fed the same tokens, so differences do not accumulate, and small ones show.

use std::time::Duration;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    Error, Result,
    converted_models::ConvertedModelCache,
    journal::Journal,
    policy::{PolicyKind, PolicyRow},
};
use crate::{
    Interrupt, Model, ModelTokenizer, OpenOptions, Runtime,
    decoder::{
        batch::{Forced, Observer, Prefilled},
        decode_loop::Policy,
        page_reads::PageReads,
        require,
    },
    progress::Items,
};

/// Number of parts of a text with separate sums.
pub const PARTS: usize = 8;

/// The result of one text under one policy: sums over tokens, per part of the text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fidelity {
    /// Tokens predicted.
    pub tokens: [usize; PARTS],
    /// KL divergence from dense attention's next-token distribution, in nats.
    pub divergence: [f64; PARTS],
    /// Negative log-likelihood of the text, in nats.
    pub surprise: [f64; PARTS],
    /// Tokens for which policy and dense attention have the same top token.
    pub agreed: usize,
    /// Page reads of the steps.
    pub reading: PageReads,
    /// This text's share of the batch's decoding time, in seconds.
    pub seconds: f64,
    /// Of these, the seconds of rectifying passes; `None` where there were to be none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass_seconds: Option<f64>,
    /// Bytes of keys, values and summaries read per step, all layers.
    pub bytes: f64,
    /// Bytes that dense attention reads per step, for the same lengths.
    #[serde(default)]
    pub dense_bytes: Option<f64>,
}

impl Fidelity {
    fn total(of: &[f64; PARTS]) -> f64 {
        of.iter().sum()
    }

    /// Tokens predicted, all parts together.
    pub fn count(&self) -> usize {
        self.tokens.iter().sum()
    }

    /// Mean divergence of a token.
    pub fn mean_divergence(&self) -> f64 {
        Self::total(&self.divergence) / self.count().max(1) as f64
    }

    /// Mean negative log-likelihood of a token.
    pub fn mean_surprise(&self) -> f64 {
        Self::total(&self.surprise) / self.count().max(1) as f64
    }
}

/// Inputs and options of a run.
pub struct FidelityJob<'a> {
    /// ONNX Runtime.
    pub runtime: &'a Runtime,
    /// How models are opened.
    pub open: &'a OpenOptions,
    /// Texts in full.
    pub texts: &'a [String],
    /// Names of the texts, for messages.
    pub names: &'a [String],
    /// Rows to measure.
    pub rows: &'a [PolicyRow],
    /// Batch size.
    pub batch: usize,
    /// Prompt tokens per prefill chunk.
    pub chunk: usize,
    /// Tokens of a text that are prefilled.
    pub prompt: usize,
    /// Maximum tokens of a text to predict.
    pub predict: usize,
    /// Stops the run between two steps.
    pub interrupt: &'a Interrupt,
}

const NO_TOKEN: Error = Error::Internal("no such token");

/// Log-probabilities of every next token of a text, `[tokens, vocabulary]`.
type Distributions = Vec<f32>;

impl FidelityJob<'_> {
    /// Measures what `journal` does not have yet. The reference is dense attention, even if it is no row.
    ///
    /// # Errors
    /// When a model or policy cannot be run, or the journal cannot be written.
    pub fn run(&self, converted: &mut ConvertedModelCache, journal: &mut Journal<Fidelity>, bar: &Items) -> Result<()> {
        let source = converted.graph().to_owned();
        let mut dense = Model::open(self.runtime, &source, self.open)?;
        let text = ModelTokenizer::open(&dense.folder)?;
        let tokens = self.tokens(&dense, &text)?;
        let batch = dense.batch(self.batch);
        let mut models: Vec<(usize, Model)> = Vec::new();
        let mut start = 0;
        for part in tokens.chunks(batch) {
            let pending = |row: &PolicyRow| (start..start + part.len()).any(|i| journal.get(&row.key(), i).is_none());
            if !self.rows.iter().any(pending) {
                bar.inc(part.len() * self.rows.len());
                start += part.len();
                continue;
            }
            let pending: Vec<bool> = self.rows.iter().map(pending).collect();
            bar.set_prefix("dense");
            let plain = Policy::new(&dense, None, None)?;
            let mut reference: Vec<Distributions> = vec![Vec::new(); part.len()];
            let mut all = self.prefill(&mut dense, part, bar)?;
            self.force(&mut all, &mut dense, plain, part, bar, &mut |at, logits| {
                let lists = reference.par_iter_mut().zip(part).enumerate();
                lists.for_each(|(row, (list, text))| {
                    let predicted = text.len() - self.prompt;
                    if at < predicted {
                        // All at once: it is the most memory that this takes.
                        list.reserve_exact(predicted * logits.vocab - list.len());
                        list.extend(log_softmax(logits.row(row)));
                    }
                });
                Ok(())
            })?;
            drop(all);
            let mut prefilled: Option<(usize, Prefilled)> = None;
            for (row, pending) in self.rows.iter().zip(pending) {
                if !pending {
                    bar.inc(part.len());
                    continue;
                }
                bar.set_prefix(&row.label);
                let place = self.rows.iter().position(|r| r.source == row.source).unwrap_or(0);
                self.interrupt.check()?;
                if row.kind != PolicyKind::Dense && !models.iter().any(|(p, _)| *p == place) {
                    let folder = converted.open(&row.source)?;
                    models.push((place, Model::open(self.runtime, &folder, self.open)?));
                }
                let model = match models.iter_mut().find(|(p, _)| *p == place) {
                    Some((_, model)) => model,
                    None => &mut dense,
                };
                let policy = row.policy(model)?;
                let reusable = prefilled.take().filter(|(p, ready)| *p == place && ready.reusable());
                let mut ready = match reusable {
                    Some((_, ready)) => ready,
                    None => self.prefill(model, part, bar)?,
                };
                let mut sums = vec![Sums::default(); part.len()];
                let forced = self.force(&mut ready, model, policy, part, bar, &mut |at, logits| {
                    let texts = sums.par_iter_mut().zip(part).zip(&reference).enumerate();
                    texts.try_for_each(|(row, ((sum, text), dense))| {
                        let Some(&target) = text.get(self.prompt + at) else {
                            return Ok(());
                        };
                        let dense = dense.get(at * logits.vocab..(at + 1) * logits.vocab);
                        let place = at * PARTS / (text.len() - self.prompt);
                        sum.add(place, dense.ok_or(NO_TOKEN)?, logits.row(row), target as usize);
                        Ok(())
                    })
                })?;
                for (i, sum) in sums.into_iter().enumerate() {
                    let reading = forced.readings.get(i).copied().unwrap_or_default();
                    let share = |time: Duration| time.as_secs_f64() / part.len() as f64;
                    let cost = Cost {
                        reading,
                        seconds: share(forced.time),
                        pass_seconds: forced.passes.map(|p| share(p.time)),
                        bytes: reading.bytes_per_step(model, row.scores()),
                        dense_bytes: Some(reading.dense_bytes_per_step(model)),
                    };
                    journal.put(&row.key(), start + i, sum.fidelity(cost))?;
                }
                bar.inc(part.len());
                prefilled = Some((place, ready));
            }
            start += part.len();
        }
        Ok(())
    }

    /// Token ids of the texts, truncated to prompt and predicted part.
    fn tokens(&self, model: &Model, text: &ModelTokenizer) -> Result<Vec<Vec<u32>>> {
        let most = model.context_length().unwrap_or(usize::MAX);
        let most = most.min(self.prompt.saturating_add(self.predict));
        let tokens = self.texts.iter().zip(self.names).map(|(full, name)| {
            let mut ids = text.encode(full).map_err(|source| Error::Tokens {
                name: name.clone(),
                source,
            })?;
            ids.truncate(most);
            require!(
                ids.len() >= self.prompt + PARTS,
                Error::ShortText {
                    name: name.clone(),
                    tokens: ids.len(),
                    least: PARTS,
                    prompt: self.prompt,
                }
            );
            Ok(ids)
        });
        tokens.collect()
    }

    fn prefill(&self, model: &mut Model, part: &[Vec<u32>], bar: &Items) -> Result<Prefilled> {
        let prompts = part.iter().map(|t| t.iter().copied().take(self.prompt).collect());
        let longest = part.iter().map(Vec::len).max().unwrap_or(0);
        Prefilled::new(model, prompts.collect(), longest, self.chunk, |_| {
            bar.tick();
            Ok(self.interrupt.check()?)
        })
    }

    fn force(
        &self,
        ready: &mut Prefilled,
        model: &mut Model,
        policy: Policy,
        part: &[Vec<u32>],
        bar: &Items,
        observe: &mut Observer<'_, Error>,
    ) -> Result<Forced> {
        let texts: Vec<&[u32]> = part.iter().map(|t| t.get(self.prompt..).unwrap_or(&[])).collect();
        let step = || {
            bar.tick();
            Ok(self.interrupt.check()?)
        };
        ready.force(model, policy, &texts, step, observe)
    }
}

#[derive(Clone, Default)]
struct Sums {
    tokens: [usize; PARTS],
    divergence: [f64; PARTS],
    surprise: [f64; PARTS],
    agreed: usize,
}

impl Sums {
    fn add(&mut self, part: usize, dense: &[f32], scores: &[f32], target: usize) {
        let own: Vec<f32> = log_softmax(scores).collect();
        let terms = dense.iter().zip(&own);
        let divergence: f64 = terms
            .filter(|(d, _)| d.is_finite())
            .map(|(&d, &o)| f64::from(d).exp() * (f64::from(d) - f64::from(o)))
            .sum();
        let best = |of: &[f32]| crate::decoder::sampling::argmax(of);
        let slots = self.divergence.get_mut(part).zip(self.surprise.get_mut(part));
        if let Some(((d, s), n)) = slots.zip(self.tokens.get_mut(part)) {
            *d += divergence;
            *s -= own.get(target).copied().map_or(0.0, f64::from);
            *n += 1;
        }
        self.agreed += usize::from(best(dense) == best(&own));
    }

    fn fidelity(self, cost: Cost) -> Fidelity {
        let Cost {
            reading,
            seconds,
            pass_seconds,
            bytes,
            dense_bytes,
        } = cost;
        Fidelity {
            tokens: self.tokens,
            divergence: self.divergence,
            surprise: self.surprise,
            agreed: self.agreed,
            reading,
            seconds,
            pass_seconds,
            bytes,
            dense_bytes,
        }
    }
}

/// What a text took under a policy: [`Fidelity`] has the fields.
struct Cost {
    reading: PageReads,
    seconds: f64,
    pass_seconds: Option<f64>,
    bytes: f64,
    dense_bytes: Option<f64>,
}

fn log_softmax(scores: &[f32]) -> impl Iterator<Item = f32> + '_ {
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = scores.iter().map(|&s| f64::from(s - top).exp()).sum();
    let norm = top + sum.ln() as f32;
    scores.iter().map(move |&s| s - norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_and_surprise_by_hand() {
        let mut sums = Sums::default();
        // Dense: 1/2, 1/2; the policy: 1/4, 3/4; the text goes on with token 0.
        let dense: Vec<f32> = log_softmax(&[1.0, 1.0]).collect();
        sums.add(2, &dense, &[0.0, 3f32.ln()], 0);
        let expected = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((sums.divergence[2] - expected).abs() < 1e-6, "{}", sums.divergence[2]);
        assert!((sums.surprise[2] - 4f64.ln()).abs() < 1e-6);
        assert_eq!((sums.tokens[2], sums.agreed), (1, 0));
        sums.add(0, &dense, &[7.0, 7.0], 1);
        assert!(sums.divergence[0].abs() < 1e-6);
        assert_eq!(sums.agreed, 1);
    }
}
