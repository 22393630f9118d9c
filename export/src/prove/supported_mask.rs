//! The masks that the operator can do.

use super::call_shape::CallShape;

/// A mask that the operator can do: causal, perhaps with a sliding window, perhaps without the padding on the left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SupportedMask {
    /// Tokens that a token sees, itself included; none: all before it.
    pub window: Option<usize>,
    /// Whether padding on the left is masked.
    pub padding: bool,
}

impl SupportedMask {
    /// Whether a token of a sequence sees another. Tokens are counted from the first of the cache, padding included.
    pub fn allows(self, call: CallShape, b: usize, query: usize, key: usize) -> bool {
        key <= query && self.window.is_none_or(|w| query - key < w) && (!self.padding || key >= call.first(b))
    }
}
