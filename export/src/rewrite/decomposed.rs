//! Attention of several nodes: what comes before the operator's node and after it, and what gives way.

use super::{
    cache_aliases,
    prune::{needed, prune},
    replace,
    sequence_lengths::{SequenceLengths, cast_to},
};
use crate::{
    rules::{self, AttentionMatch, Conversion, Layout},
    settings::Settings,
};
use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use retro_onnx::{AttributeProto, Bytes, DataType, FreshNames, GraphProto, NodeProto, TensorProto};
use std::collections::{HashMap, HashSet};

/// Replaces the attentions that are several nodes, and rebuilds what read the length of their caches.
///
/// # Errors
/// Something else needs what gives way.
pub fn rewrite(graph: &mut GraphProto, conversions: &[Conversion], settings: &Settings, opset: i64) -> Result<()> {
    let spelled: Vec<&Conversion> = conversions.iter().filter(|c| c.matched.replaces.is_some()).collect();
    if spelled.is_empty() {
        return Ok(());
    }
    ensure!(
        opset >= 11,
        "opset {opset} is too old to convert attention of several nodes; export with 11 or newer"
    );
    let was = needed(graph);
    let mut fresh = FreshNames::of(graph);
    let padding = spelled
        .iter()
        .all(|c| c.matched.lengths == rules::LengthSource::FromMask { padding: true });
    let agree = padding
        || spelled
            .iter()
            .all(|c| c.matched.lengths == rules::LengthSource::FromMask { padding: false });
    ensure!(agree, "some layers mask padding and others don't");
    let mut lengths = SequenceLengths::new(graph, &mut fresh, opset, padding)?;
    let mut instead: HashMap<usize, Vec<NodeProto>> = HashMap::new();
    let mut gone: HashSet<&str> = HashSet::new();
    let mut constants = Vec::new();
    for conversion in &spelled {
        let matched = conversion.matched;
        let place = matched.replaces.context("an attention without a place")?;
        let replaced = graph.node.get(place).context("an attention's node is gone")?;
        let nodes = node_with_company(replaced, conversion, settings, &lengths, &mut fresh, &mut constants);
        instead.insert(place, nodes);
        // The source's own appending, and copies of its result.
        gone.extend(
            [
                &matched.total_key,
                &matched.total_value,
                &matched.present_key,
                &matched.present_value,
            ]
            .map(String::as_str),
        );
    }
    let old = std::mem::take(&mut graph.node);
    for (index, node) in old.into_iter().enumerate() {
        match instead.remove(&index) {
            Some(nodes) => graph.node.extend(nodes),
            None if node.output.iter().any(|o| gone.contains(o.as_str())) => {}
            None => graph.node.push(node),
        }
    }
    graph.initializer.append(&mut constants);
    let matches: Vec<&AttentionMatch> = spelled.iter().map(|c| c.matched).collect();
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
    // The total by the name that the operator's node gives it.
    let renamed: HashMap<&str, &str> = matches
        .iter()
        .flat_map(|s| {
            [
                (s.total_key.as_str(), s.present_key.as_str()),
                (s.total_value.as_str(), s.present_value.as_str()),
            ]
        })
        .filter(|(a, b)| a != b)
        .collect();
    for node in &mut graph.node {
        for input in &mut node.input {
            if let Some(name) = renamed.get(input.as_str()) {
                *input = (*name).to_owned();
            }
        }
    }
    let others = lengths.rewire(graph, &mut fresh, &past, &present);
    if let Some((node, cache)) = others.first() {
        bail!("node {node} reads the cache {cache} too, beside the attention: what it needs isn't understood");
    }
    let mut nodes = lengths.nodes;
    nodes.append(&mut graph.node);
    graph.node = nodes;
    let was: HashSet<String> = was.into_iter().chain(needless_lengths(graph)).collect();
    prune(graph, &was);
    Ok(())
}

/// Values of this program that nothing turned out to need.
fn needless_lengths(graph: &GraphProto) -> HashSet<String> {
    let own = graph
        .node
        .iter()
        .flat_map(|n| &n.output)
        .filter(|o| o.starts_with("retro/"));
    own.cloned().collect()
}

