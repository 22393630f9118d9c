//! Attention of several nodes: the operator's node takes their place, with nodes before and after it that bring values into its
//! layout and type.

use super::{
    Error, cache_aliases,
    operator_node::replace,
    prune::{needed, prune},
    sequence_lengths::SequenceLengths,
};
use crate::{
    rules::{AttentionMatch, Conversion, HeadLayout, LengthSource},
    settings::Settings,
};
use half::{bf16, f16};
use retro_onnx::{Bytes, DataType, GraphBuilder, GraphProto, NodeProto};
use std::collections::{HashMap, HashSet};

/// From here on Slice takes its bounds as inputs, Gather negative indices, and Equal floats.
const OPSET: i64 = 11;
/// `[B, S, H, D]` to `[B, H, S, D]`, and back.
const SWAP_TOKENS_AND_HEADS: [i64; 4] = [0, 2, 1, 3];

/// Replaces the attentions that are several nodes, and rebuilds what read the length of their caches. Gives the name of the lengths
/// that their operators read, if there are any.
///
/// # Errors
/// The opset is too old; the layers' masks differ; the graph has no tokens; something else needs what gives way.
pub fn rewrite(
    graph: &mut GraphProto,
    conversions: &[Conversion],
    settings: &Settings,
    opset: i64,
    builder: &mut GraphBuilder,
) -> Result<Option<String>, Error> {
    let decomposed: Vec<&Conversion> = conversions.iter().filter(|c| c.matched.output_node.is_some()).collect();
    if decomposed.is_empty() {
        return Ok(None);
    }
    if opset < OPSET {
        return Err(Error::OldOpset(opset));
    }
    let was = needed(graph);
    let padding = masks_padding(&decomposed)?;
    let mut lengths = SequenceLengths::new(graph, builder, opset, padding)?;
    replace_nodes(graph, &decomposed, settings, &lengths, builder)?;
    let matches: Vec<&AttentionMatch> = decomposed.iter().map(|c| c.matched).collect();
    let past: Vec<String> = matches
        .iter()
        .flat_map(|s| [s.past_key.clone(), s.past_value.clone()])
        .collect();
    let present: Vec<String> = matches
        .iter()
        .flat_map(|s| [&s.total_key, &s.total_value, &s.present_key, &s.present_value].map(String::clone))
        .collect();
    let caches: Vec<&str> = past.iter().chain(&present).map(String::as_str).collect();
    cache_aliases::look_through(graph, &caches);
    // Once without what is only the old attention's, so that it is not in the way.
    prune(graph, &was);
    read_present_caches(graph, &matches);
    let others = lengths.rewire(graph, builder, &past, &present);
    if let Some((node, cache)) = others.into_iter().next() {
        return Err(Error::CacheReadElsewhere { node, cache });
    }
    let SequenceLengths {
        mut nodes, seqlens_k, ..
    } = lengths;
    nodes.append(&mut graph.node);
    graph.node = nodes;
    let was: HashSet<String> = was.into_iter().chain(needless_lengths(graph)).collect();
    prune(graph, &was);
    Ok(Some(seqlens_k))
}

/// Whether the layers mask padding.
///
/// # Errors
/// Some do and some don't.
fn masks_padding(conversions: &[&Conversion]) -> Result<bool, Error> {
    let all = |padding| {
        let mut conversions = conversions.iter();
        conversions.all(|c| c.matched.length_source == LengthSource::FromMask { padding })
    };
    match (all(true), all(false)) {
        (true, _) => Ok(true),
        (_, true) => Ok(false),
        _ => Err(Error::MixedPadding),
    }
}

/// Puts the operator's nodes where the attentions were, and removes what appended to their caches.
fn replace_nodes(
    graph: &mut GraphProto,
    conversions: &[&Conversion],
    settings: &Settings,
    lengths: &SequenceLengths,
    builder: &mut GraphBuilder,
) -> Result<(), Error> {
    let mut instead: HashMap<usize, Vec<NodeProto>> = HashMap::new();
    let mut gone: HashSet<&str> = HashSet::new();
    for conversion in conversions {
        let matched = conversion.matched;
        let place = matched.output_node.ok_or(Error::NoAttention)?;
        let replaced = graph.node.get(place).ok_or(Error::NoAttention)?;
        instead.insert(place, attention_nodes(replaced, conversion, settings, lengths, builder));
        // The source's own appending, and copies of its result.
        let caches = [
            &matched.total_key,
            &matched.total_value,
            &matched.present_key,
            &matched.present_value,
        ];
        gone.extend(caches.map(String::as_str));
    }
    for (index, node) in std::mem::take(&mut graph.node).into_iter().enumerate() {
        match instead.remove(&index) {
            Some(nodes) => graph.node.extend(nodes),
            None if node.output.iter().any(|o| gone.contains(o.as_str())) => {}
            None => graph.node.push(node),
        }
    }
    graph.initializer.append(&mut builder.take_initializers());
    Ok(())
}

/// Lets what reads a cache before it is returned read it by the name that the operator's node gives it.
fn read_present_caches(graph: &mut GraphProto, matches: &[&AttentionMatch]) {
    let caches = matches.iter().flat_map(|s| {
        [
            (s.total_key.as_str(), s.present_key.as_str()),
            (s.total_value.as_str(), s.present_value.as_str()),
        ]
    });
    let renamed: HashMap<&str, &str> = caches.filter(|(total, present)| total != present).collect();
    for input in graph.node.iter_mut().flat_map(|node| &mut node.input) {
        if let Some(name) = renamed.get(input.as_str()) {
            *input = (*name).to_owned();
        }
    }
}

