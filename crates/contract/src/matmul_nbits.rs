//! The interface of the operator `ai.retro::MatMulNBits`, version 1: that of `com.microsoft::MatMulNBits`, a product of
//! activations and of weights packed in 4 or 8 bits, for the forms that a decoding step meets.

/// ONNX domain of the operator that it stands in for.
pub const SOURCE_DOMAIN: &str = "com.microsoft";
/// ONNX operator type, in both domains.
pub const OP_TYPE: &str = "MatMulNBits";

/// Whether a node's domain and type are those of a product of packed weights, ONNX Runtime's or ours: both have the
/// same inputs, attributes and storage.
pub fn is(domain: &str, op_type: &str) -> bool {
    op_type == OP_TYPE && (domain == SOURCE_DOMAIN || domain == crate::DOMAIN)
}

/// Input slots. `T` is float32, float16 or bfloat16; G blocks a row, ceil(K / block_size).
pub mod input {
    /// T `[.., K]`.
    pub const A: usize = 0;
    /// uint8 `[N, G, block_size * bits / 8]`; with 4 bits the low nibble comes first.
    pub const B: usize = 1;
    /// T `[N, G]` or `[N * G]`.
    pub const SCALES: usize = 2;
    /// uint8 `[N, ceil(G * bits / 8)]`, packed as the weights, or T `[N, G]`; either may be flat. Optional: without it
    /// the zero point is 2^(bits - 1).
    pub const ZERO_POINTS: usize = 3;
    /// int32 `[K]` or `[G * block_size]`: the block that each column's scale is of. Optional.
    pub const G_IDX: usize = 4;
    /// T `[N]`, optional.
    pub const BIAS: usize = 5;
    /// Slots, the optional ones among them.
    pub const COUNT: usize = 6;
    /// Names for messages, in slot order.
    pub const NAMES: [&str; COUNT] = ["A", "B", "scales", "zero_points", "g_idx", "bias"];
}

/// Output slots.
pub mod output {
    /// T `[.., N]`.
    pub const Y: usize = 0;
    /// Slots.
    pub const COUNT: usize = 1;
}

/// Attribute names.
pub mod attribute {
    /// int: columns of A.
    pub const K: &str = "K";
    /// int: columns of the output.
    pub const N: &str = "N";
    /// int: bits of a weight, one of [`limits::BITS`](super::limits::BITS).
    pub const BITS: &str = "bits";
    /// int: weights a scale, one of [`limits::BLOCK_SIZES`](super::limits::BLOCK_SIZES).
    pub const BLOCK_SIZE: &str = "block_size";
    /// int: what products may be rounded to, 0 to 4; a hint.
    pub const ACCURACY_LEVEL: &str = "accuracy_level";
    /// int: 0, the weights as [`super::input::B`] has them. Others are another storage, which this operator lacks.
    pub const WEIGHT_PREPACKED: &str = "weight_prepacked";
    /// All of them.
    pub const ALL: [&str; 6] = [K, N, BITS, BLOCK_SIZE, ACCURACY_LEVEL, WEIGHT_PREPACKED];
}

/// Attribute defaults and bounds.
pub mod limits {
    /// Bits of a weight.
    pub const BITS: [usize; 2] = [4, 8];
    /// Bits of a weight where the node says none.
    pub const BITS_DEFAULT: usize = 4;
    /// Weights a scale.
    pub const BLOCK_SIZES: [usize; 4] = [16, 32, 64, 128];
    /// The largest `accuracy_level`.
    pub const ACCURACY_LEVEL_MAX: usize = 4;
    /// Rows of A up to which CUDA has a kernel that reads the packed weights.
    pub const CUDA_MAX_ROWS: usize = 32;

    /// What K must be a multiple of on CUDA: 16 bytes of packed weights.
    pub const fn cuda_k_multiple(bits: usize) -> usize {
        128 / bits
    }
}
