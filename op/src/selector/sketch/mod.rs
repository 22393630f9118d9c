//! Selector `sketch`: each key a second time in one or two bits an element, after a fixed rotation and without its
//! block's centre. A page's score is the estimated attention mass of its tokens.
//!
//! Sources: RaBitQ (Gao, Long, SIGMOD 2024 and 2025) for the estimator, QuaRot and Adamas (arXiv 2510.18413) for the
//! Hadamard rotation. docs/method.md states the arithmetic.

mod block;
mod encode;
mod query;
mod score;

use std::ops::Range;

use super::{CacheSize, PageSelector, Scoring, Selector, Written};
use crate::method::element::Element;
use crate::simd::{CodeIsa, Isa};
use block::BlockLayout;

/// Codes of one or two bits an element and a factor for every cached row, and a centre for every block of 128 rows.
pub struct Sketch;

impl PageSelector for Sketch {
    const ID: Selector = Selector::Sketch;
    type State<E: Element> = u8;

    fn update<E: Element>(size: &CacheSize, written: Written, keys: &[E], state: &mut [u8], scratch: &mut Vec<f32>) {
        let layout = BlockLayout::new::<E>(size.head_size, size.sketch_bits);
        assert!(
            keys.len() >= written.len * size.head_size && state.len() >= layout.blocks(written.len) * layout.bytes,
            "sketches outside their buffers"
        );
        encode::centres::<E>(layout, written, keys, state, scratch);
        encode::rows::<E>(layout, written.from..written.len, keys, state, scratch);
    }

    fn is_finite<E: Element>(size: &CacheSize, len: usize, state: &[u8], _: &mut Vec<f32>) -> bool {
        let layout = BlockLayout::new::<E>(size.head_size, size.sketch_bits);
        let blocks = state.chunks_exact(layout.bytes).take(layout.blocks(len));
        blocks.enumerate().all(|(block, bytes)| {
            let factors = layout.factors(bytes).take(layout.rows_of(block, len));
            factors.fold(true, |all, factor| all & factor.is_finite())
        })
    }

    fn prepare(scoring: &Scoring, query: &[f32], prepared: &mut Vec<f32>) {
        prepared.clear();
        for head in query.chunks_exact(scoring.head_size) {
            query::prepare_head(Isa::detect(), head, scoring.sketch_bits, prepared);
        }
    }

    fn score_heads<E: Element>(
        isa: Isa,
        scoring: &Scoring,
        prepared: &[f32],
        state: &[u8],
        pages: Range<usize>,
        scores: &mut [f32],
    ) {
        let layout = BlockLayout::new::<E>(scoring.head_size, scoring.sketch_bits);
        let heads = prepared.len() / query::prepared_len(scoring.head_size, scoring.sketch_bits);
        assert!(
            scores.len() == heads * pages.len()
                && pages.end.saturating_sub(1) * scoring.page_size < scoring.len.max(1)
                && layout.blocks(scoring.len) * layout.bytes <= state.len()
                && scoring.page_size.is_power_of_two()
                && scoring.page_size <= block::ROWS,
            "scores outside their buffers"
        );
        score::log_masses::<E>(
            isa,
            CodeIsa::beside(isa),
            layout,
            scoring,
            prepared,
            state,
            pages,
            scores,
        );
    }

    /// They are log masses already.
    fn finish_scores(_: &Scoring, _: &mut [f32], _: Range<usize>) {}
}

#[cfg(test)]
mod tests;
