//! Proves what an attention is, whatever pattern it was written in.
//!
//! A rule ([`crate::rules`]) names an [`AttentionCandidate`]: queries, keys, values, output, and where the scores are. From
//! there [`prove`] finds the values that the operator can take queries, keys and values from (`operands`), the cache that
//! the keys are appended to (`cache`), the `mask`, the `scale` and softcap, and head `sinks`. In the end the whole
//! attention, on random queries, keys, values and caches, must give the numbers of the operator's formula
//! (`reference`, `output`); only then is it an [`AttentionMatch`]. All is found by running the graph
//! (`crate::eval`) in small calls (`sample_calls`); what must hold in every call is shown from the nodes too
//! (`call_invariant`).
//!
//! Shapes: B sequences, S tokens fed in a call, T tokens in all (past and fed), Hq query heads, Hkv heads of keys and values,
//! C tokens that the cache can hold, D head size.

mod attention_match;
mod cache;
pub(crate) mod cache_aliases;
mod call_invariant;
mod call_shape;
mod candidate;
mod input_sizes;
mod mask;
mod model_inputs;
mod noise;
mod operands;
mod output;
mod probabilities;
mod reference;
mod refusal;
mod sample_calls;
mod scale;
mod sinks;
mod supported_mask;

pub use attention_match::{AttentionMatch, HeadLayout, LengthSource, QkNorm, Rope};
pub use candidate::{AttentionCandidate, NodeCache, ScoreSource, only_supported_attributes};
pub use input_sizes::{Size, named_sizes, sizes, width};
pub use model_inputs::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS};
pub use noise::noise;
pub use refusal::{
    AttributeRefusal, CacheDimensions, CacheRefusal, FunctionPart, InputRefusal, MaskRefusal, NodeRefusal, OperandKind,
    OperandRefusal, OperatorRefusal, ProofRefusal, Refusal, Unread,
};
pub use sample_calls::SampleCalls;

use cache::KvCache;
use mask::find_mask;
use operands::{Operand, Operands, first_call, rope_before};
use output::find_output;
use probabilities::check_probabilities;
use reference::Formula;
use retro_onnx::DataType;
use scale::find_scale;
use sinks::find_sinks;

/// Finds out what an attention is, and proves it.
///
/// # Errors
/// Why it can't be converted, with the value that failed.
pub fn prove<'a>(samples: &SampleCalls<'a>, candidate: AttentionCandidate<'a>) -> Result<AttentionMatch, Refusal> {
    let first = first_call(samples, &candidate)?;
    let env = samples.run(first)?;
    let cache = KvCache::find(samples, &candidate)?;
    let operands = Operands::find(samples, (first, &env), &candidate, cache)?;
    let heads = operands.heads;
    let mask = find_mask(samples, &candidate)?;
    let sinks = candidate
        .sink
        .map(|sink| find_sinks(samples, first, sink, heads.hq))
        .transpose()?;
    check_probabilities(samples, &candidate, heads.hq, mask, sinks.as_deref())?;
    let scale = find_scale(samples, &candidate, &operands)?;
    let formula = Formula { mask, scale, sinks };
    let output = find_output(samples, &candidate, &operands, &formula)?;
    let matched = attention_match(samples, &candidate, &operands, formula, output)?;
    let of = |name: &str| env.get(name).map_or(DataType::Undefined, |t| t.data_type);
    let matched = AttentionMatch {
        query_type: of(&matched.query),
        kv_type: of(&matched.key),
        output_type: of(&matched.output),
        ..matched
    };
    match matched.data_type {
        DataType::Float | DataType::Float16 | DataType::Bfloat16 => Ok(matched),
        found => Err(CacheRefusal::Type { found }.into()),
    }
}

/// What was found and proved, but for the types of values.
fn attention_match<'a>(
    samples: &SampleCalls<'a>,
    candidate: &AttentionCandidate<'a>,
    operands: &Operands<'a>,
    formula: Formula,
    output: Operand<'a>,
) -> Result<AttentionMatch, Refusal> {
    let output_node = samples
        .view
        .producer_index(output.name)
        .ok_or(ProofRefusal::OutputNotMade)?;
    let Operands { cache, heads, qkv } = operands;
    let [query, key, value] = qkv;
    let [present_key, present_value] = cache.presents(samples)?;
    Ok(AttentionMatch {
        query: query.name.to_owned(),
        key: key.name.to_owned(),
        value: value.name.to_owned(),
        query_layout: query.layout,
        key_layout: key.layout,
        value_layout: value.layout,
        output_layout: output.layout,
        past_key: cache.past[0].to_owned(),
        past_value: cache.past[1].to_owned(),
        present_key: present_key.to_owned(),
        present_value: present_value.to_owned(),
        total_key: cache.total[0].to_owned(),
        total_value: cache.total[1].to_owned(),
        output: output.name.to_owned(),
        output_node: Some(output_node),
        length_source: LengthSource::FromMask {
            padding: formula.mask.padding,
        },
        bias: candidate.bias.to_owned(),
        sinks: formula.sinks.map(|s| s.iter().map(|x| *x as f32).collect()),
        q_heads: heads.hq as i64,
        kv_heads: heads.hkv as i64,
        head_size: Some(heads.d as i64),
        data_type: samples.view.data_type(cache.past[0]).unwrap_or_default(),
        scale: formula.scale.scale as f32,
        softcap: formula.scale.softcap as f32,
        rope: rope_before(samples, query.name),
        local_window_size: formula.mask.window.map_or(-1, |w| w as i64),
        ..Default::default()
    })
}
