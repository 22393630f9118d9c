//! The operators measured, and the sizes of a node.

use std::fmt;

use retro_contract::{Budget, CacheSize, Mode, pages_for};
use retro_models::Dtype;

use crate::bench::args::PageSelection;

/// Sizes of a node.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads Hq.
    pub heads: usize,
    /// KV heads Hkv.
    pub kv_heads: usize,
    /// Head size D.
    pub head_size: usize,
    /// Tokens a page.
    pub page_size: usize,
    /// Element type of caches and rows.
    pub dtype: Dtype,
    /// Bits of an element of a sketch (selector `sketch`), 1 or 2.
    pub sketch_bits: usize,
}

impl AttentionShape {
    /// Bytes of keys and values a token.
    pub fn token_bytes(&self) -> usize {
        2 * self.kv_heads * self.head_size * self.dtype.size()
    }

    /// Sizes that a selector's state depends on, for caches of `capacity` tokens.
    pub fn cache_size(&self, capacity: usize) -> CacheSize {
        CacheSize {
            capacity,
            pages: pages_for(capacity, self.page_size),
            page_size: self.page_size,
            head_size: self.head_size,
            sketch_bits: self.sketch_bits,
            cache_element: self.dtype.size(),
        }
    }
}

/// An operator to measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operator {
    /// `com.microsoft::GroupQueryAttention`.
    Gqa,
    /// `ai.retro::RetroAttention`.
    Retro(RetroVariant),
}

/// The attributes that a measurement varies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetroVariant {
    /// The window w: tokens that a step feeds.
    pub window: usize,
    /// Pages that a step reads.
    pub budget: Budget,
    /// Which pages are read: selected ones, all, or sink and newest.
    pub mode: Mode,
    /// How pages are selected.
    pub selection: PageSelection,
}

impl Operator {
    /// Tokens that a step feeds once the window is full.
    pub fn window(&self) -> usize {
        match self {
            Self::Gqa => 1,
            Self::Retro(retro) => retro.window,
        }
    }

    /// Whether a step with `len` valid tokens scores pages: not if the budget covers them all.
    pub(super) fn scores(&self, shape: &AttentionShape, len: usize) -> bool {
        match self {
            Self::Retro(r) if r.mode == Mode::Retro => {
                let most = r
                    .budget
                    .pages(retro_contract::limits::BUDGET_MIN_PAGES, len, shape.page_size);
                most < pages_for(len, shape.page_size)
            }
            _ => false,
        }
    }

    /// Bytes that a step of one node must move: keys and values of the pages read, the selector's state of all valid
    /// tokens if it scores pages, and the output cache of the retrospective rows. `pages`: read per KV head.
    pub fn bytes(&self, shape: &AttentionShape, len: usize, pages: Option<f64>) -> f64 {
        let tokens = pages.map_or(len as f64, |p| (p * shape.page_size as f64).min(len as f64));
        let caches = tokens * shape.token_bytes() as f64;
        let state = match self {
            Self::Retro(retro) if self.scores(shape, len) => {
                let layout = retro.selection.selector.layout(&shape.cache_size(len));
                shape.kv_heads * layout.bytes(shape.dtype.size())
            }
            _ => 0,
        };
        let ring = 2 * (self.window() - 1) * shape.heads * shape.head_size * size_of::<f32>();
        caches + (state + ring) as f64
    }
}

impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gqa => f.write_str("GQA"),
            Self::Retro(r) => f.write_str(r.mode.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_pages_and_the_selectors_state() {
        let shape = AttentionShape {
            heads: 4,
            kv_heads: 2,
            head_size: 8,
            page_size: 16,
            dtype: Dtype::F32,
            sketch_bits: 2,
        };
        assert_eq!(Operator::Gqa.bytes(&shape, 100, None), 100.0 * 128.0);
        let retro = |budget, window| {
            Operator::Retro(RetroVariant {
                window,
                budget,
                mode: Mode::Retro,
                selection: PageSelection::default(),
            })
        };
        // 2 of 7 pages, 7 summaries of two rows.
        let few = retro(Budget::Tokens(32), 1);
        assert_eq!(few.bytes(&shape, 100, Some(2.0)), 32.0 * 128.0 + 7.0 * 128.0);
        // The whole budget scores nothing and reads no more than there is; two rows read and write 4 * 8 floats each.
        let all = retro(Budget::Ratio(1.0), 3);
        assert_eq!(
            all.bytes(&shape, 100, Some(7.0)),
            100.0 * 128.0 + 2.0 * 2.0 * 4.0 * 8.0 * 4.0
        );
    }
}
