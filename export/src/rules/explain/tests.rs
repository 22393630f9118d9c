use super::*;
use crate::{rules::find_attention, testing::projected};
use retro_onnx::{AttributeProto, DataType, Dimension, GraphProto, ModelProto, TensorProto, ValueInfoProto};

type Node<'n> = (&'n str, &'n [&'n str], &'n str, &'n [i64]);

/// Two heads of 4 with caches of some shape, which nodes bring to `keys` and `values`, [B, 2, T, 4].
fn graph(cache: &[Dimension], nodes: &[Node]) -> GraphProto {
    let mut graph = projected(2, 2);
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        if value.name().contains("key") || value.name().contains("value") {
            *value = ValueInfoProto::tensor(value.name(), DataType::Float, cache.to_vec());
        }
    }
    for (name, values) in [("heads", &[0, 0, 2, 4][..]), ("flat", &[0, 0, 8]), ("one", &[1])] {
        let size = values.len() as i64;
        graph.initializer.push(TensorProto::int64s(name, &[size], values));
    }
    let weight = TensorProto::floats("weight", &[8, 8], &[0.1; 64]);
    graph.initializer.push(weight);
    let around: [&[Node]; 3] = [
        &[
            ("Reshape", &["q", "heads"], "q_tokens", &[]),
            ("Transpose", &["q_tokens"], "q_heads", &[0, 2, 1, 3]),
            ("Reshape", &["k", "heads"], "k_tokens", &[]),
            ("Transpose", &["k_tokens"], "k_heads", &[0, 2, 1, 3]),
            ("Reshape", &["v", "heads"], "v_tokens", &[]),
            ("Transpose", &["v_tokens"], "v_heads", &[0, 2, 1, 3]),
        ],
        nodes,
        &[
            ("Transpose", &["keys"], "turned", &[0, 1, 3, 2]),
            ("MatMul", &["q_heads", "turned"], "scores", &[]),
            ("Softmax", &["scores"], "weights", &[]),
            ("MatMul", &["weights", "values"], "mixed", &[]),
            ("Transpose", &["mixed"], "mixed_tokens", &[0, 2, 1, 3]),
            ("Reshape", &["mixed_tokens", "flat"], "y", &[]),
        ],
    ];
    for (op, inputs, output, numbers) in around.concat() {
        let mut node = NodeProto::new("", op, output, inputs, &[output]);
        match op {
            "Transpose" => node.attribute.push(AttributeProto::ints("perm", numbers)),
            "Concat" => node.attribute.push(AttributeProto::int("axis", numbers[0])),
            _ => {}
        }
        graph.node.push(node);
    }
    graph
}

fn said(graph: GraphProto) -> String {
    said_of_model(&ModelProto {
        graph: Some(graph),
        ..Default::default()
    })
}

fn said_of_model(model: &ModelProto) -> String {
    let view = GraphView::new(model.graph.as_ref().unwrap(), 21);
    let found = find_attention(model, &SampleCalls::new(&view, None));
    assert_eq!(found.len(), 1);
    found[0].found.clone().expect_err("it should be refused").to_string()
}

const PAST: [&str; 2] = ["past_key_values.0.key", "past_key_values.0.value"];

#[test]
fn layouts_of_caches_are_named() {
    // The cache is appended to in its own order, then transposed to the usual one; or the other way round.
    let rows = |axes: [usize; 4]| -> Vec<Dimension> {
        let usual: [Dimension; 4] = ["batch".into(), 2.into(), "past".into(), 4.into()];
        axes.map(|axis| usual[axis].clone()).to_vec()
    };
    let bthd = graph(
        &rows([0, 2, 1, 3]),
        &[
            ("Concat", &[PAST[0], "k_tokens"], "present.0.key", &[1]),
            ("Concat", &[PAST[1], "v_tokens"], "present.0.value", &[-3]),
            ("Transpose", &["present.0.key"], "keys", &[0, 2, 1, 3]),
            ("Transpose", &["present.0.value"], "values", &[0, 2, 1, 3]),
        ],
    );
    let why = said(bthd);
    assert!(why.contains("laid out [B, T, H, D]") && why.contains(PAST[0]), "{why}");
    let turned_before = graph(
        &rows([2, 0, 1, 3]),
        &[
            ("Transpose", &[PAST[0]], "past_key", &[1, 2, 0, 3]),
            ("Transpose", &[PAST[1]], "past_value", &[1, 2, 0, 3]),
            ("Concat", &["past_key", "k_heads"], "keys", &[2]),
            ("Concat", &["past_value", "v_heads"], "values", &[2]),
            ("Transpose", &["keys"], "present.0.key", &[2, 0, 1, 3]),
            ("Transpose", &["values"], "present.0.value", &[2, 0, 1, 3]),
        ],
    );
    let why = said(turned_before);
    assert!(why.contains("laid out [T, B, H, D]"), "{why}");
    let last = graph(
        &rows([0, 1, 3, 2]),
        &[
            ("Transpose", &["k_tokens"], "k_last", &[0, 2, 3, 1]),
            ("Concat", &[PAST[0], "k_last"], "present.0.key", &[3]),
            ("Transpose", &["present.0.key"], "keys", &[0, 1, 3, 2]),
            ("Concat", &[PAST[1], "v_heads"], "present.0.value", &[2]),
            ("Identity", &["present.0.value"], "values", &[]),
        ],
    );
    let why = said(last);
    assert!(why.contains("laid out [B, H, D, T]"), "{why}");
    let side_by_side = graph(
        &["batch".into(), "past".into(), 8.into()],
        &[
            ("Concat", &[PAST[0], "k"], "present.0.key", &[1]),
            ("Concat", &[PAST[1], "v"], "present.0.value", &[1]),
            ("Reshape", &["present.0.key", "heads"], "all_keys", &[]),
            ("Reshape", &["present.0.value", "heads"], "all_values", &[]),
            ("Transpose", &["all_keys"], "keys", &[0, 2, 1, 3]),
            ("Transpose", &["all_values"], "values", &[0, 2, 1, 3]),
        ],
    );
    let why = said(side_by_side);
    assert!(why.contains("[B, T, H*D]"), "{why}");
}

