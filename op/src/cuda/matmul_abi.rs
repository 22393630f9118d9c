//! What the host and the kernels of `ai.retro::MatMulNBits` must agree on, as [`super::abi`] has it for attention.

use std::ffi::c_void;

use super::abi::{CudaType, Field, shared_constants, shared_enum, shared_formulas, shared_struct};

shared_constants! {
    /// Columns of the product that a thread block has.
    MATMUL_COLUMNS = 32;
    /// Rows of the product that a thread block has at most.
    MATMUL_ROWS = 16;
    /// Threads of a block at most.
    MATMUL_THREADS = 512;
    /// Threads of a block that dequantises a row of weights, or adds the bias to one of Y.
    MATMUL_ROW_THREADS = 128;
    /// Pieces of 16 bytes that a chunk has of a row of B.
    MATMUL_PIECES = 8;
}

shared_formulas! {
    /// Elements of a piece.
    matmul_piece_depth(bits) = 128 / bits;
    /// Elements of a chunk's rows.
    matmul_chunk_depth(bits) = MATMUL_PIECES * matmul_piece_depth(bits);
    /// Bytes between rows of A's chunks: neighbours lie in different banks.
    matmul_a_stride(bits) = 2 * matmul_chunk_depth(bits) + 256 / bits;
    /// Bytes of a chunk of B in shared memory, with so many copies of 16 bytes a row of scales and zero points.
    matmul_slot_bytes(copies) = MATMUL_COLUMNS * 16 * (MATMUL_PIECES + copies);
    /// Bytes of a warp's sums in shared memory.
    matmul_sums_bytes(rows) = rows * (MATMUL_COLUMNS + 1) * 4;
}

shared_enum! {
    /// How zero points are stored.
    pub enum ZeroPoints {
        /// There are none.
        None = NO_ZERO_POINTS,
        /// As the weights are.
        Packed = PACKED_ZERO_POINTS,
        /// As the scales are.
        Float = FLOAT_ZERO_POINTS,
    }
}

shared_struct! {
    /// One product.
    pub struct MatmulParams {
        /// A `[rows, K]`
        pub a: *const c_void,
        /// B `[N, blocks, bytes of a block]`, scales `[N, blocks]`
        pub b: *const c_void,
        pub scales: *const c_void,
        /// `[N, zero_stride bytes]`, or null
        pub zeros: *const c_void,
        /// `[K]`, the block of each of A's columns; null: in order
        pub block_of: *const i32,
        /// `[N]`, or null
        pub bias: *const c_void,
        /// Y `[rows, N]`
        pub y: *mut c_void,
        /// Dequantised weights `[N, K]`
        pub dequantised: *mut c_void,
        /// Bytes of scales and of zero points
        pub scale_bytes: u32,
        pub zero_bytes: u32,
        /// M, K, N
        pub rows: i32,
        pub k: i32,
        pub n: i32,
        pub bits: i32,
        pub block_size: i32,
        /// Blocks of a row of B, its bytes, and those of its zero points
        pub blocks: i32,
        pub b_stride: i32,
        pub zero_stride: i32,
        pub zero_points: ZeroPoints,
        /// log2 of a block's pieces
        pub block_shift: i32,
        /// Copies of 16 bytes that a chunk needs of a row's scales and zero points
        pub scale_copies: i32,
        pub zero_copies: i32,
        /// Chunks of K
        pub chunks: i32,
        /// Blocks are pieces, chunks are whole, and a chunk's scales begin at multiples of 16 bytes
        pub regular: i32,
        /// B, scales and zero points do not depend on what runs before
        pub b_is_constant: i32,
        /// Bytes of shared memory of a warp, of a chunk of B and of one of A, and whether there is room for one or two of
        /// A
        pub warp_bytes: i32,
        pub slot_bytes: i32,
        pub a_bytes: i32,
        pub a_slots: i32,
    }
}

// SAFETY: numbers, and addresses on a device that the host never reads through.
unsafe impl Send for MatmulParams {}
// SAFETY: as above.
unsafe impl Sync for MatmulParams {}
