//! Prefill and the windowed decoding loop, for one sequence or a batch.
//!
//! A step at position t feeds the r+1 tokens at positions t-r to t: the newest one and r retrospective ones, which
//! attend again to the pages that the newest one selects. r grows by one a step from 0 to w-1, from the first step on
//! that leaves pages out, and never reaches into the prompt.
//!
//! With rectifying passes ([`Policy::rectify`]) every N-th step is preceded by a dense pass over the last N tokens that
//! were decoded: it writes their keys and values anew and closes the window, as any prefill does.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use retro_contract::limits;

use crate::decoder::{
    error::{Error, Result, require},
    inputs::Feed,
    logits::Logits,
    model::Model,
    page_reads::{PageMeter, PageReads},
    stats::Passes,
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
    require!(held < prompt.len(), Error::EmptyPrompt);
    require!(chunk >= 1, Error::EmptyChunk);
    // A graph may be declared for one token per call.
    let chunk = model.io.input_ids.width.unwrap_or(chunk);
    let mut logits = Logits::default();
    for Range { start, end } in chunks(held..prompt.len(), chunk, model.keeps_window())? {
        let part = prompt.get(start..end).unwrap_or(&[]);
        // A token that is read again counts once.
        let new = end.saturating_sub(start.max(held));
        let ids = part.iter().map(|&id| i64::from(id)).collect();
        logits = model.run(
            state,
            &Feed {
                ids,
                lengths: vec![end],
                retro_length: -1,
                ..Feed::default()
            },
        )?;
        progress(new)?;
    }
    Ok(logits)
}

/// How many of a prompt's tokens need not be read where these are held: those that both begin with, but for the prompt's
/// last one, which gives the first logits.
pub(crate) fn held_of_prompt(held: &[u32], prompt: &[u32]) -> usize {
    let common = held.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    common.min(prompt.len().saturating_sub(1))
}

/// Chunks of the tokens at these positions. `keeps_window`: to the graph a single token behind others is a step, so no chunk
/// is one: the one before it lends it a token, which is read again.
fn chunks(tokens: Range<usize>, chunk: usize, keeps_window: bool) -> Result<Vec<Range<usize>>> {
    let starts = tokens.clone().step_by(chunk);
    let mut chunks: Vec<_> = starts.map(|start| start..(start + chunk).min(tokens.end)).collect();
    if keeps_window {
        require!(chunk > 1 || tokens.end <= 1, Error::ChunkOfOne);
        let last = chunks.last_mut().filter(|last| last.len() == 1);
        if let Some(last) = last.filter(|last| last.start > 0) {
            last.start -= 1;
        }
    }
    Ok(chunks)
}

/// Writes the last `count` of the tokens that a state holds anew, with dense attention. `tokens`: all tokens that it
/// holds, a row for each sequence. The window is closed after it.
///
/// # Errors
/// When a sequence has fewer tokens, or ONNX Runtime fails.
pub fn rewrite(model: &mut Model, state: &mut DecoderState, tokens: &[&[u32]], count: usize) -> Result<()> {
    let chunk = model.io.input_ids.width.unwrap_or(CHUNK).max(1);
    let too_short = Error::Internal("a sequence is shorter than its rectifying pass");
    let starts: Option<Vec<usize>> = tokens.iter().map(|t| t.len().checked_sub(count)).collect();
    let starts = starts.ok_or(too_short)?;
    let shortest = starts.iter().copied().min().unwrap_or(0);
    for part in chunks(shortest..shortest + count, chunk, model.keeps_window())? {
        let mut ids = Vec::with_capacity(tokens.len() * part.len());
        for (row, start) in tokens.iter().zip(&starts) {
            let longer = start - shortest;
            let part = row.get(part.start + longer..part.end + longer).unwrap_or(&[]);
            ids.extend(part.iter().map(|&id| i64::from(id)));
        }
        let feed = Feed {
            ids,
            lengths: starts.iter().map(|start| part.end + start - shortest).collect(),
            retro_length: -1,
            ..Feed::default()
        };
        model.run(state, &feed)?;
    }
    Ok(())
}

