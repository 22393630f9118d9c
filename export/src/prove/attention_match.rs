//! What is known of an attention that is converted, whatever pattern it was written in.
//!
//! Shapes: B sequences, S tokens fed in a call, Hq query heads, Hkv heads of keys and values, C tokens that the cache can
//! hold, D head size.

use retro_onnx::DataType;

/// An attention that can be converted, whatever pattern it was written in. Names of values; "" is an absent one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionMatch {
    /// `[B, S, Hq*D]`, or packed `[B, S, (Hq+2*Hkv)*D]` with `key` and `value` absent.
    pub query: String,
    /// `[B, S, Hkv*D]`.
    pub key: String,
    /// `[B, S, Hkv*D]`.
    pub value: String,
    /// `[B, Hkv, C, D]`, a graph input.
    pub past_key: String,
    /// As `past_key`.
    pub past_value: String,
    /// int32 `[B]`: tokens of each sequence in the cache after the call, less one, as GroupQueryAttention counts them.
    pub seqlens_k: String,
    /// int32, one number: tokens of the longest sequence after the call.
    pub total_sequence_length: String,
    /// `[positions, rotated elements / 2]`.
    pub cos_cache: String,
    /// As `cos_cache`.
    pub sin_cache: String,
    /// `[Hq]`.
    pub head_sink: String,
    /// `[B, S, Hq*D]`.
    pub output: String,
    /// As `past_key`, a graph output.
    pub present_key: String,
    /// As `past_value`, a graph output.
    pub present_value: String,

    /// Hq.
    pub q_heads: i64,
    /// Hkv.
    pub kv_heads: i64,
    /// D, where the graph tells it.
    pub head_size: Option<i64>,
    /// Of the cache.
    pub data_type: DataType,
    /// 0: 1/sqrt(D).
    pub scale: f32,
    /// 0: off.
    pub softcap: f32,
    /// Where rotary position embedding is applied.
    pub rope: Rope,
    /// Tokens of a sliding window; -1: none.
    pub local_window_size: i64,
    /// The source layer keeps a cache of about its window's size and shifts it. The operator's cache holds everything.
    pub sliding_cache: bool,

    // What follows is for attention of several nodes; the defaults are those of a single one.
    /// How `query` is laid out.
    pub query_layout: HeadLayout,
    /// How `key` is laid out.
    pub key_layout: HeadLayout,
    /// How `value` is laid out.
    pub value_layout: HeadLayout,
    /// How `output` is laid out.
    pub output_layout: HeadLayout,
    /// Element type of `query`; undefined: that of the cache.
    pub query_type: DataType,
    /// Of `key` and `value`, likewise.
    pub kv_type: DataType,
    /// Of `output`, likewise.
    pub output_type: DataType,
    /// Past and new keys together, `[B, Hkv, past + S, D]`, as the source computes them; "" where only the graph's output has them.
    pub total_key: String,
    /// Of the values, likewise.
    pub total_value: String,
    /// Index of the node that computes `output`, which is replaced; none: the attention node itself is.
    pub output_node: Option<usize>,
    /// Where the lengths of sequences come from.
    pub length_source: LengthSource,
    /// Added to queries, keys and values: `[(Hq+2*Hkv)*D]`.
    pub bias: String,
    /// Head sinks that are no tensor of their own in the source.
    pub sinks: Option<Vec<f32>>,

    // What a single node may have beside it or inside.
    /// Copies of the cache between the graph's inputs and outputs and the node.
    pub cache_aliases: Vec<String>,
    /// How the node normalises queries and keys before anything else.
    pub qk_norm: Option<QkNorm>,
}

impl AttentionMatch {
    /// One of the types of queries, keys and values, or outputs.
    pub fn typed(&self, t: DataType) -> DataType {
        if t == DataType::Undefined { self.data_type } else { t }
    }
}

/// Root mean square normalisation of every head of queries and keys.
#[derive(Clone, Debug, PartialEq)]
pub struct QkNorm {
    /// Weights `[D]`, of the queries' type.
    pub query: String,
    /// As `query`, for the keys.
    pub key: String,
    /// Added to the mean of squares.
    pub epsilon: f32,
}

/// How heads are laid out in a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadLayout {
    /// `[B, S, H*D]`, as the operator takes and gives it.
    #[default]
    Flat,
    /// `[B, S, H, D]`.
    TokenHeads,
    /// `[B, H, S, D]`.
    Heads,
}

/// Where the lengths of sequences come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LengthSource {
    /// `seqlens_k` and `total_sequence_length` are values of the graph.
    #[default]
    FromGraph,
    /// From the width of the attention mask, and its zeros where the source masks padding.
    FromMask {
        /// Whether padding on the left is masked.
        padding: bool,
    },
}

/// Where rotary position embedding happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rope {
    /// Not in the attention node, and not right before it.
    #[default]
    None,
    /// An own node before the attention.
    Before,
    /// In the node.
    Inside {
        /// Whether the elements of a pair follow one another, rather than half a head apart.
        interleaved: bool,
        /// Elements of a head that are rotated, where the graph tells it.
        dims: Option<i64>,
    },
}
