//! Prefill and the windowed decoding loop, for one sequence or a batch.
//!
//! A step at position t feeds the r+1 tokens at positions t-r to t: the newest one and r retrospective ones, which
//! attend again to the pages that the newest one selects. r grows by one a step from 0 to w-1, from the first step on
//! that leaves pages out, and never reaches into the prompt.

use std::time::{Duration, Instant};

use retro_contract::limits;

use crate::decoder::{
    error::{Error, Result, require},
    inputs::Feed,
    logits::Logits,
    model::Model,
    page_reads::{PageMeter, PageReads},
    step::DecoderState,
    step_plan::{StepPlan, StepPlanner},
};

pub use crate::decoder::step_plan::Policy;

/// Default number of tokens per prefill chunk.
pub const CHUNK: usize = 512;

/// Prefills a prompt into a fresh state of batch 1, in chunks; returns the logits after its last token. `progress` is
/// called with the tokens of each chunk and may stop with an error.
///
/// # Errors
/// When ONNX Runtime or `progress` fails.
pub fn prefill<E: From<Error>>(
    model: &mut Model,
    state: &mut DecoderState,
    prompt: &[u32],
    chunk: usize,
    progress: impl FnMut(usize) -> Result<(), E>,
) -> Result<Logits, E> {
    prefill_rest(model, state, prompt, 0, chunk, progress)
}

/// As [`prefill`], for a state that holds the prompt's first `held` tokens. Whatever else it holds is forgotten.
///
/// # Errors
/// As [`prefill`], and when nothing of the prompt is left to read.
pub fn prefill_rest<E: From<Error>>(
    model: &mut Model,
    state: &mut DecoderState,
    prompt: &[u32],
    held: usize,
    chunk: usize,
    mut progress: impl FnMut(usize) -> Result<(), E>,
) -> Result<Logits, E> {
    let rest = prompt.get(held..).filter(|rest| !rest.is_empty());
    let rest = rest.ok_or(Error::EmptyPrompt)?;
    require!(chunk >= 1, Error::EmptyChunk);
    // A graph may be declared for one token per call.
    let chunk = model.io.input_ids.width.unwrap_or(chunk);
    let mut logits = Logits::default();
    let mut done = held;
    for part in rest.chunks(chunk) {
        done += part.len();
        let ids = part.iter().map(|&id| i64::from(id)).collect();
        logits = model.run(
            state,
            &Feed {
                ids,
                lengths: vec![done],
                retro_length: -1,
                ..Feed::default()
            },
        )?;
        progress(part.len())?;
    }
    Ok(logits)
}

/// One sequence of a batch that is being decoded.
struct Sequence {
    /// Prompt and output.
    tokens: Vec<u32>,
    prompt: usize,
    /// Fed as before, so that the batch keeps its shape; its logits are ignored.
    finished: bool,
    meter: PageMeter,
}

/// The decoding loop of a batch whose prompts are prefilled.
pub struct Decoder<'a> {
    model: &'a mut Model,
    state: &'a mut DecoderState,
    policy: Policy,
    planner: StepPlanner,
    sequences: Vec<Sequence>,
    steps: usize,
    /// Slots of the page steps to measure.
    measured: Vec<usize>,
    /// Time spent in steps, without measuring.
    pub time: Duration,
}

impl<'a> Decoder<'a> {
    /// A decoder for the prompts that `state` holds, one a row.
    ///
    /// # Errors
    /// When the model was converted for a smaller window, or takes no budget at run time.
    pub fn new(model: &'a mut Model, state: &'a mut DecoderState, prompts: &[&[u32]], policy: Policy) -> Result<Self> {
        let (count, batch) = (prompts.len(), state.kv().batch());
        require!(count == batch, Error::Prompts { prompts: count, batch });
        let policy = Policy {
            dense_below: policy.dense_below,
            ..Policy::new(model, Some(policy.window), policy.budget)?
        };
        let page_size = model.retro.as_ref().map_or(limits::PAGE_SIZE, |r| r.page_size);
        let measured = model.page_step_slots();
        let sequence = |prompt: &&[u32]| Sequence {
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            finished: false,
            meter: PageMeter::new(policy.window, page_size),
        };
        let sequences = prompts.iter().map(sequence).collect();
        let planner = StepPlanner::new(model, policy);
        Ok(Self {
            model,
            state,
            policy,
            planner,
            sequences,
            steps: 0,
            measured,
            time: Duration::ZERO,
        })
    }

