//! Real exports (tests/data/zoo.tar.xz), written as other exporters or later passes write the same model: the change is made
//! in code, and the result must be the original's.

use std::{collections::HashSet, fs};

use prost::Message;
use retro_onnx::{AttributeProto, DataType, GraphProto, NodeProto, TensorProto, ValueInfoProto, read_model};
use retro_tests::{decoder::Decoder, host, paths};

use crate::{
    convert::{convert, default_page},
    verify::compared,
};

/// A case's folder with its graph changed.
fn variant(case: &str, change: impl FnOnce(&mut GraphProto)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(paths::zoo(case)).unwrap().flatten() {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let path = folder.path().join("model.onnx");
    let mut model = read_model(&path).unwrap().model;
    change(model.graph.as_mut().unwrap());
    // The bytes that were read may be those of the file itself.
    let bytes = model.encode_to_vec();
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    folder
}

fn is_attention(node: &NodeProto) -> bool {
    node.op_type() == "GroupQueryAttention"
}

fn maker<'a>(graph: &'a GraphProto, name: &str) -> &'a NodeProto {
    let mut nodes = graph.node.iter();
    nodes.find(|n| n.output.iter().any(|o| o == name)).expect("a node")
}

/// Lets the attention normalise queries and keys itself, as onnxruntime-genai writes it for CUDA and WebGPU: inputs 14
/// and 15.
fn fuse_norms(graph: &mut GraphProto, packed: bool) {
    let before = graph.clone();
    let mut gone = HashSet::new();
    for node in graph.node.iter_mut().filter(|n| is_attention(n)) {
        node.input.resize(16, String::new());
        let mut split = None;
        for (slot, weight) in [(0, 14), (1, 15)] {
            let flat = maker(&before, &node.input[slot]);
            let norm = maker(&before, flat.input(0));
            let heads = maker(&before, norm.input(0));
            assert_eq!(norm.op_type(), "SimplifiedLayerNormalization");
            gone.extend([flat, norm, heads].map(|n| n.output(0).to_owned()));
            node.input[slot] = heads.input(0).to_owned();
            node.input[weight] = norm.input(1).to_owned();
            let epsilon = norm.attribute("epsilon").expect("an epsilon").f();
            node.attribute.retain(|a| a.name() != "qk_norm_epsilon");
            node.attribute.push(AttributeProto::float("qk_norm_epsilon", epsilon));
            split = Some(maker(&before, heads.input(0)));
        }
        if packed {
            let split = split.expect("a Split");
            assert_eq!(split.op_type(), "Split");
            gone.insert(split.output(0).to_owned());
            node.input[0] = split.input(0).to_owned();
            node.input[1].clear();
            node.input[2].clear();
        }
    }
    graph.node.retain(|n| !gone.contains(n.output(0)));
}

/// A prompt and steps of two tokens.
fn logits(folder: &std::path::Path) -> Vec<f32> {
    let mut model = Decoder::open(folder, true, 64, default_page(), true);
    let tokens: Vec<i64> = (0..30).map(|i| 3 + i * 37 % 200).collect();
    let mut logits = model.feed(&tokens[..20], 20, Some(-1), None);
    for t in 20..30 {
        logits.extend(model.feed(&tokens[t - 1..=t], t + 1, Some(1), None));
    }
    logits
}

/// ONNX Runtime's CPU kernel does not normalise, so the export that has the norm as nodes is the reference.
#[test]
fn norms_of_queries_and_keys_inside_the_attention() {
    let case = "genai-qwen3-fp32-cpu";
    let folder = tempfile::tempdir().unwrap();
    let options = ["--window", "2", "--budget", "1.0", "--all-logits"];
    let target = folder.path().join("as-exported");
    convert(&paths::zoo(case), &target, &options).expect("it converts");
    let expected = logits(&target);
    for packed in [false, true] {
        let source = variant(case, |graph| fuse_norms(graph, packed));
        let target = folder.path().join(format!("packed-{packed}"));
        convert(source.path(), &target, &options).expect("it converts");
        assert!(logits(&target) == expected, "packed: {packed}");
    }
}

/// One more in every denominator.
#[test]
fn a_smooth_softmax() {
    let source = variant("genai-llama-fp32-cpu", |graph| {
        for node in graph.node.iter_mut().filter(|n| is_attention(n)) {
            node.attribute.push(AttributeProto::int("smooth_softmax", 1));
        }
    });
    compared(&source.path().join("model.onnx"));
}

