//! `com.microsoft::GroupQueryAttention`: the operator's own model, so the node converts by adding state.
//! Slots and attributes as of ONNX Runtime 1.31 (ContribOperators.md); older exporters write fewer.

mod attributes;
mod cache;

use super::rule::{MatchResult, Rule};
use crate::prove::{AttentionMatch, CacheRefusal, NodeRefusal, OperandRefusal, QkNorm, Refusal, Rope, SampleCalls};
use attributes::{GqaAttributes, MAX_SIZE};
use cache::find_cache;
use retro_onnx::{NodeProto, graph::GraphView};

mod slot {
    pub const QUERY: usize = 0;
    pub const KEY: usize = 1;
    pub const VALUE: usize = 2;
    pub const PAST_KEY: usize = 3;
    pub const PAST_VALUE: usize = 4;
    pub const SEQLENS_K: usize = 5;
    pub const TOTAL_SEQUENCE_LENGTH: usize = 6;
    pub const COS_CACHE: usize = 7;
    pub const SIN_CACHE: usize = 8;
    pub const POSITION_IDS: usize = 9;
    pub const ATTENTION_BIAS: usize = 10;
    pub const HEAD_SINK: usize = 11;
    /// Scales of a quantised cache: no counterpart in the operator.
    pub const FOREIGN: [(usize, &str); 2] = [(12, "k_scale"), (13, "v_scale")];
    pub const Q_NORM_WEIGHT: usize = 14;
    pub const K_NORM_WEIGHT: usize = 15;
    pub const COUNT: usize = 16;
}

/// The rule.
pub struct GroupQueryAttention;

/// Whether a node is what this rule is about.
pub(crate) fn is_one(node: &NodeProto) -> bool {
    node.is("com.microsoft", "GroupQueryAttention")
}

/// Measured with ONNX Runtime 1.31.1: a plain node gives the same results when w tokens are fed with the total length of
/// one step; with `sliding_window_cache` it doesn't once the cache is full and rows have shifted.
pub(crate) fn takes_tokens_again(node: &NodeProto) -> bool {
    is_one(node)
        && !node.input(slot::PAST_KEY).is_empty()
        && node.input(slot::ATTENTION_BIAS).is_empty()
        && node.attribute("sliding_window_cache").is_none_or(|a| a.i() == 0)
}

impl Rule for GroupQueryAttention {
    fn name(&self) -> &'static str {
        "gqa"
    }

    fn match_node<'a>(&self, view: &GraphView<'a>, _: &SampleCalls<'a>, node: &'a NodeProto) -> MatchResult {
        if !is_one(node) {
            return MatchResult::NotMine;
        }
        attention_match(view, node).into()
    }
}

fn attention_match(view: &GraphView, node: &NodeProto) -> Result<AttentionMatch, Refusal> {
    let attributes = GqaAttributes::of(node)?;
    check_slots(node, &attributes)?;
    let name = |slot: usize| node.input(slot).to_owned();
    let mut matched = AttentionMatch {
        query: name(slot::QUERY),
        key: name(slot::KEY),
        value: name(slot::VALUE),
        past_key: name(slot::PAST_KEY),
        past_value: name(slot::PAST_VALUE),
        seqlens_k: name(slot::SEQLENS_K),
        total_sequence_length: name(slot::TOTAL_SEQUENCE_LENGTH),
        head_sink: name(slot::HEAD_SINK),
        output: node.output(0).to_owned(),
        present_key: node.output(1).to_owned(),
        present_value: node.output(2).to_owned(),
        q_heads: attributes.num_heads,
        kv_heads: attributes.kv_num_heads,
        scale: attributes.scale,
        softcap: attributes.softcap,
        local_window_size: attributes.local_window_size,
        sliding_cache: attributes.sliding_window_cache,
        ..Default::default()
    };
    matched.data_type = find_cache(view, &mut matched)?;
    matched.qk_norm = qk_norm(node, &attributes)?;
    if attributes.smooth_softmax && matched.head_sink.is_empty() {
        // One more in every denominator: what a sink of 0 adds.
        matched.sinks = Some(vec![0.0; usize::try_from(matched.q_heads).unwrap_or_default()]);
    }
    check_activations(view, &matched)?;
    matched.head_size = head_size(view, &matched)?;
    if matched.qk_norm.is_some() && matched.head_size.is_none() {
        return Err(OperandRefusal::HeadSizeUnknown.into());
    }
    matched.rope = rope(view, node, &attributes, &mut matched)?;
    Ok(matched)
}