/// As exporters write norms that are functions of the model: whatever follows has no shape until they are inlined.
#[test]
fn functions_before_the_attention_are_named() {
    let cache = ["batch".into(), 2.into(), "past".into(), 4.into()];
    let mut graph = graph(
        &cache,
        &[
            ("Concat", &[PAST[0], "k_heads"], "present.0.key", &[2]),
            ("Concat", &[PAST[1], "v_heads"], "present.0.value", &[2]),
            ("Identity", &["present.0.key"], "keys", &[]),
            ("Identity", &["present.0.value"], "values", &[]),
        ],
    );
    for node in graph.node.iter_mut().filter(|n| n.output(0) == "q") {
        node.input[0] = "normed".into();
    }
    let call = |domain: &str| NodeProto::new(domain, "Norm", "norm_call", &["inputs_embeds"], &["normed"]);
    graph.node.insert(0, call("own"));
    let mut model = ModelProto {
        graph: Some(graph),
        ..Default::default()
    };
    assert!(
        said_of_model(&model).contains("the operator own::Norm is not supported"),
        "no function of the model"
    );
    model.functions.push(FunctionProto {
        name: Some("Norm".into()),
        domain: Some("own".into()),
        ..Default::default()
    });
    let why = said_of_model(&model);
    assert!(
        why.contains("the model's function Norm (node norm_call)")
            && why.contains("inline the model's functions first"),
        "{why}"
    );
}

#[test]
fn compressed_and_static_caches_are_named() {
    let usual = || vec!["batch".into(), 2.into(), "past".into(), 4.into()];
    let latent = graph(
        &["batch".into(), "past".into(), 8.into()],
        &[
            ("Concat", &[PAST[0], "k"], "present.0.key", &[1]),
            ("Concat", &[PAST[1], "v"], "present.0.value", &[1]),
            ("MatMul", &["present.0.key", "weight"], "up", &[]),
            ("Reshape", &["up", "heads"], "all_keys", &[]),
            ("Transpose", &["all_keys"], "keys", &[0, 2, 1, 3]),
            ("Identity", &["keys"], "values", &[]),
        ],
    );
    let why = said(latent);
    assert!(why.contains("compressed") && why.contains(PAST[0]), "{why}");
    let fixed = graph(
        &usual(),
        &[
            ("ScatterND", &[PAST[0], "one", "k_heads"], "present.0.key", &[]),
            ("ScatterND", &[PAST[1], "one", "v_heads"], "present.0.value", &[]),
            ("Identity", &["present.0.key"], "keys", &[]),
            ("Identity", &["present.0.value"], "values", &[]),
        ],
    );
    let why = said(fixed);
    assert!(why.contains("static cache") && why.contains("ScatterND"), "{why}");
}

