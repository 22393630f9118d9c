//! com.microsoft::MultiHeadAttention: with the cache as its own inputs or put together before it, repeated heads, a bias on
//! queries, keys and values, a mask as padding, as scores, or causal.

use super::rule::{MatchResult, Rule};
use crate::prove::{
    AttentionCandidate, NodeCache, NodeRefusal, Refusal, SampleCalls, ScoreSource, only_supported_attributes, prove,
};
use retro_onnx::{NodeProto, graph::GraphView};

/// The rule.
pub struct MultiHeadAttention;

mod slot {
    pub const BIAS: usize = 3;
    pub const PAST_KEY: usize = 6;
    pub const PAST_VALUE: usize = 7;
    /// Later ones (cache_indirection, past_sequence_length) are of beam search and shared buffers.
    pub const COUNT: usize = 8;
}

const KNOWN: [&str; 4] = ["num_heads", "mask_filter_value", "scale", "unidirectional"];

impl Rule for MultiHeadAttention {
    fn name(&self) -> &'static str {
        "mha"
    }

    fn match_node<'a>(&self, _: &GraphView<'a>, samples: &SampleCalls<'a>, node: &'a NodeProto) -> MatchResult {
        if !node.is("com.microsoft", "MultiHeadAttention") {
            return MatchResult::NotMine;
        }
        candidate(node).and_then(|candidate| prove(samples, candidate)).into()
    }
}

