//! Whether a graph is one that a runtime could load at all: exporters do write files that none can.

use retro_onnx::{GraphProto, NodeProto, TensorProto, ValueInfoProto, graph::subgraphs};
use std::{
    collections::{HashMap, HashSet},
    fmt,
};

/// Faults listed before "and N more".
const SHOWN: usize = 3;
/// Faults after which a graph is not checked further.
const MANY: usize = 1000;

/// Input slots and what they hold.
type Slots = &'static [(usize, &'static str)];

/// Inputs that an operator can't do without. Only operators that exporters were seen to write without them.
const REQUIRED: [(&str, &str, Slots); 3] = [
    (
        "com.microsoft",
        "RotaryEmbedding",
        &[
            (0, "input tensor"),
            (1, "position_ids"),
            (2, "cos_cache"),
            (3, "sin_cache"),
        ],
    ),
    (
        "com.microsoft",
        "GroupQueryAttention",
        &[(0, "query"), (5, "seqlens_k"), (6, "total_sequence_length")],
    ),
    ("", "MatMul", &[(0, "A"), (1, "B")]),
];

/// What is wrong with a graph: its first faults, as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidGraph {
    /// In the order in which they were found; never empty.
    pub faults: Vec<Fault>,
}

impl fmt::Display for InvalidGraph {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let shown: Vec<String> = self.faults.iter().take(SHOWN).map(Fault::to_string).collect();
        f.write_str(&shown.join("; "))?;
        match self.faults.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl std::error::Error for InvalidGraph {}

/// One thing that is wrong with a graph. Nodes are called as in [`NodeProto::label`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// An output of a node is an input of the graph.
    #[error("node {node} makes the value {value}, which is an input of the graph")]
    MakesInput { node: String, value: String },

    /// Two nodes make one value.
    #[error("nodes {first} and {second} both make the value {value}")]
    MadeTwice {
        first: String,
        second: String,
        value: String,
    },

    /// An input that the operator can't do without is absent.
    #[error("node {node} has no {what} (input {slot} of {op_type})")]
    NoInput {
        node: String,
        what: &'static str,
        slot: usize,
        op_type: &'static str,
    },

    /// A node reads what nothing makes.
    #[error("node {node} reads {value}, which doesn't exist")]
    NoValue { node: String, value: String },

    /// A node waits for itself.
    #[error("node {node} needs its own result: the graph has a circle")]
    Circle { node: String },

    /// Nothing makes an output of the graph.
    #[error("nothing makes the graph's output {output}")]
    NoOutput { output: String },
}

/// Checks that every value that is read exists and is made once, that nothing goes in a circle, and that every output of
/// the graph exists. Nodes may stand in any order: some exporters write them so, and ONNX Runtime sorts them.
///
/// # Errors
/// What is wrong.
pub fn validate(graph: &GraphProto) -> Result<(), InvalidGraph> {
    let mut faults = Vec::new();
    check(graph, None, &mut faults);
    if faults.is_empty() {
        Ok(())
    } else {
        Err(InvalidGraph { faults })
    }
}

/// Values of a graph, and of the graphs around it, which it may take values from too.
struct Scope<'s, 'a> {
    names: &'s HashSet<&'a str>,
    outer: Option<&'s Scope<'s, 'a>>,
}

impl Scope<'_, '_> {
    fn has(&self, name: &str) -> bool {
        self.names.contains(name) || self.outer.is_some_and(|outer| outer.has(name))
    }
}

/// Recursion is as deep as the file's nesting, which decoding bounds.
fn check<'a>(graph: &'a GraphProto, outer: Option<&Scope<'_, 'a>>, faults: &mut Vec<Fault>) {
    if faults.len() > MANY {
        return;
    }
    let mut names: HashSet<&str> = graph.input.iter().map(ValueInfoProto::name).collect();
    names.extend(graph.initializer.iter().map(TensorProto::name));
    let sparse = graph.sparse_initializer.iter();
    names.extend(sparse.filter_map(|s| Some(s.values.as_ref()?.name())));
    names.extend(node_outputs(graph, faults));
    let scope = Scope { names: &names, outer };
    for node in &graph.node {
        check_inputs(node, &scope, faults);
        for subgraph in subgraphs(node) {
            check(subgraph, Some(&scope), faults);
        }
    }
    if let Some(node) = in_a_circle(graph) {
        faults.push(Fault::Circle { node: node.label() });
    }
    for output in graph.output.iter().map(ValueInfoProto::name) {
        if !scope.has(output) {
            let output = output.to_owned();
            faults.push(Fault::NoOutput { output });
        }
    }
}

/// The outputs of a graph's nodes: each of one node, and none that is an input of the graph.
fn node_outputs<'a>(graph: &'a GraphProto, faults: &mut Vec<Fault>) -> Vec<&'a str> {
    let inputs: HashSet<&str> = graph.input.iter().map(ValueInfoProto::name).collect();
    let mut producers: HashMap<&str, &NodeProto> = HashMap::new();
    for node in &graph.node {
        for value in node.output.iter().map(String::as_str).filter(|o| !o.is_empty()) {
            if inputs.contains(value) {
                faults.push(Fault::MakesInput {
                    node: node.label(),
                    value: value.to_owned(),
                });
            } else if let Some(first) = producers.insert(value, node) {
                faults.push(Fault::MadeTwice {
                    first: first.label(),
                    second: node.label(),
                    value: value.to_owned(),
                });
            }
        }
    }
    producers.into_keys().collect()
}

