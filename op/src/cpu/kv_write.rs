//! What a call writes before any attention: keys and values of the fed rows, the state that pages are scored from, page
//! steps; and how queries are read.

use super::angle_cache::AngleCache;
use super::call::{CpuCall, Rows};
use super::scratch::TaskScratch;
use crate::contract::Phase;
use crate::method::element::Element;
use crate::selector::{PageSelector, Written};

/// Writes the fed rows' keys (rotated) and values into the cache.
pub(super) fn append<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
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

/// Brings the page state up to date with the rows that the call feeds.
pub(super) fn update_pages<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
    b: usize,
    head: usize,
    scratch: &mut TaskScratch,
) {
    let (dims, sequence) = (call.dims, &call.plan.sequences[b]);
    let pair = b * call.attributes.kv_heads + head;
    let (d, state_len) = (dims.head_size, call.pages_len());
    let written = Written {
        from: sequence.first_position(),
        appended: match call.plan.phase {
            Phase::Prefill => sequence.first_position(),
            Phase::Decode => sequence.len - 1,
        },
        len: sequence.len,
    };
    // SAFETY: each task owns its sequence's KV head in the caches and the state.
    let (keys, state) = unsafe {
        (
            call.state.key.range(pair * dims.capacity * d, sequence.len * d),
            call.state.pages.range_mut(pair * state_len, state_len),
        )
    };
    P::update::<E>(&call.cache_size(), written, keys, state, &mut scratch.summary);
}

/// A[j] = the newest position for every page with a valid token: the queries so far have seen everything.
pub(super) fn stamp_pages<E: Element, P: PageSelector>(call: &CpuCall<'_, E, P>, b: usize, head: usize) {
    let sequence = &call.plan.sequences[b];
    let pages = sequence.len.div_ceil(call.attributes.page_size);
    let pair = b * call.attributes.kv_heads + head;
    // SAFETY: each task owns its sequence's KV head in the page steps.
    unsafe { call.state.steps.range_mut(pair * call.dims.pages, pages) }.fill((sequence.len - 1) as i32);
}

/// Rotated and scaled query rows `tokens` (counted among the fed) of one KV head's group, token-major.
pub(super) fn query_rows<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
    rows: &Rows<'_, E>,
    b: usize,
    head: usize,
    tokens: std::ops::Range<usize>,
    target: &mut [f32],
    angles: &mut AngleCache,
) {
    angles.clear();
    let sequence = &call.plan.sequences[b];
    let group = call.group();
    let skipped = call.dims.tokens - sequence.fed;
    for (row, q) in target.chunks_exact_mut(call.dims.head_size).enumerate() {
        let (i, h) = (tokens.start + row / group, head * group + row % group);
        rows.rotated(rows.query(b, skipped + i, h), sequence.first_position() + i, q, angles);
    }
}
