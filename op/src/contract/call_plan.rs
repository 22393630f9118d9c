//! What a call is, and the lengths of its sequences, checked.

use retro_contract::{budget_pages, input, limits, pages_for};
use smallvec::SmallVec;

use super::attributes::Attributes;
use super::dims::Dims;
use crate::ort::{Result, require};

/// What a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A prompt or a chunk of it: dense causal attention; closes the window.
    Prefill,
    /// One new token for each sequence, with its retrospective ones before it.
    Decode,
}

impl Phase {
    /// What a call is that feeds `tokens` tokens with these values of retro_length (at least one of them), after
    /// checking them.
    ///
    /// # Errors
    /// When they are out of range, mix prefill with decoding, or ask for another number of tokens.
    pub fn of_call(attributes: &Attributes, tokens: usize, retro_length: &[i32], empty_cache: bool) -> Result<Self> {
        let Attributes { window, step_rows, .. } = *attributes;
        let (mut lowest, mut highest) = (i32::MAX, i32::MIN);
        for &r in retro_length {
            require!(
                (-1..window as i32).contains(&r),
                "input retro_length is {r}, expected -1 (prefill) or 0..{} (window {window})",
                window - 1
            );
            (lowest, highest) = (lowest.min(r), highest.max(r));
        }
        require!(
            lowest >= 0 || highest == -1,
            "input retro_length mixes -1 (prefill) with {highest}: prefill is for the whole batch"
        );
        let rows = highest as usize + 1..=step_rows;
        if highest >= 0 && rows.contains(&tokens) && !empty_cache {
            return Ok(Phase::Decode);
        }
        if highest == -1 || (highest == 0 && (tokens > 1 || empty_cache)) {
            return Ok(Phase::Prefill);
        }
        require!(
            tokens == highest as usize + 1,
            "input retro_length is {highest}, so a step feeds {} tokens, but query has {tokens}",
            highest + 1
        );
        Ok(Phase::Decode)
    }
}

/// One sequence of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Valid tokens after the call, n: the newest position is n-1.
    pub len: usize,
    /// Rows of this call that count: the last `fed` of the S; the leading ones are ignored and their outputs are 0.
    pub fed: usize,
    /// Pages per KV head that a decoding step may load (forced pages come on top).
    pub budget: usize,
}

impl Sequence {
    /// Position of the first row that counts.
    pub fn first_position(&self) -> usize {
        self.len - self.fed
    }
}

/// The lengths of one call, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallPlan {
    /// Prefill or decoding.
    pub phase: Phase,
    /// One a sequence of the batch; on the stack where they are few.
    pub sequences: SmallVec<[Sequence; 8]>,
}

/// The integer inputs of a call.
pub struct CallLengths<'a> {
    /// `[B]`.
    pub seqlens_k: &'a [i32],
    /// The largest valid length after the call, or an upper bound.
    pub total_sequence_length: i32,
    /// One number, or one a sequence.
    pub retro_length: &'a [i32],
    /// One number, or one a sequence.
    pub page_budget: Option<&'a [i32]>,
    /// One number, or one a sequence.
    pub retro_count: Option<&'a [i32]>,
}

impl CallLengths<'_> {
    /// The input that says how many tokens of a step are retrospective.
    fn tells_retrospective(&self) -> &'static str {
        let slot = if self.retro_count.is_some() {
            input::RETRO_COUNT
        } else {
            input::RETRO_LENGTH
        };
        input::NAMES[slot]
    }

    /// Retrospective tokens of sequence `b` in a step.
    fn retrospective(&self, attributes: &Attributes, dims: &Dims, b: usize) -> Result<i32> {
        let Some(counts) = self.retro_count else {
            return Ok(of_sequence(self.retro_length, b));
        };
        let r = of_sequence(counts, b);
        let most = attributes.window.min(dims.tokens) - 1;
        require!(
            (0..=most as i32).contains(&r),
            "input retro_count[{b}] is {r}, expected 0..{most} (window {}, {} tokens fed)",
            attributes.window,
            dims.tokens
        );
        Ok(r)
    }
}

/// Element `b` of one number for the whole batch or one a sequence.
fn of_sequence(values: &[i32], b: usize) -> i32 {
    if values.len() == 1 { values[0] } else { values[b] }
}

impl CallPlan {
    /// Decides what the call is and checks every range.
    ///
    /// # Errors
    /// When a length, a budget or the mask is out of range.
    pub fn read(attributes: &Attributes, dims: &Dims, lengths: &CallLengths<'_>) -> Result<Self> {
        let mut longest = 0;
        for (b, &last) in lengths.seqlens_k.iter().enumerate() {
            require!(
                last != limits::MASK_NOT_UNDERSTOOD,
                "input seqlens_k[{b}] is {last}: the attention mask of sequence {b} is not understood: it has zeros between valid tokens, or after the newest \
                 token fed, or padding that this model doesn't mask. Pad on the left (zeros, then ones)"
            );
            require!(
                (0..dims.capacity as i32).contains(&last),
                "input seqlens_k[{b}] is {last}, expected 0..{} (valid tokens after this call minus 1, capacity {})",
                dims.capacity - 1,
                dims.capacity
            );
            longest = longest.max(last as usize + 1);
        }
        let total = lengths.total_sequence_length;
        require!(
            i64::from(total) >= longest as i64,
            "input total_sequence_length is {total}, expected at least {longest}, the largest seqlens_k plus 1"
        );
        if attributes.do_rotary {
            require!(
                longest <= dims.rotary_rows,
                "input seqlens_k asks for position {}, but cos_cache has {} rows",
                longest - 1,
                dims.rotary_rows
            );
        }
        let phase = Phase::of_call(attributes, dims.tokens, lengths.retro_length, longest == 1)?;
        let mut sequences = SmallVec::with_capacity(dims.batch);
        for (b, &last) in lengths.seqlens_k.iter().enumerate() {
            let len = last as usize + 1;
            let fed = match phase {
                Phase::Prefill => dims.tokens.min(len),
                Phase::Decode => {
                    let r = lengths.retrospective(attributes, dims, b)?;
                    require!(
                        (r as usize) < len,
                        "input {}[{b}] is {r}, but the cache of the sequence holds {} tokens before this step",
                        lengths.tells_retrospective(),
                        len - 1
                    );
                    r as usize + 1
                }
            };
            let asked = lengths.page_budget.map_or(0, |v| of_sequence(v, b));
            require!(
                asked >= 0,
                "input page_budget[{b}] is {asked}, expected at least 0 (0: from the attributes)"
            );
            let budget = if asked > 0 {
                (asked as usize).min(pages_for(len, attributes.page_size))
            } else {
                budget_pages(
                    attributes.budget_ratio,
                    attributes.budget_min_pages,
                    len,
                    attributes.page_size,
                )
            };
            sequences.push(Sequence { len, fed, budget });
        }
        Ok(Self { phase, sequences })
    }
}
