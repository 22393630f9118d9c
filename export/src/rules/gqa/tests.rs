use super::*;
use crate::{
    prove::Refusal,
    testing::{first_match, gqa_graph, gqa_node_mut, set},
};
use retro_onnx::{AttributeProto, DataType, GraphProto, TensorProto};

fn match_of(graph: &GraphProto) -> Result<AttentionMatch, Refusal> {
    first_match(&GroupQueryAttention, graph)
}

fn refusal(change: impl FnOnce(&mut GraphProto)) -> String {
    let mut graph = gqa_graph(1);
    change(&mut graph);
    match_of(&graph).expect_err("it should be refused").to_string()
}

fn set_input(graph: &mut GraphProto, slot: usize, name: &str) {
    let input = &mut gqa_node_mut(graph, 0).input;
    input.resize(input.len().max(slot + 1), String::new());
    input[slot] = name.to_owned();
}

fn set_attribute(graph: &mut GraphProto, attribute: AttributeProto) {
    set(gqa_node_mut(graph, 0), attribute);
}

#[test]
fn a_plain_packed_node_matches() {
    let matched = match_of(&gqa_graph(1)).unwrap();
    assert_eq!((matched.q_heads, matched.kv_heads, matched.head_size), (4, 2, Some(8)));
    assert_eq!(
        (matched.query.as_str(), matched.key.as_str(), matched.value.as_str()),
        ("qkv.0", "", "")
    );
    assert_eq!(
        matched.rope,
        Rope::Inside {
            interleaved: false,
            dims: Some(8)
        }
    );
    assert_eq!(
        (matched.data_type, matched.local_window_size, matched.sliding_cache),
        (DataType::Float, -1, false)
    );
    assert_eq!(
        (matched.past_key.as_str(), matched.present_value.as_str()),
        ("past_key_values.0.key", "present.0.value")
    );
}

#[test]
fn separate_keys_head_sinks_windows_and_softcaps_match() {
    let mut graph = gqa_graph(1);
    set_input(&mut graph, slot::KEY, "k");
    set_input(&mut graph, slot::VALUE, "v");
    set_input(&mut graph, slot::HEAD_SINK, "sink");
    set_input(&mut graph, slot::COS_CACHE, "");
    set_input(&mut graph, slot::SIN_CACHE, "");
    set_input(&mut graph, slot::POSITION_IDS, "position_ids");
    set_attribute(&mut graph, AttributeProto::int("do_rotary", 0));
    set_attribute(&mut graph, AttributeProto::int("local_window_size", 8));
    set_attribute(&mut graph, AttributeProto::int("sliding_window_cache", 1));
    set_attribute(&mut graph, AttributeProto::float("softcap", 50.0));
    set_attribute(&mut graph, AttributeProto::int("kv_cache_bit_width", 0));
    set_attribute(&mut graph, AttributeProto::string("k_quant_type", "NONE"));
    graph.value_info.clear();
    let matched = match_of(&graph).unwrap();
    assert_eq!(
        (matched.key.as_str(), matched.head_sink.as_str(), matched.rope),
        ("k", "sink", Rope::None)
    );
    assert_eq!(
        (matched.local_window_size, matched.softcap, matched.sliding_cache),
        (8, 50.0, true)
    );
}

#[test]
fn norms_of_queries_and_keys_match() {
    let mut graph = gqa_graph(1);
    set_input(&mut graph, slot::Q_NORM_WEIGHT, "q_norm");
    set_input(&mut graph, slot::K_NORM_WEIGHT, "k_norm");
    let norm = |epsilon: f32| QkNorm {
        query: "q_norm".into(),
        key: "k_norm".into(),
        epsilon,
    };
    assert_eq!(match_of(&graph).unwrap().qk_norm, Some(norm(1e-6)));
    set_attribute(&mut graph, AttributeProto::float("qk_norm_epsilon", 1e-5));
    assert_eq!(match_of(&graph).unwrap().qk_norm, Some(norm(1e-5)));
    // The weights tell the head size where nothing else does.
    graph.value_info.clear();
    for cache in graph.input.iter_mut().filter(|i| i.name().starts_with("past")) {
        cache.dims_mut().unwrap()[3] = "head_size".into();
    }
    let why = match_of(&graph).expect_err("no head size").to_string();
    assert!(why.contains("nothing in the graph tells the head size"), "{why}");
    let weight = |name: &str, size: i64| TensorProto::floats(name, &[size], &vec![1.0; size as usize]);
    graph.initializer.extend([weight("q_norm", 8), weight("k_norm", 8)]);
    assert_eq!(match_of(&graph).unwrap().head_size, Some(8));
    graph.initializer.pop();
    graph.initializer.push(weight("k_norm", 4));
    let why = match_of(&graph).expect_err("two head sizes").to_string();
    assert!(why.contains("q_norm has a head size of 8, but k_norm has 4"), "{why}");
}