/// Refuses inputs and outputs that the operator has no counterpart for, and the absence of those that it needs.
fn check_slots(node: &NodeProto, attributes: &GqaAttributes) -> Result<(), Refusal> {
    let has = |slot: usize| !node.input(slot).is_empty();
    let name = |slot: usize| node.input(slot).to_owned();
    for (slot, input) in slot::FOREIGN {
        if has(slot) {
            let name = name(slot);
            return Err(NodeRefusal::Input { input, slot, name }.into());
        }
    }
    if let Some(more) = node.input.iter().skip(slot::COUNT).find(|i| !i.is_empty()) {
        return Err(NodeRefusal::MoreInputs { name: more.clone() }.into());
    }
    if has(slot::ATTENTION_BIAS) {
        let (slot, name) = (slot::ATTENTION_BIAS, name(slot::ATTENTION_BIAS));
        return Err(NodeRefusal::AttentionBias { slot, name }.into());
    }
    // Without rotary embedding in the node nothing reads the positions.
    if has(slot::POSITION_IDS) && attributes.do_rotary {
        let (slot, name) = (slot::POSITION_IDS, name(slot::POSITION_IDS));
        return Err(NodeRefusal::Positions { slot, name }.into());
    }
    if !has(slot::QUERY) || !has(slot::SEQLENS_K) || !has(slot::TOTAL_SEQUENCE_LENGTH) {
        return Err(NodeRefusal::InputAbsent.into());
    }
    if has(slot::KEY) != has(slot::VALUE) {
        return Err(NodeRefusal::KeyOrValueAlone.into());
    }
    if !has(slot::PAST_KEY) || !has(slot::PAST_VALUE) {
        return Err(CacheRefusal::NodeHasNone.into());
    }
    if let Some(extra) = node.output.iter().skip(3).find(|o| !o.is_empty()) {
        return Err(NodeRefusal::ReturnsScores { name: extra.clone() }.into());
    }
    if (0..3).any(|slot| node.output(slot).is_empty()) {
        return Err(NodeRefusal::OutputAbsent.into());
    }
    Ok(())
}

/// Both weights, or none.
fn qk_norm(node: &NodeProto, attributes: &GqaAttributes) -> Result<Option<QkNorm>, NodeRefusal> {
    let alone = |present, name: &str, missing| NodeRefusal::NormAlone {
        present,
        name: name.to_owned(),
        missing,
    };
    match (node.input(slot::Q_NORM_WEIGHT), node.input(slot::K_NORM_WEIGHT)) {
        ("", "") => Ok(None),
        (query, "") => Err(alone("q_norm_weight", query, "k_norm_weight")),
        ("", key) => Err(alone("k_norm_weight", key, "q_norm_weight")),
        (query, key) => Ok(Some(QkNorm {
            query: query.to_owned(),
            key: key.to_owned(),
            epsilon: attributes.qk_norm_epsilon,
        })),
    }
}

