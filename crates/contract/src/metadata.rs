//! Keys of a converted model's `metadata_props`.

/// Version of the operator's contract: "1".
pub const VERSION: &str = "retro.version";
/// The window w, as the attribute.
pub const WINDOW: &str = "retro.window";
/// "1" in a model whose graph feeds the window by itself: a host feeds each token once. Absent: the host does.
pub const WINDOW_IN_GRAPH: &str = "retro.window_in_graph";
/// The host that the model's state is named and shaped for: "genai". Absent: the contract's own names.
pub const HOST: &str = "retro.host";
/// The host's configuration as it was before the conversion.
pub const HOST_CONFIG: &str = "retro.host_config";
/// Tokens that a model with a [`HOST`] has state for.
pub const CONTEXT: &str = "retro.context";
/// Tokens a page, as the attribute.
pub const PAGE_SIZE: &str = "retro.page_size";
/// As [`crate::Budget`] prints it: "0.15" or "2048".
pub const BUDGET: &str = "retro.budget";
/// Least pages that a share of the context is rounded up to, also one that a run asks for instead of [`BUDGET`]'s.
pub const MIN_PAGES: &str = "retro.min_pages";
/// Contexts of up to so many tokens are better read whole, one token a step, on a CPU; absent: none are.
pub const DENSE_BELOW: &str = "retro.dense_below";
/// [`DENSE_BELOW`] where a step feeds one token, at most: up to so many tokens, choosing a part of the cache takes longer
/// than reading all of it (docs/performance.md).
pub const ONE_TOKEN_DENSE_BELOW: usize = 1024;
/// First pages that every step reads, as the attribute.
pub const SINK_PAGES: &str = "retro.sink_pages";
/// The selector, as the attribute.
pub const SELECTOR: &str = "retro.selector";
/// The group score, as the attribute.
pub const GROUP_SCORE: &str = "retro.group_score";
/// [`MASK_WIDTH`] in a model that takes the number of its tokens from the width of `attention_mask`, which then has to
/// grow with the text.
pub const LENGTHS: &str = "retro.lengths";
/// [`LENGTHS`]' one value.
pub const MASK_WIDTH: &str = "mask_width";
/// Layers that carry a RetroAttention node, comma-separated: "0,1,2".
pub const LAYERS: &str = "retro.layers";
/// Those of them whose mode is "dense", comma-separated; empty when there are none.
pub const DENSE_LAYERS: &str = "retro.dense_layers";
