//! Attention of one node: the operator's takes its place, with the nodes around it that do what the operator doesn't. These are the
//! normalisation of queries and keys, sinks that are no tensor, and casts where the graph's cache has another type than the source's
//! node has. The operator then computes in the cache's type, so that the graph's inputs and outputs stay what they are.

use super::{Error, decomposed::head_sink, operator_node::replace};
use crate::{
    prove::cache_aliases::copied,
    rules::{AttentionMatch, Conversion, QkNorm},
    settings::Settings,
};
use retro_onnx::{DataType, GraphBuilder, GraphProto, NodeProto};
use std::collections::{HashMap, HashSet};

/// From here on Split takes its sizes as an input.
const SPLIT_OPSET: i64 = 13;

/// Puts around the operator's nodes what has to be there, and removes the cache aliases that gave way.
///
/// # Errors
/// An attention is not in the graph.
pub fn surround(
    graph: &mut GraphProto,
    conversions: &[Conversion],
    settings: &Settings,
    opset: i64,
    builder: &mut GraphBuilder,
) -> Result<(), Error> {
    let mut tables = Tables::new();
    for conversion in conversions.iter().filter(|c| needs_more_nodes(c.matched)) {
        let mut nodes = graph.node.iter();
        let place = nodes.position(|n| n.output(0) == conversion.matched.output);
        let place = place.ok_or(Error::NoAttention)?;
        let node = graph.node.get(place).ok_or(Error::NoAttention)?.clone();
        let nodes = attention_nodes(node, conversion, settings, opset, builder, &mut tables);
        graph.node.splice(place..=place, nodes);
    }
    let copies = conversions.iter().flat_map(|c| &c.matched.cache_aliases);
    let gone: HashSet<&str> = copies.map(String::as_str).collect();
    graph
        .node
        .retain(|n| copied(n).is_none() || !gone.contains(n.output(0)));
    graph.value_info.retain(|v| !gone.contains(v.name()));
    graph.initializer.append(&mut builder.take_initializers());
    Ok(())
}

fn needs_more_nodes(matched: &AttentionMatch) -> bool {
    let more = matched.qk_norm.is_some() || matched.sinks.is_some();
    matched.output_node.is_none() && (more || matched.typed(matched.query_type) != matched.data_type)
}

/// Tables of rotary embedding in another type, which all layers share: the table and type, and the name of the cast one.
type Tables = HashMap<(String, DataType), String>;

/// The operator's node with the nodes around it.
fn attention_nodes(
    mut node: NodeProto,
    conversion: &Conversion,
    settings: &Settings,
    opset: i64,
    builder: &mut GraphBuilder,
    tables: &mut Tables,
) -> Vec<NodeProto> {
    let matched = conversion.matched;
    let mut own = matched.clone();
    builder.set_prefix(format!("retro/layer.{}/", conversion.attention.layer));
    if let Some(qk_norm) = &matched.qk_norm {
        normalise(builder, &mut own, qk_norm, opset);
    }
    let to = matched.data_type;
    let casts = matched.typed(matched.query_type) != to;
    if casts {
        for (name, base) in [
            (&mut own.query, "query_cast"),
            (&mut own.key, "key_cast"),
            (&mut own.value, "value_cast"),
            (&mut own.head_sink, "head_sink_cast"),
        ] {
            if !name.is_empty() {
                *name = builder.cast(name, to, base);
            }
        }
        for (name, base) in [
            (&mut own.cos_cache, "cos_cache_cast"),
            (&mut own.sin_cache, "sin_cache_cast"),
        ] {
            if !name.is_empty() {
                let table = tables.entry((name.clone(), to));
                let cast = table.or_insert_with_key(|(from, to)| builder.cast(from, *to, base));
                *name = cast.clone();
            }
        }
        own.output = builder.fresh_name("output");
    }
    if let Some(sinks) = &matched.sinks {
        own.head_sink = head_sink(builder, sinks, to);
    }
    let conversion = Conversion {
        matched: &own,
        ..*conversion
    };
    replace(&mut node, &conversion, settings);
    builder.push(node);
    if casts {
        builder.cast(&own.output, matched.typed(matched.query_type), "output_cast");
        builder.rename_last_output(&matched.output);
    }
    builder.take_nodes()
}

/// Lets an attention have queries, keys and values of their own, the first two normalised.
fn normalise(builder: &mut GraphBuilder, own: &mut AttentionMatch, qk_norm: &QkNorm, opset: i64) {
    let d = own.head_size.unwrap_or(0);
    let (q, kv) = (own.q_heads * d, own.kv_heads * d);
    if own.key.is_empty() {
        [own.query, own.key, own.value] = split(builder, &own.query, [q, kv, kv], opset);
    }
    own.query = rms_norm(builder, &own.query, &qk_norm.query, qk_norm.epsilon, [d, q], "query");
    own.key = rms_norm(builder, &own.key, &qk_norm.key, qk_norm.epsilon, [d, kv], "key");
}

/// Query, key and value of a packed `[B, S, sum of sizes]`.
fn split(builder: &mut GraphBuilder, from: &str, sizes: [i64; 3], opset: i64) -> [String; 3] {
    let names = ["query_alone", "key_alone", "value_alone"].map(|base| builder.fresh_name(base));
    let outputs = [names[0].as_str(), names[1].as_str(), names[2].as_str()];
    let name = builder.fresh_name("split");
    if opset >= SPLIT_OPSET {
        let sizes = builder.int64s("packed_sizes", &[3], &sizes);
        let node = builder.node("Split", &[from, &sizes]).int("axis", -1);
        node.named(&name, &outputs);
    } else {
        let node = builder.node("Split", &[from]).int("axis", -1).ints("split", &sizes);
        node.named(&name, &outputs);
    }
    names
}

/// `[B, S, H*D]`, each head divided by its root mean square, as exporters write it that don't leave it to the attention's node.
fn rms_norm(
    builder: &mut GraphBuilder,
    from: &str,
    weight: &str,
    epsilon: f32,
    [d, width]: [i64; 2],
    what: &str,
) -> String {
    let heads = builder.int64s(&format!("{what}_norm_heads"), &[3], &[0, -1, d]);
    let flat = builder.int64s(&format!("{what}_norm_width"), &[3], &[0, -1, width]);
    let reshape = builder.node("Reshape", &[from, &heads]);
    let by_head = reshape.output(&format!("{what}_by_head"));
    let norm = builder.node("SimplifiedLayerNormalization", &[&by_head, weight]);
    let norm = norm.float("epsilon", epsilon).int("axis", -1).int("stash_type", 1);
    let normed = norm.output(&format!("{what}_norm"));
    let reshape = builder.node("Reshape", &[&normed, &flat]);
    reshape.output(&format!("{what}_normed"))
}
