//! Attention of one node: the operator's takes its place, with the nodes around it that do what the operator doesn't. These are
//! casts where the graph's cache has another type than the source's node has. The
//! operator then computes in the cache's type, so that the graph's inputs and outputs stay what they are.

use super::{names::Fresh, replace, spelled::Company};
use crate::{
    onnx::{DataType, GraphProto, NodeProto, TensorProto},
    rules::{Conversion, Site, copies::copied},
    settings::Settings,
};
use anyhow::{Context, Result};
use std::collections::{HashMap, HashSet};

/// Puts around the operator's nodes what has to be there, and removes the copies of caches that gave way.
///
/// # Errors
/// A site is not in the graph.
pub fn surround(graph: &mut GraphProto, conversions: &[Conversion], settings: &Settings) -> Result<()> {
    let mut maker = Maker {
        fresh: Fresh::of(graph),
        constants: Vec::new(),
        tables: HashMap::new(),
    };
    for conversion in conversions.iter().filter(|c| needs_company(c.site)) {
        let mut nodes = graph.node.iter();
        let place = nodes.position(|n| n.output(0) == conversion.site.output);
        let place = place.context("a site's node is gone")?;
        let node = graph.node.get(place).context("a site's node is gone")?.clone();
        let nodes = maker.with_company(node, conversion, settings);
        graph.node.splice(place..=place, nodes);
    }
    let copies = conversions.iter().flat_map(|c| &c.site.copies);
    let gone: HashSet<&str> = copies.map(String::as_str).collect();
    graph
        .node
        .retain(|n| copied(n).is_none() || !gone.contains(n.output(0)));
    graph.value_info.retain(|v| !gone.contains(v.name()));
    graph.initializer.append(&mut maker.constants);
    Ok(())
}

fn needs_company(site: &Site) -> bool {
    site.replaces.is_none() && own_type(site) != site.data_type
}

/// The type that the source's node computes in.
fn own_type(site: &Site) -> DataType {
    match site.query_type {
        DataType::Undefined => site.data_type,
        t => t,
    }
}

struct Maker {
    fresh: Fresh,
    constants: Vec<TensorProto>,
    /// Tables of rotary embedding in another type, which all layers share.
    tables: HashMap<(String, DataType), String>,
}

impl Maker {
    fn with_company(&mut self, mut node: NodeProto, conversion: &Conversion, settings: &Settings) -> Vec<NodeProto> {
        let site = conversion.site;
        let mut own = site.clone();
        let mut nodes = Vec::new();
        let mut company = Company {
            layer: conversion.attention.layer,
            fresh: &mut self.fresh,
            constants: &mut self.constants,
            nodes: &mut nodes,
        };
        let to = site.data_type;
        let casts = own_type(site) != to;
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
        let conversion = Conversion {
            site: &own,
            ..*conversion
        };
        replace(&mut node, &conversion, settings);
        company.nodes.push(node);
        if casts {
            company.cast(&own.output, own_type(site), "output");
            company.rename_last(&site.output);
        }
        nodes
    }
}
