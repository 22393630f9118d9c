//! One call of a node: what is launched, how wide, with which scratch.

use std::ffi::c_void;

use retro_contract::{GroupScore, Mode, SKETCH_BLOCK, budget_pages, pages_for};

use super::abi::{
    ATTEND_TILE, BLOCK_RESERVED, CallPhase, F32_WARPS, GroupScoring, MAX_SPLITS, MERGE_WARPS, PAGES_WARPS, Params,
    ReadMode, SCORE_PAGES, SCORE_VARIABLES, SCORE_WARPS, kept_floats, queries_bytes, scored_page_count, sketch_bytes,
    sketch_pages_bytes, stored_heads, touched_floats, touched_page_count,
};
use super::kernel_set::{Attend, Kernels, is_by_block};
use super::launch::{Kernel, LaunchMode, Stream};
use super::scratch::Buffer;
use crate::contract::{Attributes, Dims, Phase};
use crate::ort::Result;

/// Tiles of pages that a warp scores with the 100 % shared-memory carveout at most; beyond it scoring needs the L1 cache.
const TILES_IN_L1: usize = 2;
/// One of so many multiprocessors may be kept for the selection kernel.
const SELECT_SHARE: usize = 8;
/// Pages that one block selects from at most. What blocks have to tell one another costs more than two of them save.
const SELECT_PAGES: usize = 4096;
/// The fewest blocks that share the selection.
const LEAST_SHARING: usize = 4;
/// Bytes of shared memory that a kernel gets without asking.
const SHARED_UNASKED: usize = 48 * 1024;

/// What a call has beside its parameters.
pub struct LaunchPlan<'a> {
    pub stream: Stream,
    pub kernels: &'a Kernels,
    pub multiprocessors: usize,
    /// Bytes of shared memory of each.
    pub shared_per_sm: usize,
    pub attributes: &'a Attributes,
    pub dims: &'a Dims,
    pub has_page_budget: bool,
}

/// How wide the kernels of a decoding step are.
struct Step<'a> {
    /// Rows (token and head) that attend.
    rows: usize,
    /// Whether some length needs a choice of pages.
    scored: bool,
    /// Pages that the fed rows may lie in.
    touched: usize,
    /// Pages, or blocks of sketches, that a KV head has.
    scored_units: usize,
    /// Blocks that score a KV head's other pages.
    score_blocks: usize,
    /// Statistics of scoring blocks that the selection reads, per KV head; 0: there are none.
    parts: usize,
    /// Blocks that select a KV head's pages, a cluster.
    select_blocks: usize,
    attend: &'a Attend,
    row_blocks: usize,
    splits: usize,
    launch_mode: LaunchMode,
}

/// Offsets of a scratch buffer that is asked for once.
#[derive(Default)]
struct Layout(usize);

impl Layout {
    fn take(&mut self, bytes: usize) -> usize {
        let at = self.0;
        self.0 += bytes.next_multiple_of(256);
        at
    }
}

/// Pages that a selecting block has memory for, where `blocks` share a KV head's: candidates may begin within eight pages.
fn selected_keys(max_pages: usize, blocks: usize) -> usize {
    8 * (max_pages.div_ceil(8) + 1).div_ceil(blocks)
}

fn at<T>(base: *mut c_void, offset: usize) -> *mut T {
    base.cast::<u8>().wrapping_add(offset).cast()
}

