//! Statistics of page selection: pages read per KV head, and effective exposure.
//!
//! The operator leaves its selection in the page steps: after the step at position t, the pages j with `A[j] = t` are
//! the ones loaded, S_t. Reading them is not timed.

use std::collections::VecDeque;

use retro_contract::{SKETCH_BLOCK, graph};
use serde::{Deserialize, Serialize};

use crate::decoder::{
    model::Model,
    state_slot::{SlotKind, StateSlot},
};

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
    /// Rectifying passes over one sequence, and the valid tokens in them.
    #[serde(default)]
    passes: f64,
    #[serde(default)]
    pass_lengths: f64,
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
    /// those of the w - 1 steps that corrected it, over the tokens of its own selection. 1 for w = 1. A rectifying pass
    /// ends a window early; what it reads itself does not count.
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

    /// Rectifying passes over one sequence.
    pub fn passes(&self) -> f64 {
        self.passes
    }

    /// Bytes of keys and values that a step of dense attention reads in all layers, for the same lengths.
    pub fn dense_bytes_per_step(&self, model: &Model) -> f64 {
        let caches = model.io.slots.iter().filter(|slot| slot.kind == SlotKind::Cache);
        caches.map(bytes_each).sum::<f64>() * self.length().unwrap_or(0.0)
    }

    /// Bytes of keys, values and, if pages are `scored`, selector state that a decoding step of one sequence of `model`
    /// reads in all layers. A layer that selects no pages reads every valid token and no state. A rectifying pass reads
    /// every valid token once, which its steps share.
    pub fn bytes_per_step(&self, model: &Model, scored: bool) -> f64 {
        let length = self.length().unwrap_or(0.0);
        let sparse = model.page_step_slots();
        let selects = |layer: usize| {
            let mut slots = sparse.iter().filter_map(|&i| model.io.slots.get(i));
            slots.any(|s| s.layer == layer)
        };
        let by_passes = if self.steps > 0.0 {
            self.pass_lengths / self.steps
        } else {
            0.0
        };
        let bytes = model.io.slots.iter().map(|slot| {
            let read = match slot.kind {
                SlotKind::Cache if selects(slot.layer) => self.tokens().unwrap_or(length) + by_passes,
                SlotKind::Cache => length + by_passes,
                SlotKind::Retro(graph::State::PageSummary) if scored && selects(slot.layer) => {
                    if slot.is_sketch() {
                        (length / SKETCH_BLOCK as f64).ceil()
                    } else {
                        self.valid_pages().unwrap_or(0.0)
                    }
                }
                SlotKind::Retro(_) | SlotKind::Recurrent | SlotKind::Window => 0.0,
            };
            bytes_each(slot) * read
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
        self.passes += other.passes;
        self.pass_lengths += other.pass_lengths;
    }
}

/// Bytes of one token of a cache, or of one page or block of the state: all heads.
fn bytes_each(slot: &StateSlot) -> f64 {
    let elements: usize = slot.shape(1, 1, 1).iter().product();
    slot.element.byte_size(elements).unwrap_or(0) as f64
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
        let newest = i32::try_from(t).unwrap_or(i32::MAX);
        let word = |steps: &[i32]| -> u64 {
            let bits = steps.iter().enumerate();
            bits.fold(0, |word, (j, &step)| word | (u64::from(step == newest) << j))
        };
        let selected: Pages = steps.get(..valid).unwrap_or(steps).chunks(64).map(word).collect();
        let count: u32 = selected.iter().map(|word| word.count_ones()).sum();
        self.reading.pages += f64::from(count);
        self.reading.shares += f64::from(count) / valid as f64;
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
        {
            self.reading.expose(history.iter(), token, self.page_size);
        }
    }

    /// Ends the windows of all tokens, of which `t` is the newest: a rectifying pass was run over them.
    pub fn pass(&mut self, t: usize) {
        self.reading.passes += 1.0;
        self.reading.pass_lengths += t as f64 + 1.0;
        for history in &mut self.history {
            // The window of the first of w tokens has ended by itself.
            let ended = usize::from(history.len() == self.window);
            for own in ended..history.len() {
                if let Some(token) = (t + own + 1).checked_sub(history.len()) {
                    self.reading.expose(history.iter().skip(own), token, self.page_size);
                }
            }
            history.clear();
        }
    }
}

impl PageReads {
    /// Counts a token whose window has ended, by its own selection and those that corrected it.
    fn expose<'a>(&mut self, mut selections: impl Iterator<Item = &'a Pages>, token: usize, page_size: usize) {
        let Some(own) = selections.next() else { return };
        let own_tokens = visible(own, token, page_size);
        let mut union = own.clone();
        for later in selections {
            union.iter_mut().zip(later).for_each(|(u, l)| *u |= l);
        }
        if own_tokens > 0 {
            self.exposure += visible(&union, token, page_size) as f64 / own_tokens as f64;
            self.exposed += 1.0;
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

    /// A pass ends the windows that are open, and no token of before is part of a window after it.
    #[test]
    fn a_pass_ends_windows_early() {
        let mut m = PageMeter::new(3, 16);
        m.take(0, &[39, -1, 39], 39); // 16 + 8
        m.take(0, &[39, 40, 40], 40); // 16 + 9 of its own
        m.pass(40);
        // Token 39 was corrected by page 1, token 40 by nothing.
        assert_eq!(m.reading.exposure(), Some((40.0 / 24.0 + 1.0) / 2.0));
        m.take(0, &[41, 40, 41], 41);
        m.take(0, &[41, 42, 42], 42);
        assert_eq!(m.reading.exposure(), Some((40.0 / 24.0 + 1.0) / 2.0));
        m.take(0, &[41, 42, 43], 43); // token 41: pages 0 and 2 (16 + 10), then page 1
        assert_eq!(m.reading.exposure(), Some((40.0 / 24.0 + 1.0 + 42.0 / 26.0) / 3.0));
        m.pass(43); // its window had ended: tokens 42 (pages 1 and 2: 27) and 43 (page 2: 12) are left
        assert_eq!(
            m.reading.exposure(),
            Some((40.0 / 24.0 + 1.0 + 42.0 / 26.0 + 1.0 + 1.0) / 5.0)
        );
        assert_eq!((m.reading.passes, m.reading.pass_lengths), (2.0, 41.0 + 44.0));
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