#[test]
fn merged_and_absent_caches_are_named() {
    let unsqueezed: &[Node] = &[
        ("Unsqueeze", &["k_heads", "one"], "k_five", &[]),
        ("Concat", &[PAST[0], "k_five"], "present.0.key", &[3]),
        ("Squeeze", &["present.0.key", "one"], "keys", &[]),
        ("Identity", &["keys"], "values", &[]),
    ];
    let five = vec![2.into(), "batch".into(), 2.into(), "past".into(), 4.into()];
    let why = said(graph(&five, unsqueezed));
    assert!(why.contains("keys and values are merged in one cache"), "{why}");
    let mut six = five;
    six.insert(0, 12.into());
    let why = said(graph(&six, unsqueezed));
    assert!(why.contains("keys and values of all layers are merged"), "{why}");
    let none: &[Node] = &[
        ("Identity", &["k_heads"], "keys", &[]),
        ("Identity", &["v_heads"], "values", &[]),
    ];
    let usual = ["batch".into(), 2.into(), "past".into(), 4.into()];
    let mut alone = graph(&usual, none);
    alone.input.retain(|i| !i.name().starts_with("past"));
    alone.output.retain(|o| !o.name().starts_with("present"));
    let why = said(alone.clone());
    assert!(why.contains("keeps no cache") && why.contains("encoders"), "{why}");
    // The same fed images.
    for value in alone.input.iter_mut().filter(|i| i.name() == INPUTS_EMBEDS) {
        value.name = Some("pixel_values".into());
    }
    for name in alone.node.iter_mut().flat_map(|n| &mut n.input) {
        if name == INPUTS_EMBEDS {
            *name = "pixel_values".into();
        }
    }
    let why = said(alone);
    assert!(
        why.contains("pixel_values [batch") && why.contains("encoder of images"),
        "{why}"
    );
}

#[test]
fn cross_attention_is_named() {
    let usual = ["batch".into(), 2.into(), "encoded".into(), 4.into()];
    let mut crossed = graph(
        &usual,
        &[
            ("Identity", &[PAST[0]], "keys", &[]),
            ("Identity", &[PAST[1]], "values", &[]),
        ],
    );
    crossed.output.retain(|o| !o.name().starts_with("present"));
    let why = said(crossed);
    assert!(
        why.contains("cross-attention of an encoder-decoder") && why.contains(PAST[0]),
        "{why}"
    );
}

const USUAL: &[Node] = &[
    ("Concat", &[PAST[0], "k_heads"], "present.0.key", &[2]),
    ("Concat", &[PAST[1], "v_heads"], "present.0.value", &[2]),
    ("Identity", &["present.0.key"], "keys", &[]),
    ("Identity", &["present.0.value"], "values", &[]),
];

#[test]
fn what_leaves_the_graph_is_named() {
    for (from, by, what) in [
        ("weights", "Unsqueeze", "attention probabilities"),
        ("weights", "ReduceMax", "attention probabilities"),
        ("scores", "Unsqueeze", "attention scores"),
    ] {
        let mut graph = graph(&["batch".into(), 2.into(), "past".into(), 4.into()], USUAL);
        let nodes = [
            NodeProto::new("", by, "u", &[from, "one"], &["five"]),
            NodeProto::new("", "Identity", "i", &["five"], &["attentions"]),
        ];
        graph.node.extend(nodes);
        graph
            .output
            .push(ValueInfoProto::tensor("attentions", DataType::Float, []));
        let why = said(graph);
        assert!(why.contains(what) && why.contains("(attentions)"), "{why}");
    }
}

#[test]
fn masks_that_the_caller_makes_are_named() {
    let graph = graph(&["batch".into(), 2.into(), "past".into(), 4.into()], USUAL);
    let dims = ["batch".into(), 1.into(), "tokens".into(), "total".into()];
    let why = said(masked_by(graph, "causal_mask", &dims));
    assert!(
        why.contains("made by the caller: causal_mask [batch, 1, tokens, total]"),
        "{why}"
    );
}

/// With an input of the caller's added to the scores.
fn masked_by(mut graph: GraphProto, name: &str, dims: &[Dimension]) -> GraphProto {
    graph
        .input
        .push(ValueInfoProto::tensor(name, DataType::Float, dims.to_vec()));
    let add = NodeProto::new("", "Add", "add", &["scores", name], &["masked"]);
    graph.node.push(add);
    let softmax = graph.node.iter_mut().find(|n| n.is("", "Softmax")).unwrap();
    softmax.input[0] = "masked".into();
    graph
}

#[test]
fn an_input_that_a_mask_depends_on_is_named() {
    let graph = graph(&["batch".into(), 2.into(), "past".into(), 4.into()], USUAL);
    let why = said(masked_by(graph, "bias_row", &["tokens".into(), "total".into()]));
    assert!(why.contains("depends on the input bias_row [tokens, total]"), "{why}");
}

#[test]
fn fused_attention_of_other_runtimes_is_named() {
    let graph = GraphProto {
        node: vec![NodeProto::new("trt", "FlashAttnV2", "fused", &["q"], &["y"])],
        ..Default::default()
    };
    let why = none_found(&GraphView::new(&graph, 21));
    assert!(why.contains("trt::FlashAttnV2") && why.contains("node fused"), "{why}");
    let none = none_found(&GraphView::new(&GraphProto::default(), 21));
    assert_eq!(none, "there is no attention in its graph");
}
