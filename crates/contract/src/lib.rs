//! The interface of the ONNX operator `ai.retro::RetroAttention`, version 1: names, indices, defaults and the few
//! formulas that the plugin (`op/`), the converter (`export/`) and the runner (`runner/`) must agree on.
//!
//! docs/operator.md describes the operator; this crate is its one place in code. It depends on nothing.

#![warn(missing_docs)]

mod budget;
mod choice;
pub mod graph;
pub mod matmul_nbits;
pub mod metadata;
mod state;

pub use budget::{Budget, budget_pages, pages_for};
pub use choice::{GroupScore, Mode, ParseChoiceError, Selector};
pub use state::{CUDA_MAX_RAGGED, CacheSize, SKETCH_BLOCK, StateElement, StateLayout};

/// ONNX domain of the operator.
pub const DOMAIN: &str = "ai.retro";
/// ONNX operator type.
pub const OP_TYPE: &str = "RetroAttention";
/// Version of the domain's operator set, as in a model's `opset_import`.
pub const OPSET_VERSION: i64 = 1;

/// Input slots. `T` is float32, float16 or bfloat16; B batch, S tokens fed, C cache capacity, P pages, D head size.
pub mod input {
    /// T `[B, S, Hq*D]`, or packed `[B, S, (Hq+2*Hkv)*D]` when key and value are absent.
    pub const QUERY: usize = 0;
    /// T `[B, S, Hkv*D]`, optional.
    pub const KEY: usize = 1;
    /// T `[B, S, Hkv*D]`, optional.
    pub const VALUE: usize = 2;
    /// T `[B, Hkv, C, D]`: keys after RoPE.
    pub const PAST_KEY: usize = 3;
    /// T `[B, Hkv, C, D]`.
    pub const PAST_VALUE: usize = 4;
    /// int32 `[B]`: valid tokens after this call, minus 1.
    pub const SEQLENS_K: usize = 5;
    /// int32 scalar or `[1]`, on the CPU: the largest valid length after this call, or an upper bound.
    pub const TOTAL_SEQUENCE_LENGTH: usize = 6;
    /// T `[M, rotary_dim/2]`, optional.
    pub const COS_CACHE: usize = 7;
    /// T `[M, rotary_dim/2]`, optional.
    pub const SIN_CACHE: usize = 8;
    /// int32 scalar, `[1]` or `[B]`, on the CPU: retrospective tokens among the S fed; -1 is prefill.
    pub const RETRO_LENGTH: usize = 9;
    /// The selector's state, as [`Selector::layout`](crate::Selector::layout) has it: T `[B, Hkv, P, 2, D]` for two
    /// vectors a page, uint8 `[B, Hkv, ceil(C/128), Z]` for sketches.
    pub const PAST_PAGE_SUMMARY: usize = 10;
    /// int32 `[B, Hkv, P]`.
    pub const PAST_PAGE_STEPS: usize = 11;
    /// float32 `[B, R, Hq, D]`, R = max(window-1, 1).
    pub const PAST_OUTPUTS: usize = 12;
    /// float32 `[B, R, Hq]`.
    pub const PAST_LSE: usize = 13;
    /// int32 `[B]` (or `[1]` for the whole batch), optional: pages per KV head for this step; 0: from the attributes.
    pub const PAGE_BUDGET: usize = 14;
    /// T `[Hq]`, optional: a softmax logit without a value.
    pub const HEAD_SINK: usize = 15;
    /// int32 `[B]` (or `[1]` for the whole batch), optional, with the attribute `step_rows`: retrospective tokens of each
    /// sequence in a step, read where the operator runs, in place of retro_length's number.
    pub const RETRO_COUNT: usize = 16;
    /// Slots, the optional ones among them.
    pub const COUNT: usize = 17;
    /// Names for messages, in slot order.
    pub const NAMES: [&str; COUNT] = [
        "query",
        "key",
        "value",
        "past_key",
        "past_value",
        "seqlens_k",
        "total_sequence_length",
        "cos_cache",
        "sin_cache",
        "retro_length",
        "past_page_summary",
        "past_page_steps",
        "past_outputs",
        "past_lse",
        "page_budget",
        "head_sink",
        "retro_count",
    ];
}

/// Output slots; shapes and types are those of the matching inputs.
pub mod output {
    /// T `[B, S, Hq*D]`.
    pub const OUTPUT: usize = 0;
    /// T `[B, Hkv, C, D]`.
    pub const PRESENT_KEY: usize = 1;
    /// T `[B, Hkv, C, D]`.
    pub const PRESENT_VALUE: usize = 2;
    /// The selector's state, as [`Selector::layout`](crate::Selector::layout) has it.
    pub const PRESENT_PAGE_SUMMARY: usize = 3;
    /// int32 `[B, Hkv, P]`.
    pub const PRESENT_PAGE_STEPS: usize = 4;
    /// float32 `[B, R, Hq, D]`.
    pub const PRESENT_OUTPUTS: usize = 5;
    /// float32 `[B, R, Hq]`.
    pub const PRESENT_LSE: usize = 6;
    /// Slots, all of them required.
    pub const COUNT: usize = 7;
    /// Names for messages, in slot order.
    pub const NAMES: [&str; COUNT] = [
        "output",
        "present_key",
        "present_value",
        "present_page_summary",
        "present_page_steps",
        "present_outputs",
        "present_lse",
    ];
}

