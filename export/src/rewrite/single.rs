//! Attention of one node: the operator's takes its place, with the nodes around it that do what the operator doesn't. These are the
//! normalisation of queries and keys, sinks that are no tensor, and casts where the graph's cache has another type than the source's node has. The
//! operator then computes in the cache's type, so that the graph's inputs and outputs stay what they are.

use super::{decomposed::Company, replace};
use crate::{
    prove::cache_aliases::copied,
    rules::{AttentionMatch, Conversion, QkNorm},
    settings::Settings,
};
use anyhow::{Context, Result};
use retro_onnx::{AttributeProto, DataType, FreshNames, GraphProto, NodeProto, TensorProto};
use std::collections::{HashMap, HashSet};

/// From here on Split takes its sizes as an input.
const SPLIT_OPSET: i64 = 13;

/// Puts around the operator's nodes what has to be there, and removes the copies of caches that gave way.
///
/// # Errors
/// An attention is not in the graph.
pub fn surround(graph: &mut GraphProto, conversions: &[Conversion], settings: &Settings, opset: i64) -> Result<()> {
    let mut maker = Maker {
        fresh: FreshNames::of(graph),
        constants: Vec::new(),
        tables: HashMap::new(),
        opset,
    };
    for conversion in conversions.iter().filter(|c| needs_company(c.matched)) {
        let mut nodes = graph.node.iter();
        let place = nodes.position(|n| n.output(0) == conversion.matched.output);
        let place = place.context("an attention's node is gone")?;
        let node = graph.node.get(place).context("an attention's node is gone")?.clone();
        let nodes = maker.with_company(node, conversion, settings);
        graph.node.splice(place..=place, nodes);
    }
    let copies = conversions.iter().flat_map(|c| &c.matched.copies);
    let gone: HashSet<&str> = copies.map(String::as_str).collect();
    graph
        .node
        .retain(|n| copied(n).is_none() || !gone.contains(n.output(0)));
    graph.value_info.retain(|v| !gone.contains(v.name()));
    graph.initializer.append(&mut maker.constants);
    Ok(())
}

fn needs_company(matched: &AttentionMatch) -> bool {
    let more = matched.qk_norm.is_some() || matched.sinks.is_some();
    matched.replaces.is_none() && (more || matched.typed(matched.query_type) != matched.data_type)
}

struct Maker {
    fresh: FreshNames,
    constants: Vec<TensorProto>,
    /// Tables of rotary embedding in another type, which all layers share.
    tables: HashMap<(String, DataType), String>,
    opset: i64,
}

impl Maker {
    fn with_company(&mut self, mut node: NodeProto, conversion: &Conversion, settings: &Settings) -> Vec<NodeProto> {
        let matched = conversion.matched;
        let mut own = matched.clone();
        let mut nodes = Vec::new();
        let mut company = Company {
            layer: conversion.attention.layer,
            fresh: &mut self.fresh,
            constants: &mut self.constants,
            nodes: &mut nodes,
        };
        if let Some(norm) = &matched.qk_norm {
            company.normalised(&mut own, norm, self.opset);
        }
        let to = matched.data_type;
        let casts = matched.typed(matched.query_type) != to;
        if casts {
            for (name, what) in [
                (&mut own.query, "query"),
                (&mut own.key, "key"),
                (&mut own.value, "value"),
                (&mut own.head_sink, "head_sink"),
            ] {
                if !name.is_empty() {
                    *name = company.cast(name, to, what);
                }
            }
            for (name, what) in [(&mut own.cos_cache, "cos_cache"), (&mut own.sin_cache, "sin_cache")] {
                if !name.is_empty() {
                    let table = self.tables.entry((name.clone(), to));
                    *name = table
                        .or_insert_with_key(|(from, to)| company.cast(from, *to, what))
                        .clone();
                }
            }
            own.output = company.name("output");
        }
        if let Some(sinks) = &matched.sinks {
            own.head_sink = company.numbers(sinks, to, "head_sink");
        }
        let conversion = Conversion {
            matched: &own,
            ..*conversion
        };
        replace(&mut node, &conversion, settings);
        company.nodes.push(node);
        if casts {
            company.cast(&own.output, matched.typed(matched.query_type), "output");
            company.rename_last(&matched.output);
        }
        nodes
    }
}

impl Company<'_> {
    /// Lets an attention have queries, keys and values of their own, the first two normalised.
    fn normalised(&mut self, own: &mut AttentionMatch, norm: &QkNorm, opset: i64) {
        let d = own.head_size.unwrap_or(0);
        let (q, kv) = (own.q_heads * d, own.kv_heads * d);
        if own.key.is_empty() {
            [own.query, own.key, own.value] = self.split(&own.query, [q, kv, kv], opset);
        }
        own.query = self.norm(&own.query, &norm.query, norm.epsilon, [d, q], "query");
        own.key = self.norm(&own.key, &norm.key, norm.epsilon, [d, kv], "key");
    }

    fn split(&mut self, from: &str, sizes: [i64; 3], opset: i64) -> [String; 3] {
        let names = ["query", "key", "value"].map(|what| self.name(&format!("{what}_alone")));
        let outputs = [names[0].as_str(), names[1].as_str(), names[2].as_str()];
        let axis = AttributeProto::int("axis", -1);
        let node = if opset >= SPLIT_OPSET {
            let sizes = self.ints(&sizes, "packed_sizes");
            NodeProto::new("", "Split", &self.name("split"), &[from, &sizes], &outputs).with(axis)
        } else {
            let split = NodeProto::new("", "Split", &self.name("split"), &[from], &outputs);
            split.with(axis).with(AttributeProto::ints("split", &sizes))
        };
        self.nodes.push(node);
        names
    }

    /// `[B, S, H*D]`, each head divided by its root mean square, as exporters write it that don't leave it to the attention's node.
    fn norm(&mut self, from: &str, weight: &str, epsilon: f32, [d, width]: [i64; 2], what: &str) -> String {
        let [heads, flat] =
            [(d, "heads"), (width, "width")].map(|(size, of)| self.ints(&[0, -1, size], &format!("{what}_norm_{of}")));
        let heads = self.add("Reshape", &[from, &heads], &format!("{what}_by_head"));
        let normed = self.add(
            "SimplifiedLayerNormalization",
            &[&heads, weight],
            &format!("{what}_norm"),
        );
        self.attribute(AttributeProto::float("epsilon", epsilon));
        self.attribute(AttributeProto::int("axis", -1));
        self.attribute(AttributeProto::int("stash_type", 1));
        self.add("Reshape", &[&normed, &flat], &format!("{what}_normed"))
    }
}
