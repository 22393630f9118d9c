use super::*;
use crate::{
    prove::{AttentionMatch, HeadLayout, LengthSource},
    testing::{first_match, projected},
};
use retro_onnx::{AttributeProto, DataType, GraphProto, TensorProto, ValueInfoProto};

/// Two heads of 4. What stands between the products is up to the caller: nodes from `dots` to `weights`, [B, 2, S, T].
fn graph(between: &[(&str, &[&str], &str)]) -> GraphProto {
    let mut graph = projected(2, 2);
    for (name, value) in [
        ("scale", 0.5),
        ("twice", 2.0),
        ("see", 0.0),
        ("hide", f32::NEG_INFINITY),
        ("cap", 20.0),
    ] {
        graph.initializer.push(TensorProto::floats(name, &[], &[value]));
    }
    for (name, value) in [("zero", 0), ("one", 1), ("three", 3)] {
        graph.initializer.push(TensorProto::int64s(name, &[], &[value]));
    }
    for (name, values) in [
        ("heads", &[0, 0, 2, 4][..]),
        ("flat", &[0, 0, 8]),
        ("down", &[-1, 1]),
        ("middle", &[1, 2]),
    ] {
        graph
            .initializer
            .push(TensorProto::int64s(name, &[values.len() as i64], values));
    }
    for (op, inputs, output) in [
        ("Reshape", &["q", "heads"][..], "q_tokens"),
        ("Transpose", &["q_tokens"], "q_heads"),
        ("Reshape", &["k", "heads"], "k_tokens"),
        ("Transpose", &["k_tokens"], "k_heads"),
        ("Reshape", &["v", "heads"], "v_tokens"),
        ("Transpose", &["v_tokens"], "v_heads"),
        ("Concat", &["past_key_values.0.key", "k_heads"], "present.0.key"),
        ("Concat", &["past_key_values.0.value", "v_heads"], "present.0.value"),
        ("Transpose", &["present.0.key"], "k_turned"),
        ("MatMul", &["q_heads", "k_turned"], "dots"),
        // Tokens from the widths of the mask and of what is fed.
        ("Shape", &["attention_mask"], "mask_shape"),
        ("Gather", &["mask_shape", "one"], "total"),
        ("Shape", &["inputs_embeds"], "embeds_shape"),
        ("Gather", &["embeds_shape", "one"], "fed"),
        ("Sub", &["total", "fed"], "past"),
        ("Range", &["past", "total", "one"], "queries"),
        ("Reshape", &["queries", "down"], "queries_down"),
        ("Range", &["zero", "total", "one"], "keys"),
    ]
    .iter()
    .chain(between)
    .chain(&[
        ("MatMul", &["weights", "present.0.value"][..], "mixed"),
        ("Transpose", &["mixed"], "mixed_tokens"),
        ("Reshape", &["mixed_tokens", "flat"], "y"),
    ]) {
        let mut node = NodeProto::new("", op, output, inputs, &[output]);
        match *op {
            "Transpose" if *output == "k_turned" => node.attribute.push(AttributeProto::ints("perm", &[0, 1, 3, 2])),
            "Transpose" => node.attribute.push(AttributeProto::ints("perm", &[0, 2, 1, 3])),
            "Concat" if *output == "with_sink" => node.attribute.push(AttributeProto::int("axis", 3)),
            "Concat" => node.attribute.push(AttributeProto::int("axis", 2)),
            "Cast" => node.attribute.push(AttributeProto::int("to", 9)),
            _ => {}
        }
        graph.node.push(node);
    }
    graph
}

const SCALED: (&str, &[&str], &str) = ("Mul", &["dots", "scale"], "scaled");
const CAUSAL: [(&str, &[&str], &str); 2] = [
    ("LessOrEqual", &["keys", "queries_down"], "seen"),
    ("Where", &["seen", "see", "hide"], "plane"),
];
const SOFTMAX: (&str, &[&str], &str) = ("Softmax", &["masked"], "weights");

