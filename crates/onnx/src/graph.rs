//! An index of a graph: which node makes a value, which ones read it, what is constant.

use crate::{DataType, Dimension, GraphProto, NodeProto, TensorProto, ValueInfoProto};
use std::collections::{HashMap, HashSet};

/// Bound of every walk through a graph.
const MAX_STEPS: usize = 4096;

/// The main graph of a model with its indices.
pub struct GraphView<'a> {
    /// The graph.
    pub graph: &'a GraphProto,
    /// Version of ONNX's own operators, see [`ModelProto::onnx_opset`](crate::ModelProto::onnx_opset).
    pub opset: i64,
    producers: HashMap<&'a str, usize>,
    readers: HashMap<&'a str, Vec<usize>>,
    initializers: HashMap<&'a str, &'a TensorProto>,
    declared: HashMap<&'a str, &'a ValueInfoProto>,
    inputs: HashSet<&'a str>,
    outputs: HashSet<&'a str>,
}

impl<'a> GraphView<'a> {
    /// Indexes a graph whose operators have this version.
    pub fn new(graph: &'a GraphProto, opset: i64) -> Self {
        let mut producers = HashMap::new();
        let mut readers: HashMap<&str, Vec<usize>> = HashMap::new();
        for (index, node) in graph.node.iter().enumerate() {
            for output in node.output.iter().filter(|o| !o.is_empty()) {
                producers.entry(output.as_str()).or_insert(index);
            }
            let mut read: Vec<&str> = node
                .input
                .iter()
                .map(String::as_str)
                .filter(|i| !i.is_empty())
                .collect();
            // A value that a subgraph takes from outside is read by the node that holds the subgraph.
            for subgraph in subgraphs(node) {
                mentioned_names(subgraph, &mut read);
            }
            for name in read {
                let readers = readers.entry(name).or_default();
                if readers.last() != Some(&index) {
                    readers.push(index);
                }
            }
        }
        let declared = graph.value_info.iter().chain(&graph.output).chain(&graph.input);
        let initializers = graph.initializer.iter().map(|t| (t.name(), t));
        Self {
            graph,
            opset,
            producers,
            readers,
            initializers: initializers.collect(),
            declared: declared.map(|v| (v.name(), v)).collect(),
            inputs: graph.input.iter().map(ValueInfoProto::name).collect(),
            outputs: graph.output.iter().map(ValueInfoProto::name).collect(),
        }
    }

    /// The node that makes a value; none for inputs and initializers.
    pub fn producer(&self, name: &str) -> Option<&'a NodeProto> {
        self.producer_index(name).and_then(|i| self.graph.node.get(i))
    }

    /// The index of the node that makes a value.
    pub fn producer_index(&self, name: &str) -> Option<usize> {
        self.producers.get(name).copied()
    }

    /// The nodes that read a value, themselves or in a subgraph, in graph order.
    pub fn readers(&self, name: &str) -> impl Iterator<Item = &'a NodeProto> {
        let indices = self.readers.get(name).map_or(&[][..], Vec::as_slice);
        indices.iter().filter_map(|&i| self.graph.node.get(i))
    }

    /// Their indices, ascending.
    pub fn reader_indices(&self, name: &str) -> &[usize] {
        self.readers.get(name).map_or(&[][..], Vec::as_slice)
    }

    /// The initializer of this name.
    pub fn initializer(&self, name: &str) -> Option<&'a TensorProto> {
        self.initializers.get(name).copied()
    }

    /// Whether an input of the graph has this name.
    pub fn is_input(&self, name: &str) -> bool {
        self.inputs.contains(name)
    }

    /// Whether an output of the graph has this name.
    pub fn is_output(&self, name: &str) -> bool {
        self.outputs.contains(name)
    }

    /// What the graph declares about a value (inputs, outputs, value_info).
    pub fn declared(&self, name: &str) -> Option<&'a ValueInfoProto> {
        self.declared.get(name).copied()
    }

    /// Declared dimensions of a value; those of an initializer are not declared but real, see [`Self::tensor_dims`].
    pub fn declared_dims(&self, name: &str) -> Option<&'a [Dimension]> {
        self.declared(name)?.dims()
    }

    /// The declared fixed size of one dimension; `from_end` 1 is the last.
    pub fn declared_from_end(&self, name: &str, from_end: usize) -> Option<i64> {
        let dims = self.declared_dims(name)?;
        dims.get(dims.len().checked_sub(from_end)?)?.fixed()
    }

    /// Element type of a value: an initializer's own, else the declared one.
    pub fn data_type(&self, name: &str) -> Option<DataType> {
        match self.initializer(name) {
            Some(tensor) => DataType::try_from(tensor.data_type()).ok(),
            None => self.declared(name)?.data_type(),
        }
    }

    /// Dimensions of a constant tensor: an initializer's, or the output's of a Constant node.
    pub fn tensor_dims(&self, name: &str) -> Option<&'a [i64]> {
        if let Some(tensor) = self.initializer(name) {
            return Some(&tensor.dims);
        }
        let node = self.producer(name).filter(|n| n.is("", "Constant"))?;
        let attribute = node.attribute.first()?;
        match attribute.name() {
            "value" => Some(&attribute.t.as_ref()?.dims),
            "value_float" | "value_int" => Some(&[]),
            _ => None,
        }
    }

    /// Whether a value depends on no graph input, so that it has no sequence dimension. Overridable initializers count
    /// as constants: what they may be replaced with has the same shape.
    pub fn is_constant(&self, name: &str) -> bool {
        let mut seen = HashSet::new();
        let mut open = vec![name];
        while let Some(name) = open.pop() {
            if self.initializers.contains_key(name) || !seen.insert(name) {
                continue;
            }
            let Some(node) = self.producer(name) else { return false };
            if seen.len() > MAX_STEPS || subgraphs(node).next().is_some() {
                return false;
            }
            open.extend(node.input.iter().map(String::as_str).filter(|i| !i.is_empty()));
        }
        true
    }

    /// Whether any value, node output or initializer of the graph or its subgraphs has this name.
    pub fn mentions(&self, name: &str) -> bool {
        self.producers.contains_key(name)
            || self.readers.contains_key(name)
            || self.initializers.contains_key(name)
            || self.declared.contains_key(name)
    }
}

