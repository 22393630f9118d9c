/// An input or output of an attention node that is missing, or that the operator has no counterpart for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NodeRefusal {
    /// The node has an input that this version does not convert.
    #[error("{input} (input {slot}, {name}) is not supported by this version")]
    Input {
        /// The name that the operator gives it.
        input: &'static str,
        /// Its number among the inputs.
        slot: usize,
        /// The value.
        name: String,
    },
    /// The node has an input that its operator did not have when this version was made.
    #[error("it has more inputs than this version knows ({name})")]
    MoreInputs {
        /// The value.
        name: String,
    },
    /// The node adds a mask to its scores that was not proved to be a supported one.
    #[error("attention_bias (input {slot}, {name}) is a mask that this version doesn't support")]
    AttentionBias {
        /// Its number among the inputs.
        slot: usize,
        /// The value.
        name: String,
    },
    /// The node takes the positions for its rotary embedding from the caller.
    #[error("position_ids (input {slot}, {name}) may differ from the positions in the cache, which the operator uses")]
    Positions {
        /// Its number among the inputs.
        slot: usize,
        /// The value.
        name: String,
    },
    /// The node lacks an input that its operator needs.
    #[error("a required input (query, seqlens_k or total_sequence_length) is absent")]
    InputAbsent,
    /// The node lacks an output that the operator has.
    #[error("an output (output, present_key or present_value) is absent")]
    OutputAbsent,
    /// The node has a key without a value, or the reverse.
    #[error("it has only one of key and value")]
    KeyOrValueAlone,
    /// The node normalises queries or keys alone.
    #[error("{present} ({name}) comes without {missing}")]
    NormAlone {
        /// The input that it has.
        present: &'static str,
        /// The value of that input.
        name: String,
        /// The input that it lacks.
        missing: &'static str,
    },
    /// The node applies rotary embedding without its cosines and sines.
    #[error("do_rotary = 1 without cos_cache and sin_cache")]
    AnglesAbsent,
    /// The cosines and sines are for more elements than a head has.
    #[error("cos_cache rotates {angles} elements of a head of {head_size}")]
    AnglesTooWide {
        /// Elements of a head that the cosines and sines are for.
        angles: i64,
        /// Elements of a head.
        head_size: i64,
    },
    /// The node takes queries, keys and values in one input.
    #[error("its queries, keys and values come packed in one input, which is not supported")]
    Packed,
    /// The node takes inputs for beam search or for a cache of fixed capacity.
    #[error("it takes {name}, which is for beam search or shared buffers")]
    BeamSearch {
        /// The value.
        name: String,
    },
    /// The node takes the number of valid tokens of each sequence.
    #[error("it takes nonpad_kv_seqlen ({name}), for a cache of another kind")]
    ValidLengths {
        /// The value.
        name: String,
    },
    /// The node has its scores as an output.
    #[error("it returns its attention scores ({name}), which page selection doesn't compute")]
    ReturnsScores {
        /// The output.
        name: String,
    },
    /// The graph has scores or probabilities as an output.
    #[error(
        "the graph returns its {what} ({name}), which page selection doesn't compute; export it without output_attentions"
    )]
    GraphReturns {
        /// "attention probabilities" or "attention scores".
        what: &'static str,
        /// The output.
        name: String,
    },
}