/// One sequence of a batch that is being decoded.
struct Sequence {
    /// Prompt and output. With rectifying passes a finished sequence grows on, by tokens that are no output.
    tokens: Vec<u32>,
    prompt: usize,
    output: usize,
    /// Fed all the same, so that the batch keeps its shape; its logits are ignored.
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
    /// Steps since the prompt or the last rectifying pass.
    open: usize,
    passes: Passes,
    /// Slots of the page steps to measure.
    measured: Vec<usize>,
    /// Time spent in steps and rectifying passes, without measuring.
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
            ..Policy::new(model, Some(policy.window), policy.budget)?.rectified(model, policy.rectify)?
        };
        let page_size = model.retro.as_ref().map_or(limits::PAGE_SIZE, |r| r.page_size);
        let measured = model.page_step_slots();
        let sequence = |prompt: &&[u32]| Sequence {
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            output: 0,
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
            open: 0,
            passes: Passes::default(),
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
            s.output += 1;
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
        self.sequences.get(row).map_or(&[], Sequence::text)
    }

    /// Output of a sequence.
    pub fn output(&self, row: usize) -> &[u32] {
        self.sequences
            .get(row)
            .and_then(|s| s.text().get(s.prompt..))
            .unwrap_or(&[])
    }

    /// Feeds the last tokens of every sequence, each of which got one since the last step; returns the logits of the
    /// next token, `[B, vocab]`. A rectifying pass that is due comes first.
    ///
    /// # Errors
    /// When a sequence outgrows the cache or ONNX Runtime fails.
    pub fn step(&mut self) -> Result<Logits> {
        if let Some(count) = self.policy.rectify {
            self.lengthen_finished();
            if self.open == count {
                self.rectify(count)?;
            }
        }
        let lengths: Vec<usize> = self.sequences.iter().map(|s| s.tokens.len()).collect();
        let StepPlan {
            retrospective: r,
            budgets,
        } = self.planner.next(&lengths);
        // The graph feeds the others by itself, from the first step on.
        let keeps_window = self.model.keeps_window();
        let fed_again = if keeps_window { 0 } else { r };
        let mut ids = Vec::with_capacity(self.sequences.len() * (fed_again + 1));
        for s in &self.sequences {
            let start = s
                .tokens
                .len()
                .checked_sub(fed_again + 1)
                .ok_or(Error::Internal("a sequence is shorter than the window"))?;
            ids.extend(s.tokens.get(start..).unwrap_or(&[]).iter().map(|&id| i64::from(id)));
        }
        let start = Instant::now();
        let logits = self.model.run(
            self.state,
            &Feed {
                ids,
                lengths,
                retro_length: fed_again as i32,
                budgets,
                graph_capturable: keeps_window || r + 1 == self.policy.window,
                ..Feed::default()
            },
        )?;
        self.time += start.elapsed();
        self.steps += 1;
        self.open += 1;
        self.measure();
        Ok(logits)
    }

    /// Lets finished sequences grow as the others do, up to the cache's end: a pass over the last tokens of all must not
    /// reach into their prompts.
    fn lengthen_finished(&mut self) {
        let capacity = self.state.kv().capacity();
        for s in self.sequences.iter_mut().filter(|s| s.finished) {
            // As long as an active one: the tokens of its steps and one that no step has fed.
            let wanted = (s.prompt + self.steps + 1).min(capacity);
            let last = s.tokens.last().copied().filter(|_| s.tokens.len() < wanted);
            s.tokens.extend(last);
        }
    }

    /// The rectifying pass over the last `count` tokens that the state holds: all but the newest, which no step has fed.
    fn rectify(&mut self, count: usize) -> Result<()> {
        let held = |s: &'_ Sequence| s.tokens.len().saturating_sub(1);
        let rows: Vec<&[u32]> = self
            .sequences
            .iter()
            .map(|s| s.tokens.get(..held(s)).unwrap_or(&[]))
            .collect();
        let start = Instant::now();
        rewrite(self.model, self.state, &rows, count)?;
        let time = start.elapsed();
        self.time += time;
        self.passes.add(time);
        self.open = 0;
        self.planner.close();
        for s in self.sequences.iter_mut().filter(|s| !s.finished) {
            let newest = held(s).saturating_sub(1);
            s.meter.pass(newest);
        }
        Ok(())
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

    /// Rectifying passes so far; `None` where there are to be none.
    pub fn passes(&self) -> Option<Passes> {
        self.policy.rectify.map(|_| self.passes)
    }

    /// Tokens of a sequence's output that passes have rewritten.
    pub fn rectified(&self) -> usize {
        self.passes.count * self.policy.rectify.unwrap_or(0)
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

impl Sequence {
    /// Prompt and output.
    fn text(&self) -> &[u32] {
        self.tokens.get(..self.prompt + self.output).unwrap_or(&[])
    }
}
