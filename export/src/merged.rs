//! Merged decoders: one If whose branches are the model without and with a past, as optimum writes them. The branch with a past
//! does all that is needed (a past may be empty), so it takes the If's place.

use crate::{
    eval::reads,
    graph::{subgraphs, subgraphs_mut},
    onnx::{DataType, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto},
};
use std::collections::{HashMap, HashSet};

/// A weight that only the other branch needs stays, as everything of the source does; smaller constants go.
const SMALL: usize = 4096;

/// Replaces the If of a merged decoder. Says what was done; none if the model is no merged decoder.
pub fn unfold(model: &mut ModelProto) -> Option<String> {
    let graph = model.graph.as_mut()?;
    let place = graph.node.iter().position(|n| chosen(graph, n).is_some())?;
    let name = chosen(graph, graph.node.get(place)?)?;
    let node = graph.node.remove(place);
    let condition = node.input(0).to_owned();
    let branch = node.attribute(name).and_then(|a| a.g.as_deref().cloned())?;
    let nodes = inlined(&branch, &node)?;
    graph.node.splice(place..place, nodes);
    graph.initializer.extend(branch.initializer);
    graph.value_info.extend(branch.value_info);
    // Whoever sets the condition may go on doing so; whoever doesn't need not.
    let always = u8::from(name == "then_branch");
    graph
        .initializer
        .push(TensorProto::raw(&condition, DataType::Bool, &[1], vec![always].into()));
    let read: HashSet<&str> = graph.node.iter().flat_map(reads).collect();
    let kept: HashSet<&str> = graph
        .input
        .iter()
        .chain(&graph.output)
        .map(ValueInfoProto::name)
        .collect();
    graph.initializer.retain(|t| {
        let bytes = t.raw_data.as_ref().map_or(usize::MAX, bytes::Bytes::len);
        bytes > SMALL || read.contains(t.name()) || kept.contains(t.name())
    });
    Some(format!(
        "the branch with a past takes the place of node {} (If): {condition} is not needed any more",
        node.label()
    ))
}

/// The branch that appends to the graph's caches, of an If that chooses by an input; none for any other node.
fn chosen(graph: &GraphProto, node: &NodeProto) -> Option<&'static str> {
    let input = |name: &str| graph.input.iter().find(|i| i.name() == name);
    let condition = input(node.input(0)).filter(|_| node.is("", "If"))?;
    let free = graph.initializer.iter().all(|t| t.name() != condition.name());
    if condition.data_type() != Some(DataType::Bool) || !free || condition.dims()?.len() > 1 {
        return None;
    }
    let caches: HashSet<&str> = graph
        .input
        .iter()
        .filter(|i| i.dims().is_some_and(|d| d.len() == 4))
        .map(ValueInfoProto::name)
        .collect();
    let appends = |name: &str| {
        let branch = node.attribute(name).and_then(|a| a.g.as_deref())?;
        Some(
            branch
                .node
                .iter()
                .any(|n| !n.is("", "Shape") && n.input.iter().any(|i| caches.contains(i.as_str()))),
        )
    };
    match (appends("then_branch")?, appends("else_branch")?) {
        (true, false) => Some("then_branch"),
        (false, true) => Some("else_branch"),
        _ => None,
    }
}

/// A branch's nodes, with the names of the If's outputs.
fn inlined(branch: &GraphProto, node: &NodeProto) -> Option<Vec<NodeProto>> {
    let made: HashSet<&str> = branch.node.iter().flat_map(|n| &n.output).map(String::as_str).collect();
    let mut renamed: HashMap<String, String> = HashMap::new();
    let mut copies = Vec::new();
    if branch.output.len() != node.output.len() {
        return None;
    }
    for (inner, outer) in branch.output.iter().map(ValueInfoProto::name).zip(&node.output) {
        if inner == outer {
            continue;
        }
        if !made.contains(inner) || renamed.contains_key(inner) {
            copies.push(NodeProto::new("", "Identity", "", &[inner], &[outer]));
        } else if made.contains(outer.as_str()) {
            return None;
        } else {
            renamed.insert(inner.to_owned(), outer.clone());
        }
    }
    let mut nodes = branch.node.clone();
    let mut open: Vec<&mut NodeProto> = nodes.iter_mut().collect();
    while let Some(node) = open.pop() {
        for name in node.input.iter_mut().chain(&mut node.output) {
            if let Some(new) = renamed.get(name.as_str()) {
                name.clone_from(new);
            }
        }
        if subgraphs(node).next().is_some() {
            for graph in subgraphs_mut(node) {
                for output in &mut graph.output {
                    if let Some(new) = renamed.get(output.name()) {
                        output.name = Some(new.clone());
                    }
                }
                open.extend(&mut graph.node);
            }
        }
    }
    nodes.extend(copies);
    Some(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{onnx::AttributeProto, validate::validate};

    fn merged() -> ModelProto {
        let value = |name: &str| ValueInfoProto::tensor(name, DataType::Float, []);
        let branch = |nodes: Vec<NodeProto>, output: &str| GraphProto {
            node: nodes,
            output: vec![value(output)],
            initializer: vec![TensorProto::floats(&format!("{output}.w"), &[1], &[1.0])],
            ..Default::default()
        };
        let with = branch(
            vec![NodeProto::new("", "Concat", "c", &["past", "x"], &["y_with"])],
            "y_with",
        );
        let without = branch(
            vec![NodeProto::new("", "Neg", "n", &["x"], &["y_without"])],
            "y_without",
        );
        let node = NodeProto::new("", "If", "if", &["use_cache"], &["y"])
            .with(AttributeProto::graph("then_branch", with))
            .with(AttributeProto::graph("else_branch", without));
        let four = || [1.into(), 2.into(), "past".into(), 8.into()];
        let graph = GraphProto {
            node: vec![node],
            input: vec![
                value("x"),
                ValueInfoProto::tensor("past", DataType::Float, four()),
                ValueInfoProto::tensor("use_cache", DataType::Bool, [1.into()]),
            ],
            output: vec![value("y")],
            ..Default::default()
        };
        ModelProto {
            graph: Some(graph),
            ..Default::default()
        }
    }

    #[test]
    fn the_branch_with_a_past_stays() {
        let mut model = merged();
        assert!(unfold(&mut model).unwrap().contains("node if (If)"));
        let graph = model.graph.as_ref().unwrap();
        assert_eq!(graph.node.len(), 1);
        assert_eq!((graph.node[0].name(), graph.node[0].output(0)), ("c", "y"));
        assert!(
            graph.initializer.iter().any(|t| t.name() == "use_cache"),
            "its condition has a default"
        );
        assert_eq!(validate(graph), Ok(()));
        assert_eq!(unfold(&mut model), None);
    }

    #[test]
    fn an_if_that_chooses_something_else_stays() {
        let mut model = merged();
        let node = &mut model.graph.as_mut().unwrap().node[0];
        let other = node.attribute[0].g.clone();
        node.attribute[1].g = other;
        assert_eq!(unfold(&mut model), None, "both branches append");
        let mut model = merged();
        model.graph.as_mut().unwrap().input.pop();
        assert_eq!(unfold(&mut model), None, "the condition is computed");
    }
}
