//! Memory layout for a context length and batch size.

use retro_contract::{CacheSize, Selector, StateLayout, pages_for, ring_slots};
use retro_run::decoder::device_buffers::ALIGNMENT;

use crate::{
    args::Summaries,
    common::fill,
    graph,
    host::Host,
    steps::{PREFILL_CHUNK, ROOM},
};

/// Byte offsets of the buffers of a context length and batch size.
pub struct MemoryLayout {
    pub context: usize,
    pub batch: usize,
    pub capacity: usize,
    pub pages: usize,
    size: CacheSize,
    /// Keys and values of each layer.
    pub caches: Vec<[usize; 2]>,
    /// Of each layer: the selector's state, page steps, output cache, log-sum-exps.
    pub state: Vec<[usize; 4]>,
    pub bank: usize,
    pub output: usize,
    pub rotary: [usize; 2],
    pub budget: usize,
    pub lengths: usize,
    pub bytes: usize,
}

impl MemoryLayout {
    pub fn new(host: &Host<'_>, context: usize, batch: usize) -> Self {
        let (s, args) = (&host.shape, host.args);
        let element = fill::bytes_of(s.dtype);
        let capacity = context + ROOM;
        let pages = pages_for(capacity, s.page);
        let ring = ring_slots(args.widest_window());
        let most = args.window.iter().chain(&args.gqa_tokens).copied().max().unwrap_or(1);
        let prompt = if args.prompt() { context } else { 0 };
        let chunk = if args.summaries == Summaries::Prefill {
            PREFILL_CHUNK
        } else {
            0
        };
        let mut next = 0usize;
        let mut take = |bytes: usize| {
            let at = next;
            next = (next + bytes).next_multiple_of(ALIGNMENT);
            at
        };
        let cache = batch * s.kv_heads * capacity * s.size * element;
        let caches = (0..s.layers).map(|_| [take(cache), take(cache)]).collect();
        let bank = take((graph::BANK * most).max(prompt).max(batch * chunk) * s.packed() * element);
        let output = take((batch * most).max(prompt).max(batch * chunk) * s.heads * s.size * element);
        let rotary = [(); 2].map(|()| take(capacity * s.size / 2 * element));
        let size = CacheSize {
            capacity,
            pages,
            page_size: s.page,
            head_size: s.size,
            sketch_bits: s.sketch_bits,
            cache_element: element,
        };
        // One selector is measured at a time: the largest state is room for all.
        let selectors = args.select.iter().map(|s| s.selector.layout(&size).bytes(element));
        let selector_bytes = selectors.max().unwrap_or(0);
        let state = (0..s.layers)
            .map(|_| {
                [
                    take(batch * s.kv_heads * selector_bytes),
                    take(batch * s.kv_heads * pages * 4),
                    take(batch * ring * s.heads * s.size * 4),
                    take(batch * ring * s.heads * 4),
                ]
            })
            .collect();
        let (budget, lengths) = (take(batch * 4), take(batch * 4));
        Self {
            context,
            batch,
            capacity,
            pages,
            size,
            caches,
            state,
            bank,
            output,
            rotary,
            budget,
            lengths,
            bytes: next,
        }
    }

    /// Bytes of a selector's state that a step reads of one KV head: that of the context alone.
    pub fn read(&self, selector: Selector, element: usize) -> usize {
        let valid = CacheSize {
            capacity: self.context,
            pages: pages_for(self.context, self.size.page_size),
            ..self.size
        };
        selector.layout(&valid).bytes(element)
    }

    /// The layout of a selector's state.
    pub fn of(&self, selector: Selector) -> StateLayout {
        selector.layout(&self.size)
    }
}
