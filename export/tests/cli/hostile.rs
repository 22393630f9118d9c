//! Files that were made to do harm: an error in bounded time and memory, no panic.

use crate::support::{copy_of, names, refusal};
use prost::Message;
use retro_onnx::{
    AttributeProto, DataType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
    TensorProto, ValueInfoProto, read_model,
};
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// Runs a dry conversion of these bytes; the error. It must come within seconds.
fn error_of(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    fs::write(&path, bytes).unwrap();
    let started = Instant::now();
    let error = refusal(&[path.as_os_str(), "-n".as_ref()]);
    assert!(
        started.elapsed() < Duration::from_secs(60), // on a busy machine
        "{:?}: {error}",
        started.elapsed()
    );
    error
}

fn model(graph: GraphProto) -> ModelProto {
    ModelProto {
        ir_version: Some(10),
        opset_import: vec![OperatorSetIdProto::new("", 18)],
        graph: Some(graph),
        ..Default::default()
    }
}

fn value(name: &str, dims: &[i64]) -> ValueInfoProto {
    ValueInfoProto::tensor(name, DataType::Float, dims.iter().map(|d| (*d).into()))
}

/// A graph with an attention whose mask is computed by `nodes` as "mask".
fn with_mask(mut nodes: Vec<NodeProto>, initializer: Vec<TensorProto>) -> ModelProto {
    let perm = || AttributeProto::ints("perm", &[0, 1, 3, 2]);
    nodes.extend([
        NodeProto::new("", "Concat", "ck", &["past_k", "x"], &["k"]).with(AttributeProto::int("axis", 2)),
        NodeProto::new("", "Concat", "cv", &["past_v", "x"], &["v"]).with(AttributeProto::int("axis", 2)),
        NodeProto::new("", "Transpose", "t", &["k"], &["kt"]).with(perm()),
        NodeProto::new("", "MatMul", "qk", &["x", "kt"], &["s"]),
        NodeProto::new("", "Add", "add", &["s", "mask"], &["masked"]),
        NodeProto::new("", "Softmax", "softmax", &["masked"], &["p"]).with(AttributeProto::int("axis", -1)),
        NodeProto::new("", "MatMul", "pv", &["p", "v"], &["y"]),
        NodeProto::new("", "Identity", "ok", &["k"], &["present_k"]),
        NodeProto::new("", "Identity", "ov", &["v"], &["present_v"]),
    ]);
    let cache =
        |name: &str| ValueInfoProto::tensor(name, DataType::Float, [1.into(), 2.into(), "past".into(), 8.into()]);
    model(GraphProto {
        node: nodes,
        initializer,
        input: vec![value("x", &[1, 2, 1, 8]), cache("past_k"), cache("past_v")],
        output: vec![value("y", &[1, 2, 1, 8]), cache("present_k"), cache("present_v")],
        ..Default::default()
    })
}

#[test]
fn masks_that_are_too_large_to_compute_are_refused() {
    let sizes = |n: i64| TensorProto::int64s("size", &[4], &[n, n, n, n]);
    let huge = NodeProto::new("", "ConstantOfShape", "c", &["size"], &["mask"]);
    for n in [1 << 10, 1 << 30, i64::MAX, -1] {
        let error = error_of(&with_mask(vec![huge.clone()], vec![sizes(n)]).encode_to_vec());
        assert!(error.contains("can't be converted"), "{error}");
    }
    // Each step doubles what the one before made.
    let mut nodes =
        vec![NodeProto::new("", "Constant", "c", &[], &["m0"]).with(AttributeProto::ints("value_ints", &[1; 1024]))];
    for step in 0..60 {
        let (from, to) = (format!("m{step}"), format!("m{}", step + 1));
        nodes.push(NodeProto::new("", "Concat", "d", &[&from, &from], &[&to]).with(AttributeProto::int("axis", 0)));
    }
    nodes.push(NodeProto::new("", "Identity", "last", &["m60"], &["mask"]));
    assert!(error_of(&with_mask(nodes, vec![]).encode_to_vec()).contains("can't be converted"));
    // Many values of a size that each is allowed alone.
    let mut nodes = Vec::new();
    for step in 0..2000 {
        nodes.push(NodeProto::new(
            "",
            "ConstantOfShape",
            "c",
            &["size"],
            &[&format!("m{step}")],
        ));
    }
    nodes.push(NodeProto::new("", "Identity", "last", &["m1999"], &["mask"]));
    assert!(
        error_of(&with_mask(nodes, vec![TensorProto::int64s("size", &[1], &[1 << 22])]).encode_to_vec())
            .contains("can't")
    );
}

