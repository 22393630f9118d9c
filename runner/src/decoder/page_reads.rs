//! Statistics of page selection: pages read per KV head, and effective exposure.
//!
//! The operator leaves its selection in the page steps: after the step at position t, the pages j with `A[j] = t` are
//! the ones loaded, S_t. Reading them is not timed.

use std::collections::VecDeque;

use retro_contract::{SKETCH_BLOCK, graph};
use serde::{Deserialize, Serialize};

use crate::decoder::{model::Model, state_slot::SlotKind};

/// A selection of pages, one bit each.
type Pages = Vec<u64>;

/// Sums over steps, layers, sequences and KV heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PageReads {
    pages: f64,
    shares: f64,
    /// Tokens of the loaded pages and valid pages, summed over samples (a layer and KV head in a step).
    tokens: f64,
    valid: f64,
    samples: f64,
    exposure: f64,
    exposed: f64,
    /// Steps of one sequence, and the valid tokens in them.
    steps: f64,
    lengths: f64,
}

impl PageReads {
    /// Mean pages loaded per KV head and step; `None` before the first step.
    pub fn pages(&self) -> Option<f64> {
        (self.samples > 0.0).then(|| self.pages / self.samples)
    }

    /// Mean share of the valid pages that was loaded, 0 to 1.
    pub fn share(&self) -> Option<f64> {
        (self.samples > 0.0).then(|| self.shares / self.samples)
    }

    /// Effective exposure: the tokens that a token has attended to at the end of its window, by its own selection and
    /// those of the w - 1 steps that corrected it, over the tokens of its own selection. 1 for w = 1.
    pub fn exposure(&self) -> Option<f64> {
        (self.exposed > 0.0).then(|| self.exposure / self.exposed)
    }

    /// Mean tokens loaded per KV head and step.
    pub fn tokens(&self) -> Option<f64> {
        (self.samples > 0.0).then(|| self.tokens / self.samples)
    }

    /// Mean valid pages of a step.
    pub fn valid_pages(&self) -> Option<f64> {
        (self.samples > 0.0).then(|| self.valid / self.samples)
    }

    /// Pages loaded and pages valid, summed over samples.
    pub fn page_sums(&self) -> (f64, f64) {
        (self.pages, self.valid)
    }

    /// Mean valid tokens of a step: what dense attention reads.
    pub fn length(&self) -> Option<f64> {
        (self.steps > 0.0).then(|| self.lengths / self.steps)
    }

    /// Counts a step of one sequence of `length` valid tokens.
    pub fn step(&mut self, length: usize) {
        self.steps += 1.0;
        self.lengths += length as f64;
    }

    /// Bytes of keys, values and, if pages are `scored`, selector state that a decoding step of one sequence of `model`
    /// reads in all layers. A layer that selects no pages reads every valid token and no state.
    pub fn bytes_per_step(&self, model: &Model, scored: bool) -> f64 {
        let length = self.length().unwrap_or(0.0);
        let sparse = model.page_step_slots();
        let selects = |layer: usize| {
            let mut slots = sparse.iter().filter_map(|&i| model.io.slots.get(i));
            slots.any(|s| s.layer == layer)
        };
        let bytes = model.io.slots.iter().map(|slot| {
            // Of one token of a cache, or one page or block of the state: all heads.
            let elements: usize = slot.shape(1, 1, 1).iter().product();
            let each = slot.element.byte_size(elements).unwrap_or(0) as f64;
            let read = match slot.kind {
                SlotKind::Cache if selects(slot.layer) => self.tokens().unwrap_or(length),
                SlotKind::Cache => length,
                SlotKind::Retro(graph::State::PageSummary) if scored && selects(slot.layer) => {
                    if slot.is_sketch() {
                        (length / SKETCH_BLOCK as f64).ceil()
                    } else {
                        self.valid_pages().unwrap_or(0.0)
                    }
                }
                SlotKind::Retro(_) | SlotKind::Recurrent => 0.0,
            };
            each * read
        });
        bytes.sum()
    }

    /// Adds the sums of other steps.
    pub fn add(&mut self, other: &PageReads) {
        self.pages += other.pages;
        self.shares += other.shares;
        self.tokens += other.tokens;
        self.valid += other.valid;
        self.steps += other.steps;
        self.lengths += other.lengths;
        self.samples += other.samples;
        self.exposure += other.exposure;
        self.exposed += other.exposed;
    }
}

/// Keeps the selections of the last w steps of one sequence.
pub struct PageMeter {
    window: usize,
    page_size: usize,
    /// Per layer and KV head, the selections of the last steps, oldest first.
    history: Vec<VecDeque<Pages>>,
    /// The sums so far.
    pub reading: PageReads,
}

