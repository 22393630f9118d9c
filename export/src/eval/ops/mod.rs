//! The operators that the evaluator knows: shapes always, numbers where they are known.
//!
//! [`registry`] is the one table of them. Each module holds the functions of some, with the operator's definition linked. What the
//! registry doesn't list has no shape: [`Error::NotSupported`].

mod attention;
mod creation;
mod elementwise;
mod indexing;
mod matmul;
mod quant;
mod reduce;
mod registry;
mod shape;

pub use attention::{fused_scores, windows};

use super::{Error, Tensor, tensor::numel};
use retro_onnx::NodeProto;
use std::rc::Rc;

type Inputs<'i> = &'i [Option<Rc<Tensor>>];
type Outputs = Vec<Option<Tensor>>;

/// A node with what it is called on.
struct OpCall<'c> {
    node: &'c NodeProto,
    inputs: Inputs<'c>,
    opset: i64,
}

impl<'c> OpCall<'c> {
    /// An input, if the node has it.
    fn get(&self, slot: usize) -> Option<&'c Tensor> {
        self.inputs.get(slot)?.as_deref()
    }

    /// An input that the operator can't do without.
    fn need(&self, slot: usize) -> Result<&'c Tensor, Error> {
        self.get(slot).ok_or(Error::InputAbsent(slot))
    }

    fn int(&self, name: &str, default: i64) -> i64 {
        self.node.attribute(name).map_or(default, |a| a.i())
    }

    fn float(&self, name: &str) -> Option<f64> {
        self.node.attribute(name).map(|a| f64::from(a.f()))
    }

    fn ints_attribute(&self, name: &str) -> Option<Vec<i64>> {
        self.node.attribute(name).map(|a| a.ints.clone())
    }

    /// Integers that are an input in new opsets and an attribute in old ones.
    fn ints(&self, slot: usize, name: &str) -> Result<Option<Vec<i64>>, Error> {
        match self.get(slot) {
            Some(t) => t.as_ints().map(Some),
            None => Ok(self.ints_attribute(name)),
        }
    }

    /// An input that is a shape, or another row of counts.
    fn sizes(&self, slot: usize) -> Result<Vec<usize>, Error> {
        self.need(slot)?.as_ints()?.iter().map(|d| size(*d)).collect()
    }
}

/// An axis by its number from the start, or from the end if that is negative.
fn axis_of(axis: i64, rank: usize) -> Result<usize, Error> {
    let at = if axis < 0 {
        axis.checked_add(rank as i64).unwrap_or(-1)
    } else {
        axis
    };
    usize::try_from(at)
        .ok()
        .filter(|a| *a < rank)
        .ok_or(Error::Axis { axis, rank })
}

fn size(value: i64) -> Result<usize, Error> {
    usize::try_from(value).map_err(|_| Error::NegativeSize(value))
}

/// A node's outputs; none where one is not known.
///
/// # Errors
/// The operator isn't in the registry, or these inputs don't fit it, or one has more elements than any model's.
pub(super) fn evaluate(node: &NodeProto, inputs: Inputs, opset: i64) -> Result<Outputs, Error> {
    let operator = registry::find(node).ok_or_else(|| Error::NotSupported {
        domain: node.op_domain().to_owned(),
        op_type: node.op_type().to_owned(),
    })?;
    // From here on sizes and strides of inputs can be multiplied and added.
    for input in inputs.iter().flatten() {
        numel(&input.shape)?;
    }
    if operator.is_on_demand() || !inputs.iter().flatten().any(|t| t.lazy.is_some()) {
        return operator.compute(&OpCall { node, inputs, opset });
    }
    let stored = |t: &Option<Rc<Tensor>>| t.as_ref().map(|t| Rc::new(t.stored().into_owned()));
    let inputs: Vec<_> = inputs.iter().map(stored).collect();
    let inputs = inputs.as_slice();
    operator.compute(&OpCall { node, inputs, opset })
}

/// Whether a node makes other numbers than it reads.
pub(super) fn calculates(node: &NodeProto) -> bool {
    registry::find(node).is_some_and(|operator| operator.calculates())
}

/// Whether a node's constants may be weights, of which only the shapes matter.
pub(super) fn reads_weights(node: &NodeProto) -> bool {
    registry::find(node).is_some_and(|operator| operator.reads_weights())
}

#[cfg(test)]
mod tests;
