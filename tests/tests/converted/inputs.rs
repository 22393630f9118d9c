//! `retro-export --verify` with models of fixed sizes, and ones that take more than tokens, mask and positions: the
//! comparison feeds them, or says what it can't.

use std::{fs, path::Path};

use prost::Message;
use retro_onnx::{AttributeProto, DataType, Dimension, GraphProto, NodeProto, TensorProto, ValueInfoProto, read_model};
use retro_tests::{host, paths, zoo};
use serde_json::Value;

use crate::verify::{export_with, ways};

const GQA: &str = "genai-llama-fp32-cpu";
const DECOMPOSED: &str = "optimum-llama-fp32";

/// A model of the zoo, changed and written with its weights inside, verified; its report.
fn verified(case: &str, options: &[&str], change: impl FnOnce(&mut GraphProto)) -> Result<Value, String> {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model.onnx");
    if case == GQA {
        for entry in fs::read_dir(paths::zoo(case)).unwrap().flatten() {
            fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
    } else {
        zoo::restore(&paths::data("zoo-graphs").join(format!("{case}.onnx.xz")), &source);
    }
    let mut model = read_model(&source).unwrap().model;
    change(model.graph.as_mut().expect("a graph"));
    let bytes = model.encode_to_vec();
    fs::remove_file(&source).unwrap();
    fs::write(&source, bytes).unwrap();
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("converted.onnx");
    let (mut report, error) = export_with(&source, &target, &host::device().to_string(), options);
    if !error.is_empty() {
        return Err(format!("{error}{report}"));
    }
    let verification = report["verification"].take();
    println!("{verification:#}");
    assert_eq!(verification["passed"], true, "{verification}");
    Ok(verification)
}

fn input<'g>(graph: &'g mut GraphProto, name: &str) -> &'g mut ValueInfoProto {
    let mut inputs = graph.input.iter_mut();
    inputs
        .find(|i| i.name() == name)
        .unwrap_or_else(|| panic!("an input {name}"))
}

/// Gives one dimension of some inputs and outputs another size.
fn size(graph: &mut GraphProto, names: &[&str], axis: usize, size: Dimension) {
    let values = graph.input.iter_mut().chain(&mut graph.output);
    for value in values.filter(|v| names.iter().any(|n| v.name().contains(n))) {
        let dims = value.dims_mut().expect("a shape");
        if let Some(dim) = dims.get_mut(axis) {
            *dim = size.clone();
        }
    }
}

const CACHES: [&str; 2] = ["past_key_values", "present"];

#[test]
fn a_fixed_number_of_sequences() {
    for (case, batch) in [(GQA, 1), (GQA, 2), (GQA, 3), (DECOMPOSED, 1), (DECOMPOSED, 2)] {
        let names = [
            "input_ids",
            "attention_mask",
            "position_ids",
            "past_key_values",
            "present",
            "logits",
        ];
        let made = verified(case, &[], |graph| size(graph, &names, 0, batch.into())).unwrap();
        let (compared, skipped) = (ways(&made["compared"]), ways(&made["skipped"]));
        assert!(compared.iter().all(|(_, b, _)| *b == batch as u64), "{case}: {made}");
        for window in [1, 2, 4] {
            for prompt in ["whole", "chunked"] {
                assert!(compared.contains(&(window, batch as u64, prompt)), "{case}: {made}");
            }
            assert_eq!(
                compared.contains(&(window, batch as u64, "padded")),
                batch > 1,
                "{case}: {made}"
            );
        }
        assert!(!skipped.is_empty(), "{made}");
    }
}

#[test]
fn a_fixed_number_of_tokens() {
    let names = ["input_ids", "position_ids"];
    for case in [GQA, DECOMPOSED] {
        let made = verified(case, &["--window", "1"], |graph| size(graph, &names, 1, 8.into())).unwrap();
        assert!(ways(&made["compared"]).contains(&(1, 1, "chunked")), "{made}");
    }
}

