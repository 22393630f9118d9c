//! Real exports without their weights: the graphs are what tests need, weights are noise of the same spread. An export
//! of a megabyte becomes a few kilobytes. `cargo run --release -p retro-tests --example zoo_graph -- MODEL OUT` makes
//! one.

use std::{collections::BTreeMap, fs, io::Read, path::Path};

use lzma_rust2::XzReader;
use prost::Message;
use retro_onnx::{
    AttributeProto, DataType, GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto, ValueInfoProto,
    read_model,
};
use serde_json::json;

/// Tensors with fewer bytes stay.
const SMALL: usize = 3000;
/// Stands in a tensor's metadata: its numbers were noise of this standard deviation around this mean.
const NOISE: &str = "noise";

/// A graph of `tests/data/zoo-graphs` with weights, as a file.
pub fn restore(packed: &Path, to: &Path) {
    let file = fs::File::open(packed).unwrap_or_else(|e| panic!("{}: {e}", packed.display()));
    let mut bytes = Vec::new();
    XzReader::new(file, false).read_to_end(&mut bytes).expect("an xz file");
    let mut model = ModelProto::decode(bytes.as_slice()).expect("an ONNX model");
    each_tensor(model.graph.as_mut().expect("a graph"), &mut fill);
    fs::write(to, model.encode_to_vec()).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
}

/// The model at a path without its weights.
pub fn strip(path: &Path) -> Vec<u8> {
    let mut model = read_model(path).expect("a model").model;
    let folder = path.parent().expect("a folder").to_owned();
    each_tensor(model.graph.as_mut().expect("a graph"), &mut |tensor| {
        inline(tensor, &folder);
        empty(tensor);
    });
    model.encode_to_vec()
}

fn each_tensor(graph: &mut GraphProto, visit: &mut dyn FnMut(&mut TensorProto)) {
    graph.initializer.iter_mut().for_each(&mut *visit);
    for attribute in graph.node.iter_mut().flat_map(|n| &mut n.attribute) {
        if let Some(tensor) = attribute.t.as_deref_mut() {
            visit(tensor);
        }
        for graph in attribute.g.as_deref_mut().into_iter().chain(&mut attribute.graphs) {
            each_tensor(graph, visit);
        }
    }
}

fn inline(tensor: &mut TensorProto, folder: &Path) {
    if !tensor.is_external() {
        return;
    }
    let entry = |key: &str| {
        tensor
            .external_data
            .iter()
            .find(|e| e.key() == key)
            .map(|e| e.value().to_owned())
    };
    let number = |key: &str| entry(key).map(|v| v.parse::<usize>().expect("a number"));
    let data = fs::read(folder.join(entry("location").expect("a location"))).expect("weights");
    let from = number("offset").unwrap_or(0);
    let len = number("length").expect("a length");
    tensor.raw_data = Some(data[from..from + len].to_vec().into());
    tensor.external_data.clear();
    tensor.data_location = None;
}

fn floats(tensor: &TensorProto) -> Option<Vec<f32>> {
    let raw = tensor.raw_data.as_ref()?;
    Some(match DataType::try_from(tensor.data_type()).ok()? {
        DataType::Float => raw.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        DataType::Float16 => raw
            .as_chunks()
            .0
            .iter()
            .map(|b| half::f16::from_le_bytes(*b).to_f32())
            .collect(),
        DataType::Uint8 => raw.iter().map(|b| f32::from(*b)).collect(),
        DataType::Int8 => raw.iter().map(|b| f32::from(*b as i8)).collect(),
        _ => return None,
    })
}

fn empty(tensor: &mut TensorProto) {
    let Some(numbers) = floats(tensor).filter(|n| n.len() * 2 >= SMALL) else {
        return;
    };
    let n = numbers.len() as f32;
    let mean = numbers.iter().sum::<f32>() / n;
    let spread = (numbers.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt();
    // Tables of angles are not noise: neighbours are alike.
    let steps = numbers.windows(2).map(|w| (w[1] - w[0]).abs()).sum::<f32>() / n;
    if steps < 0.6 * spread || spread == 0.0 {
        return;
    }
    tensor.raw_data = None;
    tensor
        .metadata_props
        .push(StringStringEntryProto::new(NOISE, format!("{mean} {spread}")));
}

fn fill(tensor: &mut TensorProto) {
    let Some(at) = tensor.metadata_props.iter().position(|e| e.key() == NOISE) else {
        return;
    };
    let entry = tensor.metadata_props.remove(at);
    let numbers: Vec<f32> = entry.value().split(' ').map(|x| x.parse().expect("a number")).collect();
    let n: usize = tensor.dims.iter().map(|d| *d as usize).product();
    let mut state = tensor.name().bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Uniform, of standard deviation 1.
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 12f32.sqrt()
    };
    let mut value = || numbers[0] + numbers[1] * next();
    let raw: Vec<u8> = match DataType::try_from(tensor.data_type()).expect("a type") {
        DataType::Float => (0..n).flat_map(|_| value().to_le_bytes()).collect(),
        DataType::Float16 => (0..n)
            .flat_map(|_| half::f16::from_f32(value()).to_le_bytes())
            .collect(),
        DataType::Uint8 => (0..n).map(|_| value().clamp(0.0, 255.0) as u8).collect(),
        DataType::Int8 => (0..n).map(|_| value().clamp(-128.0, 127.0) as i8 as u8).collect(),
        other => panic!("noise of {other:?}"),
    };
    tensor.raw_data = Some(raw.into());
}

/// Declares a graph's input with another element type; a Cast brings it to what the graph works with.
pub fn retype(graph: &mut GraphProto, name: &str, to: DataType) {
    let input = graph.input.iter_mut().find(|i| i.name() == name).expect("the input");
    let from = input.data_type().expect("a type");
    *input = ValueInfoProto::tensor(name, to, input.dims().expect("a shape").to_vec());
    let inner = format!("{name}_as_before");
    for value in graph.node.iter_mut().flat_map(|n| &mut n.input).filter(|v| *v == name) {
        value.clone_from(&inner);
    }
    let cast = NodeProto::new("", "Cast", &inner, &[name], &[&inner]);
    graph.node.insert(0, cast.with(AttributeProto::int("to", from as i64)));
}

/// Reads a model whose weights are in its file, changes its graph and writes it again.
pub fn change(path: &Path, how: impl FnOnce(&mut GraphProto)) {
    let mut model = read_model(path).expect("a model").model;
    how(model.graph.as_mut().expect("a graph"));
    // The bytes that were read may be those of the file itself.
    let bytes = model.encode_to_vec();
    fs::remove_file(path).expect("it can be replaced");
    fs::write(path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// A folder with the case's graph and what a runner needs beside it: a tokenizer whose words are t0, t1, ...
pub fn runnable(case: &str, folder: &Path) {
    fs::create_dir(folder).unwrap();
    restore(
        &crate::paths::data("zoo-graphs").join(format!("{case}.onnx.xz")),
        &folder.join("model.onnx"),
    );
    let vocabulary: BTreeMap<String, usize> = (0..512).map(|i| (format!("t{i}"), i)).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = if case.contains("gpt2") {
        json!({"n_positions": 256, "n_head": 2, "n_embd": 64})
    } else if case.contains("lfm2") {
        json!({"max_position_embeddings": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    } else {
        json!({"max_position_embeddings": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128})
    };
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}
