//! Small graphs for the tests of this crate.

use crate::rules::{AttentionMatch, MatchResult, Refusal, Rule, SampleCalls};
use retro_onnx::{
    AttributeProto, DataType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto,
    graph::GraphView,
};

/// A decoder as onnxruntime-genai writes it, attention only: Hq 4, Hkv 2, D 8, hidden 32, vocabulary 10.
pub fn gqa_graph(layers: usize) -> GraphProto {
    let f = DataType::Float;
    let mut graph = GraphProto {
        name: Some("main_graph".into()),
        ..Default::default()
    };
    graph.input.push(ValueInfoProto::tensor(
        "x",
        f,
        ["batch_size".into(), "sequence_length".into(), 32.into()],
    ));
    graph.input.push(ValueInfoProto::tensor(
        "seqlens_k",
        DataType::Int32,
        ["batch_size".into()],
    ));
    graph.input.push(ValueInfoProto::tensor("total", DataType::Int32, []));
    let logits = ["batch_size".into(), "sequence_length".into(), 10.into()];
    graph.output.push(ValueInfoProto::tensor("logits", f, logits));
    graph
        .initializer
        .push(TensorProto::floats("cos_cache", &[16, 4], &[1.0; 64]));
    graph
        .initializer
        .push(TensorProto::floats("sin_cache", &[16, 4], &[0.0; 64]));
    graph
        .initializer
        .push(TensorProto::floats("lm_head.weight", &[32, 10], &[0.1; 320]));
    let mut hidden = "x".to_owned();
    for layer in 0..layers {
        let (qkv, out) = (format!("qkv.{layer}"), format!("attn.{layer}"));
        let weight = format!("qkv.{layer}.weight");
        graph
            .initializer
            .push(TensorProto::floats(&weight, &[32, 64], &[0.01; 2048]));
        graph.node.push(NodeProto::new(
            "",
            "MatMul",
            &format!("qkv_proj.{layer}"),
            &[&hidden, &weight],
            &[&qkv],
        ));
        let past = ["key", "value"].map(|kind| format!("past_key_values.{layer}.{kind}"));
        let present = ["key", "value"].map(|kind| format!("present.{layer}.{kind}"));
        let inputs = [
            &qkv,
            "",
            "",
            &past[0],
            &past[1],
            "seqlens_k",
            "total",
            "cos_cache",
            "sin_cache",
            "",
            "",
            "",
        ];
        let node = NodeProto::new(
            "com.microsoft",
            "GroupQueryAttention",
            &format!("attention.{layer}"),
            &inputs,
            &[&out, &present[0], &present[1]],
        );
        graph.node.push(
            node.with(AttributeProto::int("num_heads", 4))
                .with(AttributeProto::int("kv_num_heads", 2))
                .with(AttributeProto::int("do_rotary", 1)),
        );
        for (past, present) in past.iter().zip(&present) {
            let dims = |tokens: &str| ["batch_size".into(), 2.into(), tokens.into(), 8.into()];
            graph
                .input
                .push(ValueInfoProto::tensor(past, f, dims("past_sequence_length")));
            graph
                .output
                .push(ValueInfoProto::tensor(present, f, dims("total_sequence_length")));
        }
        let activation = |width: i64| ["batch_size".into(), "sequence_length".into(), width.into()];
        graph.value_info.push(ValueInfoProto::tensor(&qkv, f, activation(64)));
        graph.value_info.push(ValueInfoProto::tensor(&out, f, activation(32)));
        hidden = out;
    }
    graph.node.push(NodeProto::new(
        "",
        "MatMul",
        "lm_head",
        &[&hidden, "lm_head.weight"],
        &["logits"],
    ));
    graph
}

/// [`gqa_graph`] as a model of opset 21, IR version 10.
pub fn gqa_model(layers: usize) -> ModelProto {
    ModelProto {
        ir_version: Some(10),
        producer_name: Some("test".into()),
        opset_import: vec![
            OperatorSetIdProto::new("", 21),
            OperatorSetIdProto::new("com.microsoft", 1),
        ],
        graph: Some(gqa_graph(layers)),
        ..Default::default()
    }
}

/// The attention node of a layer.
pub fn gqa_node_mut(graph: &mut GraphProto, layer: usize) -> &mut NodeProto {
    let mut nodes = graph.node.iter_mut().filter(|n| n.op_type() == "GroupQueryAttention");
    nodes.nth(layer).unwrap()
}

/// What surrounds one attention: `q` `[B, S, Hq*4]`, `k` and `v` `[B, S, Hkv*4]` made from inputs_embeds, caches that come and go
/// (past_key_values.0.key -> present.0.key), an attention_mask. The attention makes `y` and the presents.
pub fn projected(q_heads: i64, kv_heads: i64) -> GraphProto {
    let f = DataType::Float;
    let mut graph = GraphProto::default();
    let dims = ["batch".into(), "tokens".into(), 8.into()];
    graph.input.push(ValueInfoProto::tensor("inputs_embeds", f, dims));
    let mask = ["batch".into(), "total".into()];
    graph
        .input
        .push(ValueInfoProto::tensor("attention_mask", DataType::Int64, mask));
    for (name, heads) in [("q", q_heads), ("k", kv_heads), ("v", kv_heads)] {
        let (weight, width) = (format!("w{name}"), 4 * heads);
        let numbers = vec![0.1; 8 * width as usize];
        graph
            .initializer
            .push(TensorProto::floats(&weight, &[8, width], &numbers));
        let inputs = ["inputs_embeds", &weight];
        graph
            .node
            .push(NodeProto::new("", "MatMul", &format!("{name}_proj"), &inputs, &[name]));
    }
    for kind in ["key", "value"] {
        let dims = |tokens: &str| ["batch".into(), kv_heads.into(), tokens.into(), 4.into()];
        let (past, present) = (format!("past_key_values.0.{kind}"), format!("present.0.{kind}"));
        graph.input.push(ValueInfoProto::tensor(&past, f, dims("past")));
        graph.output.push(ValueInfoProto::tensor(&present, f, dims("total")));
    }
    graph.output.push(ValueInfoProto::tensor(
        "y",
        f,
        ["batch".into(), "tokens".into(), (4 * q_heads).into()],
    ));
    graph
}

/// What a rule says about the first node of a graph that it is about.
pub fn first_match(rule: &dyn Rule, graph: &GraphProto) -> Result<AttentionMatch, Refusal> {
    let view = GraphView::new(graph, 23);
    let samples = SampleCalls::new(&view, None);
    let mut results = graph.node.iter().map(|n| rule.match_node(&view, &samples, n));
    let first = results.find_map(|v| match v {
        MatchResult::NotMine => None,
        MatchResult::Match(matched) => Some(Ok(*matched)),
        MatchResult::Refused(why) => Some(Err(why)),
    });
    first.expect("a node that is this rule's")
}

/// What a rule says once a graph has been changed; its last node stands apart from the graph for `change`.
pub fn changed_match(
    rule: &dyn Rule,
    mut graph: GraphProto,
    change: impl FnOnce(&mut GraphProto, &mut NodeProto),
) -> Result<AttentionMatch, Refusal> {
    let mut node = graph.node.pop().expect("a graph with nodes");
    change(&mut graph, &mut node);
    graph.node.push(node);
    first_match(rule, &graph)
}

/// Gives a node an attribute, in the place of one with its name.
pub fn set(node: &mut NodeProto, attribute: AttributeProto) {
    node.attribute.retain(|a| a.name() != attribute.name());
    node.attribute.push(attribute);
}