/// Caches that are as large as they will be, and a mask as wide.
#[test]
fn fixed_capacities() {
    for capacity in [64, 20] {
        let made = verified(GQA, &[], |graph| {
            size(graph, &CACHES, 2, capacity.into());
            size(graph, &["attention_mask"], 1, capacity.into());
        });
        let made = made.unwrap();
        let compared = ways(&made["compared"]);
        for window in [1, 2, 4] {
            assert!(compared.contains(&(window, 1, "whole")), "{made}");
        }
    }
    let made = verified(GQA, &[], |graph| size(graph, &CACHES, 2, 48.into())).unwrap();
    assert!(ways(&made["compared"]).contains(&(4, 2, "whole")), "{made}");
}

/// Takes the table of embeddings out: the model is fed what came out of it.
fn embeds(graph: &mut GraphProto, dims: [Dimension; 3]) {
    let place = graph
        .node
        .iter()
        .position(|n| n.op_type() == "Gather" && n.input(1) == "input_ids");
    let gather = graph.node.remove(place.expect("a table of embeddings"));
    for node in &mut graph.node {
        for name in node.input.iter_mut().filter(|i| *i == gather.output(0)) {
            *name = "inputs_embeds".to_owned();
        }
    }
    // What reads the ids' shape reads that of the embeddings.
    let lengths = graph.node.iter_mut().filter(|n| n.op_type() == "Shape");
    lengths
        .flat_map(|n| &mut n.input)
        .filter(|i| *i == "input_ids")
        .for_each(|i| *i = "inputs_embeds".to_owned());
    assert!(graph.node.iter().all(|n| n.input.iter().all(|i| i != "input_ids")));
    let place = graph
        .input
        .iter()
        .position(|i| i.name() == "input_ids")
        .expect("input_ids");
    graph.input[place] = ValueInfoProto::tensor("inputs_embeds", DataType::Float, dims);
}

#[test]
fn embeddings_in_place_of_tokens() {
    for case in [GQA, DECOMPOSED] {
        for width in [Dimension::from(128), Dimension::from("hidden_size")] {
            let made = verified(case, &[], |graph| {
                let [batch, tokens] = input(graph, "input_ids").dims().expect("a shape") else {
                    panic!("ids of two dimensions")
                };
                let dims = [batch.clone(), tokens.clone(), width.clone()];
                embeds(graph, dims);
            });
            let made = made.unwrap();
            for way in [(1, 1, "whole"), (4, 1, "chunked"), (2, 2, "padded")] {
                assert!(ways(&made["compared"]).contains(&way), "{made}");
            }
        }
    }
}

/// A graph that keeps its window keeps embeddings, if it knows how large they are.
#[test]
fn embeddings_of_a_window_in_the_graph() {
    let options = ["--window", "3", "--window-in-graph"];
    for case in [GQA, DECOMPOSED] {
        let kept = |width: Dimension| {
            verified(case, &options, |graph| {
                let [batch, tokens] = input(graph, "input_ids").dims().expect("a shape") else {
                    panic!("ids of two dimensions")
                };
                let dims = [batch.clone(), tokens.clone(), width];
                embeds(graph, dims);
            })
        };
        let made = kept(128.into()).unwrap();
        for way in [(3, 1, "whole"), (3, 2, "padded"), (4, 1, "chunked")] {
            assert!(ways(&made["compared"]).contains(&way), "{made}");
        }
        let why = kept("hidden_size".into()).unwrap_err();
        assert!(
            why.contains("inputs_embeds does not declare how many elements"),
            "{why}"
        );
    }
}

/// The graph keeps tokens, embeddings and positions; another input with a row a token can't be fed again.
#[test]
fn other_rows_of_a_window_in_the_graph_are_refused() {
    let typed = |options: &[&str]| {
        verified(DECOMPOSED, options, |graph| {
            let (_, value) = projection(graph);
            let dims = input(graph, "input_ids").dims().expect("a shape").to_vec();
            let types = ValueInfoProto::tensor("token_type_ids", DataType::Int64, dims);
            graph.input.push(types);
            graph.initializer.push(TensorProto::int64s("last_axis", &[1], &[-1]));
            after(graph, &value, |value, changed| {
                vec![
                    node("Cast", &["token_type_ids"], "types").with(AttributeProto::int("to", 1)),
                    node("Unsqueeze", &["types", "last_axis"], "types_3"),
                    node("Add", &[value, "types_3"], changed),
                ]
            });
        })
    };
    assert!(typed(&["--window", "2"]).is_ok());
    let why = typed(&["--window", "2", "--window-in-graph"]).unwrap_err();
    assert!(
        why.contains("can't feed the input token_type_ids again") && why.contains("without --window-in-graph"),
        "{why}"
    );
}

fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto::new("", op, output, inputs, &[output])
}

/// Puts nodes between what a projection gives and who reads it. `make` makes the second name from the first.
fn after(graph: &mut GraphProto, value: &str, make: impl FnOnce(&str, &str) -> Vec<NodeProto>) {
    let changed = format!("{value}.changed");
    for name in graph.node.iter_mut().flat_map(|n| &mut n.input).filter(|i| *i == value) {
        name.clone_from(&changed);
    }
    let place = graph
        .node
        .iter()
        .position(|n| n.output.iter().any(|o| o == value))
        .expect("a maker");
    graph.node.splice(place + 1..=place, make(value, &changed));
}

/// The first product with weights that reads its input from the graph's middle, its input and its output.
fn projection(graph: &GraphProto) -> (String, String) {
    let product = graph.node.iter().find(|n| {
        n.op_type() == "MatMul"
            && graph
                .initializer
                .iter()
                .any(|t| t.name() == n.input(1) && t.dims.len() == 2)
    });
    let product = product.expect("a product with weights");
    (product.input(0).to_owned(), product.output(0).to_owned())
}

fn width_of(graph: &GraphProto, value: &str) -> i64 {
    let product = graph.node.iter().find(|n| n.output(0) == value).expect("a maker");
    graph
        .initializer
        .iter()
        .find(|t| t.name() == product.input(1))
        .expect("weights")
        .dims[1]
}

#[test]
fn adapters_that_must_be_given() {
    for case in [GQA, DECOMPOSED] {
        for open in [false, true] {
            let made = verified(case, &[], |graph| {
                let (from, value) = projection(graph);
                let width = width_of(graph, &value);
                let named = |n: i64, name: &str| {
                    if open {
                        Dimension::from(name)
                    } else {
                        Dimension::from(n)
                    }
                };
                for (name, dims) in [
                    ("lora_A", [named(128, "in"), named(8, "rank")]),
                    ("lora_B", [named(8, "rank"), named(width, "out")]),
                ] {
                    graph.input.push(ValueInfoProto::tensor(name, DataType::Float, dims));
                }
                graph
                    .input
                    .push(ValueInfoProto::tensor("lora_scale", DataType::Float, []));
                after(graph, &value, |value, changed| {
                    vec![
                        node("MatMul", &[&from, "lora_A"], "lora_down"),
                        node("MatMul", &["lora_down", "lora_B"], "lora_up"),
                        node("Mul", &["lora_up", "lora_scale"], "lora_scaled"),
                        node("Add", &[value, "lora_scaled"], changed),
                    ]
                });
            });
            let made = made.unwrap();
            assert!(ways(&made["compared"]).contains(&(4, 2, "padded")), "{made}");
        }
    }
}

/// Numbers of each kind that models take beside their tokens.
#[test]
fn other_inputs_that_must_be_given() {
    for case in [GQA, DECOMPOSED] {
        let made = verified(case, &[], |graph| {
            let (_, value) = projection(graph);
            let width = width_of(graph, &value);
            let [batch, tokens] = input(graph, "input_ids").dims().expect("a shape") else {
                panic!("ids of two dimensions")
            };
            let (batch, tokens) = (batch.clone(), tokens.clone());
            let (float, int) = (DataType::Float, DataType::Int64);
            graph.input.extend([
                ValueInfoProto::tensor("token_type_ids", int, [batch.clone(), tokens.clone()]),
                ValueInfoProto::tensor("per_layer_inputs", float, [batch.clone(), tokens.clone(), width.into()]),
                ValueInfoProto::tensor(
                    "encoder_hidden_states",
                    float,
                    [batch, "encoder_length".into(), width.into()],
                ),
                ValueInfoProto::tensor("use_adapter", DataType::Bool, [1.into()]),
                ValueInfoProto::tensor("temperature", DataType::Float16, []),
                ValueInfoProto::tensor("cache_position", int, [tokens]),
            ]);
            graph.initializer.push(TensorProto::int64s("of_encoder", &[1], &[1]));
            let to_float = |from: &str, to: &str| node("Cast", &[from], to).with(AttributeProto::int("to", 1));
            after(graph, &value, |value, changed| {
                vec![
                    to_float("token_type_ids", "types"),
                    node("Unsqueeze", &["types", "last_axis"], "types_3"),
                    node("ReduceMean", &["encoder_hidden_states", "of_encoder"], "encoded"),
                    to_float("temperature", "warm"),
                    to_float("use_adapter", "used"),
                    to_float("cache_position", "places"),
                    node("Unsqueeze", &["places", "last_axis"], "places_2"),
                    node("Mul", &["places_2", "small"], "places_small"),
                    node("Add", &[value, "types_3"], "sum_1"),
                    node("Add", &["sum_1", "per_layer_inputs"], "sum_2"),
                    node("Add", &["sum_2", "encoded"], "sum_3"),
                    node("Mul", &["sum_3", "warm"], "sum_4"),
                    node("Add", &["sum_4", "used"], "sum_5"),
                    node("Add", &["sum_5", "places_small"], changed),
                ]
            });
            graph.initializer.push(TensorProto::int64s("last_axis", &[1], &[-1]));
            graph.initializer.push(TensorProto::floats("small", &[], &[0.01]));
        });
        let made = made.unwrap();
        assert!(ways(&made["compared"]).contains(&(2, 2, "whole")), "{made}");
    }
}

