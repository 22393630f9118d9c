//! One node: its operator, or, of an If, what is inside its branches.

use super::{Error, SMALL, Tensor, ops};
use retro_onnx::{GraphProto, NodeProto};
use std::{collections::HashMap, rc::Rc};

/// Graphs inside graphs.
const MAX_DEPTH: usize = 16;

/// A failure, told with its node.
pub(super) fn at(node: &NodeProto, source: Error) -> Error {
    Error::Node {
        label: node.label(),
        op_type: node.op_type().to_owned(),
        source: Box::new(source),
    }
}

/// Values by name, as a node sees them.
pub(super) type Lookup<'l> = &'l dyn Fn(&str) -> Option<Rc<Tensor>>;

/// A node's outputs; none where one is not known. `depth`: graphs that it is inside of.
///
/// # Errors
/// An input is not known, or the operator can't be computed.
pub(super) fn evaluate(
    node: &NodeProto,
    lookup: Lookup,
    opset: i64,
    depth: usize,
) -> Result<Vec<Option<Tensor>>, Error> {
    if node.is("", "If") {
        return branch(node, lookup, opset, depth);
    }
    let inputs: Vec<Option<Rc<Tensor>>> = node
        .input
        .iter()
        .map(|name| (!name.is_empty()).then(|| lookup(name)).flatten())
        .collect();
    if let ([Some(input), None, ..] | [None, Some(input), ..], true) = (inputs.as_slice(), depth == 0)
        && input.shape.len() == 3
        && let Some(outputs) = residual(node)
    {
        // A residual connection around something of unknown shape (experts chosen by the data, recurrent layers): it keeps the
        // shape. Were it otherwise, the attention behind it would not come out as expected.
        let sum = || Some(Tensor::unknown(input.shape.clone(), input.data_type));
        return Ok(outputs.iter().map(|is_sum| is_sum.then(sum).flatten()).collect());
    }
    for (name, value) in node.input.iter().zip(&inputs) {
        if !name.is_empty() && value.is_none() {
            return Err(Error::InputUnknown(name.clone()));
        }
    }
    ops::evaluate(node, &inputs, opset)
}

/// Of a node that adds its first two inputs, which outputs have the sum's shape.
fn residual(node: &NodeProto) -> Option<&'static [bool]> {
    match (node.op_domain(), node.op_type()) {
        ("", "Add") => Some(&[true]),
        ("com.microsoft", "SkipSimplifiedLayerNormalization" | "SkipLayerNormalization") => {
            Some(&[true, false, false, true])
        }
        _ => None,
    }
}

/// An If whose condition is known: what its branch gives. Else its shapes, when both branches agree.
fn branch(node: &NodeProto, lookup: Lookup, opset: i64, depth: usize) -> Result<Vec<Option<Tensor>>, Error> {
    if depth >= MAX_DEPTH {
        return Err(Error::TooDeep(MAX_DEPTH));
    }
    let graph_of = |name: &str| node.attribute(name).and_then(|a| a.g.as_deref());
    let (Some(yes), Some(no)) = (graph_of("then_branch"), graph_of("else_branch")) else {
        return Err("a branch is missing".into());
    };
    let condition = lookup(node.input(0)).and_then(|c| c.data.as_ref()?.first().copied());
    match condition {
        Some(c) => Ok(inside(if c != 0.0 { yes } else { no }, lookup, opset, depth)),
        None => {
            let (a, b) = (inside(yes, lookup, opset, depth), inside(no, lookup, opset, depth));
            let agree = |(a, b): (Option<Tensor>, Option<Tensor>)| {
                let (a, b) = (a?, b?);
                (a.shape == b.shape).then(|| Tensor::unknown(a.shape, a.data_type))
            };
            Ok(a.into_iter().zip(b).map(agree).collect())
        }
    }
}

/// The outputs of a graph inside a node, which sees the values around it.
fn inside(graph: &GraphProto, lookup: Lookup, opset: i64, depth: usize) -> Vec<Option<Tensor>> {
    let mut own: HashMap<&str, Option<Rc<Tensor>>> = HashMap::new();
    for tensor in &graph.initializer {
        own.insert(tensor.name(), Tensor::constant(tensor, SMALL, None).map(Rc::new));
    }
    for node in &graph.node {
        let outputs = {
            let lookup = |name: &str| match own.get(name) {
                Some(value) => value.clone(),
                None => lookup(name),
            };
            evaluate(node, &lookup, opset, depth + 1).unwrap_or_default()
        };
        let mut outputs = outputs.into_iter();
        for name in &node.output {
            let mut value = outputs.next().flatten();
            if let Some(value) = &mut value {
                value.round_to_type(|| ops::calculates(node));
            }
            own.insert(name, value.map(Rc::new));
        }
    }
    let outputs = graph.output.iter().map(|o| match own.get(o.name()) {
        Some(value) => value.as_deref().cloned(),
        None => lookup(o.name()).as_deref().cloned(),
    });
    outputs.collect()
}