fn match_of(between: &[&[(&str, &[&str], &str)]]) -> Result<AttentionMatch, Refusal> {
    first_match(&Decomposed, &graph(&between.concat()))
}

fn refusal(between: &[&[(&str, &[&str], &str)]]) -> String {
    match_of(between).expect_err("it should be refused").to_string()
}

#[test]
fn a_mask_that_is_added_matches() {
    let matched = match_of(&[&[SCALED], &CAUSAL, &[("Add", &["scaled", "plane"], "masked"), SOFTMAX]]).unwrap();
    assert_eq!((matched.q_heads, matched.kv_heads, matched.head_size), (2, 2, Some(4)));
    assert_eq!(
        (matched.scale, matched.softcap, matched.local_window_size),
        (0.5, 0.0, -1)
    );
    assert_eq!((matched.query.as_str(), matched.query_layout), ("q", HeadLayout::Flat));
    assert_eq!((matched.key.as_str(), matched.value.as_str()), ("k", "v"));
    assert_eq!(
        (matched.output.as_str(), matched.output_layout),
        ("y", HeadLayout::Flat)
    );
    assert_eq!(matched.length_source, LengthSource::FromMask { padding: false });
}

#[test]
fn padding_a_window_a_softcap_and_scaled_queries_match() {
    let matched = match_of(&[
        &[
            ("Div", &["dots", "cap"], "small"),
            ("Tanh", &["small"], "bent"),
            ("Mul", &["bent", "cap"], "scaled"),
        ],
        &CAUSAL,
        &[
            ("Sub", &["queries_down", "keys"], "distance"),
            ("Less", &["distance", "three"], "near"),
            ("And", &["seen", "near"], "both"),
            ("Cast", &["attention_mask"], "valid"),
            ("Unsqueeze", &["valid", "middle"], "valid_4d"),
            ("And", &["both", "valid_4d"], "all"),
            ("Where", &["all", "scaled", "hide"], "masked"),
            SOFTMAX,
        ],
    ])
    .unwrap();
    assert_eq!((matched.softcap, matched.local_window_size), (20.0, 3));
    assert!((matched.scale - 1.0).abs() < 1e-5, "{}", matched.scale);
    assert_eq!(matched.length_source, LengthSource::FromMask { padding: true });
}

#[test]
fn a_softmax_that_weighs_nothing_is_not_its_business() {
    let softmax = NodeProto::new("", "Softmax", "s", &["q"], &["p"]);
    let mut graph = projected(2, 2);
    graph.node.push(softmax);
    let view = GraphView::new(&graph, 23);
    let samples = SampleCalls::new(&view, None);
    let results = graph.node.iter().map(|n| Decomposed.match_node(&view, &samples, n));
    assert!(results.into_iter().all(|v| matches!(v, MatchResult::NotMine)));
}

#[test]
fn masks_that_are_not_causal_are_refused_with_the_tokens() {
    let why = refusal(&[&[SCALED, ("Softmax", &["scaled"], "weights")]]);
    assert!(why.contains("token 0 sees token 1"), "{why}");
    let why = refusal(&[
        &[SCALED],
        &CAUSAL,
        &[
            ("Mul", &["keys", "keys"], "squares"),
            ("Cast", &["squares"], "not_first"),
            ("And", &["seen", "not_first"], "odd"),
            ("Where", &["odd", "scaled", "hide"], "masked"),
            SOFTMAX,
        ],
    ]);
    assert!(why.contains("does not see token 0"), "{why}");
}

#[test]
fn numbers_added_to_scores_are_refused_with_their_value() {
    let why = refusal(&[
        &[SCALED],
        &CAUSAL,
        &[
            ("Add", &["plane", "scale"], "raised"),
            ("Add", &["scaled", "raised"], "masked"),
            SOFTMAX,
        ],
    ]);
    assert!(why.contains("a bias of 0.5"), "{why}");
}

