//! Prefill: dense causal attention over a prompt or a chunk of it, and the state that decoding starts from.

use std::sync::atomic::{AtomicBool, Ordering};

use super::scratch::TaskScratch;
use super::tensors::{AngleCache, Rows};
use super::{Call, Dense, Pool};
use crate::contract::Sequence;
use crate::method::attend::{Block, Partial, attend_pages};
use crate::method::element::Element;
use crate::method::summary::summarize;
use crate::ort::Result;
use crate::simd::Isa;

/// Tokens of one block of query rows: enough that a page's keys serve many rows, few enough to spread a prompt.
const BLOCK_TOKENS: usize = 16;

pub(super) fn prefill<E: Element>(call: &Call<'_, E>, pool: &dyn Pool, dense: Dense) -> Result<()> {
    let kv_heads = call.attributes.kv_heads;
    let rows = Rows::new(call.attributes, call.dims, call.inputs);
    let broken = AtomicBool::new(false);
    pool.run(call.dims.batch * kv_heads, &|task| {
        let (b, head) = (task / kv_heads, task % kv_heads);
        call.scratch.with_task(|scratch| {
            if dense == Dense::Own {
                append(call, &rows, b, head, scratch);
            }
            summarize_touched(call, b, head, scratch);
            stamp_pages(call, b, head);
            if dense == Dense::Done && is_broken(call, &rows, b, head, scratch) {
                broken.store(true, Ordering::Relaxed);
            }
        });
    })?;
    // ONNX Runtime 1.32's operator takes a row that sees nothing but NaNs for one that sees nothing.
    let dense = if broken.into_inner() { Dense::Own } else { dense };

    // The rows whose attention we compute: all of them, or only those that the output cache keeps.
    let cached = call.attributes.window - 1;
    let first_row = |s: &Sequence| match dense {
        Dense::Own => 0,
        Dense::Done => s.fed - s.fed.min(cached),
    };
    let most = call
        .plan
        .sequences
        .iter()
        .map(|s| s.fed - first_row(s))
        .max()
        .unwrap_or(0);
    let blocks = most.div_ceil(BLOCK_TOKENS);
    pool.run(call.dims.batch * kv_heads * blocks, &|task| {
        // The longest blocks first: they see the most keys.
        let (block, pair) = (
            blocks - 1 - task / (call.dims.batch * kv_heads),
            task % (call.dims.batch * kv_heads),
        );
        let (b, head) = (pair / kv_heads, pair % kv_heads);
        let sequence = &call.plan.sequences[b];
        let from = first_row(sequence) + block * BLOCK_TOKENS;
        let to = (from + BLOCK_TOKENS).min(sequence.fed);
        if from < to {
            call.scratch
                .with_task(|scratch| attend_block(call, &rows, b, head, from..to, dense, scratch));
        }
    })?;
    if dense == Dense::Own {
        clear_ignored_rows(call);
    }
    Ok(())
}

/// Whether a NaN or an infinity is among the queries of a KV head's group or in its pages' summaries, and so perhaps among its keys.
fn is_broken<E: Element>(
    call: &Call<'_, E>,
    rows: &Rows<'_, E>,
    b: usize,
    head: usize,
    scratch: &mut TaskScratch,
) -> bool {
    let (dims, sequence) = (call.dims, &call.plan.sequences[b]);
    let (d, group) = (dims.head_size, call.attributes.heads / call.attributes.kv_heads);
    let buffer = scratch.rows.fit(d);
    let mut all_finite = |elements: &[E]| {
        let row = E::widen(elements, &mut *buffer);
        row.iter().fold(true, |all, x| all & x.is_finite())
    };
    let pages = sequence.len.div_ceil(call.attributes.page_size);
    let pair = b * call.attributes.kv_heads + head;
    // SAFETY: each task owns its sequence's KV head in the summaries.
    let summaries = unsafe { call.state.summary.range(pair * dims.pages * 2 * d, pages * 2 * d) };
    let mut queries = (dims.tokens - sequence.fed..dims.tokens)
        .flat_map(|s| (head * group..(head + 1) * group).map(move |h| rows.query(b, s, h)));
    !(summaries.chunks_exact(d).all(&mut all_finite) && queries.all(all_finite))
}

