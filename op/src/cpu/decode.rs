//! A decoding step: select pages with the newest query, attend to them once for it and for every retrospective query that
//! has not seen them, merge.

use retro_contract::Mode;

use super::prefill::{
    append, cache_output, clear_ignored_rows, finish_row, query_rows, scale, stamp_pages, summarize_touched,
    write_output,
};
use super::scratch::{CallScratch, TaskScratch, fit};
use super::tensors::Rows;
use super::{Call, Pool, Shared};
use crate::host::Result;
use crate::method::attend::{Block, Partial, attend_page};
use crate::method::element::Element;
use crate::method::math::Isa;
use crate::method::merge;
use crate::method::select::{Scoring, select_pages, streaming_pages};

/// Pages below which a split costs more than it gains.
const MIN_PAGES_A_SPLIT: usize = 8;

pub(super) fn decode<E: Element>(call: &Call<'_, E>, pool: &dyn Pool) -> Result<()> {
    call.scratch.with_call(|scratch| decode_with(call, pool, scratch))
}

fn decode_with<E: Element>(call: &Call<'_, E>, pool: &dyn Pool, scratch: &mut CallScratch) -> Result<()> {
    let (attributes, dims) = (call.attributes, call.dims);
    let (kv_heads, d) = (attributes.kv_heads, dims.head_size);
    let group = attributes.heads / kv_heads;
    let tasks = dims.batch * kv_heads;
    let block_rows = dims.tokens * group;
    let rows = Rows::new(attributes, dims, call.inputs);

    // Every row of scratch that is read below is written first.
    fit(&mut scratch.pages, tasks);
    fit(&mut scratch.selected, tasks);
    let query = Shared::new(fit(&mut scratch.query, tasks * block_rows * d));
    let pages = Shared::new(&mut scratch.pages[..tasks]);
    let selected = Shared::new(&mut scratch.selected[..tasks]);
    pool.run(tasks, &|task| {
        let (b, head) = (task / kv_heads, task % kv_heads);
        // SAFETY: each task takes its own part of each buffer.
        let (query, pages, selected) = unsafe {
            (
                query.range_mut(task * block_rows * d, call.plan.sequences[b].fed * group * d),
                &mut pages.range_mut(task, 1)[0],
                &mut selected.range_mut(task, 1)[0],
            )
        };
        call.scratch
            .with_task(|scratch| prepare(call, &rows, b, head, query, pages, selected, scratch));
    })?;

    // SAFETY: the tasks that wrote the lists have ended.
    let lists = unsafe { pages.range(0, tasks) };
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    let splits = pool.width().div_ceil(tasks).min(longest / MIN_PAGES_A_SPLIT).max(1);
    let max = Shared::new(fit(&mut scratch.max, tasks * splits * block_rows));
    let sum = Shared::new(fit(&mut scratch.sum, tasks * splits * block_rows));
    let acc = Shared::new(fit(&mut scratch.acc, tasks * splits * block_rows * d));
    // One split's share of the three buffers.
    let partial = |slot: usize, count: usize| {
        // SAFETY: each slot is taken by one task at a time, below.
        unsafe {
            Partial {
                max: max.range_mut(slot * block_rows, count),
                sum: sum.range_mut(slot * block_rows, count),
                acc: acc.range_mut(slot * block_rows * d, count * d),
            }
        }
    };
    let isa = Isa::detect();
    pool.run(tasks * splits, &|slot| {
        let (task, split) = (slot / splits, slot % splits);
        let (b, head) = (task / kv_heads, task % kv_heads);
        let sequence = &call.plan.sequences[b];
        let count = sequence.fed * group;
        let list = &lists[task];
        let share = list.len().div_ceil(splits);
        let (from, to) = ((split * share).min(list.len()), ((split + 1) * share).min(list.len()));
        let block = Block {
            group,
            head_size: d,
            page_size: attributes.page_size,
            first_position: sequence.first_position(),
            softcap: attributes.softcap,
            local_window: attributes.local_window,
        };
        let mut partial = partial(slot, count);
        partial.clear();
        // SAFETY: nobody writes queries, keys or values in this phase.
        let (query, keys, values) = unsafe {
            let at = (b * kv_heads + head) * dims.capacity * d;
            (
                query.range(task * block_rows * d, count * d),
                call.state.key.range(at, dims.capacity * d),
                call.state.value.range(at, dims.capacity * d),
            )
        };
        call.scratch.with_task(|scratch| {
            for &(page, first_row) in &list[from..to] {
                attend_page(
                    isa,
                    &block,
                    query,
                    keys,
                    values,
                    page as usize,
                    first_row as usize,
                    &mut partial,
                    &mut scratch.attend,
                );
            }
        });
    })?;

    pool.run(tasks, &|task| {
        let (b, head) = (task / kv_heads, task % kv_heads);
        let count = call.plan.sequences[b].fed * group;
        let mut joined = partial(task * splits, count);
        for split in 1..splits {
            join(&mut joined, &partial(task * splits + split, count), d);
        }
        finish(call, b, head, &mut joined);
        if attributes.mode == Mode::Dense {
            stamp_pages(call, b, head);
        } else {
            // SAFETY: the lists are complete, and each task owns its KV head's page steps.
            let (selected, steps) = unsafe {
                (
                    &selected.range(task, 1)[0],
                    call.state.steps.range_mut(task * dims.pages, dims.pages),
                )
            };
            for &page in selected {
                steps[page as usize] = (call.plan.sequences[b].len - 1) as i32;
            }
        }
    })?;
    clear_ignored_rows(call);
    Ok(())
}

