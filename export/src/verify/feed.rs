//! What a model is fed in one call.

/// `count` tokens of each sequence, the last at `total` - 1.
pub struct Feed<'f> {
    /// Token ids, `[B][total]` or longer.
    pub ids: &'f [Vec<i64>],
    /// Tokens fed in this call.
    pub count: usize,
    /// Tokens fed so far, with those of this call.
    pub total: usize,
    /// Padding at the beginning of the last sequence.
    pub padding: usize,
    /// The operator's input `retro_length`: tokens of a step that are corrected, -1 in a prompt.
    pub retro_length: i32,
    /// The mask is as wide as the caches, ones first.
    pub wide_mask: bool,
}

impl Feed<'_> {
    /// Tokens that were fed before this call.
    pub fn past(&self) -> usize {
        self.total - self.count
    }

    /// A token's id; 0 beyond the end.
    pub fn id(&self, sequence: usize, position: usize) -> i64 {
        let row = self.ids.get(sequence);
        row.and_then(|r| r.get(position)).copied().unwrap_or(0)
    }
}
