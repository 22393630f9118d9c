//! A decoding step: select pages with the newest query, attend to them once for it and for every retrospective query
//! that has not seen them, merge.

use retro_contract::Mode;

use super::call::{CpuCall, Rows};
use super::kv_write::{append, query_rows, stamp_pages, update_pages};
use super::merge::{clear_ignored_rows, finish_step, join};
use super::pool::Pool;
use super::scratch::{CallScratch, TaskScratch, fit, padded};
use super::shared::Shared;
use crate::method::attend::{Block, PageRows, Partial, attend_pages};
use crate::method::element::Element;
use crate::method::group_score::group_scores;
use crate::method::select::{choose_pages, periodic_pages, select_pages, streaming_pages};
use crate::ort::Result;
use crate::selector::{PageSelector, Scoring};
use crate::simd::Isa;

/// Pages below which a split costs more than it gains.
const MIN_PAGES_A_SPLIT: usize = 8;

pub(super) fn decode<E: Element, P: PageSelector>(call: &CpuCall<'_, E, P>, pool: &dyn Pool) -> Result<()> {
    call.scratch.with_call(|scratch| decode_with(call, pool, scratch))
}

/// Parts of each task, a sequence's KV head, so that every thread has work and none has much more than the others.
fn splits(tasks: usize, width: usize, pages: usize) -> usize {
    if tasks.is_multiple_of(width) || tasks >= 4 * width {
        return 1;
    }
    (2 * width).div_ceil(tasks).min(pages / MIN_PAGES_A_SPLIT).max(1)
}

fn decode_with<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
    pool: &dyn Pool,
    scratch: &mut CallScratch,
) -> Result<()> {
    let (attributes, dims) = (call.attributes, call.dims);
    let (kv_heads, d) = (attributes.kv_heads, dims.head_size);
    let group = call.group();
    let tasks = dims.batch * kv_heads;
    let valid = call
        .plan
        .sequences
        .iter()
        .map(|s| s.len.div_ceil(attributes.page_size))
        .max();
    let valid = valid.unwrap_or(0);
    let splits = splits(tasks, pool.width(), valid);
    // Every float of scratch that is read below is written first.
    let block_rows = dims.tokens * group;
    let (query, heads) = (
        padded(block_rows * d),
        if splits == 1 { 0 } else { padded(group * valid) },
    );
    let (sums, acc) = (padded(2 * block_rows), padded(block_rows * d));
    let step = Step {
        call,
        rows: Rows::new(attributes, dims, call.inputs),
        isa: Isa::detect(),
        group,
        splits,
        query: Parts::new(scratch.query.fit(tasks * query), query),
        heads: Parts::new(scratch.heads.fit(tasks * heads), heads),
        pages: Parts::new(fit(&mut scratch.pages, tasks), 1),
        selected: Parts::new(fit(&mut scratch.selected, tasks), 1),
        sums: Parts::new(scratch.sums.fit(tasks * splits * sums), sums),
        acc: Parts::new(scratch.acc.fit(tasks * splits * acc), acc),
    };
    if splits == 1 {
        pool.run(tasks, &|task| {
            call.scratch.with_task(|scratch| {
                step.append(task, scratch);
                step.select(task, scratch);
                step.attend(task, 0);
                step.finish(task);
            });
        })?;
    } else {
        if (0..dims.batch).any(|b| step.chooses(b)) {
            pool.run(tasks, &|task| {
                call.scratch.with_task(|scratch| step.append(task, scratch))
            })?;
            pool.run(tasks * splits, &|slot| {
                call.scratch
                    .with_task(|scratch| step.score(slot / splits, slot % splits, scratch));
            })?;
            pool.run(tasks, &|task| {
                call.scratch.with_task(|scratch| step.select(task, scratch))
            })?;
        } else {
            // Without scores these are a task's own: handing work to threads costs as much as they take.
            pool.run(tasks, &|task| {
                call.scratch.with_task(|scratch| {
                    step.append(task, scratch);
                    step.select(task, scratch);
                });
            })?;
        }
        pool.run(tasks * splits, &|slot| step.attend(slot / splits, slot % splits))?;
        pool.run(tasks, &|task| step.finish(task))?;
    }
    clear_ignored_rows(call);
    Ok(())
}

