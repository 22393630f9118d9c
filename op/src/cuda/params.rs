//! The parameters of a call, as the kernels take them: the same struct as `Params` in kernels/common.cuh.

use std::ffi::c_void;

/// Sequences of a batch whose `retro_length` may differ.
pub const MAX_RAGGED: usize = 512;

/// Layouts, meanings and units: kernels/common.cuh.
#[repr(C)]
#[derive(Clone)]
pub struct Params {
    pub query: *const c_void,
    pub key: *const c_void,
    pub value: *const c_void,
    pub seqlens_k: *const c_void,
    pub page_budget: *const c_void,
    pub cos: *const c_void,
    pub sin: *const c_void,
    pub head_sink: *const c_void,
    pub key_cache: *mut c_void,
    pub value_cache: *mut c_void,
    pub summary: *mut c_void,
    pub page_steps: *mut c_void,
    pub cached_outputs: *mut c_void,
    pub cached_lse: *mut c_void,
    pub output: *mut c_void,
    pub scores: *mut c_void,
    pub score_stats: *mut c_void,
    pub pages: *mut c_void,
    pub kept: *mut c_void,
    pub progress: *mut c_void,
    pub part_outputs: *mut c_void,
    pub part_stats: *mut c_void,
    pub budget_ratio: f64,
    pub query_stride: i64,
    pub kv_stride: i64,
    pub batch: i32,
    pub tokens: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub group: i32,
    pub head_size: i32,
    pub capacity: i32,
    pub cache_pages: i32,
    pub ring: i32,
    pub page_shift: i32,
    pub rotary_half: i32,
    pub rotary_rows: i32,
    pub rotary_interleaved: i32,
    pub budget_stride: i32,
    pub budget_min_pages: i32,
    pub sink_pages: i32,
    pub local_window: i32,
    pub phase: i32,
    pub selector: i32,
    pub group_score: i32,
    pub mode: i32,
    pub total: i32,
    pub max_pages: i32,
    pub splits: i32,
    pub rows: i32,
    pub score_parts: i32,
    pub copies_page: i32,
    pub keys: i32,
    pub score_blocks: i32,
    pub last_tokens: i32,
    pub stages: i32,
    pub write_output: i32,
    pub window: i32,
    pub scale: f32,
    pub softcap: f32,
    pub lambda: f32,
    pub correlation: f32,
    pub ragged: i32,
    pub retro: [u8; MAX_RAGGED],
}

// kernels/retro.cu asserts the same size.
const _: () = assert!(size_of::<Params>() == 864);
