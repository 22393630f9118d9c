//! The proof itself: in a few calls, on random queries, keys, values and caches, the attention must give the numbers of the
//! operator's formula, and its caches must be the past followed by the new tokens.

use super::{
    attention_match::HeadLayout,
    call_invariant::others_are_call_invariant,
    call_shape::CallShape,
    candidate::AttentionCandidate,
    operands::{Operand, Operands, layouts},
    reference::{Formula, ReferenceCall},
    refusal::{CacheRefusal, ProofRefusal, Refusal},
    sample_calls::SampleCalls,
};
use crate::eval::Env;

/// Calls that the attention is tried in.
const CALLS: [CallShape; 4] = [
    CallShape::new(1, 1, 3, 0),
    CallShape::new(2, 3, 4, 2),
    CallShape::new(1, 4, 0, 0),
    CallShape::new(2, 1, 5, 2),
];
/// Numbers this near are equal.
const TOLERANCE: f64 = 1e-4;
/// Values after the attention that are tried as its output.
const MAX_OUTPUTS: usize = 16;

/// Compares an attention with the formula, and finds the value that is its output: of those that have the formula's
/// numbers in every call the farthest, in the simplest layout.
///
/// # Errors
/// Names the number, or the cache, that differs.
pub fn find_output<'a>(
    samples: &SampleCalls<'a>,
    candidate: &AttentionCandidate<'a>,
    operands: &Operands<'a>,
    formula: &Formula,
) -> Result<Operand<'a>, Refusal> {
    let mut names = rearranged(samples, candidate.output);
    let mut best: Option<Operand> = None;
    for call in CALLS {
        let env = samples.run(call)?;
        // Some models take several tokens only without a past.
        match env.need(candidate.output) {
            Err(why) if call.continues() && why.is_size_conflict() => continue,
            output => output?,
        };
        let mut reference = ReferenceCall::new(samples, operands, call, 1.0)?;
        let mut targets = names.clone();
        targets.extend(operands.cache.total);
        let tried = samples.program().substitute(&env, reference.seeds(operands), &targets);
        if !candidate.bias.is_empty() {
            reference.add_bias(&env, candidate.bias)?;
        }
        check_caches(&tried, operands, &reference)?;
        let rows = reference.outputs(formula);
        let dims = [call.b, operands.heads.hq, call.s, operands.heads.d];
        let equal = equal_outputs(&tried, &names, call, &rows, dims)?;
        names.retain(|name| equal.iter().any(|o| o.name == *name));
        let rank = |output: &Operand| {
            let nearness = names.iter().position(|name| *name == output.name).unwrap_or(0);
            (output.layout as u8, usize::MAX - nearness)
        };
        best = equal.into_iter().min_by_key(rank);
    }
    best.ok_or_else(|| ProofRefusal::NoOutput.into())
}

/// Caches of keys and values must be the past followed by the new tokens.
fn check_caches(tried: &Env, operands: &Operands, reference: &ReferenceCall) -> Result<(), Refusal> {
    for (which, total) in operands.cache.total.into_iter().enumerate() {
        let name = || total.to_owned();
        let got = tried.need(total)?.data.as_ref();
        let got = got.ok_or_else(|| ProofRefusal::NotComputed { name: name() })?;
        if !are_equal(&reference.total(which), got) {
            return Err(CacheRefusal::OtherNumbers { total: name() }.into());
        }
    }
    Ok(())
}

/// The values, in each layout that their shape may have, that are equal to the formula's rows.
///
/// # Errors
/// There is none: why the last one is not.
fn equal_outputs<'a>(
    tried: &Env,
    names: &[&'a str],
    call: CallShape,
    rows: &[Option<Vec<f64>>],
    dims: [usize; 4],
) -> Result<Vec<Operand<'a>>, Refusal> {
    let mut why: Option<Refusal> = None;
    let mut equal = Vec::new();
    for name in names {
        let value = match tried.need(name) {
            Ok(value) => value,
            Err(unknown) => {
                why = Some(unknown.into());
                continue;
            }
        };
        let Some(data) = &value.data else {
            let name = (*name).to_owned();
            why = Some(ProofRefusal::NotComputed { name }.into());
            continue;
        };
        for layout in layouts(&value.shape, dims) {
            match first_difference(rows, data, dims, layout) {
                None => equal.push(Operand {
                    name,
                    layout,
                    factor: 1.0,
                }),
                Some(Difference {
                    found,
                    expected,
                    head,
                    token,
                }) => {
                    let difference = ProofRefusal::OutputNumber {
                        call,
                        name: (*name).to_owned(),
                        found,
                        expected,
                        head,
                        token,
                    };
                    why = Some(difference.into());
                }
            }
        }
    }
    if equal.is_empty() {
        let why = Box::new(why.unwrap_or_else(|| ProofRefusal::OutputShape.into()));
        return Err(Refusal::OtherOutput { why });
    }
    Ok(equal)
}

fn are_equal(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= TOLERANCE)
}

/// Where an output is not the formula's.
struct Difference {
    found: f64,
    expected: f64,
    head: usize,
    token: usize,
}

/// The first number of a value that differs from the formula's rows; none when they are equal.
fn first_difference(
    rows: &[Option<Vec<f64>>],
    data: &[f64],
    [_, h, s, d]: [usize; 4],
    layout: HeadLayout,
) -> Option<Difference> {
    for (at, row) in rows.iter().enumerate() {
        let Some(row) = row else { continue };
        let (b, head, token) = (at / (h * s), at / s % h, at % s);
        let from = match layout {
            HeadLayout::Heads => at * d,
            HeadLayout::Flat | HeadLayout::TokenHeads => ((b * s + token) * h + head) * d,
        };
        let got = data.get(from..from + d).unwrap_or_default();
        if !are_equal(row, got) {
            let far = |(a, b): (&f64, &f64)| (a - b).abs() > TOLERANCE;
            let i = row.iter().zip(got).position(far).unwrap_or(0);
            return Some(Difference {
                found: got.get(i).copied().unwrap_or(f64::NAN),
                expected: row.get(i).copied().unwrap_or(f64::NAN),
                head,
                token,
            });
        }
    }
    None
}

/// A value and what is made of it alone, by rearranging and guarding.
fn rearranged<'a>(samples: &SampleCalls<'a>, from: &'a str) -> Vec<&'a str> {
    const KEEPS: [&str; 10] = [
        "Transpose",
        "Reshape",
        "Where",
        "Cast",
        "Identity",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Mul",
        "Dropout",
    ];
    let mut names = vec![from];
    let mut name = from;
    while names.len() < MAX_OUTPUTS && !samples.view.is_output(name) {
        let mut readers = samples.view.readers(name);
        let (Some(node), None) = (readers.next(), readers.next()) else {
            break;
        };
        let keeps = node.op_domain().is_empty() && KEEPS.contains(&node.op_type());
        if !keeps || !others_are_call_invariant(samples, node, name) || node.output(0).is_empty() {
            break;
        }
        name = node.output(0);
        names.push(name);
    }
    names
}
