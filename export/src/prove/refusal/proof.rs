use crate::prove::call_shape::CallShape;

/// Numbers of an attention that are not those of the operator, or that can't be had.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ProofRefusal {
    /// What the Softmax takes does not depend on the tokens.
    #[error("its scores ({name}) do not depend on the tokens")]
    ScoresWithoutTokens {
        /// The value.
        name: String,
    },
    /// A node before the Softmax combines the scores with another value of the tokens.
    #[error("node {node} ({op_type}) mixes its scores with {other}, which depends on the tokens")]
    ScoresMixed {
        /// The node that combines them.
        node: String,
        /// The node's operator.
        op_type: String,
        /// The other value.
        other: String,
    },
    /// The Softmax is not of a product.
    #[error("there is no product of queries and keys before its Softmax")]
    NoScores,
    /// The probabilities are used several times.
    #[error("its probabilities go into {products} products, not one")]
    SeveralProducts {
        /// How many products.
        products: usize,
    },
    /// The probabilities are multiplied with nothing.
    #[error("it has no values")]
    NoValues,
    /// No node computes the output.
    #[error("nothing makes its output")]
    OutputNotMade,
    /// A value of the attention has no numbers.
    #[error("{name} can't be computed")]
    NotComputed {
        /// The value.
        name: String,
    },
    /// The scores have no numbers.
    #[error("its scores can't be computed")]
    ScoresNotComputed,
    /// The newest token attends to no key.
    #[error("its newest token attends to no key")]
    SeesNothing,
    /// The factor of the scores is not a positive number.
    #[error("its scale is {scale}")]
    Scale {
        /// The factor.
        scale: f64,
    },
    /// The softcap is not a positive number.
    #[error("its softcap is {cap}, which is not a finite positive number")]
    Softcap {
        /// The softcap.
        cap: f64,
    },
    /// The head sinks are computed from the tokens.
    #[error("its head sinks ({name}) are not constant")]
    SinksNotConstant {
        /// The head sinks.
        name: String,
    },
    /// The head sinks are not one number a query head.
    #[error("its head sinks ({name}) have shape {shape:?}")]
    SinksShape {
        /// The head sinks.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The head sinks are not the same for every token.
    #[error("its head sinks ({name}) differ from token to token")]
    SinksDiffer {
        /// The head sinks.
        name: String,
    },
    /// The head sinks change with the sizes of a call.
    #[error("its head sinks ({name}) are others with {call}")]
    SinksChange {
        /// The head sinks.
        name: String,
        /// The call.
        call: CallShape,
    },
    /// The probabilities of a call have no numbers.
    #[error("with {call}, its probabilities ({name}) can't be computed")]
    ProbabilitiesNotComputed {
        /// The call.
        call: CallShape,
        /// The value.
        name: String,
    },
    /// A probability is not the softmax of the scores.
    #[error(
        "with {call}, equal scores give token {query} the probability {found} of token {key} where {expected} is expected: \
         what follows its Softmax depends on the position"
    )]
    Probabilities {
        /// The call.
        call: CallShape,
        /// Position of the token.
        query: usize,
        /// Position of the key.
        key: usize,
        /// The probability.
        found: f64,
        /// The probability of softmax.
        expected: f64,
    },
    /// A number of the output is not the one that attention gives.
    #[error("with {call}, {name} has {found:.4} where {expected:.4} is expected (head {head}, token {token})")]
    OutputNumber {
        /// The call.
        call: CallShape,
        /// The value.
        name: String,
        /// The number.
        found: f64,
        /// The number of attention.
        expected: f64,
        /// Query head.
        head: usize,
        /// Position of the token.
        token: usize,
    },
    /// No value after the probabilities has the shape of an output.
    #[error("no value of it has a shape that is supported")]
    OutputShape,
    /// No value after the probabilities was compared.
    #[error("it has no output")]
    NoOutput,
}
