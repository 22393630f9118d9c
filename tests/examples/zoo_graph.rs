//! Takes the weights out of a model, so that its graph can go into tests/data/zoo-graphs: `zoo_graph MODEL.onnx OUT.onnx`, then
//! `xz -9e OUT.onnx`.

use std::{env, fs, path::Path};

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [model, out] = arguments.as_slice() else {
        eprintln!("usage: zoo_graph MODEL.onnx OUT.onnx");
        std::process::exit(2);
    };
    fs::write(out, retro_tests::zoo::strip(Path::new(model))).expect("the output can be written");
}