/// A buffer in parts of equal length, one a task or a split.
struct Parts<'a, T> {
    buffer: Shared<'a, T>,
    len: usize,
}

impl<'a, T> Parts<'a, T> {
    fn new(buffer: &'a mut [T], len: usize) -> Self {
        Self {
            buffer: Shared::new(buffer),
            len,
        }
    }

    /// The first `len` of part `index`.
    ///
    /// # Safety
    /// Nobody reads or writes the part while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    unsafe fn write(&self, index: usize, len: usize) -> &mut [T] {
        assert!(len <= self.len, "a task left its part");
        // SAFETY: passed on.
        unsafe { self.buffer.range_mut(index * self.len, len) }
    }

    /// The first `len` of part `index`.
    ///
    /// # Safety
    /// Nobody writes the part while the slice lives.
    unsafe fn read(&self, index: usize, len: usize) -> &[T] {
        assert!(len <= self.len, "a task left its part");
        // SAFETY: passed on.
        unsafe { self.buffer.range(index * self.len, len) }
    }
}

/// One step, in phases that run one after another for a task, each by one thread or, where they say so, by several.
struct Step<'a, E: Element, P: PageSelector> {
    call: &'a CpuCall<'a, E, P>,
    rows: Rows<'a, E>,
    isa: Isa,
    /// Query heads a KV head.
    group: usize,
    splits: usize,
    query: Parts<'a, f32>,
    heads: Parts<'a, f32>,
    pages: Parts<'a, Vec<PageRows>>,
    selected: Parts<'a, Vec<u32>>,
    sums: Parts<'a, f32>,
    acc: Parts<'a, f32>,
}

