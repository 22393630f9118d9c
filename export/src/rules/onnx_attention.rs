//! ai.onnx::Attention (opset 23 to 25): with the cache as its own inputs or put together before it.

use super::rule::{MatchResult, Rule};
use crate::prove::{
    AttentionCandidate, NodeCache, NodeRefusal, Refusal, SampleCalls, ScoreSource, only_supported_attributes, prove,
};
use retro_onnx::{NodeProto, graph::GraphView};

/// The rule.
pub struct OnnxAttention;

const KNOWN: [&str; 9] = [
    "is_causal",
    "kv_num_heads",
    "left_window_size",
    "right_window_size",
    "q_num_heads",
    "scale",
    "softcap",
    "softmax_precision",
    "qk_matmul_output_mode",
];

impl Rule for OnnxAttention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn match_node<'a>(&self, _: &GraphView<'a>, samples: &SampleCalls<'a>, node: &'a NodeProto) -> MatchResult {
        if !node.is("", "Attention") {
            return MatchResult::NotMine;
        }
        candidate(node).and_then(|candidate| prove(samples, candidate)).into()
    }
}

fn candidate(node: &NodeProto) -> Result<AttentionCandidate<'_>, Refusal> {
    if !node.input(6).is_empty() {
        return Err(NodeRefusal::ValidLengths {
            name: node.input(6).to_owned(),
        }
        .into());
    }
    if !node.output(3).is_empty() {
        return Err(NodeRefusal::ReturnsScores {
            name: node.output(3).to_owned(),
        }
        .into());
    }
    only_supported_attributes(node, &KNOWN)?;
    let cache = NodeCache::read(node, [4, 5])?;
    Ok(AttentionCandidate {
        query: node.input(0),
        key: node.input(1),
        value: node.input(2),
        output: node.output(0),
        scores: ScoreSource::Fused(node),
        cache,
        bias: "",
        sink: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        prove::{AttentionMatch, HeadLayout, LengthSource},
        testing::{changed_match, projected, set},
    };
    use retro_onnx::{AttributeProto, DataType, GraphProto, TensorProto};

    /// Four query heads of 4 for two key heads, causal, the cache inside.
    fn graph() -> GraphProto {
        let mut graph = projected(4, 2);
        let inputs = ["q", "k", "v", "", "past_key_values.0.key", "past_key_values.0.value"];
        let outputs = ["y", "present.0.key", "present.0.value"];
        let node = NodeProto::new("", "Attention", "attention", &inputs, &outputs);
        graph.node.push(
            node.with(AttributeProto::int("q_num_heads", 4))
                .with(AttributeProto::int("kv_num_heads", 2))
                .with(AttributeProto::int("is_causal", 1)),
        );
        graph
    }

    fn matched_after(change: impl FnOnce(&mut GraphProto, &mut NodeProto)) -> Result<AttentionMatch, Refusal> {
        changed_match(&OnnxAttention, graph(), change)
    }

    fn refusal(change: impl FnOnce(&mut GraphProto, &mut NodeProto)) -> String {
        matched_after(change).expect_err("it should be refused").to_string()
    }

    #[test]
    fn a_cache_inside_matches() {
        let matched = matched_after(|_, _| {}).unwrap();
        assert_eq!((matched.q_heads, matched.kv_heads, matched.head_size), (4, 2, Some(4)));
        assert_eq!(
            (matched.scale, matched.softcap, matched.local_window_size),
            (0.5, 0.0, -1)
        );
        assert_eq!(
            (matched.query.as_str(), matched.output.as_str(), matched.query_layout),
            ("q", "y", HeadLayout::Flat)
        );
        assert_eq!(matched.length_source, LengthSource::FromMask { padding: false });
    }

    #[test]
    fn scale_softcap_and_a_boolean_mask_of_padding_match() {
        let matched = matched_after(|graph, node| {
            set(node, AttributeProto::float("scale", 0.25));
            set(node, AttributeProto::float("softcap", 30.0));
            graph.initializer.push(TensorProto::int64s("middle", &[2], &[1, 2]));
            let to = AttributeProto::int("to", i64::from(i32::from(DataType::Bool)));
            graph
                .node
                .push(NodeProto::new("", "Cast", "cast", &["attention_mask"], &["valid"]).with(to));
            let inputs = ["valid", "middle"];
            graph
                .node
                .push(NodeProto::new("", "Unsqueeze", "spread", &inputs, &["valid_4d"]));
            node.input[3] = "valid_4d".into();
        })
        .unwrap();
        assert_eq!((matched.scale, matched.softcap), (0.25, 30.0));
        assert_eq!(matched.length_source, LengthSource::FromMask { padding: true });
    }

    #[test]
    fn windows_of_opset_25_count_the_tokens_before_and_behind() {
        let windows = |sides: &[(&str, i64)]| {
            matched_after(|_, node| {
                sides
                    .iter()
                    .for_each(|(name, n)| set(node, AttributeProto::int(name, *n)))
            })
        };
        let (left, right, causal) = ("left_window_size", "right_window_size", "is_causal");
        for (sides, window) in [
            (&[(left, 5)][..], 6),
            (&[(left, 0)], 1),
            (&[(left, 5000)], 5001),
            (&[(left, -1), (right, -1)], -1),
            (&[(left, 5), (right, 0), (causal, 0)], 6),
            (&[(right, 0), (causal, 0)], -1),
            // A causal mask hides what is behind whatever the window.
            (&[(left, 4), (right, 2)], 5),
        ] {
            assert_eq!(windows(sides).unwrap().local_window_size, window, "{sides:?}");
        }
        for sides in [&[(left, 5), (causal, 0)][..], &[(right, 2), (causal, 0)]] {
            let why = windows(sides).expect_err("tokens behind").to_string();
            assert!(why.contains("token 0 sees token 1"), "{why}");
        }
        let why = windows(&[(left, -2)]).expect_err("no size").to_string();
        assert!(why.contains("its left_window_size is -2"), "{why}");
    }

    #[test]
    fn a_cache_put_together_before_it_matches() {
        let matched = matched_after(|graph, node| {
            graph
                .initializer
                .push(TensorProto::int64s("heads", &[4], &[0, 0, 2, 4]));
            for (new, kind) in [("k", "key"), ("v", "value")] {
                let [by_token, by_head] = ["tokens", "heads"].map(|n| format!("{new}_{n}"));
                let reshape = NodeProto::new("", "Reshape", &by_token, &[new, "heads"], &[&by_token]);
                let transpose = NodeProto::new("", "Transpose", &by_head, &[&by_token], &[&by_head]);
                let (past, present) = (format!("past_key_values.0.{kind}"), format!("present.0.{kind}"));
                let append = NodeProto::new("", "Concat", &present, &[&past, &by_head], &[&present]);
                graph.node.extend([
                    reshape,
                    transpose.with(AttributeProto::ints("perm", &[0, 2, 1, 3])),
                    append.with(AttributeProto::int("axis", 2)),
                ]);
            }
            graph
                .initializer
                .push(TensorProto::int64s("q_heads", &[4], &[0, 0, 4, 4]));
            let reshape = NodeProto::new("", "Reshape", "q_tokens", &["q", "q_heads"], &["q_tokens"]);
            let transpose = NodeProto::new("", "Transpose", "q_by_head", &["q_tokens"], &["q_by_head"]);
            graph
                .node
                .extend([reshape, transpose.with(AttributeProto::ints("perm", &[0, 2, 1, 3]))]);
            node.input = ["q_by_head", "present.0.key", "present.0.value", "mask"]
                .map(str::to_owned)
                .to_vec();
            node.output = vec!["y".into()];
            // Without a past of its own the node takes the first query for token 0, so the mask is written out.
            node.attribute.retain(|a| a.name() != "is_causal");
            for (name, value) in [("one", 1), ("zero", 0)] {
                graph.initializer.push(TensorProto::int64s(name, &[], &[value]));
            }
            graph.initializer.push(TensorProto::int64s("rows", &[2], &[-1, 1]));
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
                graph.node.push(NodeProto::new("", op, output, inputs, &[output]));
            }
        })
        .unwrap();
        assert_eq!(
            (matched.query.as_str(), matched.key.as_str(), matched.query_layout),
            ("q", "k", HeadLayout::Flat)
        );
        assert_eq!(
            (matched.output_layout, matched.total_key.as_str()),
            (HeadLayout::Heads, "present.0.key")
        );
        assert_eq!((matched.q_heads, matched.kv_heads), (4, 2));
    }

    #[test]
    fn inputs_outputs_and_attributes_without_a_counterpart_are_refused_by_name() {
        let why = refusal(|_, node| node.input.push("lengths".into()));
        assert!(why.contains("nonpad_kv_seqlen (lengths)"), "{why}");
        let why = refusal(|_, node| node.output.push("scores".into()));
        assert!(why.contains("returns its attention scores (scores)"), "{why}");
        let why = refusal(|_, node| set(node, AttributeProto::int("brand_new", 1)));
        assert!(why.contains("attribute brand_new is not supported"), "{why}");
        let why = refusal(|_, node| node.input[5] = String::new());
        assert!(why.contains("its cache is not complete"), "{why}");
    }

    #[test]
    fn masks_and_heads_that_do_not_fit_are_refused_with_what_failed() {
        let why = refusal(|_, node| set(node, AttributeProto::int("is_causal", 0)));
        assert!(why.contains("token 0 sees token 1"), "bidirectional: {why}");
        let why = refusal(|graph, node| {
            graph.initializer.push(TensorProto::floats("m", &[3, 1, 1], &[0.0; 3]));
            node.input[3] = "m".into();
        });
        assert!(why.contains("[3, 1, 1]"), "a mask of 3 heads for 4: {why}");
        let why = refusal(|_, node| set(node, AttributeProto::int("q_num_heads", 3)));
        assert!(why.contains("16 elements are not 3 heads"), "{why}");
        let why = refusal(|_, node| {
            node.input[4] = "past_key_values.0.value".into();
            node.input[0] = "k".into();
            node.attribute.retain(|a| a.name() != "q_num_heads");
        });
        assert!(why.contains("not 0 heads"), "{why}");
        // Values wider than keys.
        let why = refusal(|graph, node| {
            graph
                .initializer
                .push(TensorProto::floats("wide", &[8, 16], &[0.1; 128]));
            let wide = NodeProto::new("", "MatMul", "wide_proj", &["inputs_embeds", "wide"], &["v_wide"]);
            graph.node.push(wide);
            node.input[2] = "v_wide".into();
            let past = graph.input.iter_mut().find(|i| i.name() == "past_key_values.0.value");
            past.unwrap().dims_mut().unwrap()[3] = 8.into();
        });
        assert!(why.contains("keys are 2 heads of 4, its values 2 of 8"), "{why}");
    }

    #[test]
    fn a_cache_that_does_not_leave_the_graph_is_refused() {
        let why = refusal(|graph, _| graph.output.retain(|o| o.name() != "present.0.key"));
        assert!(why.contains("present.0.key is not an output of the graph"), "{why}");
    }
}