#[test]
fn a_smooth_softmax_is_a_sink_of_0_unless_sinks_are_given() {
    let mut graph = gqa_graph(1);
    set_attribute(&mut graph, AttributeProto::int("smooth_softmax", 1));
    assert_eq!(match_of(&graph).unwrap().sinks, Some(vec![0.0; 4]));
    set_input(&mut graph, slot::HEAD_SINK, "sink");
    let matched = match_of(&graph).unwrap();
    assert_eq!((matched.head_sink.as_str(), matched.sinks), ("sink", None));
}

/// Puts a copy between a graph's cache and the node.
fn put_behind(graph: &mut GraphProto, op: &str, to: Option<DataType>) {
    let attribute = to.map(|t| AttributeProto::int("to", i64::from(i32::from(t))));
    let copy = |from: &str, to: &str| {
        let mut node = NodeProto::new("", op, to, &[from], &[to]);
        node.attribute.extend(attribute.clone());
        node
    };
    let node = gqa_node_mut(graph, 0);
    let mut copies = Vec::new();
    for name in &mut node.input[3..5] {
        let inner = format!("inner.{name}");
        copies.push(copy(name, &inner));
        *name = inner;
    }
    for name in &mut node.output[1..3] {
        let inner = format!("inner.{name}");
        copies.push(copy(&inner, name));
        *name = inner;
    }
    graph.node.extend(copies);
}

#[test]
fn a_cache_behind_copies_matches() {
    let mut graph = gqa_graph(1);
    put_behind(&mut graph, "Identity", None);
    let matched = match_of(&graph).unwrap();
    assert_eq!(
        [
            &matched.past_key,
            &matched.past_value,
            &matched.present_key,
            &matched.present_value
        ]
        .map(String::as_str),
        [
            "past_key_values.0.key",
            "past_key_values.0.value",
            "present.0.key",
            "present.0.value"
        ]
    );
    assert_eq!(matched.cache_aliases.len(), 4, "{:?}", matched.cache_aliases);
    assert_eq!(
        (matched.data_type, matched.query_type),
        (DataType::Float, DataType::Undefined)
    );
}

#[test]
fn a_cache_of_another_type_matches_where_both_ends_agree() {
    let mut graph = gqa_graph(1);
    put_behind(&mut graph, "Cast", Some(DataType::Float16));
    let why = match_of(&graph).expect_err("queries are float32").to_string();
    assert!(why.contains("query (qkv.0) is float32, its cache is float16"), "{why}");
    graph.value_info.clear();
    let matched = match_of(&graph).unwrap();
    assert_eq!(
        (matched.data_type, matched.query_type),
        (DataType::Float, DataType::Float16)
    );
    let output = graph.output.iter_mut().find(|o| o.name() == "present.0.key").unwrap();
    let dims = output.dims().unwrap().to_vec();
    *output = retro_onnx::ValueInfoProto::tensor("present.0.key", DataType::Float16, dims);
    let why = match_of(&graph).expect_err("one type in, another out").to_string();
    assert!(
        why.contains("comes in as float32 (past_key_values.0.key) and goes out as float16 (present.0.key)"),
        "{why}"
    );
}

#[test]
fn a_cache_whose_copy_others_read_is_refused() {
    for name in ["inner.past_key_values.0.key", "inner.present.0.value", "present.0.key"] {
        let mut graph = gqa_graph(1);
        put_behind(&mut graph, "Identity", None);
        graph.node.push(NodeProto::new("", "Neg", "other", &[name], &["read"]));
        let why = match_of(&graph).expect_err("another reader").to_string();
        assert!(why.contains(name) && why.contains("too"), "{why}");
    }
}

#[test]
fn every_input_without_a_counterpart_is_refused_by_name() {
    for (slot, what) in [
        (9, "position_ids"),
        (10, "attention_bias"),
        (12, "k_scale"),
        (13, "v_scale"),
        (14, "comes without k_norm_weight"),
        (15, "comes without q_norm_weight"),
        (16, "more inputs"),
    ] {
        let why = refusal(|g| set_input(g, slot, "extra"));
        assert!(why.contains(what) && why.contains("extra"), "{slot}: {why}");
    }
    for (slot, what) in [
        (3, "no past_key"),
        (1, "only one of"),
        (7, "without cos_cache"),
        (5, "required"),
    ] {
        let why = refusal(|g| set_input(g, slot, if slot == 1 { "k" } else { "" }));
        assert!(why.contains(what), "{slot}: {why}");
    }
}