fn candidate(node: &NodeProto) -> Result<AttentionCandidate<'_>, Refusal> {
    if node.input(1).is_empty() || node.input(2).is_empty() {
        return Err(NodeRefusal::Packed.into());
    }
    if let Some(extra) = node.input.iter().skip(slot::COUNT).find(|i| !i.is_empty()) {
        return Err(NodeRefusal::BeamSearch { name: extra.clone() }.into());
    }
    if let Some(extra) = node.output.iter().skip(3).find(|o| !o.is_empty()) {
        return Err(NodeRefusal::ReturnsScores { name: extra.clone() }.into());
    }
    only_supported_attributes(node, &KNOWN)?;
    let cache = NodeCache::read(node, [slot::PAST_KEY, slot::PAST_VALUE])?;
    Ok(AttentionCandidate {
        query: node.input(0),
        key: node.input(1),
        value: node.input(2),
        output: node.output(0),
        scores: ScoreSource::Fused(node),
        cache,
        bias: node.input(slot::BIAS),
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
    use retro_onnx::{AttributeProto, DataType, GraphProto, TensorProto, ValueInfoProto};

    /// Two heads of 4, causal, padding as a mask of what is valid, the cache inside.
    fn graph() -> GraphProto {
        let mut graph = projected(2, 2);
        let to = AttributeProto::int("to", i64::from(i32::from(DataType::Int32)));
        graph
            .node
            .push(NodeProto::new("", "Cast", "mask", &["attention_mask"], &["valid"]).with(to));
        let inputs = [
            "q",
            "k",
            "v",
            "",
            "valid",
            "",
            "past_key_values.0.key",
            "past_key_values.0.value",
        ];
        let outputs = ["y", "present.0.key", "present.0.value"];
        let node = NodeProto::new("com.microsoft", "MultiHeadAttention", "attention", &inputs, &outputs);
        graph.node.push(
            node.with(AttributeProto::int("num_heads", 2))
                .with(AttributeProto::int("unidirectional", 1)),
        );
        graph
    }

    fn matched_after(change: impl FnOnce(&mut GraphProto, &mut NodeProto)) -> Result<AttentionMatch, Refusal> {
        changed_match(&MultiHeadAttention, graph(), change)
    }

    fn refusal(change: impl FnOnce(&mut GraphProto, &mut NodeProto)) -> String {
        matched_after(change).expect_err("it should be refused").to_string()
    }

    #[test]
    fn a_cache_inside_and_a_padding_mask_match() {
        let matched = matched_after(|_, _| {}).unwrap();
        assert_eq!((matched.q_heads, matched.kv_heads, matched.head_size), (2, 2, Some(4)));
        assert_eq!(
            (matched.query.as_str(), matched.key.as_str(), matched.value.as_str()),
            ("q", "k", "v")
        );
        assert_eq!(
            (matched.query_layout, matched.output_layout, matched.output.as_str()),
            (HeadLayout::Flat, HeadLayout::Flat, "y")
        );
        assert_eq!(
            (matched.past_key.as_str(), matched.present_value.as_str()),
            ("past_key_values.0.key", "present.0.value")
        );
        assert_eq!(
            (matched.scale, matched.softcap, matched.local_window_size),
            (0.5, 0.0, -1),
            "1/sqrt(4)"
        );
        assert_eq!(matched.length_source, LengthSource::FromMask { padding: true });
    }

    #[test]
    fn scale_bias_and_no_padding_match() {
        let matched = matched_after(|graph, node| {
            set(node, AttributeProto::float("scale", 0.3));
            let bias: Vec<f32> = (0..24).map(|i| i as f32 / 10.0).collect();
            graph.initializer.push(TensorProto::floats("bias", &[24], &bias));
            node.input[slot::BIAS] = "bias".into();
            node.input[4] = String::new();
        })
        .unwrap();
        assert_eq!((matched.scale, matched.bias.as_str()), (0.3, "bias"));
        assert_eq!(matched.length_source, LengthSource::FromMask { padding: false });
    }

    #[test]
    fn a_window_written_as_a_bias_on_the_scores_matches() {
        // [1, 1, S, T], from positions: -inf where a key is 3 or more tokens back.
        let matched = matched_after(|graph, node| {
            for (name, value) in [("one", 1), ("three", 3), ("zero", 0)] {
                graph.initializer.push(TensorProto::int64s(name, &[], &[value]));
            }
            graph.initializer.push(TensorProto::int64s("rows", &[2], &[-1, 1]));
            graph.initializer.push(TensorProto::int64s("front", &[2], &[0, 1]));
            graph.initializer.push(TensorProto::floats("see", &[], &[0.0]));
            graph
                .initializer
                .push(TensorProto::floats("hide", &[], &[f32::NEG_INFINITY]));
            for (op, inputs, output) in [
                ("Shape", &["attention_mask"][..], "mask_shape"),
                ("Gather", &["mask_shape", "one"], "total"),
                ("Shape", &["inputs_embeds"], "embeds_shape"),
                ("Gather", &["embeds_shape", "one"], "fed"),
                ("Sub", &["total", "fed"], "past"),
                ("Range", &["past", "total", "one"], "queries"),
                ("Reshape", &["queries", "rows"], "queries_down"),
                ("Range", &["zero", "total", "one"], "keys"),
                ("Sub", &["queries_down", "keys"], "distance"),
                ("Less", &["distance", "three"], "near"),
                ("Where", &["near", "see", "hide"], "plane"),
                ("Unsqueeze", &["plane", "front"], "scores_bias"),
            ] {
                graph.node.push(NodeProto::new("", op, output, inputs, &[output]));
            }
            node.input[5] = "scores_bias".into();
        })
        .unwrap();
        assert_eq!(matched.local_window_size, 3);
    }

    #[test]
    fn inputs_outputs_and_attributes_without_a_counterpart_are_refused_by_name() {
        let why = refusal(|_, node| node.input[2] = String::new());
        assert!(why.contains("packed in one input"), "{why}");
        let why = refusal(|_, node| node.input.push("beams".into()));
        assert!(why.contains("it takes beams"), "{why}");
        let why = refusal(|_, node| node.output.push("scores".into()));
        assert!(why.contains("returns its attention scores (scores)"), "{why}");
        let why = refusal(|_, node| set(node, AttributeProto::int("brand_new", 1)));
        assert!(why.contains("attribute brand_new is not supported"), "{why}");
        let why = refusal(|_, node| node.input[7] = String::new());
        assert!(why.contains("its cache is not complete"), "{why}");
    }

    #[test]
    fn masks_and_heads_that_do_not_fit_are_refused_with_what_failed() {
        let why = refusal(|_, node| node.attribute.retain(|a| a.name() != "unidirectional"));
        assert!(why.contains("token 0 sees token 1"), "bidirectional: {why}");
        let why = refusal(|_, node| set(node, AttributeProto::int("num_heads", 3)));
        assert!(why.contains("8 elements are not 3 heads"), "{why}");
        let why = refusal(|graph, node| {
            graph
                .initializer
                .push(TensorProto::floats("steep", &[1, 1, 1, 1], &[0.7]));
            node.input[5] = "steep".into();
        });
        assert!(why.contains("bias of 0.69999"), "{why}");
    }

    #[test]
    fn a_cache_behind_a_copy_matches() {
        let matched = matched_after(|graph, node| {
            let past = ["past_key_values.0.key"];
            graph
                .node
                .push(NodeProto::new("", "Identity", "copy", &past, &["copied"]));
            node.input[6] = "copied".into();
            node.output[1] = "inner".into();
            graph
                .node
                .push(NodeProto::new("", "Identity", "back", &["inner"], &["present.0.key"]));
        });
        let matched = matched.unwrap();
        assert_eq!(
            (
                matched.past_key.as_str(),
                matched.present_key.as_str(),
                matched.total_key.as_str()
            ),
            ("past_key_values.0.key", "present.0.key", "inner")
        );
    }

    #[test]
    fn caches_that_are_not_the_graphs_are_refused() {
        let why = refusal(|graph, node| {
            // Cross-attention: keys and values of an encoder, no cache of their own.
            node.input[6] = String::new();
            node.input[7] = String::new();
            let f = DataType::Float;
            for name in ["k", "v"] {
                graph.node.retain(|n| n.output(0) != name);
                let dims = ["batch".into(), "tokens".into(), 8.into()];
                graph.input.push(ValueInfoProto::tensor(name, f, dims));
            }
        });
        assert!(why.contains("its keys come from k, an input that is none of"), "{why}");
        let why = refusal(|graph, _| graph.output.retain(|o| o.name() != "present.0.value"));
        assert!(why.contains("present.0.value is not an output of the graph"), "{why}");
        let why = refusal(|graph, node| {
            let past = ["past_key_values.0.key"];
            graph.node.push(NodeProto::new("", "Neg", "turn", &past, &["turned"]));
            node.input[6] = "turned".into();
        });
        assert!(why.contains("its cache turned is not an input of the graph"), "{why}");
    }
}