/// The operator's node with the nodes around it that bring values into its layout and type.
fn node_with_company(
    replaced: &NodeProto,
    conversion: &Conversion,
    settings: &Settings,
    lengths: &SequenceLengths,
    fresh: &mut FreshNames,
    constants: &mut Vec<TensorProto>,
) -> Vec<NodeProto> {
    let matched = conversion.matched;
    let layer = conversion.attention.layer;
    let mut nodes = Vec::new();
    let mut company = Company {
        layer,
        fresh,
        constants,
        nodes: &mut nodes,
    };
    let (hq, hkv, d) = (matched.q_heads, matched.kv_heads, matched.head_size.unwrap_or(0));
    let mut own = matched.clone();
    let operands = [
        (&matched.query, matched.query_layout, matched.query_type, 0, hq, "query"),
        (&matched.key, matched.key_layout, matched.kv_type, hq * d, hkv, "key"),
        (
            &matched.value,
            matched.value_layout,
            matched.kv_type,
            (hq + hkv) * d,
            hkv,
            "value",
        ),
    ];
    let brought = operands.map(|(name, layout, data_type, start, heads, what)| {
        let mut name = company.flat(name, layout, heads * d, what);
        if !matched.bias.is_empty() {
            name = company.biased(&name, &matched.bias, start, start + heads * d, what);
        }
        if matched.typed(data_type) != matched.data_type {
            name = company.cast(&name, matched.data_type, what);
        }
        name
    });
    [own.query, own.key, own.value] = brought;
    own.seqlens_k = lengths.seqlens_k.clone();
    own.total_sequence_length = lengths.total_sequence_length.clone();
    if let Some(sinks) = &matched.sinks {
        own.head_sink = company.numbers(sinks, matched.data_type, "head_sink");
    }
    let cast_back = matched.typed(matched.output_type) != matched.data_type;
    let direct = matched.output_layout == Layout::Flat && !cast_back;
    if !direct {
        own.output = company.name("output");
    }
    let mut node = NodeProto {
        name: Some(company.name("attention")),
        ..Default::default()
    };
    node.doc_string.clone_from(&replaced.doc_string);
    let of_it = Conversion {
        attention: conversion.attention,
        matched: &own,
        node: conversion.node,
        mode: conversion.mode,
    };
    replace(&mut node, &of_it, settings);
    company.nodes.push(node);
    if !direct {
        company.restore(
            &own.output,
            matched,
            d,
            cast_back.then(|| matched.typed(matched.output_type)),
        );
    }
    nodes
}

/// Makes the nodes around one attention.
pub struct Company<'c> {
    pub layer: usize,
    pub fresh: &'c mut FreshNames,
    pub constants: &'c mut Vec<TensorProto>,
    pub nodes: &'c mut Vec<NodeProto>,
}

impl Company<'_> {
    pub fn name(&mut self, what: &str) -> String {
        self.fresh.name(&format!("retro/layer.{}/{what}", self.layer))
    }

    pub fn ints(&mut self, values: &[i64], what: &str) -> String {
        let name = self.name(what);
        self.constants
            .push(TensorProto::int64s(&name, &[values.len() as i64], values));
        name
    }

    pub fn numbers(&mut self, values: &[f32], data_type: DataType, what: &str) -> String {
        let name = self.name(what);
        let raw: Bytes = match data_type {
            DataType::Float16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            DataType::Bfloat16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        self.constants
            .push(TensorProto::raw(&name, data_type, &[values.len() as i64], raw));
        name
    }

    pub fn add(&mut self, op: &str, inputs: &[&str], what: &str) -> String {
        let name = self.name(what);
        self.nodes.push(NodeProto::new("", op, &name, inputs, &[&name]));
        name
    }

    pub fn attribute(&mut self, attribute: AttributeProto) {
        if let Some(node) = self.nodes.last_mut() {
            node.attribute.push(attribute);
        }
    }

    pub fn cast(&mut self, from: &str, to: DataType, what: &str) -> String {
        let name = self.name(&format!("{what}_cast"));
        self.nodes.push(cast_to(from, to, &name));
        name
    }

    /// A value as `[B, S, width]`.
    fn flat(&mut self, from: &str, layout: Layout, width: i64, what: &str) -> String {
        let from = match layout {
            Layout::Flat => return from.to_owned(),
            Layout::TokenHeads => from.to_owned(),
            Layout::Heads => {
                let moved = self.add("Transpose", &[from], &format!("{what}_by_token"));
                self.attribute(AttributeProto::ints("perm", &[0, 2, 1, 3]));
                moved
            }
        };
        let shape = self.ints(&[0, 0, width], &format!("{what}_shape"));
        self.add("Reshape", &[&from, &shape], what)
    }

    fn biased(&mut self, from: &str, bias: &str, start: i64, end: i64, what: &str) -> String {
        let starts = self.ints(&[start], &format!("{what}_bias_start"));
        let ends = self.ints(&[end], &format!("{what}_bias_end"));
        let part = self.add("Slice", &[bias, &starts, &ends], &format!("{what}_bias"));
        self.add("Add", &[from, &part], &format!("{what}_biased"))
    }

    /// The operator's output in the source's layout and type, by the source's name.
    fn restore(&mut self, from: &str, matched: &AttentionMatch, d: i64, to: Option<DataType>) {
        let mut from = from.to_owned();
        if let Some(to) = to {
            from = self.cast(&from, to, "output");
        }
        if matched.output_layout != Layout::Flat {
            let shape = self.ints(&[0, 0, matched.q_heads, d], "output_shape");
            from = self.add("Reshape", &[&from, &shape], "output_by_head");
            if matched.output_layout == Layout::Heads {
                self.add("Transpose", &[&from], "output_moved");
                self.attribute(AttributeProto::ints("perm", &[0, 2, 1, 3]));
            }
        }
        self.rename_last(&matched.output);
    }

    /// Gives what the last node makes the source's name.
    pub fn rename_last(&mut self, to: &str) {
        if let Some(last) = self.nodes.last_mut() {
            last.output = vec![to.to_owned()];
        }
    }
}