/// The state that a call updates in place, as pairs of input and output slots: keys and values, then the operator's own
/// four.
pub const STATE: [(usize, usize); 6] = [
    (input::PAST_KEY, output::PRESENT_KEY),
    (input::PAST_VALUE, output::PRESENT_VALUE),
    (input::PAST_PAGE_SUMMARY, output::PRESENT_PAGE_SUMMARY),
    (input::PAST_PAGE_STEPS, output::PRESENT_PAGE_STEPS),
    (input::PAST_OUTPUTS, output::PRESENT_OUTPUTS),
    (input::PAST_LSE, output::PRESENT_LSE),
];

/// Attribute names.
pub mod attribute {
    /// int: query heads Hq, a multiple of the KV heads.
    pub const NUM_HEADS: &str = "num_heads";
    /// int: KV heads Hkv.
    pub const KV_NUM_HEADS: &str = "kv_num_heads";
    /// float: softmax scale; 0 stands for 1 / sqrt(D).
    pub const SCALE: &str = "scale";
    /// float: bound of the logits, softcap * tanh(logit / softcap); 0: none.
    pub const SOFTCAP: &str = "softcap";
    /// int: 1 if the operator rotates queries and keys (RoPE).
    pub const DO_ROTARY: &str = "do_rotary";
    /// int: 1 if rotated pairs are neighbours, 0 if they are halves of a head.
    pub const ROTARY_INTERLEAVED: &str = "rotary_interleaved";
    /// int: tokens that a query sees, itself included; -1: all.
    pub const LOCAL_WINDOW_SIZE: &str = "local_window_size";
    /// int: tokens a page, a power of two.
    pub const PAGE_SIZE: &str = "page_size";
    /// int: the window w, tokens that a step feeds at most.
    pub const WINDOW: &str = "window";
    /// float: share of the valid tokens that a step reads, 0 to 1.
    pub const BUDGET_RATIO: &str = "budget_ratio";
    /// int: pages that a step reads at least.
    pub const BUDGET_MIN_PAGES: &str = "budget_min_pages";
    /// int: first pages, which every step reads.
    pub const SINK_PAGES: &str = "sink_pages";
    /// string: [`Selector`](crate::Selector).
    pub const SELECTOR: &str = "selector";
    /// string: [`GroupScore`](crate::GroupScore).
    pub const GROUP_SCORE: &str = "group_score";
    /// float: weight of the standard deviation in a page's score.
    pub const SELECTOR_LAMBDA: &str = "selector_lambda";
    /// float: share of the spread along the query that signed deviations add up to, 0 to 1.
    pub const SELECTOR_CORRELATION: &str = "selector_correlation";
    /// int: bits of an element of a sketch, 1 or 2.
    pub const SKETCH_BITS: &str = "sketch_bits";
    /// string: [`Mode`](crate::Mode).
    pub const MODE: &str = "mode";
    /// int: above 0, a step may feed up to so many rows, of which a sequence's last ones count.
    pub const STEP_ROWS: &str = "step_rows";
    /// All of them.
    pub const ALL: [&str; 19] = [
        NUM_HEADS,
        KV_NUM_HEADS,
        SCALE,
        SOFTCAP,
        DO_ROTARY,
        ROTARY_INTERLEAVED,
        LOCAL_WINDOW_SIZE,
        PAGE_SIZE,
        WINDOW,
        BUDGET_RATIO,
        BUDGET_MIN_PAGES,
        SINK_PAGES,
        SELECTOR,
        GROUP_SCORE,
        SELECTOR_LAMBDA,
        SELECTOR_CORRELATION,
        SKETCH_BITS,
        MODE,
        STEP_ROWS,
    ];
}

/// Attribute defaults (the paper's) and bounds.
pub mod limits {
    /// Tokens a page.
    pub const PAGE_SIZE: usize = 16;
    /// The smallest page of the selectors with two vectors a page, in tokens:
    /// [`Selector::page_sizes`](crate::Selector::page_sizes) has every selector's.
    pub const PAGE_SIZE_MIN: usize = 4;
    /// The largest page, in tokens.
    pub const PAGE_SIZE_MAX: usize = 128;
    /// The window w.
    pub const WINDOW: usize = 2;
    /// The largest window, in tokens.
    pub const WINDOW_MAX: usize = 64;
    /// In `seqlens_k`: the graph found an attention mask that isn't padding followed by valid tokens.
    pub const MASK_NOT_UNDERSTOOD: i32 = i32::MIN;
    /// Share of the valid tokens that a step reads.
    pub const BUDGET_RATIO: f32 = 0.15;
    /// Pages that a step reads at least.
    pub const BUDGET_MIN_PAGES: usize = 4;
    /// First pages that every step reads.
    pub const SINK_PAGES: usize = 1;
    /// Weight of the standard deviation.
    pub const SELECTOR_LAMBDA: f32 = 2.5;
    /// Share of the spread along the query that signed deviations add up to.
    pub const SELECTOR_CORRELATION: f32 = 0.2;
    /// Bits of an element of a sketch.
    pub const SKETCH_BITS: usize = 2;
    /// The most bits of an element of a sketch.
    pub const SKETCH_BITS_MAX: usize = 2;
}

/// Slots of the output cache for a window: the last w-1 positions, and at least one so that the tensor is never empty.
pub const fn ring_slots(window: usize) -> usize {
    if window > 1 { window - 1 } else { 1 }
}
