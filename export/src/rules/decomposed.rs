//! Attention spelled out: a product of queries and keys, a mask, a Softmax, a product with values. In any order of scaling,
//! with any way of repeating heads and of moving axes, guards against rows without keys, softcap, head sinks.

use super::{
    Rule, Verdict,
    core::{Core, Scores, site},
    other,
    probe::Probes,
};
use crate::{graph::GraphView, onnx::NodeProto};

/// The rule.
pub struct Decomposed;

const PRODUCTS: [&str; 3] = ["MatMul", "FusedMatMul", "Einsum"];
const MAX_STEPS: usize = 32;

fn is_product(node: &NodeProto) -> bool {
    matches!(node.op_domain(), "" | "com.microsoft") && PRODUCTS.contains(&node.op_type())
}

impl Rule for Decomposed {
    fn name(&self) -> &'static str {
        "decomposed"
    }

    fn look<'a>(&self, view: &GraphView<'a>, probes: &Probes<'a>, node: &'a NodeProto) -> Verdict {
        if !node.is("", "Softmax") || !other::weighs_values(view, node) {
            return Verdict::NotMine;
        }
        match core(view, probes, node).and_then(|core| site(probes, core)) {
            Ok(site) => Verdict::Site(Box::new(site)),
            Err(why) => Verdict::Refused(why),
        }
    }
}

fn core<'a>(view: &GraphView<'a>, probes: &Probes<'a>, softmax: &'a NodeProto) -> Result<Core<'a>, String> {
    let program = probes.program();
    // Up to the product of queries and keys.
    let mut masked = softmax.input(0);
    let mut name = masked;
    let mut sink = None;
    let mut product = None;
    for _ in 0..MAX_STEPS {
        let Some(node) = view.producer(name) else { break };
        if is_product(node) {
            product = Some(node);
            break;
        }
        let data: Vec<&str> = node
            .input
            .iter()
            .map(String::as_str)
            .filter(|i| program.is_data(i))
            .collect();
        name = match data.as_slice() {
            [one] if node.is("", "Concat") && node.input.len() == 2 && node.input(0) == *one => {
                sink = Some(node.input(1));
                masked = *one;
                *one
            }
            [one] => one,
            // The largest score is taken off before the Softmax.
            [a, b]
                if node.is("", "Sub")
                    && view
                        .producer(b)
                        .is_some_and(|n| n.is("", "ReduceMax") && n.input(0) == *a) =>
            {
                a
            }
            [] => return Err(format!("its scores ({name}) do not depend on the tokens")),
            several => {
                return Err(format!(
                    "node {} ({}) mixes its scores with {}, which depends on the tokens",
                    node.label(),
                    node.op_type(),
                    several[1]
                ));
            }
        };
    }
    let product = product.ok_or("there is no product of queries and keys before its Softmax")?;
    // Down to the product with the values.
    let mut weights = vec![softmax.output(0)];
    let mut found: Vec<(&NodeProto, &str)> = Vec::new();
    let mut at = 0;
    while let Some(name) = weights.get(at).copied().filter(|_| at < MAX_STEPS) {
        at += 1;
        for reader in view.readers(name) {
            if is_product(reader) {
                if !found.iter().any(|(n, _)| std::ptr::eq(*n, reader)) {
                    found.push((reader, name));
                }
            } else if !weights.contains(&reader.output(0)) {
                weights.push(reader.output(0));
            }
        }
    }
    let [(values, by)] = found.as_slice() else {
        return Err(format!("its probabilities go into {} products, not one", found.len()));
    };
    let value = values
        .input
        .iter()
        .map(String::as_str)
        .find(|i| i != by)
        .ok_or("it has no values")?;
    Ok(Core {
        query: product.input(0),
        key: product.input(1),
        value,
        output: values.output(0),
        scores: Scores::Spelled {
            product: product.output(0),
            masked,
        },
        cache: None,
        bias: "",
        sink,
    })
}
