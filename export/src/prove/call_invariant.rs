//! Whether a value is the same in every call: whatever tokens, how many, after how many, with what padding.
//!
//! A factor that grows with the position may be 1 in all small calls, so trying is not enough: such a value must be made from
//! constants and from sizes that don't change, a head's for instance.

use super::{call_shape::CallShape, sample_calls::SampleCalls};
use retro_onnx::{NodeProto, graph::subgraphs};
use std::collections::HashSet;

/// Calls that differ in every size that a call has: sequences, tokens, past tokens, all tokens.
const DIFFERENT: [CallShape; 2] = [CallShape::new(1, 1, 3, 0), CallShape::new(2, 3, 0, 0)];
const MAX_STEPS: usize = 512;
/// Nodes of a chain, at most.
pub const MAX_CHAIN: usize = 64;
/// Operators that hand sizes on as they are.
const HAND_ON: [&str; 9] = [
    "Identity",
    "Cast",
    "Gather",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Concat",
    "Reshape",
    "Split",
];

/// Whether a slot of a node is a shape that its data gets, which doesn't change its numbers.
pub fn is_shape_only(node: &NodeProto, slot: usize) -> bool {
    slot == 1 && (node.is("", "Reshape") || node.is("", "Expand"))
}

/// Whether all that a node reads, but for `data` and shapes, is the same in every call.
pub fn others_are_call_invariant(samples: &SampleCalls, node: &NodeProto, data: &str) -> bool {
    let mut inputs = node.input.iter().map(String::as_str).enumerate();
    inputs.all(|(slot, name)| name == data || is_shape_only(node, slot) || is_call_invariant(samples, name))
}

/// Whether a value is the same in every call.
pub fn is_call_invariant(samples: &SampleCalls, name: &str) -> bool {
    let view = samples.view;
    let mut seen = HashSet::new();
    let mut open = vec![name];
    while let Some(name) = open.pop() {
        if name.is_empty() || view.initializer(name).is_some() || !seen.insert(name) {
            continue;
        }
        let Some(node) = view.producer(name) else { return false };
        if seen.len() > MAX_STEPS || subgraphs(node).next().is_some() {
            return false;
        }
        if is_sizes(samples, name) && is_same(samples, name) {
            continue;
        }
        if reads_shape(node) {
            return false;
        }
        open.extend(node.input.iter().map(String::as_str));
    }
    true
}

/// A value and those before it, as long as each is made from one value that depends on tokens, and in the same way in every
/// call: rearranged or scaled, but not by what depends on the position.
pub fn invariant_chain<'a>(samples: &SampleCalls<'a>, from: &'a str) -> Vec<&'a str> {
    let program = samples.program();
    let mut names = vec![from];
    let mut name = from;
    while names.len() < MAX_CHAIN {
        let Some(node) = samples.view.producer(name) else { break };
        let mut data = node
            .input
            .iter()
            .map(String::as_str)
            .filter(|i| program.is_data_dependent(i));
        let (Some(one), None) = (data.next(), data.next()) else {
            break;
        };
        if !others_are_call_invariant(samples, node, one) {
            break;
        }
        name = one;
        names.push(name);
    }
    names
}

fn reads_shape(node: &NodeProto) -> bool {
    node.is("", "Shape") || node.is("", "Size")
}

/// Whether a value is made of sizes and constants, each as it is.
fn is_sizes(samples: &SampleCalls, name: &str) -> bool {
    const PICKS: [&str; 2] = ["Gather", "Slice"];
    let view = samples.view;
    let is_constant = |name: &str| {
        let made = view.producer(name).is_some_and(|n| n.is("", "Constant"));
        made || name.is_empty() || view.initializer(name).is_some()
    };
    let mut open = vec![name];
    let mut steps = 0;
    while let Some(name) = open.pop() {
        steps += 1;
        if name.is_empty() || view.initializer(name).is_some() {
            continue;
        }
        match view.producer(name) {
            _ if steps > MAX_STEPS => return false,
            Some(node) if reads_shape(node) || node.is("", "Constant") => {}
            // A size as an index picks other numbers in calls that are not tried.
            Some(node) if PICKS.contains(&node.op_type()) && !node.input.iter().skip(1).all(|i| is_constant(i)) => {
                return false;
            }
            Some(node) if node.op_domain().is_empty() && HAND_ON.contains(&node.op_type()) => {
                open.extend(node.input.iter().map(String::as_str));
            }
            _ => return false,
        }
    }
    true
}

/// Whether a value has the same numbers in calls that have no size in common.
fn is_same(samples: &SampleCalls, name: &str) -> bool {
    let numbers = DIFFERENT.map(|z| samples.run(z).ok().and_then(|env| env.get(name)?.data.clone()));
    matches!(numbers, [Some(a), Some(b)] if a == b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::projected;
    use retro_onnx::{AttributeProto, DataType, TensorProto, graph::GraphView};

    #[test]
    fn sizes_of_heads_are_call_invariant_and_positions_are_not() {
        let mut graph = projected(2, 2);
        for (name, value) in [("zero", 0), ("one", 1), ("two", 2)] {
            graph.initializer.push(TensorProto::int64s(name, &[], &[value]));
        }
        // The same for all calls that are tried.
        graph
            .initializer
            .push(TensorProto::int64s("table", &[6], &[1, 1, 1, 1, 1, 2]));
        for (op, inputs, output) in [
            ("Shape", &["q"][..], "shape"),
            ("Gather", &["shape", "two"], "width"),
            ("Gather", &["shape", "one"], "fed"),
            ("Cast", &["width"], "width_f"),
            ("Sqrt", &["width_f"], "root"),
            ("Shape", &["attention_mask"], "mask_shape"),
            ("Gather", &["mask_shape", "one"], "total"),
            ("Sub", &["total", "fed"], "past"),
            ("Range", &["past", "total", "one"], "positions"),
            ("Mul", &["positions", "zero"], "nothing"),
            ("Gather", &["table", "total"], "picked"),
        ] {
            let mut node = NodeProto::new("", op, output, inputs, &[output]);
            if op == "Cast" {
                let float = i64::from(i32::from(DataType::Float));
                node.attribute.push(AttributeProto::int("to", float));
            }
            graph.node.push(node);
        }
        let view = GraphView::new(&graph, 23);
        let samples = SampleCalls::new(&view, None);
        for name in ["one", "width", "root", "wq", ""] {
            assert!(is_call_invariant(&samples, name), "{name}");
        }
        // The last is 0 always, but that doesn't show in how it is made.
        for name in [
            "shape",
            "fed",
            "positions",
            "attention_mask",
            "q",
            "past",
            "nothing",
            "picked",
        ] {
            assert!(!is_call_invariant(&samples, name), "{name}");
        }
    }

    #[test]
    fn the_shape_of_a_reshape_may_change_and_a_factor_may_not() {
        let mut graph = projected(2, 2);
        graph
            .node
            .push(NodeProto::new("", "Shape", "s", &["inputs_embeds"], &["shape"]));
        graph
            .node
            .push(NodeProto::new("", "Reshape", "r", &["q", "shape"], &["a"]));
        graph.node.push(NodeProto::new("", "Mul", "m", &["q", "shape"], &["b"]));
        graph.node.push(NodeProto::new("", "Mul", "w", &["q", "wq"], &["c"]));
        let view = GraphView::new(&graph, 23);
        let samples = SampleCalls::new(&view, None);
        let invariant = |made: &str| view.producer(made).map(|n| others_are_call_invariant(&samples, n, "q"));
        assert_eq!(["a", "b", "c"].map(invariant), [Some(true), Some(false), Some(true)]);
    }
}