fn cast(from: &str, to: &str, data_type: DataType) -> NodeProto {
    let attribute = AttributeProto::int("to", i64::from(i32::from(data_type)));
    NodeProto::new("", "Cast", &format!("cast_to_{to}"), &[from], &[to]).with(attribute)
}

/// Puts nodes between the graph's caches and the attention.
fn behind(graph: &mut GraphProto, past: impl Fn(&str, &str) -> NodeProto, present: impl Fn(&str, &str) -> NodeProto) {
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for node in graph.node.iter_mut().filter(|n| is_attention(n)) {
        for name in &mut node.input[3..5] {
            let inner = format!("inner.{name}");
            first.push(past(name, &inner));
            *name = inner;
        }
        for name in &mut node.output[1..3] {
            let inner = format!("inner.{name}");
            last.push(present(&inner, name));
            *name = inner;
        }
    }
    graph.node.splice(0..0, first);
    graph.node.extend(last);
}

fn caches_hold(graph: &mut GraphProto, data_type: DataType) {
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        if value.name().starts_with("past_key_values.") || value.name().starts_with("present.") {
            let dims = value.dims().expect("a shape").to_vec();
            *value = ValueInfoProto::tensor(value.name(), data_type, dims);
        }
    }
}

/// What conversions to float16 that keep the types of inputs and outputs make: the attention is float16, its cache
/// float32.
#[test]
fn casts_between_a_cache_and_its_attention() {
    let source = variant("genai-llama-fp16-cuda", |graph| {
        caches_hold(graph, DataType::Float);
        behind(
            graph,
            |from, to| cast(from, to, DataType::Float16),
            |from, to| cast(from, to, DataType::Float),
        );
    });
    // On CUDA ONNX Runtime gives the original's caches inside, whose shapes nobody declares, one buffer, which then is
    // too small.
    if !host::on_gpu() {
        compared(&source.path().join("model.onnx"));
    }
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("converted");
    convert(source.path(), &target, &[]).expect("it converts");
    let graph = read_model(&target.join("model.onnx")).unwrap().model.graph.unwrap();
    let of = |op: &'static str| graph.node.iter().filter(move |n| n.op_type() == op);
    let caches = graph.input.iter().chain(&graph.output);
    let mut caches = caches.filter(|v| v.name().contains("key") || v.name().contains("value"));
    assert!(caches.all(|v| v.data_type() == Some(DataType::Float)));
    for node in of("RetroAttention") {
        assert!(node.input(3).starts_with("past_key_values.") && node.output(1).starts_with("present."));
    }
    let tables: HashSet<&str> = of("RetroAttention").flat_map(|n| [n.input(7), n.input(8)]).collect();
    assert_eq!(tables.len(), 2, "layers share the tables of rotary embedding");
    assert!(!of("Cast").any(|n| n.input(0).contains("past_key") || n.output(0).contains("present")));
}

/// The same the other way round, and copies that change nothing.
#[test]
fn copies_between_a_cache_and_its_attention() {
    let copy = |op: &'static str| {
        move |from: &str, to: &str| {
            let node = NodeProto::new("", op, &format!("copy_to_{to}"), &[from], &[to]);
            if op == "Concat" {
                node.with(AttributeProto::int("axis", 2))
            } else {
                node
            }
        }
    };
    for (before, after) in [("Identity", "Identity"), ("Concat", "Identity")] {
        let source = variant("genai-llama-fp32-cpu", |graph| behind(graph, copy(before), copy(after)));
        compared(&source.path().join("model.onnx"));
    }
}

/// What was dead in the source stays, with what reads it, although it leaves outputs out as living nodes do.
#[test]
fn dead_nodes_that_leave_outputs_out() {
    let source = variant("genai-llama-fp32-cpu", |graph| {
        let norm = graph.node.iter().find(|n| n.output.iter().any(String::is_empty));
        let mut dead = norm.expect("a norm that leaves outputs out").clone();
        for output in dead.output.iter_mut().filter(|o| !o.is_empty()) {
            output.insert_str(0, "dead.");
        }
        dead.name = Some("dead".into());
        let reader = NodeProto::new("", "Shape", "dead_reader", &[dead.output(0)], &["dead.shape"]);
        graph.node.extend([dead, reader]);
        graph.initializer.push(TensorProto::int64s("dead.constant", &[1], &[1]));
    });
    let folder = tempfile::tempdir().unwrap();
    convert(source.path(), &folder.path().join("converted"), &[]).expect("it converts");
}
