//! Cache aliases: values that are copies of a cache. Whatever reads an alias's shape reads the cache's instead.

use crate::prove::cache_aliases::copied;
use retro_onnx::{GraphProto, NodeProto, graph::subgraphs_mut};
use std::collections::HashMap;

/// Lets what reads the shape of a cache alias read that of the cache, so that nothing but the old attention needs the alias.
pub fn look_through(graph: &mut GraphProto, caches: &[&str]) {
    let mut sources: HashMap<String, &str> = HashMap::new();
    // Copies of copies, too: as many rounds as there are steps between them.
    loop {
        let source = |n: &NodeProto| {
            let from = copied(n)?;
            let cache = caches.iter().find(|c| **c == from).or_else(|| sources.get(from))?;
            let new = !sources.contains_key(n.output(0)) && !caches.contains(&n.output(0));
            new.then(|| (n.output(0).to_owned(), *cache))
        };
        let found: Vec<_> = graph.node.iter().filter_map(source).collect();
        if found.is_empty() {
            break;
        }
        sources.extend(found);
    }
    let mut open: Vec<&mut NodeProto> = graph.node.iter_mut().collect();
    while let Some(node) = open.pop() {
        if node.is("", "Shape") {
            for input in &mut node.input {
                if let Some(cache) = sources.get(input.as_str()) {
                    *input = (*cache).to_owned();
                }
            }
        }
        open.extend(subgraphs_mut(node).flat_map(|g| &mut g.node));
    }
}
