//! The model as an ONNX message: the graph with its initializers, inline or in an external data file.

use bytes::Bytes;
use retro_onnx::{DataLocation, GraphProto, ModelProto, OperatorSetIdProto, StringStringEntryProto, TensorProto};

use crate::{dtype::Dtype, error::Result, graph::Llama, initializer::Initializer};

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
    llama: &Llama,
    dtype: Dtype,
    mut data: impl FnMut(usize, &Initializer) -> Result<Data>,
) -> Result<ModelProto> {
    let initializer = llama
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
            initializer,
            ..llama.graph.clone()
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
        Data::Inline(bytes) => TensorProto::raw(&init.name, init.data_type(dtype), &dims, Bytes::from(bytes)),
        Data::External {
            location,
            offset,
            length,
        } => TensorProto {
            dims,
            data_type: Some(init.data_type(dtype).into()),
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