/// Writes the fed rows' keys (rotated) and values into the cache.
pub(super) fn append<E: Element>(
    call: &Call<'_, E>,
    rows: &Rows<'_, E>,
    b: usize,
    head: usize,
    scratch: &mut TaskScratch,
) {
    let (dims, sequence) = (call.dims, &call.plan.sequences[b]);
    let d = dims.head_size;
    let skipped = dims.tokens - sequence.fed;
    let buffer = scratch.rows.fit(d);
    scratch.angles.clear();
    let cache = (b * call.attributes.kv_heads + head) * dims.capacity;
    for i in 0..sequence.fed {
        let position = sequence.first_position() + i;
        rows.rotated(rows.key(b, skipped + i, head), position, buffer, &mut scratch.angles);
        // SAFETY: each task owns its sequence's KV head in the caches.
        let (key, value) = unsafe {
            let at = (cache + position) * d;
            (call.state.key.range_mut(at, d), call.state.value.range_mut(at, d))
        };
        E::narrow(buffer, key);
        value.copy_from_slice(rows.value(b, skipped + i, head));
    }
}

/// Recomputes the summaries of the pages that the fed rows touch.
pub(super) fn summarize_touched<E: Element>(call: &Call<'_, E>, b: usize, head: usize, scratch: &mut TaskScratch) {
    let (dims, sequence) = (call.dims, &call.plan.sequences[b]);
    let (d, page_size) = (dims.head_size, call.attributes.page_size);
    let pair = b * call.attributes.kv_heads + head;
    for page in sequence.first_position() / page_size..=(sequence.len - 1) / page_size {
        let (start, end) = (page * page_size, ((page + 1) * page_size).min(sequence.len));
        // SAFETY: each task owns its sequence's KV head in the caches and summaries.
        let (keys, summary) = unsafe {
            (
                call.state
                    .key
                    .range((pair * dims.capacity + start) * d, (end - start) * d),
                call.state.summary.range_mut((pair * dims.pages + page) * 2 * d, 2 * d),
            )
        };
        summarize(call.attributes.selector, keys, summary, &mut scratch.summary);
    }
}

/// A[j] = the newest position for every page with a valid token: the queries so far have seen everything.
pub(super) fn stamp_pages<E: Element>(call: &Call<'_, E>, b: usize, head: usize) {
    let sequence = &call.plan.sequences[b];
    let pages = sequence.len.div_ceil(call.attributes.page_size);
    let pair = b * call.attributes.kv_heads + head;
    // SAFETY: each task owns its sequence's KV head in the page steps.
    unsafe { call.state.steps.range_mut(pair * call.dims.pages, pages) }.fill((sequence.len - 1) as i32);
}

/// Outputs of leading rows that a sequence ignores are 0.
pub(super) fn clear_ignored_rows<E: Element>(call: &Call<'_, E>) {
    let row = call.attributes.heads * call.dims.head_size;
    for (b, sequence) in call.plan.sequences.iter().enumerate() {
        let skipped = call.dims.tokens - sequence.fed;
        // SAFETY: no task runs; these rows belong to nobody.
        unsafe { call.output.range_mut(b * call.dims.tokens * row, skipped * row) }.fill(E::default());
    }
}

/// Rotated and scaled query rows `tokens` (counted among the fed) of one KV head's group, token-major.
pub(super) fn query_rows<E: Element>(
    call: &Call<'_, E>,
    rows: &Rows<'_, E>,
    b: usize,
    head: usize,
    tokens: std::ops::Range<usize>,
    target: &mut [f32],
    angles: &mut AngleCache,
) {
    angles.clear();
    let sequence = &call.plan.sequences[b];
    let group = call.attributes.heads / call.attributes.kv_heads;
    let skipped = call.dims.tokens - sequence.fed;
    for (row, q) in target.chunks_exact_mut(call.dims.head_size).enumerate() {
        let (i, h) = (tokens.start + row / group, head * group + row % group);
        rows.rotated(rows.query(b, skipped + i, h), sequence.first_position() + i, q, angles);
    }
}

/// The softmax scale.
pub(super) fn scale<E: Element>(call: &Call<'_, E>) -> f32 {
    call.attributes
        .scale
        .unwrap_or(1.0 / (call.dims.head_size as f32).sqrt())
}