/// Lengths that the caller counts, as pipelines for NPUs have them.
#[test]
fn lengths_that_must_be_given() {
    let made = verified(GQA, &[], |graph| {
        let attention = graph
            .node
            .iter()
            .find(|n| n.op_type() == "GroupQueryAttention")
            .expect("one");
        let [lengths, total] = [5, 6].map(|slot| attention.input(slot).to_owned());
        graph.node.retain(|n| n.output(0) != lengths && n.output(0) != total);
        graph.node.insert(0, node("Identity", &["total_seq_len"], &total));
        graph
            .node
            .insert(0, node("Squeeze", &["past_seq_len", "column"], &lengths));
        graph.initializer.push(TensorProto::int64s("column", &[1], &[1]));
        graph.input.extend([
            ValueInfoProto::tensor("past_seq_len", DataType::Int32, ["batch_size".into(), 1.into()]),
            ValueInfoProto::tensor("total_seq_len", DataType::Int32, [1.into()]),
        ]);
    });
    let made = made.unwrap();
    assert!(ways(&made["compared"]).contains(&(4, 2, "whole")), "{made}");
}

/// State of convolutions is carried from call to call.
#[test]
fn state_that_comes_back() {
    let made = verified("genai-lfm2", &["--window", "1"], |_| ()).unwrap();
    let compared = ways(&made["compared"]);
    assert!(
        compared.contains(&(1, 1, "whole")) && compared.contains(&(1, 2, "whole")),
        "{made}"
    );
}

/// Heads and their size, where an exporter left them open: hosts make their caches by the declared shapes.
#[test]
fn sizes_of_caches_are_declared_once_they_are_known() {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(paths::zoo(GQA)).unwrap().flatten() {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let source = folder.path().join("model.onnx");
    let mut model = read_model(&source).unwrap().model;
    let graph = model.graph.as_mut().unwrap();
    size(graph, &CACHES, 3, "kv_cache_dim".into());
    size(graph, &CACHES, 1, "kv_heads".into());
    graph.value_info.clear();
    let bytes = model.encode_to_vec();
    fs::remove_file(&source).unwrap();
    fs::write(&source, bytes).unwrap();
    let target = folder.path().join("converted.onnx");
    let (_, error) = export_with(
        &source,
        &target,
        &host::device().to_string(),
        &["--external-data", "reference"],
    );
    assert_eq!(error, "");
    declared_in_full(&target);
}

fn declared_in_full(target: &Path) {
    let graph = read_model(target).unwrap().model.graph.unwrap();
    let mut caches = 0;
    for value in graph.input.iter().chain(&graph.output) {
        let state = value.name().contains("past") || value.name().contains("present");
        for (axis, dim) in value.dims().unwrap().iter().enumerate().filter(|_| state) {
            let open = axis == 0 || axis == 2;
            assert!(open || dim.fixed().is_some(), "{}: {:?}", value.name(), value.dims());
        }
        caches += usize::from(state);
    }
    assert!(caches > 0);
}
