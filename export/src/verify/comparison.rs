//! What is compared, and how.

use super::other_inputs::OtherInput;
use std::path::Path;

/// A cache of the source: its names, its sizes, and how it is kept.
#[derive(Clone, Debug)]
pub struct CacheFacts {
    /// The graph's input, `[B, H, T, D]`.
    pub past: String,
    /// The output that it comes back as.
    pub present: String,
    /// H, key/value heads.
    pub heads: usize,
    /// D, elements of a head.
    pub head_size: usize,
    /// A sliding-window cache, which has its size from the beginning; others grow.
    pub sliding: bool,
    /// Of a layer that stays as it is, with a past as long as what was fed, in the converted model too.
    pub grows: bool,
}

/// How padding on the left is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PaddingCheck {
    /// The converted model does not take it.
    None,
    /// Both models are fed the padded batch.
    Both,
    /// The original reads padding as tokens (GroupQueryAttention): it is fed each sequence alone, without padding.
    Alone,
}

/// What is compared.
#[derive(Clone, Debug)]
pub struct Comparison<'c> {
    /// The source's file.
    pub original: &'c Path,
    /// Converted with a window of at least the largest of `windows`.
    pub converted: &'c Path,
    /// Windows (w, tokens fed a step) that are tried.
    pub windows: &'c [usize],
    /// The converted graph feeds tokens again by itself, as many as it was converted for: the only one of `windows`.
    pub window_in_graph: bool,
    /// The converted graph takes lengths from the attention mask, where the original took them from its caches' shapes. Unless its
    /// metadata says that the mask's width counts, masks as wide as the caches are compared too.
    pub lengths_from_mask: bool,
    /// The source's caches.
    pub caches: &'c [CacheFacts],
    /// Inputs that may be fed anything.
    pub unused_inputs: &'c [String],
    /// Inputs beside tokens, mask, positions and caches.
    pub other_inputs: &'c [OtherInput],
    /// Tokens in a page of the converted model.
    pub page_size: usize,
    /// Token ids are drawn below this.
    pub vocabulary: usize,
    /// How padding on the left is compared.
    pub padding: PaddingCheck,
    /// The original's numbers depend on which tokens are fed together (dynamic quantisation), padding among them: how much, is
    /// measured, and the converted model may differ as much.
    pub dynamic_quantization: bool,
    /// The original with its attention rounded otherwise, where more may come of that than rounding: how much, is measured too.
    pub perturbed: Option<&'c Path>,
    /// Largest difference that is rounding, for logits of up to 1; larger ones allow as much more.
    pub tolerance: f32,
    /// Seed of the token ids.
    pub seed: u64,
}
