//! What of an attention the graph returns.

use super::trace::is_product;
use retro_onnx::{NodeProto, graph::GraphView};
use std::collections::HashSet;

/// The output of the graph that a value becomes, rearranged or put together with others of its kind.
pub fn graph_output_of<'a>(view: &GraphView<'a>, from: &'a str) -> Option<&'a str> {
    const KEEPS: [&str; 12] = [
        "Identity",
        "Cast",
        "Dropout",
        "Reshape",
        "Transpose",
        "Unsqueeze",
        "Squeeze",
        "Concat",
        "Where",
        "Slice",
        "Flatten",
        "ReduceMean",
    ];
    let mut seen = HashSet::new();
    let mut open = vec![from];
    while let Some(name) = open.pop().filter(|_| seen.len() < 64) {
        if view.is_output(name) {
            return Some(name);
        }
        if !seen.insert(name) {
            continue;
        }
        let keeps = |n: &&NodeProto| n.op_domain().is_empty() && KEEPS.contains(&n.op_type());
        open.extend(view.readers(name).filter(keeps).map(|n| n.output(0)));
    }
    None
}

/// An output of the graph that is computed of probabilities other than by weighing values with them.
pub fn graph_output_from<'a>(view: &GraphView<'a>, weights: &'a str) -> Option<&'a str> {
    let mut open = vec![weights];
    let mut at = 0;
    while let Some(name) = open.get(at).copied().filter(|_| at < 64) {
        at += 1;
        // Of them alone: no values are weighed.
        let alone = |n: &&NodeProto| n.input.iter().all(|i| i == name || i.is_empty() || view.is_constant(i));
        let readers = view
            .readers(name)
            .filter(|n| !is_product(n) && !n.is("", "Shape"))
            .filter(alone);
        let outputs = readers.flat_map(|n| &n.output).map(String::as_str);
        for output in outputs.filter(|o| !o.is_empty()) {
            if view.is_output(output) {
                return Some(output);
            }
            open.push(output);
        }
    }
    None
}
