//! Attention of several nodes: a product of queries and keys, a mask, a Softmax, a product with values. In any order of scaling,
//! with any way of repeating heads and of moving axes, guards against rows without keys, softcap, head sinks.
//!
//! As optimum, `torch.onnx.export` (TorchScript and dynamo) and transformers' exporters write it, where nothing fuses it.

use super::{
    rule::{MatchResult, Rule},
    unsupported,
};
use crate::prove::{AttentionCandidate, ProofRefusal, Refusal, SampleCalls, ScoreSource, prove};
use retro_onnx::{NodeProto, graph::GraphView};

/// The rule.
pub struct Decomposed;

const PRODUCTS: [&str; 3] = ["MatMul", "FusedMatMul", "Einsum"];
/// Nodes between a product and the Softmax, at most.
const MAX_STEPS: usize = 32;

fn is_product(node: &NodeProto) -> bool {
    matches!(node.op_domain(), "" | "com.microsoft") && PRODUCTS.contains(&node.op_type())
}

impl Rule for Decomposed {
    fn name(&self) -> &'static str {
        "decomposed"
    }

    fn match_node<'a>(&self, view: &GraphView<'a>, samples: &SampleCalls<'a>, node: &'a NodeProto) -> MatchResult {
        if !node.is("", "Softmax") || !unsupported::weighs_values(view, node) {
            return MatchResult::NotMine;
        }
        candidate(view, samples, node)
            .and_then(|candidate| prove(samples, candidate))
            .into()
    }
}

/// The attention around a Softmax.
///
/// # Errors
/// Its scores are not one product of queries and keys, or its probabilities weigh more than one value.
pub fn candidate<'a>(
    view: &GraphView<'a>,
    samples: &SampleCalls<'a>,
    softmax: &'a NodeProto,
) -> Result<AttentionCandidate<'a>, Refusal> {
    let Scores { product, masked, sink } = scores(view, samples, softmax)?;
    let (values, weights) = product_with_values(view, softmax)?;
    let value = values.input.iter().map(String::as_str).find(|i| *i != weights);
    Ok(AttentionCandidate {
        query: product.input(0),
        key: product.input(1),
        value: value.ok_or(ProofRefusal::NoValues)?,
        output: values.output(0),
        scores: ScoreSource::Decomposed {
            product: product.output(0),
            masked,
        },
        cache: None,
        bias: "",
        sink,
    })
}

/// What a Softmax takes.
struct Scores<'a> {
    /// The product of queries and keys.
    product: &'a NodeProto,
    /// The scores with the mask, without sinks.
    masked: &'a str,
    sink: Option<&'a str>,
}

/// Goes up from a Softmax to the product of queries and keys.
fn scores<'a>(
    view: &GraphView<'a>,
    samples: &SampleCalls<'a>,
    softmax: &'a NodeProto,
) -> Result<Scores<'a>, ProofRefusal> {
    let program = samples.program();
    let mut masked = softmax.input(0);
    let mut name = masked;
    let mut sink = None;
    for _ in 0..MAX_STEPS {
        let Some(node) = view.producer(name) else { break };
        if is_product(node) {
            return Ok(Scores {
                product: node,
                masked,
                sink,
            });
        }
        let inputs = node.input.iter().map(String::as_str);
        let data: Vec<&str> = inputs.filter(|i| program.is_data_dependent(i)).collect();
        name = match data.as_slice() {
            [one] if node.is("", "Concat") && node.input.len() == 2 && node.input(0) == *one => {
                sink = Some(node.input(1));
                masked = *one;
                *one
            }
            [one] => one,
            // The largest score is taken off before the Softmax.
            [a, b] if node.is("", "Sub") && is_largest(view, b, a) => a,
            [] => return Err(ProofRefusal::ScoresWithoutTokens { name: name.to_owned() }),
            [_, other, ..] => {
                return Err(ProofRefusal::ScoresMixed {
                    node: node.label(),
                    op_type: node.op_type().to_owned(),
                    other: (*other).to_owned(),
                });
            }
        };
    }
    Err(ProofRefusal::NoScores)
}

/// Whether a value is the largest of the numbers of another.
fn is_largest(view: &GraphView, value: &str, of: &str) -> bool {
    view.producer(value)
        .is_some_and(|n| n.is("", "ReduceMax") && n.input(0) == of)
}

/// Goes down from a Softmax to the product with the values, and gives the name that the probabilities have there.
fn product_with_values<'a>(
    view: &GraphView<'a>,
    softmax: &'a NodeProto,
) -> Result<(&'a NodeProto, &'a str), ProofRefusal> {
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
    match *found.as_slice() {
        [one] => Ok(one),
        _ => Err(ProofRefusal::SeveralProducts { products: found.len() }),
    }
}

#[cfg(test)]
mod tests;