#[test]
fn every_attribute_without_a_counterpart_is_refused_with_its_value() {
    for (attribute, what) in [
        (AttributeProto::int("smooth_softmax", 2), "smooth_softmax = 2"),
        (AttributeProto::int("causal", 0), "causal = 0"),
        (AttributeProto::int("qk_output", 2), "qk_output = 2"),
        (AttributeProto::int("kv_cache_bit_width", 8), "kv_cache_bit_width = 8"),
        (
            AttributeProto::string("k_quant_type", "PER_TENSOR"),
            "k_quant_type = \"PER_TENSOR\"",
        ),
        (AttributeProto::int("brand_new", 3), "brand_new = 3"),
        (
            AttributeProto::int("num_heads", 3),
            "num_heads = 3 is not a multiple of kv_num_heads = 2",
        ),
        (AttributeProto::int("kv_num_heads", 0), "kv_num_heads = 0"),
        (AttributeProto::int("num_heads", i64::MIN), "num_heads"),
        (AttributeProto::int("local_window_size", 0), "local_window_size = 0"),
        (AttributeProto::int("do_rotary", 2), "do_rotary = 2"),
        (AttributeProto::float("scale", f32::NAN), "scale is NaN"),
        (AttributeProto::float("num_heads", 4.0), "num_heads is not a plain Int"),
    ] {
        let why = refusal(|g| set_attribute(g, attribute));
        assert!(why.contains(what), "{what}: {why}");
    }
}

#[test]
fn a_cache_that_is_not_the_callers_alone_is_refused() {
    let why = refusal(|g| g.input.retain(|i| i.name() != "past_key_values.0.key"));
    assert!(why.contains("not an input of the graph"), "{why}");
    let why = refusal(|g| g.output.retain(|o| o.name() != "present.0.value"));
    assert!(why.contains("not an output of the graph"), "{why}");
    let why = refusal(|g| {
        g.node
            .push(NodeProto::new("", "Shape", "s", &["past_key_values.0.key"], &["n"]))
    });
    assert!(why.contains("read by other nodes"), "{why}");
    let why = refusal(|g| {
        g.node
            .push(NodeProto::new("", "Shape", "s", &["present.0.key"], &["n"]))
    });
    assert!(why.contains("read by node s"), "{why}");
    let why = refusal(|g| gqa_node_mut(g, 0).output.push("scores".into()));
    assert!(why.contains("attention scores (scores)"), "{why}");
}

#[test]
fn shapes_and_types_that_disagree_are_refused() {
    fn declare(g: &mut GraphProto, name: &str, t: DataType, dims: &[i64]) {
        let values = g.input.iter_mut().chain(&mut g.value_info);
        let value = values.into_iter().find(|v| v.name() == name).unwrap();
        *value = retro_onnx::ValueInfoProto::tensor(name, t, dims.iter().map(|d| (*d).into()));
    }
    let key = "past_key_values.0.key";
    for (name, t, dims, what) in [
        (
            key,
            DataType::Int8,
            &[1, 2, 9, 8][..],
            "its cache holds int8 keys and float32",
        ),
        (
            key,
            DataType::Float,
            &[1, 3, 9, 8],
            "has 3 heads, but kv_num_heads is 2",
        ),
        (key, DataType::Float, &[1, 2, 8], "has 3 dimensions, not 4"),
        (key, DataType::Float, &[1, 2, 9, 16], "head size of 16"),
        (key, DataType::Float, &[1, 2, 9, -8], "head size of -8"),
        ("qkv.0", DataType::Float16, &[1, 1, 64], "query (qkv.0) is float16"),
        ("qkv.0", DataType::Float, &[1, 64], "query (qkv.0) has 2 dimensions"),
    ] {
        let why = refusal(|g| declare(g, name, t, dims));
        assert!(why.contains(what), "{what}: {why}");
    }
    let why = refusal(|g| {
        declare(g, key, DataType::Int8, &[1, 2, 9, 8]);
        declare(g, "past_key_values.0.value", DataType::Int8, &[1, 2, 9, 8]);
    });
    assert!(why.contains("its cache holds int8, not"), "{why}");
}

#[test]
fn tokens_fed_again_suit_plain_nodes_only() {
    let mut graph = gqa_graph(1);
    assert!(takes_tokens_again(gqa_node_mut(&mut graph, 0)));
    set_attribute(&mut graph, AttributeProto::int("sliding_window_cache", 1));
    assert!(!takes_tokens_again(gqa_node_mut(&mut graph, 0)));
}