/// Refuses queries, keys, values and weights whose declared shapes or types the operator doesn't take.
fn check_activations(view: &GraphView, matched: &AttentionMatch) -> Result<(), OperandRefusal> {
    for (input, name) in [
        ("query", &matched.query),
        ("key", &matched.key),
        ("value", &matched.value),
    ] {
        if let Some(dims) = view.declared_dims(name).filter(|d| d.len() != 3) {
            return Err(OperandRefusal::Rank {
                input,
                name: name.clone(),
                rank: dims.len(),
            });
        }
    }
    let cache = matched.typed(matched.query_type);
    let norm = matched.qk_norm.as_ref();
    for (input, name) in [
        ("query", Some(&matched.query)),
        ("head_sink", Some(&matched.head_sink)),
        ("q_norm_weight", norm.map(|n| &n.query)),
        ("k_norm_weight", norm.map(|n| &n.key)),
    ] {
        let other_type = name.and_then(|n| view.data_type(n)).filter(|t| *t != cache);
        if let (Some(name), Some(found)) = (name, other_type) {
            return Err(OperandRefusal::Type {
                input,
                name: name.clone(),
                found,
                cache,
            });
        }
    }
    match view.tensor_dims(&matched.head_sink) {
        Some(dims) if dims != [matched.q_heads] => Err(OperandRefusal::HeadSinkShape {
            shape: dims.to_vec(),
            q_heads: matched.q_heads,
        }),
        _ => Ok(()),
    }
}

/// The head size from the cache's declared shape, else from the width of the query, which exporters declare more often.
fn head_size(view: &GraphView, matched: &AttentionMatch) -> Result<Option<i64>, OperandRefusal> {
    let of_cache = |name: &str| view.declared_from_end(name, 1);
    let packed = matched.key.is_empty();
    let heads = if packed {
        matched.q_heads + 2 * matched.kv_heads
    } else {
        matched.q_heads
    };
    let of_width = |name: &str, heads: i64| {
        view.declared_from_end(name, 1)
            .filter(|w| w % heads == 0)
            .map(|w| w / heads)
    };
    let of_weight = |name: &str| match view.tensor_dims(name) {
        Some([size]) => Some(*size),
        _ => None,
    };
    let weights = matched.qk_norm.iter().flat_map(|norm| [&norm.query, &norm.key]);
    let known = [
        (&matched.past_key, of_cache(&matched.past_key)),
        (&matched.past_value, of_cache(&matched.past_value)),
        (&matched.query, of_width(&matched.query, heads)),
        (&matched.output, of_width(&matched.output, matched.q_heads)),
    ];
    let known: Vec<_> = known
        .into_iter()
        .chain(weights.map(|name| (name, of_weight(name))))
        .collect();
    let mut size: Option<(i64, &str)> = None;
    for (name, d) in known.iter().filter_map(|(name, d)| Some((name.as_str(), (*d)?))) {
        match size {
            _ if !(1..=MAX_SIZE).contains(&d) => {
                return Err(OperandRefusal::HeadSize {
                    name: name.to_owned(),
                    size: d,
                });
            }
            Some((first_size, first)) if first_size != d => {
                return Err(OperandRefusal::HeadSizes {
                    first: first.to_owned(),
                    first_size,
                    name: name.to_owned(),
                    size: d,
                });
            }
            _ => size = Some((d, name)),
        }
    }
    Ok(size.map(|(d, _)| d))
}

fn rope(
    view: &GraphView,
    node: &NodeProto,
    attributes: &GqaAttributes,
    matched: &mut AttentionMatch,
) -> Result<Rope, NodeRefusal> {
    if !attributes.do_rotary {
        let before = view
            .producer(&matched.query)
            .is_some_and(|n| n.op_type() == "RotaryEmbedding");
        return Ok(if before { Rope::Before } else { Rope::None });
    }
    let (cos, sin) = (node.input(slot::COS_CACHE), node.input(slot::SIN_CACHE));
    if cos.is_empty() || sin.is_empty() {
        return Err(NodeRefusal::AnglesAbsent);
    }
    let width = view
        .tensor_dims(cos)
        .and_then(|d| d.last().copied())
        .or_else(|| view.declared_from_end(cos, 1));
    let dims = width.and_then(|w| w.checked_mul(2));
    if let (Some(angles), Some(head_size)) = (dims, matched.head_size)
        && (angles < 2 || angles > head_size)
    {
        return Err(NodeRefusal::AnglesTooWide { angles, head_size });
    }
    matched.cos_cache = cos.to_owned();
    matched.sin_cache = sin.to_owned();
    Ok(Rope::Inside {
        interleaved: attributes.rotary_interleaved,
        dims,
    })
}

#[cfg(test)]
mod tests;
