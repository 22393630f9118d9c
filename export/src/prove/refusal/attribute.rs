use retro_onnx::AttributeType;

/// An attribute that the operator has no counterpart for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AttributeRefusal {
    #[error("its attribute {name} is not supported")]
    Unknown { name: String },
    #[error("attribute {name} is not a plain {expected:?}")]
    Type { name: String, expected: AttributeType },
    /// `value` as it is shown: a number, or a string in quotes.
    #[error("attribute {name} = {value} is not supported by this version")]
    Value { name: String, value: String },
    #[error("attribute {name} is {value}")]
    Number { name: String, value: f32 },
    #[error("attribute {name} = {value} is neither 0 nor 1")]
    Flag { name: String, value: i64 },
    #[error("num_heads = {q_heads} is not a multiple of kv_num_heads = {kv_heads}")]
    Heads { q_heads: i64, kv_heads: i64 },
    #[error("local_window_size = {value} is neither -1 nor a number of tokens")]
    Window { value: i64 },
}