#[test]
fn what_is_no_softmax_attention_is_refused_with_the_value_that_differs() {
    let masked = ("Add", &["scaled", "plane"][..], "masked");
    let why = refusal(&[
        &[SCALED],
        &CAUSAL,
        &[
            masked,
            ("Softmax", &["masked"], "likely"),
            ("Mul", &["likely", "twice"], "weights"),
        ],
    ]);
    assert!(
        why.contains("is not that of softmax attention") && why.contains("is expected"),
        "{why}"
    );
    let why = refusal(&[&[("Mul", &["dots", "k_turned"], "scaled")], &CAUSAL, &[masked, SOFTMAX]]);
    assert!(why.contains("mixes its scores with k_turned"), "{why}");
    let why = refusal(&[&CAUSAL, &[("Softmax", &["plane"], "weights")]]);
    assert!(why.contains("its scores (plane) do not depend on the tokens"), "{why}");
    let why = refusal(&[
        &[SCALED],
        &CAUSAL,
        &[masked, SOFTMAX, ("MatMul", &["weights", "present.0.value"], "again")],
    ]);
    assert!(why.contains("go into 2 products"), "{why}");
}

/// Scores where a table allows them.
const CHOSEN: [(&str, &[&str], &str); 1] = [("Where", &["allowed", "scaled", "hide"], "masked")];
/// A mask of the table and of padding, that is added: computed apart from the scores.
const ADDED: [(&str, &[&str], &str); 5] = [
    ("Cast", &["attention_mask"], "valid"),
    ("Unsqueeze", &["valid", "middle"], "valid_4d"),
    ("And", &["allowed", "valid_4d"], "all"),
    ("Where", &["all", "see", "hide"], "plane"),
    ("Add", &["scaled", "plane"], "masked"),
];

/// Masked by a table of all positions by all positions, as it is made ahead and sliced in each call.
fn tabled(
    masking: &[(&str, &[&str], &str)],
    size: usize,
    sees: impl Fn(usize, usize) -> bool,
) -> Result<AttentionMatch, Refusal> {
    let mut graph = graph(
        &[
            &[
                SCALED,
                ("Reshape", &["past", "list"], "from"),
                ("Reshape", &["total", "list"], "to"),
                ("Slice", &["table", "from", "to", "second"], "rows"),
                ("Slice", &["rows", "start", "to", "third"], "part"),
                ("Cast", &["part"], "allowed"),
            ][..],
            masking,
            &[SOFTMAX],
        ]
        .concat(),
    );
    for (name, value) in [("list", -1), ("start", 0), ("second", 2), ("third", 3)] {
        graph.initializer.push(TensorProto::int64s(name, &[1], &[value]));
    }
    let cells = (0..size * size).map(|at| f32::from(u8::from(sees(at / size, at % size))));
    let (dims, cells) = ([1, 1, size as i64, size as i64], cells.collect::<Vec<_>>());
    graph.initializer.push(TensorProto::floats("table", &dims, &cells));
    first_match(&Decomposed, &graph)
}

#[test]
fn a_window_inside_a_table_is_found() {
    for masking in [&CHOSEN[..], &ADDED] {
        for (size, window) in [(128, 40), (300, 256), (50, 49), (128, 127)] {
            let matched = tabled(masking, size, |i, j| j <= i && i - j < window).unwrap();
            assert_eq!(matched.local_window_size, window as i64, "of {size}");
        }
        for size in [128, 256, 1024] {
            let matched = tabled(masking, size, |i, j| j <= i).unwrap();
            assert_eq!(matched.local_window_size, -1, "of {size}");
        }
        let why = tabled(masking, 128, |i, j| j <= i && i / 40 == j / 40)
            .expect_err("chunks")
            .to_string();
        assert!(why.contains("neither causal nor a sliding window"), "{why}");
    }
}

