//! Rows of a tensor that a graph's weight is made of.

/// Some rows of a Hugging Face tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub tensor: String,
    pub first: usize,
    pub rows: usize,
    /// Rows of the whole tensor.
    pub of: usize,
}

impl Part {
    /// All rows.
    pub fn whole(tensor: String, rows: usize) -> Self {
        Self {
            tensor,
            first: 0,
            rows,
            of: rows,
        }
    }
}
