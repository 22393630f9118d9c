/// An input or output of an attention node that is missing, or that the operator has no counterpart for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NodeRefusal {
    #[error("{input} (input {slot}, {name}) is not supported by this version")]
    Input {
        input: &'static str,
        slot: usize,
        name: String,
    },
    #[error("it has more inputs than this version knows ({name})")]
    MoreInputs { name: String },
    #[error("attention_bias (input {slot}, {name}) is a mask that this version doesn't support")]
    AttentionBias { slot: usize, name: String },
    #[error("position_ids (input {slot}, {name}) may differ from the positions in the cache, which the operator uses")]
    Positions { slot: usize, name: String },
    #[error("a required input (query, seqlens_k or total_sequence_length) is absent")]
    InputAbsent,
    #[error("an output (output, present_key or present_value) is absent")]
    OutputAbsent,
    #[error("only one of key and value is given")]
    KeyOrValueAlone,
    #[error("{given} ({name}) comes without {missing}")]
    NormAlone {
        given: &'static str,
        name: String,
        missing: &'static str,
    },
    #[error("do_rotary = 1 without cos_cache and sin_cache")]
    AnglesAbsent,
    /// `angles`: elements of a head that the cosines and sines are for.
    #[error("cos_cache rotates {angles} elements of a head of {head_size}")]
    AnglesTooWide { angles: i64, head_size: i64 },
    #[error("its queries, keys and values come packed in one input, which is not supported")]
    Packed,
    #[error("it takes {name}, which is for beam search or shared buffers")]
    BeamSearch { name: String },
    #[error("it takes nonpad_kv_seqlen ({name}), for a cache of another kind")]
    ValidLengths { name: String },
    #[error("it returns its attention scores ({name}), which page selection doesn't compute")]
    ReturnsScores { name: String },
    /// `what`: attention probabilities or scores, which are an output of the graph.
    #[error(
        "the graph returns its {what} ({name}), which page selection doesn't compute; export it without output_attentions"
    )]
    GraphReturns { what: &'static str, name: String },
}
