//! Removes nodes that nothing needs any more, and what only they read.

use crate::eval::{leading_to, reads};
use retro_onnx::{GraphProto, NodeProto, ValueInfoProto};
use std::collections::HashSet;

/// Constants up to this many bytes go when nothing reads them any more.
const SMALL: usize = 4096;

/// The nodes that the graph's outputs depend on, by place.
pub fn living(graph: &GraphProto) -> Vec<bool> {
    let outputs = graph.output.iter().map(ValueInfoProto::name);
    leading_to(graph, outputs, |node| reads(node).collect())
}

/// Removes nodes that were needed once and no longer are, what was declared about their values, and small constants
/// that only they read. What the source had without need stays, unless it reads from what goes. `was`: names of values needed before.
pub fn prune(graph: &mut GraphProto, was: &HashSet<String>) {
    let alive = living(graph);
    let needless = |node: &NodeProto| node.output.iter().any(|o| was.contains(o));
    let mut gone: HashSet<String> = HashSet::new();
    let mut freed: HashSet<String> = HashSet::new();
    let nodes = std::mem::take(&mut graph.node);
    for (node, alive) in nodes.into_iter().zip(alive) {
        if alive || !needless(&node) {
            graph.node.push(node);
        } else {
            freed.extend(reads(&node).map(str::to_owned));
            gone.extend(node.output);
        }
    }
    // Inliners leave nodes that nothing needs; those that read a value that is gone can't stay.
    loop {
        let made: HashSet<&str> = graph.node.iter().flat_map(|n| &n.output).map(String::as_str).collect();
        let lost = |node: &NodeProto| reads(node).any(|name| gone.contains(name) && !made.contains(name));
        let lost: HashSet<usize> = (0..graph.node.len()).filter(|i| lost(&graph.node[*i])).collect();
        if lost.is_empty() {
            break;
        }
        let nodes = std::mem::take(&mut graph.node);
        for (index, node) in nodes.into_iter().enumerate() {
            if lost.contains(&index) {
                freed.extend(reads(&node).map(str::to_owned));
                gone.extend(node.output.into_iter().filter(|o| !o.is_empty()));
            } else {
                graph.node.push(node);
            }
        }
    }
    let made: HashSet<&str> = graph.node.iter().flat_map(|n| &n.output).map(String::as_str).collect();
    let read: HashSet<&str> = graph.node.iter().flat_map(reads).collect();
    let outputs: HashSet<&str> = graph.output.iter().map(ValueInfoProto::name).collect();
    graph
        .value_info
        .retain(|v| !gone.contains(v.name()) || made.contains(v.name()));
    let idle = |name: &str| freed.contains(name) && !read.contains(name) && !outputs.contains(name);
    let inputs: HashSet<&str> = graph.input.iter().map(ValueInfoProto::name).collect();
    graph.initializer.retain(|t| {
        let bytes = t.raw_data.as_ref().map_or(0, bytes::Bytes::len);
        !idle(t.name()) || bytes > SMALL || t.is_external() || inputs.contains(t.name())
    });
}

/// Names of all values that are needed.
pub fn needed(graph: &GraphProto) -> HashSet<String> {
    let alive = living(graph);
    let nodes = graph.node.iter().zip(alive).filter(|(_, alive)| *alive);
    let outputs = nodes.flat_map(|(n, _)| &n.output);
    // An output that is left out has no name that others could not have as well.
    outputs.filter(|o| !o.is_empty()).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use retro_onnx::DataType;

    #[test]
    fn what_was_dead_before_goes_with_what_it_reads() {
        let mut graph = GraphProto {
            node: vec![
                NodeProto::new("", "Old", "old", &["x"], &["mask"]),
                NodeProto::new("", "Shape", "dead", &["mask"], &["shape"]),
                NodeProto::new("", "Gather", "dead_too", &["shape", "zero"], &["width"]),
                NodeProto::new("", "Shape", "dead_apart", &["x"], &["other"]),
                NodeProto::new("", "New", "new", &["x"], &["y"]),
            ],
            ..Default::default()
        };
        let was = ["mask", "y"].map(str::to_owned).into();
        graph.output.push(ValueInfoProto::tensor("y", DataType::Float, []));
        prune(&mut graph, &was);
        let left: Vec<&str> = graph.node.iter().map(NodeProto::name).collect();
        assert_eq!(left, ["dead_apart", "new"]);
    }

    #[test]
    fn what_was_dead_before_stays_although_both_leave_an_output_out() {
        let mut graph = GraphProto {
            node: vec![
                NodeProto::new("", "Norm", "needed", &["x"], &["y", ""]),
                NodeProto::new("", "Norm", "dead", &["x"], &["z", ""]),
                NodeProto::new("", "Shape", "reader", &["z"], &["shape"]),
            ],
            output: vec![ValueInfoProto::tensor("y", DataType::Float, [])],
            ..Default::default()
        };
        let before = graph.clone();
        let was = needed(&graph);
        prune(&mut graph, &was);
        assert_eq!(graph, before);
    }
}