    /// Turns off the measuring of page reads.
    pub fn measure_nothing(&mut self) {
        self.measured.clear();
    }

    /// Appends the token chosen for a sequence.
    pub fn push(&mut self, row: usize, token: u32) {
        if let Some(s) = self.sequences.get_mut(row).filter(|s| !s.finished) {
            s.tokens.push(token);
        }
    }

    /// Marks a sequence as finished: it is no longer counted.
    pub fn finish(&mut self, row: usize) {
        if let Some(s) = self.sequences.get_mut(row) {
            s.finished = true;
        }
    }

    /// Whether a sequence is finished; true for a row that does not exist.
    pub fn finished(&self, row: usize) -> bool {
        self.sequences.get(row).is_none_or(|s| s.finished)
    }

    /// Prompt and output of a sequence.
    pub fn tokens(&self, row: usize) -> &[u32] {
        self.sequences.get(row).map_or(&[], |s| &s.tokens)
    }

    /// Output of a sequence.
    pub fn output(&self, row: usize) -> &[u32] {
        self.sequences
            .get(row)
            .and_then(|s| s.tokens.get(s.prompt..))
            .unwrap_or(&[])
    }

    /// Feeds the last tokens of every sequence, each of which got one since the last step; returns the logits of the
    /// next token, `[B, vocab]`.
    ///
    /// # Errors
    /// When a sequence outgrows the cache or ONNX Runtime fails.
    pub fn step(&mut self) -> Result<Logits> {
        let lengths: Vec<usize> = self.sequences.iter().map(|s| s.tokens.len()).collect();
        let StepPlan {
            retrospective: r,
            budgets,
        } = self.planner.next(&lengths);
        let mut ids = Vec::with_capacity(self.sequences.len() * (r + 1));
        for s in &self.sequences {
            let start = s
                .tokens
                .len()
                .checked_sub(r + 1)
                .ok_or(Error::Internal("a sequence is shorter than the window"))?;
            ids.extend(s.tokens.get(start..).unwrap_or(&[]).iter().map(|&id| i64::from(id)));
        }
        let start = Instant::now();
        let logits = self.model.run(
            self.state,
            &Feed {
                ids,
                lengths,
                retro_length: r as i32,
                budgets,
                graph_capturable: r + 1 == self.policy.window,
            },
        )?;
        self.time += start.elapsed();
        self.steps += 1;
        self.measure();
        Ok(logits)
    }

    fn measure(&mut self) {
        for s in self.sequences.iter_mut().filter(|s| !s.finished) {
            s.meter.reading.step(s.tokens.len());
        }
        let mut head0 = 0;
        for &slot in &self.measured {
            let Some((steps, [_, heads, pages])) = self.state.kv().page_steps(slot) else {
                continue;
            };
            for (row, s) in self.sequences.iter_mut().enumerate().filter(|(_, s)| !s.finished) {
                for head in 0..heads {
                    let start = (row * heads + head) * pages;
                    let own = steps.get(start..start + pages).unwrap_or(&[]);
                    s.meter.take(head0 + head, own, s.tokens.len() - 1);
                }
            }
            head0 += heads;
        }
    }

    /// Steps run so far.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Page reads of all sequences so far.
    pub fn reading(&self) -> PageReads {
        let mut sum = PageReads::default();
        self.readings().for_each(|r| sum.add(r));
        sum
    }

    /// Page reads of each sequence so far.
    pub fn readings(&self) -> impl Iterator<Item = &PageReads> {
        self.sequences.iter().map(|s| &s.meter.reading)
    }
}
