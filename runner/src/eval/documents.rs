//! Free generation over documents with known answers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Error, Result, converted_models::ConvertedModelCache, journal::Journal, policy::PolicyRow};
use crate::{
    Interrupt, Model, ModelTokenizer, OpenOptions, Runtime,
    decoder::{batch::Prefilled, decode_loop::Policy, page_reads::PageReads, require},
    eval::{score::Document, scorer::Answers},
    progress::Items,
};

/// The result of one document under one policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DocumentResult {
    /// Correctness of each answer, in order.
    pub right: Vec<bool>,
    /// Page reads of the steps.
    pub reading: PageReads,
    /// Tokens generated.
    pub generated: usize,
    /// Tokens of the question, decoded before them.
    #[serde(default)]
    pub asked: usize,
    /// This document's share of the batch's decoding time, in seconds.
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

impl DocumentResult {
    /// Fraction of right answers, 0 to 1.
    pub fn share(&self) -> f64 {
        share(&self.right)
    }

    /// Fraction of answers before the first wrong one; 1 if all are right.
    pub fn first_wrong(&self) -> f64 {
        let first = self.right.iter().position(|r| !r);
        first.map_or(1.0, |i| i as f64 / self.right.len() as f64)
    }

    /// Fraction of right answers per quarter of the output; NaN for a quarter without answers.
    pub fn quarters(&self) -> [f64; 4] {
        let n = self.right.len();
        std::array::from_fn(|q| {
            let part = self.right.get(q * n / 4..(q + 1) * n / 4).unwrap_or(&[]);
            if part.is_empty() { f64::NAN } else { share(part) }
        })
    }
}

fn share(right: &[bool]) -> f64 {
    right.iter().filter(|&&r| r).count() as f64 / right.len().max(1) as f64
}

/// Inputs and options of a run.
pub struct DocumentsJob<'a> {
    /// ONNX Runtime.
    pub runtime: &'a Runtime,
    /// How models are opened.
    pub open: &'a OpenOptions,
    /// The documents; the journal numbers them in this order.
    pub documents: &'a [Document],
    /// Rows to measure.
    pub rows: &'a [PolicyRow],
    /// Batch size.
    pub batch: usize,
    /// Prompt tokens per prefill chunk.
    pub chunk: usize,
    /// The answers of each document.
    pub answers: &'a [Answers],
    /// Maximum tokens to generate per document; `None`: from the documents.
    pub n_predict: Option<usize>,
    /// Questions are prefilled with their prompts instead of being decoded.
    pub dense_questions: bool,
    /// Stops the run between two steps.
    pub interrupt: &'a Interrupt,
}

