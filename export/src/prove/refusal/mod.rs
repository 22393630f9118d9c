//! Why an attention stays as it is.
//!
//! Every reason is a variant that carries the names, sizes and types it speaks of; its [`Display`](std::fmt::Display) is
//! the line that a report shows. What must be decided from a reason is decided from the variant, never from its words.

mod attribute;
mod cache;
mod input;
mod mask;
mod node;
mod operand;
mod operator;
mod proof;

pub use attribute::AttributeRefusal;
pub use cache::{CacheDimensions, CacheRefusal};
pub use input::InputRefusal;
pub use mask::{MaskRefusal, Unread};
pub use node::NodeRefusal;
pub use operand::{OperandKind, OperandRefusal};
pub use operator::{FunctionPart, OperatorRefusal};
pub use proof::ProofRefusal;

use crate::eval;

/// Why an attention is not converted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// The operator, or the place where it stands.
    #[error(transparent)]
    Operator(#[from] OperatorRefusal),
    /// An attribute of the node.
    #[error(transparent)]
    Attribute(#[from] AttributeRefusal),
    /// Inputs and outputs of the node.
    #[error(transparent)]
    Node(#[from] NodeRefusal),
    /// The cache of keys and values.
    #[error(transparent)]
    Cache(#[from] CacheRefusal),
    /// An input of the model.
    #[error(transparent)]
    Input(#[from] InputRefusal),
    /// Queries, keys, values and their sizes.
    #[error(transparent)]
    Operand(#[from] OperandRefusal),
    /// The mask, or what else is added to the scores.
    #[error(transparent)]
    Mask(#[from] MaskRefusal),
    /// The numbers of the attention are not those of the operator.
    #[error(transparent)]
    Proof(#[from] ProofRefusal),
    /// What is wrong with the queries, the keys or the values.
    #[error("its {kind}: {why}")]
    In {
        /// Which operand.
        kind: OperandKind,
        /// What is wrong with it.
        why: Box<Refusal>,
    },
    /// No value has the numbers of the operator's formula. `why`: of the last that was compared.
    #[error("its output is not that of softmax attention: {why}")]
    OtherOutput {
        /// Of the value that was compared last.
        why: Box<Refusal>,
    },
    /// A value that the proof needs can't be computed.
    #[error(transparent)]
    Evaluation(#[from] eval::Error),
}

impl Refusal {
    /// What the evaluator could not compute, if that is the reason, at whichever step.
    pub fn evaluation(&self) -> Option<&eval::Error> {
        match self {
            Self::Evaluation(why) => Some(why),
            Self::In { why, .. } | Self::OtherOutput { why } => why.evaluation(),
            _ => None,
        }
    }
}