/// Causal, and near: where the distance `apart` (`distance` as it is, or made of it) is less than `bound`.
fn bounded(more: &[(&str, &[&str], &str)], change: impl FnOnce(&mut GraphProto)) -> Result<AttentionMatch, Refusal> {
    let near = [
        ("Less", &["apart", "bound"][..], "near"),
        ("And", &["seen", "near"], "both"),
        ("Where", &["both", "scaled", "hide"], "masked"),
        SOFTMAX,
    ];
    let start = [SCALED, ("Sub", &["queries_down", "keys"], "distance")];
    let mut graph = graph(&[&start[..], &CAUSAL, more, &near].concat());
    for (name, value) in [("many", 70), ("most", 20_000), ("few", 4), ("wide", 8000)] {
        graph.initializer.push(TensorProto::int64s(name, &[], &[value]));
    }
    for (name, value) in [("tiny", 1.0 / 4900.0), ("unit", 1.0), ("half", 4900.5)] {
        graph.initializer.push(TensorProto::floats(name, &[], &[value]));
    }
    change(&mut graph);
    first_match(&Decomposed, &graph)
}

fn as_floats(graph: &mut GraphProto, output: &str) {
    let node = graph.node.iter_mut().find(|n| n.output(0) == output).expect("the Cast");
    node.attribute = vec![AttributeProto::int("to", 1)];
}

#[test]
fn a_mask_by_an_operator_that_is_not_supported_is_refused() {
    let why = refusal(&[
        &[SCALED],
        &CAUSAL,
        &[
            ("Resize", &["plane"], "out of range"),
            ("Add", &["scaled", "out of range"], "masked"),
            SOFTMAX,
        ],
    ]);
    assert!(
        why.contains("out of range (Resize): the operator Resize is not supported"),
        "{why}"
    );
}

#[test]
fn a_window_that_is_computed_is_found() {
    let same = ("Identity", &["distance"][..], "apart");
    let floats = ("Cast", &["distance"][..], "distance_f");
    let squares = ("Mul", &["distance", "distance"][..], "apart");
    let of = |more: &[(&str, &[&str], &str)]| {
        let change = |graph: &mut GraphProto| {
            if more.iter().any(|(_, _, output)| *output == "distance_f") {
                as_floats(graph, "distance_f");
            }
        };
        bounded(more, change).unwrap().local_window_size
    };
    assert_eq!(of(&[same, ("Mul", &["many", "many"], "bound")]), 4900);
    assert_eq!(of(&[same, ("Div", &["most", "few"], "bound")]), 5000);
    assert_eq!(of(&[same, ("Sub", &["most", "wide"], "bound")]), 12_000);
    assert_eq!(
        of(&[
            floats,
            ("Identity", &["distance_f"], "apart"),
            ("Identity", &["half"], "bound")
        ]),
        4901
    );
    assert_eq!(
        of(&[
            floats,
            ("Mul", &["distance_f", "tiny"], "apart"),
            ("Identity", &["unit"], "bound")
        ]),
        4900
    );
    assert_eq!(
        of(&[
            squares,
            ("Mul", &["many", "many"], "side"),
            ("Mul", &["side", "side"], "bound")
        ]),
        4900
    );
}

#[test]
fn a_cache_of_one_length_that_grows_is_refused() {
    let masked = ("Add", &["scaled", "plane"][..], "masked");
    let mut graph = graph(&[&[SCALED][..], &CAUSAL, &[masked, SOFTMAX]].concat());
    assert!(first_match(&Decomposed, &graph).is_ok());
    let mut inputs = graph.input.iter_mut();
    let past = inputs.find(|i| i.name() == "past_key_values.0.value").expect("a cache");
    past.dims_mut().expect("a shape")[2] = 63.into();
    let why = first_match(&Decomposed, &graph)
        .expect_err("it has to be cut")
        .to_string();
    assert!(why.contains("past_key_values.0.value comes in with 63 tokens"), "{why}");
}

