//! The masks that the operator can do.

use super::call_shape::CallShape;
use std::ops::Range;

/// A mask that the operator can do: causal, perhaps with a sliding window, perhaps without the padding on the left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SupportedMask {
    /// Tokens that a token sees, itself included; none: all before it.
    pub window: Option<usize>,
    /// Whether padding on the left is masked.
    pub padding: bool,
}

impl SupportedMask {
    /// The tokens that a token of a sequence sees. Tokens are counted from the first of the cache, padding included.
    pub fn keys(self, call: CallShape, b: usize, query: usize) -> Range<usize> {
        let end = query + 1;
        let window = self.window.map_or(0, |w| end.saturating_sub(w));
        let padding = if self.padding { call.first(b) } else { 0 };
        window.max(padding)..end
    }
}