impl PageMeter {
    /// A meter for a sequence decoded with window `window`.
    pub fn new(window: usize, page_size: usize) -> Self {
        Self {
            window: window.max(1),
            page_size: page_size.max(1),
            history: Vec::new(),
            reading: PageReads::default(),
        }
    }

    /// Adds the page steps A of one head after the step at position `t`. Heads are numbered over layers and KV heads.
    pub fn take(&mut self, head: usize, steps: &[i32], t: usize) {
        let valid = t / self.page_size + 1;
        let mut selected = vec![0u64; valid.div_ceil(64)];
        let mut count = 0usize;
        for (j, &step) in steps.iter().enumerate().take(valid) {
            if usize::try_from(step) == Ok(t) {
                if let Some(word) = selected.get_mut(j / 64) {
                    *word |= 1 << (j % 64);
                }
                count += 1;
            }
        }
        self.reading.pages += count as f64;
        self.reading.shares += count as f64 / valid as f64;
        self.reading.tokens += visible(&selected, t, self.page_size) as f64;
        self.reading.valid += valid as f64;
        self.reading.samples += 1.0;
        if self.history.len() <= head {
            self.history.resize_with(head + 1, VecDeque::new);
        }
        let Some(history) = self.history.get_mut(head) else {
            return;
        };
        history.push_back(selected);
        if history.len() > self.window {
            history.pop_front();
        }
        // The token whose window ends now is w - 1 positions back.
        if history.len() == self.window
            && let Some(token) = t.checked_sub(self.window - 1)
            && let Some(own) = history.front()
        {
            let own_tokens = visible(own, token, self.page_size);
            let mut union = own.clone();
            for later in history.iter().skip(1) {
                union.iter_mut().zip(later).for_each(|(u, l)| *u |= l);
            }
            if own_tokens > 0 {
                self.reading.exposure += visible(&union, token, self.page_size) as f64 / own_tokens as f64;
                self.reading.exposed += 1.0;
            }
        }
    }
}

/// Tokens at positions up to `token` in the pages of a selection.
fn visible(pages: &[u64], token: usize, page_size: usize) -> usize {
    let mut sum = 0;
    for (word_index, &word) in pages.iter().enumerate() {
        let mut rest = word;
        while rest != 0 {
            let start = (word_index * 64 + rest.trailing_zeros() as usize) * page_size;
            sum += (token + 1).saturating_sub(start).min(page_size);
            rest &= rest - 1;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_read_are_those_stamped_with_the_newest_position() {
        let mut m = PageMeter::new(1, 16);
        // t = 70: pages 0..=4 are valid; 0, 2 and 4 were loaded, 5 is beyond the sequence whatever it says.
        m.take(0, &[70, 69, 70, -1, 70, 70], 70);
        assert_eq!(m.reading.pages(), Some(3.0));
        assert_eq!(m.reading.share(), Some(0.6));
        assert_eq!(m.reading.tokens(), Some(16.0 + 16.0 + 7.0));
        assert_eq!(m.reading.valid_pages(), Some(5.0));
        assert_eq!(m.reading.exposure(), Some(1.0));
    }

    #[test]
    fn exposure_is_the_union_over_a_tokens_window_in_tokens_it_can_see() {
        let mut m = PageMeter::new(2, 16);
        m.take(0, &[39, -1, 39], 39); // own: page 0 (16 tokens) and page 2 up to 39 (8 tokens)
        assert_eq!(m.reading.exposure(), None);
        m.take(0, &[39, 40, 40], 40); // corrected by page 1 (16); page 2's token 40 is not visible to 39
        assert_eq!(m.reading.exposure(), Some(40.0 / 24.0));
        m.take(0, &[41, 41, 41], 41); // token 40: own pages 1 and 2 (16 + 9), then page 0 as well
        assert_eq!(m.reading.exposure(), Some((40.0 / 24.0 + 41.0 / 25.0) / 2.0));
    }

    #[test]
    fn heads_are_apart_and_many_pages_fit() {
        let mut m = PageMeter::new(2, 16);
        let mut steps = vec![-1; 200];
        steps[130] = 2100;
        steps[131] = 2100;
        m.take(3, &steps, 2100);
        m.take(1, &[], 2100);
        assert_eq!(m.reading.pages(), Some(1.0));
        assert_eq!(visible(&m.history[3][0], 2100, 16), 16 + 2100 - 131 * 16 + 1);
    }
}