/// Where the distance, or its square, in this type is less than the type's `limit`.
fn narrow(data_type: DataType, squared: bool, limit: &str) -> Result<AttentionMatch, Refusal> {
    let (apart, distance) = if squared {
        ("Mul", &["narrow", "narrow"][..])
    } else {
        ("Identity", &["narrow"][..])
    };
    let more = [
        ("Mul", &["many", "many"][..], "side"),
        ("Mul", &["side", "side"], "square"),
        ("Cast", &["distance"], "narrow"),
        (apart, distance, "apart"),
        ("Cast", &[limit], "bound"),
    ];
    bounded(&more, |graph| {
        let casts = graph
            .node
            .iter_mut()
            .filter(|n| ["narrow", "bound"].contains(&n.output(0)));
        casts.for_each(|n| n.attribute = vec![AttributeProto::int("to", i64::from(i32::from(data_type)))]);
    })
}

#[test]
fn distances_are_what_their_type_holds() {
    // Of the numbers between 4096 and 8192 float16 has every fourth: 7998 is 8000.
    assert_eq!(
        narrow(DataType::Float16, false, "wide").unwrap().local_window_size,
        7998
    );
    // An 8-bit integer counts from 0 again at 256, and squares in 32 bits are negative behind 46,340 tokens.
    let why = narrow(DataType::Uint8, false, "few")
        .expect_err("256 tokens away is near")
        .to_string();
    assert!(why.contains("does not see token"), "{why}");
    let why = narrow(DataType::Int32, true, "square")
        .expect_err("46,341 tokens away is near")
        .to_string();
    assert!(why.contains("does not see token"), "{why}");
    // In a branch too.
    let why = bounded(
        &[("If", &["seen_once"], "apart"), ("Identity", &["few"], "bound")],
        |graph| {
            let mut cast = NodeProto::new("", "Cast", "cast", &["distance"], &["narrow"]);
            cast.attribute = vec![AttributeProto::int("to", i64::from(i32::from(DataType::Uint8)))];
            let branch = GraphProto {
                node: vec![cast],
                output: vec![ValueInfoProto::tensor("narrow", DataType::Uint8, [])],
                ..Default::default()
            };
            let whole = TensorProto::raw("seen_once", DataType::Bool, &[], vec![1].into());
            graph.initializer.push(whole);
            let node = graph.node.iter_mut().find(|n| n.is("", "If")).expect("the If");
            node.attribute = ["then_branch", "else_branch"]
                .map(|name| AttributeProto::graph(name, branch.clone()))
                .to_vec();
        },
    );
    assert!(why.is_err(), "{why:?}");
}

#[test]
fn chunks_and_sinks_that_are_computed_are_refused() {
    let chunks = [
        ("Mul", &["many", "many"][..], "size"),
        ("Div", &["queries_down", "size"], "q_chunk"),
        ("Div", &["keys", "size"], "k_chunk"),
        ("Sub", &["q_chunk", "k_chunk"], "apart"),
        ("Identity", &["one"], "bound"),
    ];
    let why = bounded(&chunks, |_| {}).expect_err("chunks").to_string();
    assert!(why.contains("does not see token 0"), "{why}");
    // The distance counts from the fourth token on only.
    let sinks = [
        ("Mul", &["many", "many"][..], "bound"),
        ("Greater", &["keys", "three"], "later"),
        ("Where", &["later", "distance", "zero"], "apart"),
    ];
    let why = bounded(&sinks, |_| {}).expect_err("sinks").to_string();
    assert!(why.contains("the last 4900 tokens it sees the first 4"), "{why}");
}

#[test]
fn probabilities_that_depend_on_the_position_are_refused() {
    let between = |bound: i64| {
        let nodes = [
            &[SCALED][..],
            &CAUSAL,
            &[
                ("Add", &["scaled", "plane"], "masked"),
                ("Softmax", &["masked"], "likely"),
                ("Sub", &["queries_down", "keys"], "distance"),
                ("Less", &["distance", "bound"], "near"),
                ("Where", &["near", "likely", "see"], "weights"),
            ],
        ];
        let mut graph = graph(&nodes.concat());
        graph.initializer.push(TensorProto::int64s("bound", &[], &[bound]));
        first_match(&Decomposed, &graph)
    };
    let why = between(3000).expect_err("a window behind the Softmax").to_string();
    assert!(
        why.contains("what follows its Softmax depends on the position"),
        "{why}"
    );
}

