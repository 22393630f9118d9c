//! Real exports (tests/data/zoo), written as other exporters or later passes write the same model: the change is made in code, and the
//! result must be the original's.

use std::fs;

use prost::Message;
use retro_export::onnx::{GraphProto, NodeProto, TensorProto, read_model};
use retro_tests::paths;

use crate::convert::convert;

/// A case's folder with its graph changed.
fn variant(case: &str, change: impl FnOnce(&mut GraphProto)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(paths::data("zoo").join(case)).unwrap().flatten() {
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