impl DocumentsJob<'_> {
    fn pending(&self, journal: &Journal<DocumentResult>, row: &PolicyRow, first: usize, count: usize) -> bool {
        (first..first + count).any(|i| journal.get(&row.key(), i).is_none())
    }

    /// Measures what `journal` does not have yet.
    ///
    /// # Errors
    /// When a model or policy cannot be run, or the journal cannot be written.
    pub fn run(
        &self,
        converted: &mut ConvertedModelCache,
        journal: &mut Journal<DocumentResult>,
        bar: &Items,
    ) -> Result<()> {
        let mut groups: Vec<Vec<&PolicyRow>> = Vec::new();
        for row in self.rows {
            match groups.iter_mut().find(|g| g.iter().any(|r| r.source == row.source)) {
                Some(group) => group.push(row),
                None => groups.push(vec![row]),
            }
        }
        for group in groups {
            let open = group
                .iter()
                .any(|row| self.pending(journal, row, 0, self.documents.len()));
            if open {
                self.run_group(converted, journal, bar, &group)?;
            } else {
                bar.inc(group.len() * self.documents.len());
            }
        }
        Ok(())
    }

    /// Measures the rows of one model, which share its session and the prefilled prompts.
    fn run_group(
        &self,
        converted: &mut ConvertedModelCache,
        journal: &mut Journal<DocumentResult>,
        bar: &Items,
        group: &[&PolicyRow],
    ) -> Result<()> {
        self.interrupt.check()?;
        let first = group.first().ok_or(Error::Internal("no row"))?;
        let folder = converted.open(&first.source)?;
        let mut model = Model::open(self.runtime, &folder, self.open)?;
        let text = ModelTokenizer::open(&model.folder)?;
        model.folder.eos = text.ends(&model.folder);
        let policies = group
            .iter()
            .map(|row| row.policy(&model))
            .collect::<Result<Vec<Policy>>>()?;
        let texts = self.tokens(&text)?;
        let longest = texts.iter().map(TokenizedDocument::len).max().unwrap_or(0);
        let max_new = self.max_new(&model, &text, longest)?;
        let batch = model.batch(self.batch);
        let step = |_| -> Result<()> {
            bar.tick();
            Ok(self.interrupt.check()?)
        };
        let mut start = 0;
        for part in texts.chunks(batch) {
            let answers = self.answers.get(start..start + part.len()).unwrap_or(&[]);
            let questions: Vec<&[u32]> = part.iter().map(|d| d.question.as_slice()).collect();
            let mut prefilled: Option<Prefilled> = None;
            for (row, policy) in group.iter().zip(&policies) {
                if !self.pending(journal, row, start, part.len()) {
                    bar.inc(part.len());
                    continue;
                }
                bar.set_prefix(&row.label);
                let mut ready = match prefilled.take().filter(Prefilled::reusable) {
                    Some(ready) => ready,
                    None => {
                        let prompts = part.iter().map(|d| d.prompt.clone()).collect();
                        Prefilled::new(&mut model, prompts, longest + max_new, self.chunk, step)?
                    }
                };
                let decoded = ready.decode_after(&mut model, *policy, &questions, max_new, step)?;
                let share = |time: Duration| time.as_secs_f64() / part.len() as f64;
                for (i, (answers, output)) in answers.iter().zip(&decoded.outputs).enumerate() {
                    let reading = decoded.readings.get(i).copied().unwrap_or_default();
                    let outcome = DocumentResult {
                        right: answers.judge(&text.decode(output)?),
                        reading,
                        generated: output.len(),
                        asked: questions.get(i).map_or(0, |q| q.len()),
                        seconds: share(decoded.stats.decode_time),
                        pass_seconds: decoded.stats.passes.map(|p| share(p.time)),
                        bytes: reading.bytes_per_step(&model, row.scores()),
                        dense_bytes: Some(reading.dense_bytes_per_step(&model)),
                    };
                    journal.put(&row.key(), start + i, outcome)?;
                }
                bar.inc(part.len());
                prefilled = Some(ready);
            }
            start += part.len();
        }
        Ok(())
    }

    /// The documents in tokens of the model's.
    fn tokens(&self, text: &ModelTokenizer) -> Result<Vec<TokenizedDocument>> {
        let tokens = self.documents.iter().enumerate().map(|(number, d)| {
            let encoded = match d.question.as_deref() {
                Some(question) if !self.dense_questions => text.encode_after(&d.prompt, question),
                _ => text.encode(&d.text()).map(|prompt| (prompt, Vec::new())),
            };
            let (prompt, question) = encoded.map_err(|source| Error::Prompt { number, source })?;
            require!(!prompt.is_empty(), Error::QuestionOnly(number));
            Ok(TokenizedDocument { prompt, question })
        });
        tokens.collect()
    }

    /// Maximum output length, within the context: what the documents ask for, or the longest reference and a few tokens
    /// more.
    fn max_new(&self, model: &Model, text: &ModelTokenizer, longest: usize) -> Result<usize> {
        let room = model.context_length().map(|c| c.saturating_sub(longest));
        let of_document = |(number, d): (usize, &Document)| -> Result<Option<usize>> {
            let reference = d.reference.as_deref().map(|r| text.encode(r)).transpose();
            let reference = reference.map_err(|source| Error::Reference { number, source })?;
            Ok(d.n_predict.or(reference.map(|r| r.len() + 4)))
        };
        let of_documents = self.documents.iter().enumerate().map(of_document);
        let of_documents = of_documents.collect::<Result<Option<Vec<usize>>>>();
        let wanted = self.n_predict.or(of_documents?.and_then(|list| list.into_iter().max()));
        let wanted = wanted.or(room).ok_or(Error::UnknownLength)?;
        let most = room.map_or(wanted, |room| wanted.min(room));
        require!(most >= 1, Error::NoRoom(longest));
        Ok(most)
    }
}

/// A document in tokens.
struct TokenizedDocument {
    prompt: Vec<u32>,
    question: Vec<u32>,
}

impl TokenizedDocument {
    fn len(&self) -> usize {
        self.prompt.len() + self.question.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_by_place() {
        let outcome = |right: &[u8]| DocumentResult {
            right: right.iter().map(|&r| r == 1).collect(),
            reading: PageReads::default(),
            generated: 0,
            asked: 0,
            seconds: 0.0,
            pass_seconds: None,
            bytes: 0.0,
            dense_bytes: None,
        };
        let o = outcome(&[1, 1, 1, 0, 0, 1, 0, 0]);
        assert_eq!((o.share(), o.first_wrong()), (0.5, 3.0 / 8.0));
        assert_eq!(o.quarters(), [1.0, 0.5, 0.5, 0.0]);
        assert_eq!(outcome(&[1, 1]).first_wrong(), 1.0);
        let short = outcome(&[1, 0]).quarters();
        assert!(short[0].is_nan() && short[1] == 1.0 && short[3] == 0.0, "{short:?}");
    }
}