/// A factor that is 1 for the first 50 positions, and 2 from there on.
const FACTOR: [(&str, &[&str], &str); 2] = [
    ("Less", &["queries_down", "fifty"], "early"),
    ("Where", &["early", "once", "twice"], "factor"),
];

/// Causal attention; `change` puts the factor in.
fn with_factor(
    more: &[(&str, &[&str], &str)],
    change: impl FnOnce(&mut GraphProto),
) -> Result<AttentionMatch, Refusal> {
    let mut between = [&[SCALED][..], &CAUSAL, &FACTOR, more].concat();
    if !more.iter().any(|(_, _, output)| *output == "masked") {
        between.push(("Add", &["scaled", "plane"], "masked"));
    }
    between.push(SOFTMAX);
    let mut graph = graph(&between);
    graph.initializer.push(TensorProto::int64s("fifty", &[], &[50]));
    graph.initializer.push(TensorProto::floats("once", &[], &[1.0]));
    change(&mut graph);
    first_match(&Decomposed, &graph)
}

fn reads_instead(graph: &mut GraphProto, output: &str, new: &str) {
    let node = graph.node.iter_mut().find(|n| n.output(0) == output);
    node.expect("the node").input[0] = new.into();
}

#[test]
fn a_factor_of_the_position_stays_outside() {
    let times_factor = ("Mul", &["q_heads", "factor"][..], "q_times_factor");
    let matched = with_factor(&[times_factor], |graph| reads_instead(graph, "dots", "q_times_factor")).unwrap();
    assert_eq!(
        (matched.query.as_str(), matched.query_layout),
        ("q_times_factor", HeadLayout::Heads)
    );
    let times_factor = ("Mul", &["mixed", "factor"][..], "mixed_times_factor");
    let matched = with_factor(&[times_factor], |graph| {
        reads_instead(graph, "mixed_tokens", "mixed_times_factor")
    })
    .unwrap();
    assert_eq!(
        (matched.output.as_str(), matched.output_layout),
        ("mixed", HeadLayout::Heads)
    );
}

#[test]
fn a_factor_of_the_position_on_scores_or_kept_keys_is_refused() {
    let times_factor = [
        ("Mul", &["scaled", "factor"][..], "scores_times_factor"),
        ("Add", &["scores_times_factor", "plane"], "masked"),
    ];
    let why = with_factor(&times_factor, |_| {})
        .expect_err("a factor on scores")
        .to_string();
    assert!(why.contains("its scores are multiplied with 1 where others"), "{why}");
    let times_factor = ("Mul", &["present.0.key", "factor"][..], "keys_times_factor");
    let why = with_factor(&[times_factor], |graph| {
        reads_instead(graph, "k_turned", "keys_times_factor")
    })
    .expect_err("a factor on keys")
    .to_string();
    assert!(
        why.contains("its keys (keys_times_factor, by Mul) are not a cache"),
        "{why}"
    );
}

#[test]
fn a_graph_without_a_cache_is_refused() {
    let between = [
        &[SCALED][..],
        &CAUSAL,
        &[("Add", &["scaled", "plane"], "masked"), SOFTMAX],
    ]
    .concat();
    let mut graph = graph(&between);
    graph.input.retain(|i| !i.name().starts_with("past"));
    for node in graph.node.iter_mut().filter(|n| n.op_type() == "Concat") {
        node.input.remove(0);
    }
    let why = first_match(&Decomposed, &graph).expect_err("no cache").to_string();
    assert!(
        why.contains("keeps no cache") && why.contains("decoder_with_past"),
        "{why}"
    );
}