/// Steps 1 and 2 for one KV head: append, rotate the queries, select, and find the first row that each page serves.
#[expect(clippy::too_many_arguments, reason = "the task's own parts of the call's buffers")]
fn prepare<E: Element>(
    call: &Call<'_, E>,
    rows: &Rows<'_, E>,
    b: usize,
    head: usize,
    query: &mut [f32],
    pages: &mut Vec<(u32, u32)>,
    selected: &mut Vec<u32>,
    scratch: &mut TaskScratch,
) {
    let (attributes, dims, sequence) = (call.attributes, call.dims, &call.plan.sequences[b]);
    let (d, page_size) = (dims.head_size, attributes.page_size);
    let group = attributes.heads / attributes.kv_heads;
    append(call, rows, b, head, scratch);
    summarize_touched(call, b, head, scratch);
    query_rows(call, rows, b, head, 0..sequence.fed, query, &mut scratch.angles);

    let first = sequence.first_position();
    let newest = sequence.len - 1;
    // A retrospective query may look further back than the newest one, but only pages that the newest one's window
    // touches are ever loaded; a dense layer reads whatever any of its queries sees.
    let seen_from = |position: usize| attributes.local_window.map_or(0, |w| (position + 1).saturating_sub(w));
    let oldest = if attributes.mode == Mode::Dense {
        seen_from(first)
    } else {
        seen_from(newest)
    };
    let candidates = oldest / page_size..newest / page_size + 1;
    let pair = b * attributes.kv_heads + head;
    let page_scale = scale(call);
    match attributes.mode {
        Mode::Dense => {
            selected.clear();
            selected.extend(candidates.map(|p| p as u32));
        }
        Mode::Streaming => streaming_pages(candidates, attributes.sink_pages, sequence.budget, selected),
        Mode::Retro => {
            let scoring = Scoring {
                selector: attributes.selector,
                group_score: attributes.group_score,
                scale: page_scale,
                lambda: attributes.selector_lambda,
                correlation: attributes.selector_correlation,
                page_size,
                head_size: d,
            };
            // SAFETY: this task owns its KV head's summaries, and they are complete.
            let summary = unsafe { call.state.summary.range(pair * dims.pages * 2 * d, dims.pages * 2 * d) };
            select_pages(
                Isa::detect(),
                &scoring,
                &query[(sequence.fed - 1) * group * d..],
                summary,
                candidates,
                sequence.len,
                attributes.sink_pages,
                sequence.budget,
                &mut scratch.select,
                selected,
            );
        }
    }

    // Row i (position first + i) takes a page if no step since i loaded it (A < i) and it holds a token up to i. Both
    // hold from some row on, so a page serves a suffix of the rows; the newest row always.
    // SAFETY: this task owns its KV head's page steps; they are written after the attention.
    let steps = unsafe { call.state.steps.range(pair * dims.pages, dims.pages) };
    let last_row = sequence.fed - 1;
    pages.clear();
    pages.extend(selected.iter().map(|&page| {
        let visible_from = page as usize * page_size;
        let from = if attributes.mode == Mode::Dense {
            visible_from
        } else {
            let loaded = i64::from(steps[page as usize]) + 1;
            visible_from.max(usize::try_from(loaded).unwrap_or(0))
        };
        let row = from.saturating_sub(first).min(last_row);
        (page, (row * group) as u32)
    }));
    query.iter_mut().for_each(|q| *q *= page_scale);
}

/// Adds the partial attention `other` to `into`.
fn join(into: &mut Partial<'_>, other: &Partial<'_>, d: usize) {
    for row in 0..into.max.len() {
        let (a, b) = (into.max[row], other.max[row]);
        if b == f32::NEG_INFINITY {
            continue;
        }
        let m = a.max(b);
        let (ea, eb) = ((a - m).exp(), (b - m).exp());
        into.max[row] = m;
        into.sum[row] = into.sum[row] * ea + other.sum[row] * eb;
        for (x, y) in into.acc[row * d..][..d].iter_mut().zip(&other.acc[row * d..][..d]) {
            *x = *x * ea + y * eb;
        }
    }
}

/// Steps 3 to 5 for one KV head: merge the retrospective rows with the output cache, write outputs, push the newest.
///
/// Rows run from old to new: the newest position takes the ring slot of the oldest one that is still read.
fn finish<E: Element>(call: &Call<'_, E>, b: usize, head: usize, partial: &mut Partial<'_>) {
    let (attributes, dims, sequence) = (call.attributes, call.dims, &call.plan.sequences[b]);
    let (d, ring, heads) = (dims.head_size, attributes.ring(), attributes.heads);
    let group = heads / attributes.kv_heads;
    let skipped = dims.tokens - sequence.fed;
    for i in 0..sequence.fed {
        let position = sequence.first_position() + i;
        let complete = i + 1 == sequence.fed || attributes.mode == Mode::Dense;
        for g in 0..group {
            let (row, h) = (i * group + g, head * group + g);
            if complete {
                let lse = finish_row(call, partial, row, h);
                let values = &partial.acc[row * d..][..d];
                write_output(call, b, skipped + i, h, values);
                cache_output(call, b, position, h, values, lse);
                continue;
            }
            let at = (b * ring + position % ring) * heads + h;
            // SAFETY: each query head of the ring belongs to one task.
            let (cached, lse) = unsafe {
                (
                    call.state.outputs.range_mut(at * d, d),
                    &mut call.state.lse.range_mut(at, 1)[0],
                )
            };
            if partial.sum[row] > 0.0 {
                let (old, new, merged) = merge::weights(*lse, partial.lse(row));
                let new = new / partial.sum[row];
                for (o, a) in cached.iter_mut().zip(&partial.acc[row * d..][..d]) {
                    *o = old * *o + new * a;
                }
                *lse = merged;
            }
            write_output(call, b, skipped + i, h, cached);
        }
    }
}
