//! Names that nothing in a graph has yet.

use crate::{GraphProto, TensorProto, ValueInfoProto, graph::subgraphs};
use std::collections::HashSet;

pub struct FreshNames(HashSet<String>);

impl FreshNames {
    pub fn of(graph: &GraphProto) -> Self {
        let mut taken = HashSet::new();
        let mut open = vec![graph];
        while let Some(graph) = open.pop() {
            let values = graph.input.iter().chain(&graph.output).chain(&graph.value_info);
            taken.extend(values.map(ValueInfoProto::name).map(str::to_owned));
            taken.extend(graph.initializer.iter().map(TensorProto::name).map(str::to_owned));
            for node in &graph.node {
                taken.extend(node.input.iter().chain(&node.output).cloned());
                taken.insert(node.name().to_owned());
                open.extend(subgraphs(node));
            }
        }
        Self(taken)
    }

    /// `base`, or `base_2`, `base_3`, ...
    pub fn name(&mut self, base: &str) -> String {
        let numbered = (2..).map(|n| format!("{base}_{n}"));
        let mut names = std::iter::once(base.to_owned()).chain(numbered);
        let name = names.find(|n| !self.0.contains(n)).unwrap_or_default();
        self.0.insert(name.clone());
        name
    }
}