/// The graphs in a node's attributes.
pub fn subgraphs(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute
        .iter()
        .flat_map(|a| a.g.as_deref().into_iter().chain(&a.graphs))
}

/// The graphs in a node's attributes, to be changed.
pub fn subgraphs_mut(node: &mut NodeProto) -> impl Iterator<Item = &mut GraphProto> {
    node.attribute
        .iter_mut()
        .flat_map(|a| a.g.as_deref_mut().into_iter().chain(&mut a.graphs))
}

/// Every name that a graph or its subgraphs read, define or return: a superset of what they capture.
fn mentioned_names<'a>(graph: &'a GraphProto, names: &mut Vec<&'a str>) {
    let mut open = vec![graph];
    while let Some(graph) = open.pop() {
        names.extend(graph.initializer.iter().map(TensorProto::name));
        names.extend(graph.output.iter().map(ValueInfoProto::name));
        for node in &graph.node {
            names.extend(
                node.input
                    .iter()
                    .chain(&node.output)
                    .map(String::as_str)
                    .filter(|n| !n.is_empty()),
            );
            open.extend(subgraphs(node));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AttributeProto;

    fn sample() -> GraphProto {
        let inner = GraphProto {
            node: vec![NodeProto::new("", "Neg", "inner", &["h"], &["z"])],
            output: vec![ValueInfoProto::tensor("z", DataType::Float, [])],
            ..Default::default()
        };
        GraphProto {
            node: vec![
                NodeProto::new("", "Transpose", "t", &["w"], &["wt"]),
                NodeProto::new("", "MatMul", "m", &["x", "wt"], &["h"]),
                NodeProto::new("", "If", "i", &["c"], &["y"]).with(AttributeProto::graph("then_branch", inner)),
            ],
            initializer: vec![TensorProto::floats("w", &[2, 3], &[0.; 6])],
            input: vec![ValueInfoProto::tensor(
                "x",
                DataType::Float16,
                ["batch".into(), "3".into()],
            )],
            output: vec![ValueInfoProto::tensor("y", DataType::Float, [])],
            ..Default::default()
        }
    }
    #[test]
    fn producers_readers_and_constants() {
        let graph = sample();
        let view = GraphView::new(&graph, 21);
        assert_eq!(view.producer("h").unwrap().name(), "m");
        assert!(view.producer("x").is_none());
        let readers: Vec<_> = view.readers("h").map(NodeProto::name).collect();
        assert_eq!(readers, ["i"], "a subgraph's capture is a reader");
        assert!(view.is_constant("wt") && view.is_constant("w"));
        assert!(!view.is_constant("h") && !view.is_constant("x") && !view.is_constant("nowhere"));
        assert_eq!(view.tensor_dims("w"), Some(&[2, 3][..]));
        assert_eq!(view.declared_from_end("x", 1), Some(3), "\"3\" is a number");
        assert_eq!(view.declared_from_end("x", 3), None);
        assert_eq!(view.data_type("x"), Some(DataType::Float16));
        assert_eq!(view.data_type("w"), Some(DataType::Float));
    }
}