/// Checks that a node has the inputs that it can't do without, and that all it reads exists.
fn check_inputs(node: &NodeProto, scope: &Scope, faults: &mut Vec<Fault>) {
    for (domain, op_type, slots) in REQUIRED {
        if node.is(domain, op_type) {
            for (slot, what) in slots.iter().filter(|(slot, _)| node.input(*slot).is_empty()) {
                faults.push(Fault::NoInput {
                    node: node.label(),
                    what,
                    slot: *slot,
                    op_type,
                });
            }
        }
    }
    for value in node.input.iter().map(String::as_str).filter(|i| !i.is_empty()) {
        if !scope.has(value) {
            faults.push(Fault::NoValue {
                node: node.label(),
                value: value.to_owned(),
            });
        }
    }
}

/// A node that can never run because it waits for itself; none if the nodes can be put in order.
fn in_a_circle(graph: &GraphProto) -> Option<&NodeProto> {
    let mut waiting: HashMap<&str, Vec<usize>> = HashMap::new();
    let made: HashSet<&str> = graph.node.iter().flat_map(|n| &n.output).map(String::as_str).collect();
    let mut missing = vec![0usize; graph.node.len()];
    for (index, (node, missing)) in graph.node.iter().zip(&mut missing).enumerate() {
        for input in node.input.iter().filter(|i| !i.is_empty() && made.contains(i.as_str())) {
            waiting.entry(input).or_default().push(index);
            *missing += 1;
        }
    }
    let mut ready: Vec<usize> = (0..missing.len()).filter(|i| missing.get(*i) == Some(&0)).collect();
    while let Some(node) = ready.pop().and_then(|i| graph.node.get(i)) {
        for reader in node.output.iter().filter_map(|o| waiting.remove(o.as_str())).flatten() {
            if let Some(count) = missing.get_mut(reader) {
                *count -= 1;
                if *count == 0 {
                    ready.push(reader);
                }
            }
        }
    }
    missing.iter().position(|m| *m > 0).and_then(|i| graph.node.get(i))
}

#[cfg(test)]
mod tests {
    use super::*;
    use retro_onnx::{AttributeProto, DataType};

    fn graph(nodes: Vec<NodeProto>) -> GraphProto {
        GraphProto {
            node: nodes,
            input: vec![ValueInfoProto::tensor("x", DataType::Float, [])],
            output: vec![ValueInfoProto::tensor("y", DataType::Float, [])],
            ..Default::default()
        }
    }

    #[test]
    fn a_valid_graph_passes_captures_and_all() {
        let inner = GraphProto {
            node: vec![NodeProto::new("", "Neg", "n", &["h"], &["z"])],
            output: vec![ValueInfoProto::tensor("z", DataType::Float, [])],
            ..Default::default()
        };
        let branch = NodeProto::new("", "If", "if", &["x"], &["y"]).with(AttributeProto::graph("then_branch", inner));
        assert_eq!(
            validate(&graph(vec![NodeProto::new("", "Abs", "a", &["x", ""], &["h"]), branch])),
            Ok(())
        );
    }

    #[test]
    fn nodes_may_stand_in_any_order() {
        let later = NodeProto::new("", "Abs", "b", &["h"], &["y"]);
        assert_eq!(
            validate(&graph(vec![later, NodeProto::new("", "Neg", "a", &["x"], &["h"])])),
            Ok(())
        );
    }

    #[test]
    fn faults_are_named() {
        let fault = |nodes| validate(&graph(nodes)).unwrap_err().to_string();
        assert_eq!(fault(vec![]), "nothing makes the graph's output y");
        assert!(fault(vec![NodeProto::new("", "Abs", "a", &["q"], &["y"])]).contains("reads q, which doesn't exist"));
        let circle = vec![
            NodeProto::new("", "Add", "a", &["x", "h"], &["y"]),
            NodeProto::new("", "Neg", "b", &["y"], &["h"]),
        ];
        assert!(fault(circle).contains("node a needs its own result"));
        let twice = ["a", "b"]
            .map(|n| NodeProto::new("", "Abs", n, &["x"], &["y"]))
            .to_vec();
        assert!(fault(twice).contains("nodes a and b both make the value y"));
        let rotary = NodeProto::new("com.microsoft", "RotaryEmbedding", "r", &["x", "x", "", "x"], &["y"]);
        assert!(fault(vec![rotary]).contains("node r has no cos_cache (input 2 of RotaryEmbedding)"));
        let many = (0..9)
            .map(|i| NodeProto::new("", "Abs", "a", &[&format!("q{i}")], &[""]))
            .collect();
        assert!(fault(many).ends_with("and 7 more"));
    }
}
