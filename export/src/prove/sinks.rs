//! Head sinks: a logit a head that takes part in the Softmax without a value.

use super::{
    call_invariant::{MAX_CHAIN, is_call_invariant, others_are_call_invariant},
    call_shape::CallShape,
    refusal::{ProofRefusal, Refusal},
    sample_calls::{FAR_CALLS, SampleCalls},
};
use crate::eval::Env;

/// The logits of the sinks, `[Hq]`, the same for all tokens in all calls. `first`: a call in which the attention has shapes.
///
/// # Errors
/// They are not constant, or not one a head.
pub fn find_sinks<'a>(
    samples: &SampleCalls<'a>,
    first: CallShape,
    sink: &'a str,
    query_heads: usize,
) -> Result<Vec<f64>, Refusal> {
    let env = samples.run(first)?;
    let found = logits(first, &env, sink, query_heads)?;
    if is_call_invariant_but_repeated(samples, sink) {
        return Ok(found);
    }
    let slice = samples.program().slice_to(&[sink]);
    for call in FAR_CALLS {
        let env = samples.run_slice(call, &slice)?;
        if env.need(sink).is_ok() && logits(call, &env, sink, query_heads)? != found {
            let name = sink.to_owned();
            return Err(ProofRefusal::SinksChange { name, call }.into());
        }
    }
    Ok(found)
}

/// A logit a head, of `[B, Hq, S, 1]` in one call.
fn logits(call: CallShape, env: &Env, sink: &str, query_heads: usize) -> Result<Vec<f64>, Refusal> {
    let name = || sink.to_owned();
    let data = env.need(sink)?.data.clone();
    let data = data.ok_or_else(|| ProofRefusal::SinksNotConstant { name: name() })?;
    if data.len() != call.b * query_heads * call.s {
        let shape = env.shape(sink).unwrap_or_default().to_vec();
        return Err(ProofRefusal::SinksShape { name: name(), shape }.into());
    }
    let by_head: Vec<f64> = (0..query_heads).map(|head| data[head * call.s]).collect();
    let same = data
        .iter()
        .enumerate()
        .all(|(at, x)| *x == by_head[at / call.s % query_heads]);
    if !same {
        return Err(ProofRefusal::SinksDiffer { name: name() }.into());
    }
    Ok(by_head)
}

/// Whether a value is the same in every call but for how often it is repeated.
fn is_call_invariant_but_repeated(samples: &SampleCalls, name: &str) -> bool {
    let mut name = name;
    for _ in 0..MAX_CHAIN {
        if is_call_invariant(samples, name) {
            return true;
        }
        match samples.view.producer(name) {
            Some(node) if node.op_domain().is_empty() && others_are_call_invariant(samples, node, node.input(0)) => {
                name = node.input(0);
            }
            _ => return false,
        }
    }
    false
}
