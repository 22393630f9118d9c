//! Which merged decoders are unfolded, and which are refused.

use super::*;
use crate::validate::validate;
use retro_onnx::AttributeProto;

fn merged() -> ModelProto {
    let value = |name: &str| ValueInfoProto::tensor(name, DataType::Float, []);
    let branch = |nodes: Vec<NodeProto>, output: &str| GraphProto {
        node: nodes,
        output: vec![value(output)],
        initializer: vec![TensorProto::floats(&format!("{output}.w"), &[1], &[1.0])],
        ..Default::default()
    };
    let with = branch(
        vec![NodeProto::new("", "Concat", "c", &["past", "x"], &["y_with"])],
        "y_with",
    );
    let without = branch(
        vec![NodeProto::new("", "Neg", "n", &["x"], &["y_without"])],
        "y_without",
    );
    let node = NodeProto::new("", "If", "if", &["use_cache"], &["y"])
        .with(AttributeProto::graph("then_branch", with))
        .with(AttributeProto::graph("else_branch", without));
    let four = || [1.into(), 2.into(), "past".into(), 8.into()];
    let graph = GraphProto {
        node: vec![node],
        input: vec![
            value("x"),
            ValueInfoProto::tensor("past", DataType::Float, four()),
            ValueInfoProto::tensor("use_cache", DataType::Bool, [1.into()]),
        ],
        output: vec![value("y")],
        ..Default::default()
    };
    ModelProto {
        graph: Some(graph),
        ..Default::default()
    }
}

#[test]
fn the_branch_with_a_past_stays() {
    let mut model = merged();
    assert!(unfold(&mut model).unwrap().unwrap().contains("node if (If)"));
    let graph = model.graph.as_ref().unwrap();
    assert_eq!(graph.node.len(), 1);
    assert_eq!((graph.node[0].name(), graph.node[0].output(0)), ("c", "y"));
    assert!(
        graph.initializer.iter().any(|t| t.name() == "use_cache"),
        "its condition has a default"
    );
    assert_eq!(validate(graph), Ok(()));
    assert_eq!(unfold(&mut model), Ok(None));
}

/// A merged decoder of an encoder-decoder: what the encoder gave comes in, its keys are made by the branch without a past. How
/// the other branch gives them is up to the caller.
fn seq2seq(with: Vec<NodeProto>, past_first: bool) -> ModelProto {
    let value = |name: &str| ValueInfoProto::tensor(name, DataType::Float, []);
    let four = |name: &str| {
        let dims = [1.into(), 2.into(), "past".into(), 8.into()];
        ValueInfoProto::tensor(name, DataType::Float, dims)
    };
    let branch = |nodes: Vec<NodeProto>, of: &str| GraphProto {
        node: nodes,
        output: ["self", "cross"].map(|kind| value(&format!("{kind}_{of}"))).to_vec(),
        ..Default::default()
    };
    let node = |op: &str, inputs: &[&str], output: &str| NodeProto::new("", op, output, inputs, &[output]);
    let appended = node("Concat", &["past.self", INPUT_IDS], "self_with");
    let with = branch([vec![appended], with].concat(), "with");
    let made = [
        node("Neg", &[INPUT_IDS], "self_without"),
        node("MatMul", &["encoder_hidden_states", "weight"], "cross_without"),
    ];
    let without = branch(made.to_vec(), "without");
    let (yes, no) = if past_first { (with, without) } else { (without, with) };
    let outputs = ["present.self", "present.cross"];
    let choice = NodeProto::new("", "If", "choice", &["use_cache"], &outputs)
        .with(AttributeProto::graph("then_branch", yes))
        .with(AttributeProto::graph("else_branch", no));
    let graph = GraphProto {
        node: vec![choice],
        initializer: vec![TensorProto::floats("weight", &[1, 1], &[1.0])],
        input: vec![
            value(INPUT_IDS),
            value("encoder_hidden_states"),
            four("past.self"),
            four("past.cross"),
            ValueInfoProto::tensor("use_cache", DataType::Bool, [1.into()]),
        ],
        output: outputs.map(value).to_vec(),
        ..Default::default()
    };
    ModelProto {
        graph: Some(graph),
        ..Default::default()
    }
}

#[test]
fn what_only_the_branch_without_a_past_computes_is_not_dropped() {
    let node = |op: &str, inputs: &[&str], output: &str| NodeProto::new("", op, output, inputs, &[output]);
    let empty = node("Slice", &["encoder_hidden_states", "zero", "zero"], "nothing");
    for (how, with) in [
        ("handed on", vec![node("Identity", &["past.cross"], "cross_with")]),
        ("in another type", vec![node("Cast", &["past.cross"], "cross_with")]),
        (
            "in another shape",
            vec![
                node("Shape", &[INPUT_IDS], "shape"),
                node("Reshape", &["past.cross", "shape"], "cross_with"),
            ],
        ),
        (
            "with nothing behind it",
            vec![empty, node("Concat", &["past.cross", "nothing"], "cross_with")],
        ),
        ("a constant", vec![node("Constant", &[], "cross_with")]),
    ] {
        for past_first in [true, false] {
            let mut model = seq2seq(with.clone(), past_first);
            let before = model.clone();
            let why = unfold(&mut model).expect_err(how).to_string();
            let names = ["present.cross", "encoder_hidden_states", "decoder_with_past_model.onnx"];
            assert!(names.iter().all(|name| why.contains(name)), "{how}: {why}");
            assert!(model == before, "{how}: nothing is changed");
        }
    }
}

/// As some exporters write it, with an If for each cache.
#[test]
fn other_ifs_of_the_same_condition_count() {
    let value = |name: &str| ValueInfoProto::tensor(name, DataType::Float, []);
    let branch = |op: &str, inputs: &[&str], output: &str| GraphProto {
        node: vec![NodeProto::new("", op, op, inputs, &[output])],
        output: vec![value(output)],
        ..Default::default()
    };
    let first = NodeProto::new("", "If", "first", &["use_cache"], &["y"])
        .with(AttributeProto::graph(
            "then_branch",
            branch("Concat", &["past.self", INPUT_IDS], "y_with"),
        ))
        .with(AttributeProto::graph(
            "else_branch",
            branch("Neg", &[INPUT_IDS], "y_without"),
        ));
    let handed_on = NodeProto::new("", "Identity", "", &["past.cross"], &["cross_with"]);
    let mut model = seq2seq(vec![handed_on], true);
    let graph = model.graph.as_mut().unwrap();
    graph.output.push(value("y"));
    graph.node.insert(0, first);
    let why = unfold(&mut model)
        .expect_err("the second makes the encoder's keys")
        .to_string();
    assert!(why.contains("node choice (If)"), "{why}");
}

#[test]
fn a_branch_that_computes_everything_itself_takes_the_place() {
    let node = NodeProto::new(
        "",
        "MatMul",
        "m",
        &["encoder_hidden_states", INPUT_IDS],
        &["cross_with"],
    );
    for past_first in [true, false] {
        let mut model = seq2seq(vec![node.clone()], past_first);
        assert!(unfold(&mut model).unwrap().is_some());
    }
}

#[test]
fn an_if_that_chooses_something_else_stays() {
    let mut model = merged();
    let node = &mut model.graph.as_mut().unwrap().node[0];
    let other = node.attribute[0].g.clone();
    node.attribute[1].g = other;
    assert_eq!(unfold(&mut model), Ok(None), "both branches append");
    let mut model = merged();
    model.graph.as_mut().unwrap().input.pop();
    assert_eq!(unfold(&mut model), Ok(None), "the condition is computed");
}
