//! Fresh names: those that nothing in a graph has yet.

use crate::{GraphProto, TensorProto, ValueInfoProto, graph::subgraphs};
use std::collections::HashSet;

/// The names that are taken in a graph and its subgraphs, by values and by nodes.
#[derive(Clone, Debug, Default)]
pub struct FreshNames(HashSet<String>);

impl FreshNames {
    /// The names that a graph and its subgraphs have.
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

    /// Takes a name that something else was given.
    pub fn take(&mut self, name: &str) {
        self.0.insert(name.to_owned());
    }

    /// `base`, or the first of `base_2`, `base_3`, ... that is free. It is taken then.
    pub fn name(&mut self, base: &str) -> String {
        let numbered = (2..).map(|n| format!("{base}_{n}"));
        let mut names = std::iter::once(base.to_owned()).chain(numbered);
        let name = names.find(|n| !self.0.contains(n)).unwrap_or_default();
        self.0.insert(name.clone());
        name
    }
}
