//! Cross-attention: keys and values that an encoder gave, which the tokens fed don't change.

use super::{
    carried_state::{comes_back, dependents},
    decomposed,
};
use crate::{
    eval::reads,
    prove::{INPUT_IDS, INPUTS_EMBEDS, SampleCalls},
};
use retro_onnx::{NodeProto, graph::GraphView};
use std::collections::HashSet;

/// Whether an attention gives the same for a token whenever it is fed: its keys and values come from inputs that the tokens fed
/// have no part in and that don't come back changed.
pub fn keeps_nothing(samples: &SampleCalls, node: &NodeProto) -> bool {
    let view = samples.view;
    let Some([query, key, value]) = operands(samples, node) else {
        return false;
    };
    let tokens = dependents(view, &[INPUT_IDS, INPUTS_EMBEDS]);
    if !tokens.contains(query) || tokens.contains(key) || tokens.contains(value) {
        return false;
    }
    let inputs = inputs_of(view, &[key, value]);
    !inputs.is_empty() && !inputs.iter().any(|name| comes_back(view, name))
}

/// Queries, keys and values of an attention without a cache inside.
fn operands<'a>(samples: &SampleCalls<'a>, node: &NodeProto) -> Option<[&'a str; 3]> {
    let view = samples.view;
    let node = view.producer(node.output.iter().find(|o| !o.is_empty())?)?;
    let inside: &[usize] = match (node.op_domain(), node.op_type()) {
        ("", "Softmax") => {
            let candidate = decomposed::candidate(view, samples, node).ok()?;
            return Some([candidate.query, candidate.key, candidate.value]);
        }
        ("", "Attention") => &[4, 5, 6],
        ("com.microsoft", "MultiHeadAttention") => &[6, 7, 8, 9],
        _ => return None,
    };
    let own = inside.iter().all(|slot| node.input(*slot).is_empty());
    let operands = [node.input(0), node.input(1), node.input(2)];
    (own && operands.iter().all(|name| !name.is_empty())).then_some(operands)
}

/// The graph's inputs that values depend on.
pub fn inputs_of<'a>(view: &GraphView<'a>, names: &[&'a str]) -> Vec<&'a str> {
    let mut found = Vec::new();
    let mut seen: HashSet<&str> = HashSet::new();
    let mut open = names.to_vec();
    while let Some(name) = open.pop() {
        if name.is_empty() || view.initializer(name).is_some() || !seen.insert(name) {
            continue;
        }
        match view.producer(name) {
            Some(node) => open.extend(reads(node)),
            None if view.is_input(name) => found.push(name),
            None => {}
        }
    }
    found
}