#[test]
fn circles_deep_nesting_and_wide_graphs_end_in_an_error() {
    let circle = vec![
        NodeProto::new("", "Neg", "a", &["b"], &["a"]),
        NodeProto::new("", "Neg", "b", &["a"], &["b"]),
        NodeProto::new("", "Identity", "m", &["a"], &["mask"]),
    ];
    assert!(error_of(&with_mask(circle, vec![]).encode_to_vec()).contains("circle"));
    let mut inner = GraphProto {
        output: vec![value("x", &[])],
        ..Default::default()
    };
    for depth in 0..200 {
        let node = NodeProto::new("", "If", "if", &["x"], &["y"]).with(AttributeProto::graph("then_branch", inner));
        inner = GraphProto {
            name: Some(format!("{depth}")),
            node: vec![node],
            ..Default::default()
        };
    }
    assert!(
        error_of(&model(inner).encode_to_vec()).contains("not an ONNX model"),
        "nesting beyond protobuf's own limit"
    );
    // Many branches in a graph with many values: looking each up must not take the product of both.
    let mut graph = GraphProto {
        input: vec![value("x", &[])],
        ..Default::default()
    };
    for n in 0..20_000 {
        graph
            .initializer
            .push(TensorProto::floats(&format!("w{n}"), &[], &[1.0]));
        let branch = GraphProto {
            output: vec![value("x", &[])],
            ..Default::default()
        };
        graph.node.push(
            NodeProto::new("", "If", &format!("if{n}"), &["x"], &[&format!("y{n}")])
                .with(AttributeProto::graph("then_branch", branch)),
        );
    }
    assert!(error_of(&model(graph).encode_to_vec()).contains("no attention"));
}

#[test]
fn lengths_that_lie_are_not_believed() {
    let bytes = with_mask(vec![NodeProto::new("", "Identity", "m", &["x"], &["mask"])], vec![]).encode_to_vec();
    for end in (0..bytes.len()).step_by(37) {
        error_of(&bytes[..end]);
    }
    // A field of 2^63 bytes; a message that says it holds more than the file; tags without an end.
    error_of(&[0x3a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]);
    error_of(&[0x3a, 0x80, 0x80, 0x80, 0x80, 0x08, 0x0a, 0x00]);
    error_of(&[0xff; 64]);
    let absurd = TensorProto {
        dims: vec![i64::MAX, 2, -7],
        ..TensorProto::floats("size", &[4], &[1.0; 4])
    };
    let node = NodeProto::new("", "ConstantOfShape", "c", &["size"], &["mask"]);
    assert!(error_of(&with_mask(vec![node], vec![absurd]).encode_to_vec()).contains("can't be converted"));
}

#[test]
fn a_record_that_was_tampered_with_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = copy_of("genai-llama-fp32-cpu", folder.path());
    let target = folder.path().join("converted");
    crate::support::convert(&[&source, Path::new("-o"), &target]);
    let path = target.join("model.onnx");
    let model = read_model(&path).unwrap().model;
    let back = folder.path().join("back");
    let revert = || refusal(&[target.as_os_str(), "--revert".as_ref(), "-o".as_ref(), back.as_os_str()]);
    let record = model.metadata("retro.original").unwrap().to_owned();
    // Not base64; cut short; a bomb of zeros; gone.
    let bomb = "7MEBAQAAAICQ/q/uCAoAAAAAAAAAAAAAAAAAAAAAAAAA".to_owned();
    for record in [
        "%".to_owned(),
        record[..record.len() / 2 / 4 * 4].to_owned(),
        bomb,
        String::new(),
    ] {
        let mut bad = model.clone();
        bad.set_metadata("retro.original", record);
        fs::write(&path, bad.encode_to_vec()).unwrap();
        let error = revert();
        assert!(error.contains("record"), "{error}");
        assert!(!back.exists());
    }
    let mut bad = model.clone();
    bad.metadata_props
        .retain(|e: &StringStringEntryProto| e.key() != "retro.original");
    fs::write(&path, bad.encode_to_vec()).unwrap();
    assert!(revert().contains("not converted by retro-export"));
    assert_eq!(names(folder.path()), ["converted", "genai-llama-fp32-cpu"]);
}

/// A record that inflates to a gigabyte and more is refused in little memory, and nothing is written.
#[test]
fn a_record_that_inflates_without_end_takes_little_memory() {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use std::io::Write;
    let folder = tempfile::tempdir().unwrap();
    let source = copy_of("genai-llama-fp32-cpu", folder.path());
    let target = folder.path().join("converted");
    crate::support::convert(&[&source, Path::new("-o"), &target]);
    let path = target.join("model.onnx");
    let model = read_model(&path).unwrap().model;
    // Of an honest length and of one that no model has; the latter says the truth about what follows.
    for (length, given) in [(60u64 << 20, 60u64 << 20), (3 << 30, 3 << 30), (100, 3 << 30)] {
        let mut out = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(&[1]).unwrap();
        for number in [length, 0] {
            out.write_all(&number.to_le_bytes()).unwrap();
        }
        out.write_all(&[0]).unwrap();
        out.write_all(&length.to_le_bytes()).unwrap();
        let zeros = vec![0; 1 << 20];
        (0..given >> 20).for_each(|_| out.write_all(&zeros).unwrap());
        let mut bad = model.clone();
        bad.set_metadata("retro.original", STANDARD.encode(out.finish().unwrap()));
        fs::write(&path, bad.encode_to_vec()).unwrap();
        let script = format!("ulimit -v 300000; exec {} \"$@\"", env!("CARGO_BIN_EXE_retro-export"));
        let started = Instant::now();
        let output = std::process::Command::new("bash")
            .args(["-c", &script, "-"])
            .arg(&target)
            .args(["--revert", "-o"])
            .arg(folder.path().join("back"))
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(
            error.starts_with("error: ") && error.lines().count() == 1 && error.contains("record"),
            "{error}"
        );
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
        assert_eq!(names(folder.path()), ["converted", "genai-llama-fp32-cpu"]);
    }
}
