//! What the host and the kernels must agree on, defined once: the parameters of a call, constants, the shapes and
//! launch bounds of kernels, sizes in shared memory.
//!
//! The build script compiles this file too and writes `params.cuh` from it (build/params.rs), which every kernel
//! includes: with nvcc from the build's output folder, with NVRTC from the text in the plugin. The header asserts each
//! field's offset, size and alignment, so that a compiler that lays the struct out in another way compiles nothing.

use std::ffi::c_void;

use retro_contract::Selector;

/// Whether there are kernels for a selector.
pub fn has_kernels(selector: Selector) -> bool {
    !matches!(selector, Selector::Adamas | Selector::AdamasRms)
}

/// A type that both sides have.
pub trait CudaType: Sized {
    const ZERO: Self;
    /// The declaration of a field or variable of this type.
    fn declare(name: &str) -> String;
}

macro_rules! cuda_types {
    ($($rust:ty = $cuda:literal, $zero:expr;)+) => {$(
        impl CudaType for $rust {
            const ZERO: Self = $zero;
            fn declare(name: &str) -> String {
                format!("{} {name}", $cuda)
            }
        }
    )+};
}

cuda_types! {
    i32 = "int", 0;
    u32 = "u32", 0;
    i64 = "long long", 0;
    f32 = "float", 0.0;
    f64 = "double", 0.0;
    *const c_void = "const void*", std::ptr::null();
    *mut c_void = "void*", std::ptr::null_mut();
    *const i32 = "const int*", std::ptr::null();
    *mut i32 = "int*", std::ptr::null_mut();
    *mut u32 = "u32*", std::ptr::null_mut();
    *mut f32 = "float*", std::ptr::null_mut();
    *mut [f32; 4] = "float4*", std::ptr::null_mut();
}

impl<const N: usize> CudaType for [u8; N] {
    const ZERO: Self = [0; N];
    fn declare(name: &str) -> String {
        format!("u8 {name}[{N}]")
    }
}

/// A field of a struct of parameters as the header declares and checks it.
pub struct Field {
    pub declaration: String,
    pub name: &'static str,
    pub about: &'static [&'static str],
    /// In bytes.
    pub offset: usize,
    /// In bytes.
    pub size: usize,
    /// In bytes.
    pub align: usize,
}

/// A constant's name, value and meaning.
pub type Constant = (&'static str, usize, &'static [&'static str]);
/// A formula's name, arguments, expression and meaning.
pub type Formula = (
    &'static str,
    &'static [&'static str],
    &'static str,
    &'static [&'static str],
);

