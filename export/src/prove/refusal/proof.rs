use crate::prove::call_shape::CallShape;

/// Numbers of an attention that are not those of the operator, or that can't be had.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ProofRefusal {
    #[error("its scores ({name}) do not depend on the tokens")]
    ScoresWithoutTokens { name: String },
    #[error("node {node} ({op_type}) mixes its scores with {other}, which depends on the tokens")]
    ScoresMixed {
        node: String,
        op_type: String,
        other: String,
    },
    #[error("there is no product of queries and keys before its Softmax")]
    NoScores,
    #[error("its probabilities go into {products} products, not one")]
    SeveralProducts { products: usize },
    #[error("it has no values")]
    NoValues,
    #[error("nothing makes its output")]
    OutputNotMade,
    #[error("{name} can't be computed")]
    NotComputed { name: String },
    #[error("its scores can't be computed")]
    ScoresNotComputed,
    #[error("it sees nothing")]
    SeesNothing,
    #[error("its scale is {scale}")]
    Scale { scale: f64 },
    #[error("its scores end at {cap}")]
    Softcap { cap: f64 },
    #[error("its head sinks ({name}) are not constant")]
    SinksNotConstant { name: String },
    #[error("its head sinks ({name}) have shape {shape:?}")]
    SinksShape { name: String, shape: Vec<usize> },
    #[error("its head sinks ({name}) differ from token to token")]
    SinksDiffer { name: String },
    #[error("its head sinks ({name}) are others with {call}")]
    SinksChange { name: String, call: CallShape },
    #[error("with {call}, its probabilities ({name}) can't be computed")]
    ProbabilitiesNotComputed { call: CallShape, name: String },
    #[error(
        "with {call}, equal scores give token {query} the probability {found} of token {key} where {expected} is expected: \
         what follows its Softmax depends on the position"
    )]
    Probabilities {
        call: CallShape,
        query: usize,
        key: usize,
        found: f64,
        expected: f64,
    },
    #[error("with {call}, {name} has {found:.4} where {expected:.4} is expected (head {head}, token {token})")]
    OutputNumber {
        call: CallShape,
        name: String,
        found: f64,
        expected: f64,
        head: usize,
        token: usize,
    },
    #[error("no value of it has a shape that is supported")]
    OutputShape,
    #[error("it has no output")]
    NoOutput,
}