impl LaunchPlan<'_> {
    /// Pairs of a sequence and a KV head.
    fn pairs(&self) -> usize {
        self.dims.batch * self.attributes.kv_heads
    }

    fn group(&self) -> usize {
        self.attributes.heads / self.attributes.kv_heads
    }

    /// Pages that a step may list for one KV head.
    fn most_pages(&self, total: usize, max_pages: usize) -> usize {
        let a = self.attributes;
        if a.mode == Mode::Dense || self.has_page_budget {
            return max_pages;
        }
        let budget = budget_pages(a.budget_ratio, a.budget_min_pages, total, a.page_size);
        budget.max(a.sink_pages + 1).min(max_pages)
    }

    /// Whether no length, up to so many pages, needs a choice of pages.
    fn takes_everything(&self, max_pages: usize) -> bool {
        let a = self.attributes;
        !self.has_page_budget && (a.budget_ratio >= 1.0 || a.budget_min_pages >= max_pages)
    }

    /// Shared memory for the keys of a page that is summarised, in bytes.
    fn page_copy(&self) -> usize {
        let bytes = self.page_keys();
        let beside = self.appending() + SCORE_VARIABLES;
        if bytes + beside <= SHARED_UNASKED { bytes } else { 0 }
    }

    /// Bytes of a page's keys.
    fn page_keys(&self) -> usize {
        self.attributes.page_size * self.dims.head_size * self.kernels.element
    }

    /// Shared memory of a block that appends and scores a page, beside the page's keys: prepared queries and the summary, in bytes.
    fn appending(&self) -> usize {
        4 * touched_floats(self.group(), self.kernels.padded, self.dims.head_size)
    }

    fn by_block(&self) -> bool {
        is_by_block(self.attributes.selector)
    }

    /// Rows of what a warp scores: a page, or a block.
    fn scored_rows(&self) -> usize {
        if self.by_block() {
            SKETCH_BLOCK
        } else {
            self.attributes.page_size
        }
    }

    /// The scoring kernel for this head size alone, if there is one.
    fn whole(&self) -> Option<&Kernel> {
        let whole = self.kernels.score.whole.as_ref();
        whole.filter(|_| self.dims.head_size == self.kernels.padded)
    }

    /// Shared memory of the scoring kernel's blocks, in bytes.
    fn score_shared(&self) -> usize {
        let padded = self.kernels.padded;
        if self.by_block() {
            let ring_bits = self.whole().map_or(0, |_| self.attributes.sketch_bits);
            return sketch_bytes(stored_heads(self.group()), padded, ring_bits);
        }
        // What the blocks that append need; or the queries of the blocks that score (page_vectors.cuh).
        (self.appending() + self.page_copy()).max(queries_bytes(padded))
    }

    /// The attention kernel for `rows` rows, how many row blocks and how many splits over `tokens` tokens, in `reserved` blocks fewer than
    /// the device holds.
    fn attention(&self, rows: usize, tokens: usize, reserved: usize) -> (&Attend, usize, usize) {
        let list = &self.kernels.attend;
        let attend = list.iter().find(|a| rows <= a.rows).or(list.last());
        let attend = attend.unwrap_or_else(|| unreachable!("every element type has an attention kernel"));
        let blocks = rows.div_ceil(attend.rows);
        // One wave.
        let wanted = (attend.blocks_per_sm * self.multiprocessors - reserved) / (self.pairs() * blocks);
        let most = tokens.div_ceil(ATTEND_TILE * F32_WARPS).min(MAX_SPLITS);
        (attend, blocks, wanted.min(most).max(1))
    }

    /// Shared memory of the attention's blocks: more than they need where all of them are on the device at once, so that none gets
    /// more of them than another multiprocessor.
    fn spread(&self, attend: &Attend, grid: usize) -> usize {
        let blocks = grid.div_ceil(self.multiprocessors).min(attend.blocks_per_sm);
        attend
            .shared
            .max(self.shared_per_sm / (blocks + 1) + 1 - BLOCK_RESERVED)
            .min(attend.max_shared)
    }

    /// A decoding step: three or four launches, each started while the one before drains.
    pub fn decode(&self, params: &mut Params, buffer: &mut Buffer) -> Result<()> {
        let step = self.step(params);
        let kept = self.place_step(&step, params, buffer)?;
        self.launch_step(&step, kept, params)?;
        buffer.settle();
        Ok(())
    }

    /// How many blocks select a KV head's pages: as many as the pages are worth, and more where their shared memory would
    /// not hold them.
    fn select_blocks(&self, max_pages: usize) -> usize {
        let most = self.kernels.select.cluster;
        // By the pages of a context, and not by those of a cache that is a little longer.
        let wanted = match max_pages / SELECT_PAGES {
            0 => 1,
            many => (1 << many.ilog2()).max(LEAST_SHARING),
        };
        let room = (self.multiprocessors / 2 / self.pairs()).max(1);
        let mut blocks = wanted.min(1 << room.ilog2()).min(most);
        let fit = |blocks: usize| 4 * kept_floats(selected_keys(max_pages, blocks)) <= self.kernels.select.shared;
        while blocks < most && !fit(blocks) {
            blocks *= 2;
        }
        blocks
    }

    /// How wide a step's kernels are.
    fn step(&self, params: &Params) -> Step<'_> {
        let a = self.attributes;
        let (total, max_pages) = (params.total as usize, params.max_pages as usize);
        let (pairs, rows) = (self.pairs(), self.dims.tokens * self.group());
        let listed = self.most_pages(total, max_pages);
        let scored = a.mode == Mode::Retro && !self.takes_everything(max_pages);
        // The blocks that choose pages are on the device while the others score and while those that attend arrive, where
        // they are few and kernels overlap.
        let few = self.stream.overlaps && pairs <= self.multiprocessors / SELECT_SHARE;
        let select_blocks = self.select_blocks(max_pages);
        let reserved = if scored && few { pairs * select_blocks } else { 0 };
        let (attend, row_blocks, splits) = self.attention(rows, listed * a.page_size, reserved);
        let touched = touched_page_count(self.dims.tokens, self.scored_rows().trailing_zeros() as usize);
        let scored_at_once = if self.by_block() { 1 } else { SCORE_PAGES };
        let scored_units = total.div_ceil(self.scored_rows());
        let score_blocks = if scored {
            // One wave, the blocks that append included. Most of these find no page of theirs; where pairs are many, others
            // take their place.
            let appending = if few { touched } else { 1 };
            let on_device = self.kernels.score.blocks_per_sm * self.multiprocessors;
            let wanted = ((on_device - reserved) / pairs).saturating_sub(appending);
            wanted.clamp(1, scored_units.div_ceil(scored_at_once * SCORE_WARPS))
        } else {
            0
        };
        // Where a warp scores more pages than that, what is on its way to it needs the L1 cache.
        let short = scored_units <= score_blocks * scored_at_once * SCORE_WARPS * TILES_IN_L1;
        let parts = score_blocks + touched;
        Step {
            rows,
            scored,
            touched,
            scored_units,
            score_blocks,
            parts: if scored && (self.kernels.half || self.by_block()) {
                parts
            } else {
                0
            },
            select_blocks,
            attend,
            row_blocks,
            splits,
            launch_mode: if few && (short || !scored) {
                LaunchMode::PdlMaxShared
            } else {
                LaunchMode::Pdl
            },
        }
    }

    /// Sets a step's parameters and gives it scratch memory. Returns a selecting block's bytes of shared memory for its
    /// pages; `None` where they have memory on the device.
    fn place_step(&self, step: &Step<'_>, params: &mut Params, buffer: &mut Buffer) -> Result<Option<usize>> {
        let (d, group, pairs) = (self.dims.head_size, self.group(), self.pairs());
        let max_pages = params.max_pages as usize;
        let softmax = self.attributes.group_score == GroupScore::Softmax;
        params.score_blocks = step.score_blocks as i32;
        params.touched = step.touched as i32;
        let score_warps = (step.score_blocks * SCORE_WARPS).max(1);
        params.warp_pages = (step.scored_units / score_warps) as i32;
        params.more_pages = (step.scored_units % score_warps) as i32;
        params.score_parts = step.parts as i32;

        let mut layout = Layout::default();
        let score_stats = layout.take(pairs * step.parts * if softmax { group } else { 1 } * 16);
        let scores_a_page = if softmax { stored_heads(group) } else { 1 };
        let score_bytes = pairs * scored_page_count(max_pages) * scores_a_page * 4;
        let scores = layout.take(if step.scored { score_bytes } else { 0 });
        let keys = selected_keys(max_pages, step.select_blocks);
        let kept = 4 * kept_floats(keys);
        let in_shared = kept <= self.kernels.select.shared;
        let outside = step.scored && !in_shared;
        let kept_outside = layout.take(if outside { pairs * step.select_blocks * kept } else { 0 });
        let outputs = layout.take(pairs * step.splits * step.rows * d * 4);
        let stats = layout.take(pairs * step.splits * step.rows * 8);
        let scratch = buffer.get(layout.0, self.stream)?;
        if outside {
            params.kept = at(scratch, kept_outside);
        }
        params.keys = keys as i32;
        let flags = buffer.flags(pairs + pairs * max_pages, self.stream)?;
        params.progress = flags.cast();
        params.pages = at(flags, pairs * 4);
        params.scores = at(scratch, scores);
        params.score_stats = at(scratch, score_stats);
        params.part_outputs = at(scratch, outputs);
        params.part_stats = at(scratch, stats);
        params.splits = step.splits as i32;
        params.rows = step.rows as i32;
        params.stages = step.attend.stages;
        params.copies_page = i32::from(self.page_copy() > 0);
        Ok(in_shared.then_some(kept))
    }

    fn launch_step(&self, step: &Step<'_>, kept: Option<usize>, params: &Params) -> Result<()> {
        let (a, k, mode) = (self.attributes, self.kernels, step.launch_mode);
        let (batch, kv_heads, pairs) = (self.dims.batch, a.kv_heads, self.pairs());
        let grid = [step.score_blocks + step.touched, kv_heads, batch];
        self.stream.launch(
            self.whole().unwrap_or(&k.score.any),
            grid,
            self.score_shared(),
            mode,
            params,
        )?;
        if step.scored {
            let select = match a.group_score {
                _ if kept.is_none() || step.parts == 0 => &k.select.any,
                GroupScore::Max => &k.select.max,
                GroupScore::Softmax => &k.select.softmax,
            };
            let grid = [step.select_blocks, kv_heads, batch];
            self.stream
                .launch_clusters(select, step.select_blocks, grid, kept.unwrap_or(0), mode, params)?;
        }
        let grid = [step.row_blocks, step.splits, pairs];
        let shared = self.spread(step.attend, grid.iter().product());
        self.stream.launch(&step.attend.kernel, grid, shared, mode, params)?;
        let grid = [a.heads + kv_heads, batch, (self.dims.tokens - 1).max(1)];
        self.stream.launch(&k.merge, grid, 0, mode, params)
    }

    /// What must be so before the host's own operator does a prefill.
    pub fn before_fallback(&self, params: &Params) -> Result<()> {
        let grid = [1, self.attributes.kv_heads, self.dims.batch];
        self.stream
            .launch(&self.kernels.clear, grid, 0, LaunchMode::Pdl, params)
    }

    /// What a prefill writes beside what the host's own operator wrote, if that ran (`by_fallback`).
    pub fn prefill(&self, params: &mut Params, buffer: &mut Buffer, by_fallback: bool) -> Result<()> {
        let (a, d, k) = (self.attributes, self.dims.head_size, self.kernels);
        let (total, batch, kv_heads) = (params.total as usize, self.dims.batch, a.kv_heads);
        if !by_fallback {
            self.stream.launch(
                &k.append,
                [self.dims.tokens, kv_heads, batch],
                0,
                LaunchMode::Plain,
                params,
            )?;
        }
        let tokens = if by_fallback {
            self.dims.tokens.min(a.window - 1)
        } else {
            self.dims.tokens
        };
        let page_copies = PAGES_WARPS * self.page_keys();
        let page_copies = if page_copies <= SHARED_UNASKED { page_copies } else { 0 };
        params.copies_page = i32::from(page_copies > 0);
        let (pages, page_shared) = if self.by_block() {
            (
                total.div_ceil(SKETCH_BLOCK),
                sketch_pages_bytes(k.padded.next_multiple_of(128)),
            )
        } else {
            ((params.max_pages as usize).div_ceil(PAGES_WARPS), page_copies)
        };
        let pages = [pages, kv_heads, batch];
        if tokens == 0 {
            return self
                .stream
                .launch(&k.pages, pages, page_shared, LaunchMode::PdlMaxShared, params);
        }
        params.last_tokens = if by_fallback { tokens as i32 } else { 0 };
        params.write_output = i32::from(!by_fallback);
        let rows = tokens * self.group();
        let (attend, blocks, splits) = self.attention(rows, total, 0);
        params.rows = rows as i32;
        params.stages = attend.stages;
        params.splits = splits as i32;
        if splits > 1 {
            let mut layout = Layout::default();
            let outputs = layout.take(self.pairs() * splits * rows * d * 4);
            let stats = layout.take(self.pairs() * splits * rows * 8);
            let scratch = buffer.get(layout.0, self.stream)?;
            params.part_outputs = at(scratch, outputs);
            params.part_stats = at(scratch, stats);
        }
        self.stream.launch(
            &attend.kernel,
            [blocks, splits, self.pairs()],
            attend.shared,
            LaunchMode::PdlMaxShared,
            params,
        )?;
        // Beside the attention, which leaves room for it.
        self.stream
            .launch(&k.pages, pages, page_shared, LaunchMode::PdlMaxShared, params)?;
        // A block a row where only the last rows are asked for (merge.cuh).
        let chunks = if by_fallback {
            tokens
        } else {
            tokens.div_ceil(MERGE_WARPS)
        };
        self.stream
            .launch(&k.merge, [a.heads, batch, chunks], 0, LaunchMode::Pdl, params)
    }
}