impl<E: Element, P: PageSelector> Step<'_, E, P> {
    /// Sequence and KV head of a task.
    fn pair(&self, task: usize) -> (usize, usize) {
        let kv_heads = self.call.attributes.kv_heads;
        (task / kv_heads, task % kv_heads)
    }

    /// Floats of a task's query rows.
    fn query_len(&self, b: usize) -> usize {
        self.call.plan.sequences[b].fed * self.group * self.call.dims.head_size
    }

    /// The pages among which a step chooses: those that the newest query's sliding window touches. A retrospective
    /// query may look further back, but only pages that the newest one's window touches are ever loaded; a dense layer
    /// reads whatever any of its queries sees.
    fn candidates(&self, b: usize) -> std::ops::Range<usize> {
        let (attributes, sequence) = (self.call.attributes, &self.call.plan.sequences[b]);
        let newest = sequence.len - 1;
        let from = if attributes.mode == Mode::Dense {
            sequence.first_position()
        } else {
            newest
        };
        let oldest = attributes.local_window.map_or(0, |w| (from + 1).saturating_sub(w));
        oldest / attributes.page_size..newest / attributes.page_size + 1
    }

    fn scoring(&self, b: usize) -> Scoring {
        let attributes = self.call.attributes;
        Scoring {
            group_score: attributes.group_score,
            scale: self.call.scale(),
            lambda: attributes.selector_lambda,
            correlation: attributes.selector_correlation,
            page_size: attributes.page_size,
            head_size: self.call.dims.head_size,
            len: self.call.plan.sequences[b].len,
            softcap: attributes.softcap,
            local_window: attributes.local_window,
            sketch_bits: attributes.sketch_bits,
        }
    }

    /// A KV head's page state.
    ///
    /// # Safety
    /// Nobody writes them while the slice lives.
    unsafe fn page_state(&self, task: usize) -> &[P::State<E>] {
        let len = self.call.pages_len();
        // SAFETY: passed on.
        unsafe { self.call.state.pages.range(task * len, len) }
    }

    /// Step 1: appends keys and values, brings the page state up to date, rotates the queries (not yet scaled).
    fn append(&self, task: usize, scratch: &mut TaskScratch) {
        let (b, head) = self.pair(task);
        append(self.call, &self.rows, b, head, scratch);
        update_pages(self.call, b, head, scratch);
        self.forget_future(task, b);
        // SAFETY: this task's own part.
        let query = unsafe { self.query.write(task, self.query_len(b)) };
        let fed = self.call.plan.sequences[b].fed;
        query_rows(self.call, &self.rows, b, head, 0..fed, query, &mut scratch.angles);
    }

    /// A page step at or behind the newest position is left over from tokens that a rewind took back (docs/method.md,
    /// Truncation): the page counts as loaded just before the rows that this step feeds.
    fn forget_future(&self, task: usize, b: usize) {
        let (dims, sequence) = (self.call.dims, &self.call.plan.sequences[b]);
        let pages = sequence.len.div_ceil(self.call.attributes.page_size);
        let (newest, before) = ((sequence.len - 1) as i32, sequence.first_position() as i32 - 1);
        // SAFETY: this task owns its KV head's page steps.
        let steps = unsafe { self.call.state.steps.range_mut(task * dims.pages, pages) };
        for step in steps {
            *step = if *step >= newest { before } else { *step };
        }
    }

    /// The newest query's rows.
    ///
    /// # Safety
    /// They are complete, and nobody writes them while the slice lives.
    unsafe fn newest_query(&self, task: usize, b: usize) -> &[f32] {
        let len = self.query_len(b);
        // SAFETY: passed on.
        let query = unsafe { self.query.read(task, len) };
        &query[len - self.group * self.call.dims.head_size..]
    }

    /// Whether a task has pages to choose from that do not all fit its budget.
    fn chooses(&self, b: usize) -> bool {
        self.call.attributes.mode == Mode::Retro && self.call.plan.sequences[b].budget < self.candidates(b).len()
    }

    /// Scores one split of a task's candidate pages for each of its heads.
    fn score(&self, task: usize, split: usize, scratch: &mut TaskScratch) {
        let (b, _) = self.pair(task);
        if !self.chooses(b) {
            return;
        }
        let candidates = self.candidates(b);
        let count = candidates.len();
        let (from, to) = share(count, self.splits, split);
        // SAFETY: queries and page state are complete.
        let (query, state) = unsafe { (self.newest_query(task, b), self.page_state(task)) };
        let scoring = self.scoring(b);
        P::prepare(&scoring, query, &mut scratch.summary);
        let own = scratch.rows.fit(self.group * (to - from));
        let pages = candidates.start + from..candidates.start + to;
        P::score_heads::<E>(self.isa, &scoring, &scratch.summary, state, pages, own);
        for (g, scores) in own.chunks_exact((to - from).max(1)).enumerate() {
            let at = task * self.heads.len + g * count + from;
            // SAFETY: this split's own pages of the head.
            unsafe { self.heads.buffer.range_mut(at, to - from) }.copy_from_slice(scores);
        }
    }

    /// Step 2: selects pages, finds the first row that each serves, and scales the queries.
    fn select(&self, task: usize, scratch: &mut TaskScratch) {
        let (call, attributes) = (self.call, self.call.attributes);
        let (b, _) = self.pair(task);
        let sequence = &call.plan.sequences[b];
        let candidates = self.candidates(b);
        // SAFETY: this task's own parts; queries, page state and scores are complete.
        let (selected, pages, state) = unsafe {
            (
                &mut self.selected.write(task, 1)[0],
                &mut self.pages.write(task, 1)[0],
                self.page_state(task),
            )
        };
        match attributes.mode {
            Mode::Dense => {
                selected.clear();
                selected.extend(candidates.map(|p| p as u32));
            }
            Mode::Streaming => streaming_pages(candidates, attributes.sink_pages, sequence.budget, selected),
            Mode::Periodic => periodic_pages(candidates, attributes.sink_pages, sequence.budget, selected),
            Mode::Retro if self.splits > 1 && self.chooses(b) => {
                let count = candidates.len();
                // SAFETY: as above.
                let heads = unsafe { self.heads.write(task, self.group * count) };
                let scratch = &mut scratch.select;
                scratch.scores.resize(count, 0.0);
                let scoring = self.scoring(b);
                group_scores::<P>(self.isa, &scoring, heads, candidates.clone(), &mut scratch.scores);
                choose_pages(
                    &scratch.scores,
                    candidates,
                    attributes.sink_pages,
                    sequence.budget,
                    &mut scratch.order,
                    selected,
                );
            }
            Mode::Retro => select_pages::<E, P>(
                self.isa,
                &self.scoring(b),
                // SAFETY: as above.
                unsafe { self.newest_query(task, b) },
                state,
                candidates,
                attributes.sink_pages,
                sequence.budget,
                &mut scratch.select,
                selected,
            ),
        }

        // Row i (position first + i) takes a page if no step since i loaded it (A < i) and it holds a token up to i.
        // Both hold from some row on, so a page serves a suffix of the rows; the newest row always.
        // SAFETY: this task owns its KV head's page steps; they are written after the attention.
        let steps = unsafe { call.state.steps.range(task * call.dims.pages, call.dims.pages) };
        let (first, last_row) = (sequence.first_position(), sequence.fed - 1);
        pages.clear();
        pages.extend(selected.iter().map(|&page| {
            let visible_from = page as usize * attributes.page_size;
            let from = if attributes.mode == Mode::Dense {
                visible_from
            } else {
                let loaded = i64::from(steps[page as usize]) + 1;
                visible_from.max(usize::try_from(loaded).unwrap_or(0))
            };
            let row = from.saturating_sub(first).min(last_row);
            (page, (row * self.group) as u32)
        }));
        for split in 0..self.splits {
            let (from, to) = share(pages.len(), self.splits, split);
            // Few rows differ: the order by pages stays in long runs.
            pages[from..to].sort_unstable_by_key(|&(page, row)| (row, page));
        }
        let scale = call.scale();
        // SAFETY: this task's own part.
        let query = unsafe { self.query.write(task, self.query_len(b)) };
        query.iter_mut().for_each(|q| *q *= scale);
    }

    /// One split's sums over its pages.
    ///
    /// # Safety
    /// Nobody else uses the split's sums while they live.
    unsafe fn partial(&self, slot: usize, b: usize) -> Partial<'_> {
        let count = self.call.plan.sequences[b].fed * self.group;
        // SAFETY: passed on.
        unsafe {
            let (max, sum) = self.sums.write(slot, 2 * count).split_at_mut(count);
            let acc = self.acc.write(slot, count * self.call.dims.head_size);
            Partial { max, sum, acc }
        }
    }

    /// Attends to one split of the selected pages.
    fn attend(&self, task: usize, split: usize) {
        let (call, attributes, dims) = (self.call, self.call.attributes, self.call.dims);
        let (b, _) = self.pair(task);
        let sequence = &call.plan.sequences[b];
        let block = Block {
            group: self.group,
            head_size: dims.head_size,
            page_size: attributes.page_size,
            first_position: sequence.first_position(),
            softcap: attributes.softcap,
            local_window: attributes.local_window,
        };
        let cache = dims.capacity * dims.head_size;
        // SAFETY: this split's own sums; queries, lists and caches are complete.
        unsafe {
            let mut partial = self.partial(task * self.splits + split, b);
            partial.clear();
            let list = &self.pages.read(task, 1)[0];
            let (from, to) = share(list.len(), self.splits, split);
            attend_pages(
                self.isa,
                &block,
                self.query.read(task, self.query_len(b)),
                call.state.key.range(task * cache, cache),
                call.state.value.range(task * cache, cache),
                &list[from..to],
                &mut partial,
            );
        }
    }

    /// Steps 3 to 5: joins the splits, merges, writes outputs and page steps.
    fn finish(&self, task: usize) {
        let (call, dims) = (self.call, self.call.dims);
        let (b, head) = self.pair(task);
        // SAFETY: the splits' tasks have ended; lists and page steps are this task's own.
        unsafe {
            let mut joined = self.partial(task * self.splits, b);
            for split in 1..self.splits {
                join(
                    &mut joined,
                    &self.partial(task * self.splits + split, b),
                    dims.head_size,
                );
            }
            finish_step(call, b, head, &mut joined);
            if call.attributes.mode == Mode::Dense {
                stamp_pages(call, b, head);
            } else {
                let steps = call.state.steps.range_mut(task * dims.pages, dims.pages);
                for &page in &self.selected.read(task, 1)[0] {
                    steps[page as usize] = (call.plan.sequences[b].len - 1) as i32;
                }
            }
        }
    }
}

/// Part `index` of `count` things in `parts`.
fn share(count: usize, parts: usize, index: usize) -> (usize, usize) {
    (count * index / parts, count * (index + 1) / parts)
}