fn attend_block<E: Element>(
    call: &Call<'_, E>,
    rows: &Rows<'_, E>,
    b: usize,
    head: usize,
    tokens: std::ops::Range<usize>,
    dense: Dense,
    scratch: &mut TaskScratch,
) {
    let (attributes, dims, sequence) = (call.attributes, call.dims, &call.plan.sequences[b]);
    let (d, group, page_size) = (
        dims.head_size,
        attributes.heads / attributes.kv_heads,
        attributes.page_size,
    );
    let count = tokens.len() * group;
    let TaskScratch {
        pages,
        rows: query,
        angles,
        partial,
        ..
    } = scratch;
    let query = query.fit(count * d);
    query_rows(call, rows, b, head, tokens.clone(), query, angles);
    let by = scale(call);
    query.iter_mut().for_each(|q| *q *= by);

    let block = Block {
        group,
        head_size: d,
        page_size,
        first_position: sequence.first_position() + tokens.start,
        softcap: attributes.softcap,
        local_window: attributes.local_window,
    };
    let (acc, rest) = partial.fit(count * (d + 2)).split_at_mut(count * d);
    let (max, sum) = rest.split_at_mut(count);
    let mut partial = Partial { max, sum, acc };
    partial.clear();
    // SAFETY: keys and values are complete; nobody writes them in this phase.
    let (keys, values) = unsafe {
        let at = (b * attributes.kv_heads + head) * dims.capacity * d;
        (
            call.state.key.range(at, dims.capacity * d),
            call.state.value.range(at, dims.capacity * d),
        )
    };
    let newest = block.first_position + tokens.len() - 1;
    let oldest = attributes
        .local_window
        .map_or(0, |w| (block.first_position + 1).saturating_sub(w));
    pages.clear();
    pages.extend((oldest / page_size..=newest / page_size).map(|page| {
        let first_row = (page * page_size).saturating_sub(block.first_position) * group;
        (page as u32, first_row as u32)
    }));
    attend_pages(Isa::detect(), &block, query, keys, values, pages, &mut partial);

    let skipped = dims.tokens - sequence.fed;
    for row in 0..count {
        let (i, h) = (tokens.start + row / group, head * group + row % group);
        let lse = finish_row(call, &mut partial, row, h);
        let values = &partial.acc[row * d..][..d];
        if dense == Dense::Own {
            write_output(call, b, skipped + i, h, values);
        }
        if i + attributes.window > sequence.fed {
            cache_output(call, b, sequence.first_position() + i, h, values, lse);
        }
    }
}

/// Divides a row by its sum, its head sink included, and returns its log-sum-exp.
pub(super) fn finish_row<E: Element>(call: &Call<'_, E>, partial: &mut Partial<'_>, row: usize, head: usize) -> f32 {
    let d = call.dims.head_size;
    let mut lse = partial.lse(row);
    let mut inverse = 1.0 / partial.sum[row];
    if let Some(sink) = call.inputs.head_sink.get(head) {
        let (seen, _, joined) = crate::method::merge::weights(lse, sink.to_f32());
        // With logits of -inf alone the sink has all the weight; without a sink that is 0 / 0, as in any softmax.
        inverse = if partial.sum[row] == 0.0 { 0.0 } else { inverse * seen };
        lse = joined;
    }
    partial.acc[row * d..][..d].iter_mut().for_each(|v| *v *= inverse);
    lse
}

/// Writes one head of output row `s`.
pub(super) fn write_output<E: Element>(call: &Call<'_, E>, b: usize, s: usize, head: usize, values: &[f32]) {
    let d = call.dims.head_size;
    let at = ((b * call.dims.tokens + s) * call.attributes.heads + head) * d;
    // SAFETY: each output head belongs to one task.
    E::narrow(values, unsafe { call.output.range_mut(at, d) });
}

/// Puts (O, L) of a position into the output cache; a window of one token keeps none.
pub(super) fn cache_output<E: Element>(
    call: &Call<'_, E>,
    b: usize,
    position: usize,
    head: usize,
    values: &[f32],
    lse: f32,
) {
    if call.attributes.window == 1 {
        return;
    }
    let (d, ring, heads) = (call.dims.head_size, call.attributes.ring(), call.attributes.heads);
    let at = (b * ring + position % ring) * heads + head;
    // SAFETY: each query head of the ring belongs to one task.
    unsafe {
        call.state.outputs.range_mut(at * d, d).copy_from_slice(values);
        call.state.lse.range_mut(at, 1)[0] = lse;
    }
}