/// The parameters that do not depend on what is launched.
pub fn params(attributes: &Attributes, dims: &Dims, phase: Phase, total: usize) -> Params {
    let a = attributes;
    let kv_width = a.kv_heads * dims.head_size;
    let width = a.heads * dims.head_size;
    Params {
        budget_ratio: a.budget_ratio,
        query_stride: if dims.packed { width + 2 * kv_width } else { width } as i64,
        kv_stride: if dims.packed { width + 2 * kv_width } else { kv_width } as i64,
        batch: dims.batch as i32,
        tokens: dims.tokens as i32,
        heads: a.heads as i32,
        kv_heads: a.kv_heads as i32,
        group: (a.heads / a.kv_heads) as i32,
        head_size: dims.head_size as i32,
        capacity: dims.capacity as i32,
        cache_pages: dims.pages as i32,
        state_blocks: dims.blocks as i32,
        ring: a.ring() as i32,
        page_shift: a.page_size.trailing_zeros() as i32,
        rotary_half: dims.rotary_half as i32,
        rotary_rows: dims.rotary_rows as i32,
        rotary_interleaved: i32::from(a.rotary_interleaved),
        budget_min_pages: a.budget_min_pages as i32,
        sink_pages: a.sink_pages as i32,
        local_window: a.local_window.map_or(0, |w| i32::try_from(w).unwrap_or(i32::MAX)),
        phase: match phase {
            Phase::Decode => CallPhase::Decode,
            Phase::Prefill => CallPhase::Prefill,
        },
        group_score: match a.group_score {
            GroupScore::Max => GroupScoring::Max,
            GroupScore::Softmax => GroupScoring::Softmax,
        },
        mode: match a.mode {
            Mode::Retro => ReadMode::Retro,
            Mode::Dense => ReadMode::Dense,
            Mode::Streaming => ReadMode::Streaming,
            Mode::Periodic => ReadMode::Periodic,
        },
        total: total as i32,
        max_pages: pages_for(total, a.page_size) as i32,
        splits: 1,
        write_output: 1,
        sketch_bits: a.sketch_bits as i32,
        window: a.window as i32,
        scale: a.scale.unwrap_or(1.0 / (dims.head_size as f32).sqrt()),
        softcap: a.softcap,
        lambda: a.selector_lambda,
        correlation: a.selector_correlation,
        // Exact below 2^28 rows. A group of one is not divided by.
        group_inverse: (u32::MAX / (a.heads / a.kv_heads) as u32).wrapping_add(1),
        ..Params::default()
    }
}
