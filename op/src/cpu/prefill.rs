//! Prefill: dense causal attention over a prompt or a chunk of it, and the state that decoding starts from.

use std::sync::atomic::{AtomicBool, Ordering};

use super::call::{CpuCall, Dense, Rows};
use super::kv_write::{append, query_rows, stamp_pages, update_pages};
use super::merge::{cache_output, clear_ignored_rows, finish_row, write_output};
use super::pool::Pool;
use super::scratch::TaskScratch;
use crate::contract::Sequence;
use crate::method::attend::{Block, Partial, attend_pages};
use crate::method::element::Element;
use crate::ort::Result;
use crate::selector::PageSelector;
use crate::simd::Isa;

/// Tokens of one block of query rows: enough that a page's keys serve many rows, few enough to spread a prompt.
const BLOCK_TOKENS: usize = 16;

pub(super) fn prefill<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
    pool: &dyn Pool,
    dense: Dense,
) -> Result<()> {
    let kv_heads = call.attributes.kv_heads;
    let rows = Rows::new(call.attributes, call.dims, call.inputs);
    let broken = AtomicBool::new(false);
    pool.run(call.dims.batch * kv_heads, &|task| {
        let (b, head) = (task / kv_heads, task % kv_heads);
        call.scratch.with_task(|scratch| {
            if dense == Dense::Own {
                append(call, &rows, b, head, scratch);
            }
            update_pages(call, b, head, scratch);
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

/// Whether a NaN or an infinity is among the queries of a KV head's group or in its page state, and so perhaps among
/// its keys.
fn is_broken<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
    rows: &Rows<'_, E>,
    b: usize,
    head: usize,
    scratch: &mut TaskScratch,
) -> bool {
    let (dims, sequence) = (call.dims, &call.plan.sequences[b]);
    let (d, group) = (dims.head_size, call.group());
    let pair = b * call.attributes.kv_heads + head;
    let state_len = call.pages_len();
    // SAFETY: each task owns its sequence's KV head in the state.
    let state = unsafe { call.state.pages.range(pair * state_len, state_len) };
    if !P::is_finite::<E>(&call.cache_size(), sequence.len, state, &mut scratch.summary) {
        return true;
    }
    let buffer = scratch.rows.fit(d);
    let mut queries = (dims.tokens - sequence.fed..dims.tokens)
        .flat_map(|s| (head * group..(head + 1) * group).map(move |h| rows.query(b, s, h)));
    !queries.all(|query| {
        let row = E::widen(query, &mut *buffer);
        row.iter().fold(true, |all, x| all & x.is_finite())
    })
}

fn attend_block<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
    rows: &Rows<'_, E>,
    b: usize,
    head: usize,
    tokens: std::ops::Range<usize>,
    dense: Dense,
    scratch: &mut TaskScratch,
) {
    let (attributes, dims, sequence) = (call.attributes, call.dims, &call.plan.sequences[b]);
    let (d, group, page_size) = (dims.head_size, call.group(), attributes.page_size);
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
    let by = call.scale();
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
