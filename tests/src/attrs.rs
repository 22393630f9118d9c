//! The operator's attributes and the sizes they imply.

use retro_contract::{CacheSize, GroupScore, Mode, Selector, StateElement, StateLayout, limits, pages_for, ring_slots};

use crate::tensor::Dtype;

#[derive(Clone, Debug)]
pub struct Attrs {
    pub heads: usize,
    pub kv_heads: usize,
    /// Not an attribute of the node: it follows from the shapes.
    pub head_size: usize,
    /// 0 is 1/sqrt(head_size).
    pub scale: f32,
    pub softcap: f32,
    pub do_rotary: bool,
    pub rotary_interleaved: bool,
    pub local_window_size: i64,
    pub page: usize,
    pub window: usize,
    pub budget_ratio: f32,
    pub budget_min_pages: usize,
    pub sink_pages: usize,
    pub selector: Selector,
    pub group_score: GroupScore,
    pub lambda: f32,
    pub correlation: f32,
    pub sketch_bits: usize,
    pub mode: Mode,
}

impl Attrs {
    pub fn new(heads: usize, kv_heads: usize, head_size: usize) -> Self {
        Self {
            heads,
            kv_heads,
            head_size,
            scale: 0.0,
            softcap: 0.0,
            do_rotary: false,
            rotary_interleaved: false,
            local_window_size: -1,
            page: limits::PAGE_SIZE,
            window: limits::WINDOW,
            budget_ratio: limits::BUDGET_RATIO,
            budget_min_pages: limits::BUDGET_MIN_PAGES,
            sink_pages: limits::SINK_PAGES,
            selector: Selector::default(),
            group_score: GroupScore::default(),
            lambda: limits::SELECTOR_LAMBDA,
            correlation: limits::SELECTOR_CORRELATION,
            sketch_bits: limits::SKETCH_BITS,
            mode: Mode::default(),
        }
    }

    /// Every step loads every page.
    pub fn full_budget(mut self) -> Self {
        (self.budget_ratio, self.budget_min_pages) = (1.0, 1);
        self
    }

    pub fn budget(mut self, ratio: f32, min_pages: usize) -> Self {
        (self.budget_ratio, self.budget_min_pages) = (ratio, min_pages);
        self
    }

    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    pub fn ring(&self) -> usize {
        ring_slots(self.window)
    }

    pub fn pages(&self, tokens: usize) -> usize {
        pages_for(tokens, self.page)
    }

    /// How the selector lays its state out for a cache of `capacity` tokens.
    pub fn layout(&self, dtype: Dtype, capacity: usize) -> StateLayout {
        self.selector.layout(&CacheSize {
            capacity,
            pages: self.pages(capacity),
            page_size: self.page,
            head_size: self.head_size,
            sketch_bits: self.sketch_bits,
            cache_element: dtype.bytes(),
        })
    }

    /// The type of the selector's state.
    pub fn state_dtype(&self, dtype: Dtype) -> Dtype {
        match self.selector.state_element() {
            StateElement::Cache => dtype,
            StateElement::Byte => Dtype::U8,
        }
    }

    pub fn actual_scale(&self) -> f64 {
        if self.scale == 0.0 {
            1.0 / (self.head_size as f64).sqrt()
        } else {
            f64::from(self.scale)
        }
    }
}