/// Values of this program that nothing turned out to need.
fn needless_lengths(graph: &GraphProto) -> HashSet<String> {
    let outputs = graph.node.iter().flat_map(|n| &n.output);
    outputs.filter(|o| o.starts_with("retro/")).cloned().collect()
}

/// The operator's node, with nodes before it that bring query, key and value into its layout and type, and nodes after it that
/// bring its output into the source's.
fn attention_nodes(
    replaced: &NodeProto,
    conversion: &Conversion,
    settings: &Settings,
    lengths: &SequenceLengths,
    builder: &mut GraphBuilder,
) -> Vec<NodeProto> {
    let matched = conversion.matched;
    builder.set_prefix(format!("retro/layer.{}/", conversion.attention.layer));
    let (hq, hkv, d) = (matched.q_heads, matched.kv_heads, matched.head_size.unwrap_or(0));
    let mut own = matched.clone();
    let (query, key, value) = (&matched.query, &matched.key, &matched.value);
    let operands = [
        (query, matched.query_layout, matched.query_type, 0, hq, "query"),
        (key, matched.key_layout, matched.kv_type, hq * d, hkv, "key"),
        (
            value,
            matched.value_layout,
            matched.kv_type,
            (hq + hkv) * d,
            hkv,
            "value",
        ),
    ];
    [own.query, own.key, own.value] = operands.map(|(name, layout, data_type, start, heads, what)| {
        let mut name = flatten_heads(builder, name, layout, heads * d, what);
        if !matched.bias.is_empty() {
            name = add_bias(builder, &name, &matched.bias, [start, start + heads * d], what);
        }
        if matched.typed(data_type) != matched.data_type {
            name = builder.cast(&name, matched.data_type, &format!("{what}_cast"));
        }
        name
    });
    own.seqlens_k = lengths.seqlens_k.clone();
    own.total_sequence_length = lengths.total_sequence_length.clone();
    if let Some(sinks) = &matched.sinks {
        own.head_sink = head_sink(builder, sinks, matched.data_type);
    }
    let cast_back = matched.typed(matched.output_type) != matched.data_type;
    let direct = matched.output_layout == HeadLayout::Flat && !cast_back;
    if !direct {
        own.output = builder.fresh_name("output");
    }
    let mut node = NodeProto {
        name: Some(builder.fresh_name("attention")),
        ..Default::default()
    };
    node.doc_string.clone_from(&replaced.doc_string);
    let conversion = Conversion {
        matched: &own,
        ..*conversion
    };
    replace(&mut node, &conversion, settings);
    builder.push(node);
    if !direct {
        let to = cast_back.then(|| matched.typed(matched.output_type));
        restore_output(builder, &own.output, matched, d, to);
    }
    builder.take_nodes()
}

/// A per-head sink, `[H]`, as a constant of the operator's type; returns its name.
pub fn head_sink(builder: &mut GraphBuilder, sinks: &[f32], data_type: DataType) -> String {
    let raw: Bytes = match data_type {
        DataType::Float16 => sinks.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        DataType::Bfloat16 => sinks.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => sinks.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    builder.raw("head_sink", data_type, &[sinks.len() as i64], raw)
}

/// A value as `[B, S, width]`.
fn flatten_heads(builder: &mut GraphBuilder, from: &str, layout: HeadLayout, width: i64, what: &str) -> String {
    let from = match layout {
        HeadLayout::Flat => return from.to_owned(),
        HeadLayout::TokenHeads => from.to_owned(),
        HeadLayout::Heads => {
            let transpose = builder.node("Transpose", &[from]).ints("perm", &SWAP_TOKENS_AND_HEADS);
            transpose.output(&format!("{what}_by_token"))
        }
    };
    let shape = builder.int64s(&format!("{what}_shape"), &[3], &[0, 0, width]);
    builder.node("Reshape", &[&from, &shape]).output(what)
}

/// Adds the elements `start..end` of the packed bias.
fn add_bias(builder: &mut GraphBuilder, from: &str, bias: &str, [start, end]: [i64; 2], what: &str) -> String {
    let starts = builder.int64s(&format!("{what}_bias_start"), &[1], &[start]);
    let ends = builder.int64s(&format!("{what}_bias_end"), &[1], &[end]);
    let slice = builder.node("Slice", &[bias, &starts, &ends]);
    let part = slice.output(&format!("{what}_bias"));
    builder.node("Add", &[from, &part]).output(&format!("{what}_biased"))
}

/// The operator's output in the source's layout and type, by the source's name. `to`: the type, where it is another.
fn restore_output(builder: &mut GraphBuilder, from: &str, matched: &AttentionMatch, d: i64, to: Option<DataType>) {
    let mut from = from.to_owned();
    if let Some(to) = to {
        from = builder.cast(&from, to, "output_cast");
    }
    if matched.output_layout != HeadLayout::Flat {
        let shape = builder.int64s("output_shape", &[4], &[0, 0, matched.q_heads, d]);
        from = builder.node("Reshape", &[&from, &shape]).output("output_by_head");
        if matched.output_layout == HeadLayout::Heads {
            let transpose = builder.node("Transpose", &[&from]).ints("perm", &SWAP_TOKENS_AND_HEADS);
            transpose.output("output_moved");
        }
    }
    builder.rename_last_output(&matched.output);
}