/// A struct of both sides. A field without a text of its own goes with the one above it.
macro_rules! shared_struct {
    ($(#[doc = $about:literal])+ pub struct $name:ident {
        $($(#[doc = $doc:literal])* pub $field:ident: $type:ty,)+
    }) => {
        $(#[doc = $about])+
        #[repr(C)]
        #[derive(Clone)]
        pub struct $name { $($(#[doc = $doc])* pub $field: $type,)+ }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: <$type as CudaType>::ZERO,)+ }
            }
        }

        impl $name {
            /// In order.
            pub fn fields() -> Vec<Field> {
                vec![$(Field {
                    declaration: <$type as CudaType>::declare(stringify!($field)),
                    name: stringify!($field),
                    about: &[$($doc),*],
                    offset: std::mem::offset_of!($name, $field),
                    size: size_of::<$type>(),
                    align: align_of::<$type>(),
                },)+]
            }
        }
    };
}

/// An enumeration of both sides, whose values are parameters of type i32.
macro_rules! shared_enum {
    ($(#[doc = $about:literal])+ pub enum $name:ident {
        $($(#[doc = $doc:literal])* $variant:ident = $cuda:ident,)+
    }) => {
        $(#[doc = $about])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(i32)]
        pub enum $name { $($(#[doc = $doc])* $variant,)+ }

        impl $name {
            /// The names of its values in the kernels, and the values.
            pub const VALUES: &'static [(&'static str, i32)] = &[$((stringify!($cuda), $name::$variant as i32),)+];
        }

        impl CudaType for $name {
            const ZERO: Self = [$($name::$variant),+][0];
            fn declare(name: &str) -> String {
                format!(concat!(stringify!($name), " {}"), name)
            }
        }
    };
}

/// Constants of both sides.
macro_rules! shared_constants {
    ($($(#[doc = $doc:literal])+ $name:ident = $value:expr;)+) => {
        $($(#[doc = $doc])+ pub const $name: usize = $value;)+
        /// Names, values and meanings.
        pub const CONSTANTS: &[(&str, usize, &[&str])] = &[$((stringify!($name), $name, &[$($doc),+]),)+];
    };
}

/// Sizes of both sides, in arithmetic that means the same in Rust and CUDA.
macro_rules! shared_formulas {
    ($($(#[doc = $doc:literal])+ $name:ident($($arg:ident),+) = $value:expr;)+) => {
        $(
            $(#[doc = $doc])+
            #[allow(clippy::manual_div_ceil, reason = "CUDA has no div_ceil")]
            pub const fn $name($($arg: usize),+) -> usize { $value }
        )+
        /// Names, arguments, expressions and meanings.
        pub const FORMULAS: &[(&str, &[&str], &str, &[&str])] =
            &[$((stringify!($name), &[$(stringify!($arg)),+], stringify!($value), &[$($doc),+]),)+];
    };
}

pub(super) use {shared_constants, shared_enum, shared_formulas, shared_struct};

shared_constants! {
    /// Sequences of a batch whose `retro_length` may differ.
    MAX_RAGGED = 512;
    /// Largest head size, D.
    MAX_HEAD_SIZE = 256;
    /// Rows of a block of sketches.
    SKETCH_BLOCK = 128;
    /// Largest page size, in tokens.
    MAX_PAGE_SIZE = 128;
    /// Query heads a KV head at most: the rows of a tensor core's tile.
    MAX_GROUP = 16;
    /// Threads of a block that scores pages.
    SCORE_THREADS = 256;
    /// Its warps.
    SCORE_WARPS = SCORE_THREADS / 32;
    /// Pages that a warp scores at once on tensor cores.
    SCORE_PAGES = 8;
    /// Threads of a block that selects pages of a KV head.
    SELECT_THREADS = 512;
    /// Blocks that may select the pages of a KV head together, a power of two.
    MAX_CLUSTER = 8;
    /// Threads of a block that merges.
    MERGE_THREADS = 256;
    /// Its warps: each ends a row of a prefill.
    MERGE_WARPS = MERGE_THREADS / 32;
    /// Splits of a row that are merged at most.
    MAX_SPLITS = 256;
    /// Threads of a block that summarises a prompt's pages.
    PAGES_THREADS = 128;
    /// Its warps, with a page each.
    PAGES_WARPS = PAGES_THREADS / 32;
    /// Threads of a block that sketches a block of a prompt's rows.
    SKETCH_THREADS = 256;
    /// Its warps.
    SKETCH_WARPS = SKETCH_THREADS / 32;
    /// Threads of a block that appends a token's keys and values.
    APPEND_THREADS = 128;
    /// Threads of a block that clears values.
    CLEAR_THREADS = 128;
    /// Tokens of a tile of attention.
    ATTEND_TILE = 16;
    /// Stages of the attention's pipeline at most.
    MAX_STAGES = 4;
    /// Warps of a block of float32 attention.
    F32_WARPS = 4;
    /// Its query rows.
    F32_ROWS = 8;
    /// Bytes of shared memory that a block takes beside what it asks for.
    BLOCK_RESERVED = 1024;
    /// Bytes of shared memory that are left to a scoring block's variables.
    SCORE_VARIABLES = 8 * 1024;
    /// Bytes of shared memory that are left to the selecting block's variables and to others beside it.
    SELECT_VARIABLES = 24 * 1024;
}

const _: () = assert!(MAX_RAGGED == retro_contract::CUDA_MAX_RAGGED && SKETCH_BLOCK == retro_contract::SKETCH_BLOCK);

shared_formulas! {
    /// Pages that the fed rows of a step may lie in.
    touched_page_count(tokens, page_shift) = ((tokens + (1 << page_shift) - 2) >> page_shift) + 1;
    /// Pages of a KV head that there is memory for the scores of.
    scored_page_count(max_pages) = (max_pages + 7) / 8 * 8;
    /// Heads that a page's scores are stored for where every head's is: read by four.
    stored_heads(group) = (group + 3) / 4 * 4;
    /// Floats of memory of a selecting block: a score and a bin of 16 bits for each of so many pages, a multiple of 8.
    kept_floats(keys) = keys + keys / 2;
    /// Floats in shared memory of the block that summarises and scores a touched page, before the page's keys: the
    /// prepared queries, and the page's two vectors.
    touched_floats(group, padded, head_size) = 2 * group * padded + 2 * head_size;
    /// Elements between two queries in a scoring block's shared memory.
    query_pitch(padded) = padded + 32;
    /// Bytes of shared memory of a scoring block's queries, of which there are up to three forms.
    queries_bytes(padded) = 3 * MAX_GROUP * query_pitch(padded) * 2;
    /// Bytes of shared memory of a block that scores sketches, for so many heads, a multiple of four (sketch_score.cuh):
    /// statistics, queries, their two bytes an element, what they stand for, codes of rows that are appended, and a
    /// block's codes of so many bits for each warp.
    sketch_bytes(heads, padded, bits) =
        heads * (4 * SCORE_THREADS + 4 * padded + 2 * (padded + 16) + 8)
            + SKETCH_BLOCK / 2 * (padded / 4)
            + SCORE_WARPS * SKETCH_BLOCK * padded * bits / 8;
    /// The same of a block that sketches a prompt's rows: sums, codes.
    sketch_pages_bytes(padded) = SKETCH_WARPS * padded * 4 + SKETCH_BLOCK * (padded / 4);
    /// Bytes of shared memory where the warps of an attention block are joined: statistics and outputs.
    joint_bytes(parts, rows, padded) = parts * rows * 2 * 4 + parts * rows * (padded + 4) * 4;
    /// Bytes of shared memory of a block of float32 attention: queries, weights, the join.
    f32_attend_bytes(rows, padded, warps, tile) =
        rows * padded * 4 + warps * tile * rows * 4 + joint_bytes(warps, rows, padded);
}

/// Head sizes that kernels are unrolled for.
pub const HEAD_SIZES: [usize; 3] = [64, 128, 256];

/// A scoring kernel's head size, and how many of its blocks a multiprocessor's registers hold (launch bounds).
#[derive(Clone, Copy)]
pub struct ScoreShape {
    pub padded: usize,
    pub blocks_per_sm: usize,
}

const fn score_shape(padded: usize, blocks_per_sm: usize) -> ScoreShape {
    ScoreShape { padded, blocks_per_sm }
}

/// float16 and bfloat16.
pub const SCORE_HALF: [ScoreShape; 3] = [score_shape(64, 3), score_shape(128, 2), score_shape(256, 1)];
/// Sketches, of every element type.
pub const SCORE_SKETCH: [ScoreShape; 3] = [score_shape(64, 2), score_shape(128, 2), score_shape(256, 1)];
/// float32.
pub const SCORE_F32: [ScoreShape; 3] = [score_shape(64, 2), score_shape(128, 2), score_shape(256, 1)];

/// An attention kernel: query rows (token and head) of its blocks, and how many of them a multiprocessor's
/// registers hold.
#[derive(Clone, Copy)]
pub struct AttendShape {
    pub padded: usize,
    pub rows: usize,
    pub blocks_per_sm: usize,
    /// Threads that the launch bounds count more than there are: registers that stay free for a block of
    /// another kernel.
    pub spare_threads: usize,
}

const fn attend_shape(padded: usize, rows: usize, blocks_per_sm: usize, spare_threads: usize) -> AttendShape {
    AttendShape {
        padded,
        rows,
        blocks_per_sm,
        spare_threads,
    }
}

/// float16 and bfloat16, for each head size in ascending order of rows. Head size 128: beside two blocks there are
/// registers for one that selects pages, so that none starts late.
pub const ATTEND_HALF: [AttendShape; 7] = [
    attend_shape(64, 8, 4, 0),
    attend_shape(64, 16, 3, 0),
    attend_shape(64, 32, 3, 0),
    attend_shape(128, 16, 2, 64),
    attend_shape(128, 32, 2, 64),
    attend_shape(256, 16, 2, 0),
    attend_shape(256, 32, 1, 0),
];
/// float32.
pub const ATTEND_F32: [AttendShape; 3] = [
    attend_shape(64, F32_ROWS, 3, 0),
    attend_shape(128, F32_ROWS, 3, 0),
    attend_shape(256, F32_ROWS, 2, 0),
];

/// On tensor cores: warps take 8 rows each, several times over; those that share rows share a stage's tiles.
impl AttendShape {
    /// Warps that take different rows.
    pub const fn row_groups(&self) -> usize {
        self.rows / 8
    }

    /// Warps that take the same rows and different tokens.
    pub const fn token_groups(&self) -> usize {
        let few = if self.row_groups() == 4 { 2 } else { 4 };
        if self.padded > 128 { few / 2 } else { few }
    }

    pub const fn threads(&self) -> usize {
        32 * self.row_groups() * self.token_groups()
    }

    /// Tokens of a stage: what one step of the pipeline brings into shared memory.
    pub const fn stage_tokens(&self) -> usize {
        if self.padded > 128 { 32 } else { 64 }
    }

    /// Bytes of a stage's keys and values.
    pub const fn stage_bytes(&self) -> usize {
        2 * self.stage_tokens() * self.padded * 2
    }

    /// Bytes of shared memory behind the stages: where the tokens stand, and the queries.
    pub const fn beside_bytes(&self) -> usize {
        (MAX_STAGES + 1) * self.stage_tokens() * 8 + self.rows * (self.padded + 8) * 2
    }
}

/// A kernel that summarises a prompt's pages, for head sizes up to 128 `parts`, and its blocks on a multiprocessor.
pub const PAGES_SHAPES: [(usize, usize); 2] = [(1, 5), (2, 4)];

/// Blocks of the selecting and the merging kernels on a multiprocessor.
pub const SELECT_BLOCKS: usize = 2;
pub const MERGE_BLOCKS: usize = 4;

shared_enum! {
    /// What a call is.
    pub enum CallPhase {
        Decode = DECODE,
        Prefill = PREFILL,
    }
}
shared_enum! {
    /// How the scores of a group's heads become the page's (`retro_contract::GroupScore`).
    pub enum GroupScoring {
        Max = MAX,
        Softmax = SOFTMAX,
    }
}
shared_enum! {
    /// Which pages a step reads (`retro_contract::Mode`).
    pub enum ReadMode {
        Retro = RETRO,
        Dense = DENSE,
        Streaming = STREAMING,
        Periodic = PERIODIC,
    }
}

shared_struct! {
    /// One call. B batch, S tokens fed, Hq and Hkv heads, g = Hq / Hkv, C capacity, P pages, D head size, R slots of
    /// the output cache.
    pub struct Params {
        /// Inputs. Rows are (b, s): query `[B, S, Hq, D]`, key and value `[B, S, Hkv, D]`, each with a row
        /// stride in elements.
        pub query: *const c_void,
        pub key: *const c_void,
        pub value: *const c_void,
        /// `[B]`
        pub seqlens_k: *const i32,
        /// `[B]` or `[1]`, or null
        pub page_budget: *const i32,
        /// `[B]` or `[1]`: retrospective tokens of a step; null: those of `retro`
        pub retro_count: *const i32,
        /// `[M, rotary_half]`, or null
        pub cos: *const c_void,
        pub sin: *const c_void,
        /// `[Hq]`, or null
        pub head_sink: *const c_void,
        /// State: `[B, Hkv, C, D]`
        pub key_cache: *mut c_void,
        pub value_cache: *mut c_void,
        /// `[B, Hkv, ...]` as the selector lays it out
        pub page_state: *mut c_void,
        /// `[B, Hkv, P]`
        pub page_steps: *mut i32,
        /// `[B, R, Hq, D]`
        pub cached_outputs: *mut f32,
        /// `[B, R, Hq]`
        pub cached_lse: *mut f32,
        /// `[B, S, Hq, D]`
        pub output: *mut c_void,
        /// Scratch of this call: `[B, Hkv, scored_page_count, stored_heads]`, or without the last with
        /// the group score max
        pub scores: *mut f32,
        /// `[B, Hkv, score_parts, g or 1]`: of each scoring block (score_kernel.cuh)
        pub score_stats: *mut [f32; 4],
        /// `[B, Hkv, max_pages]`: 1 and the number of each page that a step has chosen; 0 before and after
        pub pages: *mut i32,
        /// `[B, Hkv, selecting blocks, kept_floats]`: of the selection kernel; null: it has shared memory for them
        pub kept: *mut f32,
        /// `[B, Hkv]`: blocks that have scored; 0 before and after a step
        pub progress: *mut u32,
        /// `[B, Hkv, splits, rows, D]`, not divided by the sums
        pub part_outputs: *mut f32,
        /// `[B, Hkv, splits, rows, 2]`: largest logit (base 2) and sum
        pub part_stats: *mut f32,
        /// Share of the valid tokens that a step reads
        pub budget_ratio: f64,
        /// Elements between two rows of queries, and of keys and values
        pub query_stride: i64,
        pub kv_stride: i64,
        /// B, S, Hq, Hkv, g, D, C, P, R
        pub batch: i32,
        pub tokens: i32,
        pub heads: i32,
        pub kv_heads: i32,
        pub group: i32,
        pub head_size: i32,
        pub capacity: i32,
        pub cache_pages: i32,
        /// Blocks of sketches that the state has room for
        pub state_blocks: i32,
        pub ring: i32,
        /// log2 of the page size
        pub page_shift: i32,
        /// Rotated pairs of a head, rows of cos and sin, whether pairs are neighbours
        pub rotary_half: i32,
        pub rotary_rows: i32,
        pub rotary_interleaved: i32,
        /// 1: page_budget, retro_count have one number a sequence
        pub budget_stride: i32,
        pub count_stride: i32,
        pub budget_min_pages: i32,
        pub sink_pages: i32,
        /// Tokens that a query sees; 0: all
        pub local_window: i32,
        pub phase: CallPhase,
        pub group_score: GroupScoring,
        pub mode: ReadMode,
        /// Largest valid length that the launch is sized for, and its pages
        pub total: i32,
        pub max_pages: i32,
        /// Of part_outputs; without it, outputs are written directly
        pub splits: i32,
        pub rows: i32,
        /// Of score_stats; 0: there are none
        pub score_parts: i32,
        /// There is shared memory for the rows of a page that is summarised
        pub copies_page: i32,
        /// That a block of the selection kernel keeps, a multiple of 8
        pub keys: i32,
        /// Blocks of the score kernel that score; those that append, each what the step touches of a page, or of a
        /// block of sketches
        pub score_blocks: i32,
        pub touched: i32,
        /// Pages (blocks of sketches) that each of the scoring blocks' warps scores, and warps that score one more
        pub warp_pages: i32,
        pub more_pages: i32,
        /// Rows of queries, keys, values, cos and sin can be read 16 bytes at a time, and halves of a head are rotated
        pub vec8: i32,
        /// Attention covers the last so many fed rows; 0: all
        pub last_tokens: i32,
        /// Of the attention's pipeline, 2 to 4
        pub stages: i32,
        /// 0: the output is there already, only the output cache is filled
        pub write_output: i32,
        /// Bits of an element of a sketch
        pub sketch_bits: i32,
        /// w
        pub window: i32,
        /// Of the logits; of the softcap, 0: none
        pub scale: f32,
        pub softcap: f32,
        /// Attributes selector_lambda and selector_correlation
        pub lambda: f32,
        pub correlation: f32,
        /// 2^32 / g, rounded up
        pub group_inverse: u32,
        /// Retro lengths are one a sequence
        pub ragged: i32,
        pub retro: [u8; MAX_RAGGED],
    }
}
