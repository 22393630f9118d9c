//! The graph as ONNX messages.

use anyhow::Result;
use bytes::Bytes;
use retro_onnx::{
    AttributeProto, DataLocation, Dimension, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, ValueInfoProto,
};

use crate::{
    dtype::Dtype,
    graph::{Attribute, Dim, Graph, Node, Value},
    initializer::Initializer,
};

/// Where an initializer's bytes are.
pub enum Data {
    Inline(Vec<u8>),
    External {
        location: &'static str,
        offset: u64,
        length: u64,
    },
}

/// The versions that genai's builder 0.18 writes.
const IR_VERSION: i64 = 10;
const OPSETS: [(&str, i64); 2] = [("", 22), ("com.microsoft", 1)];

/// The model message; `data` gives each initializer's bytes or their place.
pub fn model(
    graph: &Graph,
    dtype: Dtype,
    mut data: impl FnMut(usize, &Initializer) -> Result<Data>,
) -> Result<ModelProto> {
    let initializer = graph
        .initializers
        .iter()
        .enumerate()
        .map(|(i, init)| Ok(tensor(init, dtype, data(i, init)?)))
        .collect::<Result<_>>()?;
    Ok(ModelProto {
        ir_version: Some(IR_VERSION),
        producer_name: Some(env!("CARGO_PKG_NAME").into()),
        producer_version: Some(env!("CARGO_PKG_VERSION").into()),
        graph: Some(GraphProto {
            node: graph.nodes.iter().map(node).collect(),
            name: Some("main_graph".into()),
            initializer,
            input: graph.inputs.iter().map(value).collect(),
            output: graph.outputs.iter().map(value).collect(),
            ..Default::default()
        }),
        opset_import: OPSETS
            .iter()
            .map(|(domain, version)| OperatorSetIdProto::new(domain, *version))
            .collect(),
        ..Default::default()
    })
}

fn tensor(init: &Initializer, dtype: Dtype, data: Data) -> TensorProto {
    let dims: Vec<i64> = init.dims.iter().map(|&d| d as i64).collect();
    match data {
        Data::Inline(bytes) => TensorProto::raw(&init.name, dtype.onnx(), &dims, Bytes::from(bytes)),
        Data::External {
            location,
            offset,
            length,
        } => TensorProto {
            dims,
            data_type: Some(dtype.onnx().into()),
            name: Some(init.name.clone()),
            external_data: vec![
                StringStringEntryProto::new("location", location),
                StringStringEntryProto::new("offset", offset.to_string()),
                StringStringEntryProto::new("length", length.to_string()),
            ],
            data_location: Some(DataLocation::External.into()),
            ..Default::default()
        },
    }
}

fn node(node: &Node) -> NodeProto {
    let names = |list: &'_ [String]| list.to_vec();
    NodeProto {
        input: names(&node.inputs),
        output: names(&node.outputs),
        attribute: node
            .attributes
            .iter()
            .map(|(name, value)| attribute(name, value))
            .collect(),
        ..NodeProto::new(node.domain, node.op_type, &node.name, &[], &[])
    }
}

fn attribute(name: &str, value: &Attribute) -> AttributeProto {
    match value {
        Attribute::Int(i) => AttributeProto::int(name, *i),
        Attribute::Float(f) => AttributeProto::float(name, *f),
        Attribute::Int64s(values, dims) => AttributeProto::tensor(name, TensorProto::int64s("", dims, values)),
    }
}

fn value(value: &Value) -> ValueInfoProto {
    ValueInfoProto::tensor(
        &value.name,
        value.elem_type,
        value.dims.iter().map(|d| match d {
            Dim::Is(n) => Dimension::from(*n as i64),
            Dim::Named(name) => Dimension::from(*name),
        }),
    )
}
