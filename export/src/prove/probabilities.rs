//! What lies between the Softmax and the product with the values. Nothing there may depend on the position: the proof runs
//! that part in small calls only. Where something does (guards for rows without keys), probabilities of equal scores must be
//! equal from afar too.

use super::{
    call_invariant::{is_call_invariant, is_shape_only},
    call_shape::CallShape,
    candidate::{AttentionCandidate, ScoreSource},
    mask::{ScorePlaces, read_places},
    refusal::{ProofRefusal, Refusal},
    sample_calls::{FAR_CALLS, SampleCalls},
    supported_mask::SupportedMask,
};
use crate::eval::{GraphSlice, Tensor};
use retro_onnx::DataType;
use std::collections::HashSet;

/// The values around a Softmax.
struct Path<'a> {
    /// The product of queries and keys.
    product: &'a str,
    /// What the Softmax takes.
    masked: &'a str,
    /// What the values are multiplied with.
    weights: &'a str,
}

/// Checks that what follows the Softmax does not depend on the position. `sinks`: a logit a head.
///
/// # Errors
/// Equal scores give unequal probabilities somewhere, or they can't be computed.
pub fn check_probabilities<'a>(
    samples: &SampleCalls<'a>,
    candidate: &AttentionCandidate<'a>,
    query_heads: usize,
    mask: SupportedMask,
    sinks: Option<&[f64]>,
) -> Result<(), Refusal> {
    let ScoreSource::Decomposed { product, masked } = candidate.scores else {
        return Ok(());
    };
    let node = samples
        .view
        .producer(candidate.output)
        .ok_or(ProofRefusal::OutputNotMade)?;
    let Some(weights) = node.input.iter().map(String::as_str).find(|i| *i != candidate.value) else {
        return Ok(());
    };
    let path = Path {
        product,
        masked,
        weights,
    };
    if reads_call_invariants_alone(samples, candidate, &path) {
        return Ok(());
    }
    let slice = samples.program().slice_to(&[weights]);
    for call in FAR_CALLS {
        if let Some(probabilities) = of_equal_scores(samples, &slice, &path, query_heads, call)? {
            are_even(call, &probabilities, mask, sinks)?;
        }
    }
    Ok(())
}

/// Whether all that the nodes on the path read beside the scores is the same in every call.
fn reads_call_invariants_alone<'a>(samples: &SampleCalls<'a>, candidate: &AttentionCandidate, path: &Path<'a>) -> bool {
    let of_scores = made_of(samples, path.masked, candidate.output);
    let mut seen: HashSet<&str> = HashSet::new();
    let mut open = vec![path.weights];
    while let Some(name) = open.pop() {
        if name == path.masked || !seen.insert(name) {
            continue;
        }
        let Some(node) = samples.view.producer(name) else {
            continue;
        };
        for (slot, input) in node.input.iter().map(String::as_str).enumerate() {
            if of_scores.contains(input) {
                open.push(input);
            } else if !is_shape_only(node, slot) && candidate.sink != Some(input) && !is_call_invariant(samples, input)
            {
                return false;
            }
        }
    }
    true
}

/// All that is made of a value, up to the node that makes `until`.
fn made_of<'a>(samples: &SampleCalls<'a>, from: &'a str, until: &str) -> HashSet<&'a str> {
    let mut made: HashSet<&str> = [from].into();
    let mut open = vec![from];
    while let Some(name) = open.pop() {
        let readers = samples.view.readers(name);
        for reader in readers.filter(|n| !n.output.iter().any(|o| o == until)) {
            open.extend(reader.output.iter().map(String::as_str).filter(|o| made.insert(o)));
        }
    }
    made
}

/// Probabilities `[Hq, S, T]` of scores that are all 0; none in a call that the model doesn't take.
fn of_equal_scores<'a>(
    samples: &SampleCalls<'a>,
    slice: &GraphSlice<'a>,
    path: &Path<'a>,
    query_heads: usize,
    call: CallShape,
) -> Result<Option<Vec<f64>>, Refusal> {
    let env = samples.run_slice(call, slice)?;
    let Ok(shape) = env.shape(path.product).map(<[usize]>::to_vec) else {
        return Ok(None);
    };
    let scores = Tensor::filled(shape, DataType::Float, 0.0)?;
    let tried = samples
        .program()
        .substitute(&env, vec![(path.product, scores)], &[path.weights]);
    let got = tried.need(path.weights)?.clone();
    let full = [1, query_heads, call.s, call.total()];
    let rows = ScorePlaces::Rows((0..call.s).collect());
    let probabilities = (got.shape.iter().product::<usize>() == full.iter().product::<usize>())
        .then(|| read_places(&got, full, &rows))
        .flatten();
    let name = || path.weights.to_owned();
    Ok(Some(probabilities.ok_or_else(|| {
        ProofRefusal::ProbabilitiesNotComputed { call, name: name() }
    })?))
}

/// Every token must give each key that it sees an equal share, less what its head's sink takes.
fn are_even(
    call: CallShape,
    probabilities: &[f64],
    mask: SupportedMask,
    sinks: Option<&[f64]>,
) -> Result<(), ProofRefusal> {
    for (at, row) in probabilities.chunks(call.total()).enumerate() {
        let (head, query) = (at / call.s, call.past + at % call.s);
        let sink = sinks.and_then(|s| s.get(head)).map_or(0.0, |s| s.exp());
        let keys = mask.window.unwrap_or(usize::MAX).min(query + 1);
        let each = 1.0 / (keys as f64 + sink);
        let expected = |key: usize| if key <= query && query - key < keys { each } else { 0.0 };
        if let Some(key) = (0..row.len()).find(|key| (row[*key] - expected(*key)).abs() > 1e-3 * each) {
            return Err(ProofRefusal::Probabilities {
                call,
                query,
                key,
                found: row[key],
                expected: expected(key),
            });
        }
    }
    Ok(())
}
