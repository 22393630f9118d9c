//! Layers that share a cache: named, left by --partial, which converts the others.

use crate::support::{convert, refusal};
use prost::Message;
use retro_onnx::{
    AttributeProto, DataType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto,
};
use serde_json::Value;
use std::fs;

/// Three layers of two heads of 4; the last reads the keys and values of the one before.
fn model() -> ModelProto {
    let f = DataType::Float;
    let mut graph = GraphProto::default();
    let embeds = ["batch".into(), "tokens".into(), 8.into()];
    graph
        .input
        .push(ValueInfoProto::tensor("inputs_embeds", f, embeds.clone()));
    let mask = ["batch".into(), "total".into()];
    graph
        .input
        .push(ValueInfoProto::tensor("attention_mask", DataType::Int64, mask));
    graph.output.push(ValueInfoProto::tensor("logits", f, embeds));
    for (name, number) in [("one", 1), ("zero", 0)] {
        graph.initializer.push(TensorProto::int64s(name, &[], &[number]));
    }
    graph.initializer.push(TensorProto::int64s("rows", &[2], &[-1, 1]));
    graph
        .initializer
        .push(TensorProto::int64s("heads", &[4], &[0, 0, 2, 4]));
    graph.initializer.push(TensorProto::int64s("flat", &[3], &[0, 0, 8]));
    let weights: Vec<f32> = (0..64).map(|i| (i * 37 % 64) as f32 / 64.0 - 0.5).collect();
    graph.initializer.push(TensorProto::floats("w", &[8, 8], &weights));
    let mut add = |op: &str, inputs: &[&str], output: &str, attribute: Option<AttributeProto>| {
        let mut node = NodeProto::new("", op, output, inputs, &[output]);
        node.attribute.extend(attribute);
        graph.node.push(node);
    };
    for (op, inputs, output) in [
        ("Shape", &["attention_mask"][..], "mask_shape"),
        ("Gather", &["mask_shape", "one"], "total"),
        ("Shape", &["inputs_embeds"], "embeds_shape"),
        ("Gather", &["embeds_shape", "one"], "fed"),
        ("Sub", &["total", "fed"], "past"),
        ("Range", &["past", "total", "one"], "queries"),
        ("Reshape", &["queries", "rows"], "queries_down"),
        ("Range", &["zero", "total", "one"], "keys"),
        ("LessOrEqual", &["keys", "queries_down"], "mask"),
    ] {
        add(op, inputs, output, None);
    }
    let turn = || Some(AttributeProto::ints("perm", &[0, 2, 1, 3]));
    let mut hidden = "inputs_embeds".to_owned();
    for layer in 0..3 {
        let own = layer.min(1);
        let kinds: &[&str] = if own == layer {
            &["query", "key", "value"]
        } else {
            &["query"]
        };
        for kind in kinds {
            let [flat, by_token, by_head] = ["flat", "tokens", "heads"].map(|n| format!("{kind}.{layer}.{n}"));
            add("MatMul", &[&hidden, "w"], &flat, None);
            add("Reshape", &[&flat, "heads"], &by_token, None);
            add("Transpose", &[&by_token], &by_head, turn());
            if *kind != "query" {
                let past = format!("past_key_values.{layer}.{kind}");
                let append = Some(AttributeProto::int("axis", 2));
                add("Concat", &[&past, &by_head], &format!("present.{layer}.{kind}"), append);
            }
        }
        let [query, key, value] = [
            format!("query.{layer}.heads"),
            format!("present.{own}.key"),
            format!("present.{own}.value"),
        ];
        let [attended, by_token, next] = ["attended", "tokens", "next"].map(|n| format!("{n}.{layer}"));
        add("Attention", &[&query, &key, &value, "mask"], &attended, None);
        add("Transpose", &[&attended], &by_token, turn());
        let output = if layer == 2 { "logits" } else { &next };
        add("Reshape", &[&by_token, "flat"], output, None);
        hidden = next;
    }
    for layer in 0..2 {
        for kind in ["key", "value"] {
            let dims = |tokens: &str| ["batch".into(), 2.into(), tokens.into(), 4.into()];
            let [past, present] = ["past_key_values", "present"].map(|n| format!("{n}.{layer}.{kind}"));
            graph.input.push(ValueInfoProto::tensor(&past, f, dims("past")));
            graph.output.push(ValueInfoProto::tensor(&present, f, dims("total")));
        }
    }
    graph.name = Some("shared".into());
    ModelProto {
        ir_version: Some(10),
        opset_import: vec![OperatorSetIdProto::new("", 23)],
        graph: Some(graph),
        ..Default::default()
    }
}

#[test]
fn layers_that_share_a_cache_are_named_and_the_others_converted() {
    let folder = tempfile::tempdir().unwrap();
    let [source, target] = ["source.onnx", "converted.onnx"].map(|n| folder.path().join(n));
    fs::write(&source, model().encode_to_vec()).unwrap();
    let [from, to] = [&source, &target].map(|p| p.to_str().unwrap());
    let why = refusal(&[from, "-o", to]);
    assert!(
        why.contains("2 of 3 attention layers can't be converted")
            && why.contains("2 layers share the cache past_key_values.1.key"),
        "{why}"
    );
    assert!(why.contains("--partial"), "{why}");
    let report = convert(&[from, "-o", to, "--partial", "--window", "1", "--json"]);
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["converted_layers"], 1, "{report}");
    let ops = |path| {
        let graph = retro_onnx::read_model(path).unwrap().model.graph.unwrap();
        let ops = graph.node.into_iter().map(|n| n.op_type().to_owned());
        ops.filter(|op| op.ends_with("Attention")).collect::<Vec<_>>()
    };
    assert_eq!(ops(&source), ["Attention"; 3]);
    assert_eq!(ops(&target), ["RetroAttention", "Attention", "Attention"]);
}
