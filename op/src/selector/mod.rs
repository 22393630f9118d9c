//! Selectors: the state from which a decoding step scores pages without reading their keys, one file each.
//!
//! A selector is a type that implements [`PageSelector`]; the two-vector ones do so through [`PageVectors`].
//! [`for_selector!`] runs generic code for the one that a node names (attribute `selector`): an id without a type here
//! does not compile.
//! `cuda/kernels/selector/` has a file of the same name for each.

pub use retro_contract::{CacheSize, GroupScore, Selector, StateElement, StateLayout};

use crate::method::element::Element;
use crate::ort::Plain;
use crate::simd::Isa;

mod adamas;
mod bounds;
mod moments;
pub mod page_vectors;
mod rotation;
mod signed_moments;
mod sketch;

pub use adamas::{Adamas, AdamasRms};
pub use bounds::Bounds;
pub use moments::Moments;
pub use page_vectors::PageVectors;
pub use signed_moments::SignedMoments;
pub use sketch::Sketch;

/// Evaluates an expression in which a name stands for the type of a selector: `for_selector!(id, P => decode::<E,
/// P>(call))`.
#[macro_export]
macro_rules! for_selector {
    ($id:expr, $selector:ident => $body:expr) => {
        match $id {
            $crate::selector::Selector::Bounds => {
                type $selector = $crate::selector::Bounds;
                $body
            }
            $crate::selector::Selector::Moments => {
                type $selector = $crate::selector::Moments;
                $body
            }
            $crate::selector::Selector::SignedMoments => {
                type $selector = $crate::selector::SignedMoments;
                $body
            }
            $crate::selector::Selector::Sketch => {
                type $selector = $crate::selector::Sketch;
                $body
            }
            $crate::selector::Selector::Adamas => {
                type $selector = $crate::selector::Adamas;
                $body
            }
            $crate::selector::Selector::AdamasRms => {
                type $selector = $crate::selector::AdamasRms;
                $body
            }
        }
    };
}
pub use for_selector;

/// The rows of a KV head's cache that a call has written, in tokens: `from..len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The first row that was written.
    pub from: usize,
    /// The first row that the call appended; those before it were valid and are overwritten.
    pub appended: usize,
    /// Valid rows after the call.
    pub len: usize,
}

/// How a step scores its pages, beside what the selector itself says.
#[derive(Clone, Copy, Debug)]
pub struct Scoring {
    /// How the scores of a group's heads become the page's.
    pub group_score: GroupScore,
    /// Softmax scale of the attention.
    pub scale: f32,
    /// Weight of the standard deviation (attribute `selector_lambda`).
    pub lambda: f32,
    /// Share of the spread along the query that the signed deviations add up to (attribute `selector_correlation`).
    pub correlation: f32,
    /// Tokens of a page.
    pub page_size: usize,
    /// D.
    pub head_size: usize,
    /// Valid tokens, the newest included.
    pub len: usize,
    /// Softcap of the attention's logits; 0: off.
    pub softcap: f32,
    /// Tokens that the newest query sees, itself included; `None`: all.
    pub local_window: Option<usize>,
    /// Bits of an element of a sketch (attribute `sketch_bits`).
    pub sketch_bits: usize,
}

/// What a step chooses its pages by. `E` is the element type of caches and activations.
pub trait PageSelector: Send + Sync + 'static {
    /// Its name in models, reports and flags.
    const ID: Selector;
    /// Element type of the state tensor. lib.rs registers the operator for each.
    type State<E: Element>: Plain + Default + Send + Sync;

    /// Shape and element type of a layer's state: the contract's, which hosts read too.
    fn layout(size: &CacheSize) -> StateLayout {
        Self::ID.layout(size)
    }

    /// Brings one KV head's state up to date after rows were written.
    ///
    /// `keys`: its valid rows `[len, D]`, after RoPE; `state`: as [`Self::layout`] has it. From the keys, not from
    /// older state, where rows were overwritten.
    fn update<E: Element>(
        size: &CacheSize,
        written: Written,
        keys: &[E],
        state: &mut [Self::State<E>],
        scratch: &mut Vec<f32>,
    );

    /// Whether no NaN and no infinity is in one KV head's state of `len` valid tokens, and so none among its keys.
    fn is_finite<E: Element>(size: &CacheSize, len: usize, state: &[Self::State<E>], scratch: &mut Vec<f32>) -> bool;

    /// Turns queries `[g, D]`, after RoPE and not scaled, into what [`Self::score_heads`] reads.
    fn prepare(scoring: &Scoring, query: &[f32], prepared: &mut Vec<f32>);

    /// Scores of every head for some pages, head-major: `scores` is `[g, pages.len()]`. They may lack what
    /// [`Self::finish_scores`] adds. Equal state has equal scores, wherever it stands.
    fn score_heads<E: Element>(
        isa: Isa,
        scoring: &Scoring,
        prepared: &[f32],
        state: &[Self::State<E>],
        pages: std::ops::Range<usize>,
        scores: &mut [f32],
    );

    /// Makes one head's scores of all candidates comparable with other heads', as the group score needs them.
    fn finish_scores(scoring: &Scoring, scores: &mut [f32], pages: std::ops::Range<usize>);
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::ort::DataType;

    #[test]
    fn the_state_has_the_contracts_element_type() {
        let size = CacheSize {
            capacity: 100,
            pages: 7,
            page_size: 16,
            head_size: 8,
            sketch_bits: 2,
            cache_element: 4,
        };
        for &id in Selector::ALL {
            let (named, declared, kernels) = for_selector!(id, P => (
                <P as PageSelector>::ID,
                P::layout(&size).element,
                [<P as PageSelector>::State::<f32>::DATA_TYPE, <P as PageSelector>::State::<f16>::DATA_TYPE],
            ));
            let expected = match declared {
                StateElement::Cache => [f32::DATA_TYPE, f16::DATA_TYPE],
                StateElement::Byte => [DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8; 2],
            };
            assert_eq!((named, kernels), (id, expected));
        }
    }
}
