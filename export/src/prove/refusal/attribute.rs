use retro_onnx::AttributeType;

/// An attribute that the operator has no counterpart for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AttributeRefusal {
    /// The node has an attribute that this version has no counterpart for.
    #[error("its attribute {name} is not supported")]
    Unknown {
        /// The attribute.
        name: String,
    },
    /// An attribute has another type than its operator defines.
    #[error("attribute {name} is not a plain {expected:?}")]
    Type {
        /// The attribute.
        name: String,
        /// The type that the operator defines.
        expected: AttributeType,
    },
    /// An attribute has a value that this version does not convert.
    #[error("attribute {name} = {value} is not supported by this version")]
    Value {
        /// The attribute.
        name: String,
        /// Its value as shown: a number, or a string in quotes.
        value: String,
    },
    /// A number is infinite, NaN or out of its range.
    #[error("attribute {name} is {value}")]
    Number {
        /// The attribute.
        name: String,
        /// Its value.
        value: f32,
    },
    /// A switch is neither 0 nor 1.
    #[error("attribute {name} = {value} is neither 0 nor 1")]
    Flag {
        /// The attribute.
        name: String,
        /// Its value.
        value: i64,
    },
    /// The query heads do not divide into groups of one key head each.
    #[error("num_heads = {q_heads} is not a multiple of kv_num_heads = {kv_heads}")]
    Heads {
        /// Query heads.
        q_heads: i64,
        /// Key and value heads.
        kv_heads: i64,
    },
    /// The sliding window is no length.
    #[error("local_window_size = {value} is neither -1 nor a number of tokens")]
    Window {
        /// Its value.
        value: i64,
    },
}
