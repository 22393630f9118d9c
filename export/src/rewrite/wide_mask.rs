//! Masks as wide as the caches, where the source reads the number of its tokens from its mask's width ([`super::sequence_lengths`]):
//! ones first, zeros for what is still to come. A step then has the same shapes at every length, as a CUDA graph needs them.
//!
//! The operator needs no width: `seqlens_k` counts the mask's ones, and `total_sequence_length` may be too large. But positions or
//! another mask may be made from the width as well, and would be those of a full cache. So such masks are taken only where the
//! graph shows that nothing but these two inputs depends on the mask. A mask of any other width stays what it was: as wide as there
//! are tokens.

use super::{
    mask_check::{self, MaskCheck, OnesEnd, TokensFed},
    operator_node::is_operator,
    prune::{needed, prune},
};
use crate::{
    mask_width::{reader_beside_lengths, takes_wide_masks},
    rules::{ATTENTION_MASK, Conversion, INPUT_IDS, INPUTS_EMBEDS, LengthSource},
};
use retro_onnx::{GraphBuilder, GraphProto, graph::GraphView};

/// Lets the operators that read the lengths `lengths` take such masks too. Whether they do: if not, all is as it was.
pub fn accept(
    graph: &mut GraphProto,
    conversions: &[Conversion],
    lengths: &str,
    opset: i64,
    builder: &mut GraphBuilder,
) -> bool {
    let mut from_mask = conversions.iter().filter_map(|c| match c.matched.length_source {
        LengthSource::FromMask { padding } => Some((padding, &c.matched.past_key)),
        LengthSource::FromGraph => None,
    });
    let Some(((padding, cache), tokens)) = from_mask.next().zip(TokensFed::of(graph)) else {
        return false;
    };
    let view = GraphView::new(graph, opset);
    if reader_beside_lengths(&view, ATTENTION_MASK).is_some() {
        return false;
    }
    let Some(place) = view.producer_index(lengths) else {
        return false;
    };
    builder.set_prefix("retro/wide_mask/");
    let check = MaskCheck {
        data_type: mask_check::data_type(graph),
        end: OnesEnd::ByWidth(tokens, cache),
        from_start: !padding,
        opset,
    };
    let was = needed(graph);
    let checked = check.seqlens_k(builder, None);
    graph.initializer.append(&mut builder.take_initializers());
    graph.node.splice(place..place, builder.take_nodes());
    for node in graph.node.iter_mut().filter(|n| is_operator(n)) {
        for slot in node.input.iter_mut().filter(|name| *name == lengths) {
            slot.clone_from(&checked);
        }
    }
    prune(graph, &was);
    true
}

/// Whether a graph whose lengths are checked needs masks as wide as there are tokens, whatever its attentions were, or it
/// cannot be told. To ask before the window's own nodes read the width.
pub fn needs_width(graph: &GraphProto, opset: i64) -> bool {
    let view = GraphView::new(graph, opset);
    let tokens = [INPUT_IDS, INPUTS_EMBEDS].into_iter().find(|name| view.is_input(name));
    takes_wide_masks(&view, ATTENTION_MASK, tokens.unwrap_or(INPUT_IDS)).is_err()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        eval::{Env, Program, Tensor},
        rewrite::sequence_lengths::SequenceLengths,
        rules::{Attention, AttentionMatch},
    };
    use retro_contract::{DOMAIN, Mode, OP_TYPE, input, limits::MASK_NOT_UNDERSTOOD};
    use retro_onnx::{DataType, Dimension, NodeProto, ValueInfoProto};
    use std::collections::HashSet;

    const OPSET: i64 = 13;

    /// A graph with an operator's node whose lengths come from the mask, and the lengths' name.
    fn graph(padding: bool) -> (GraphProto, String) {
        let mut graph = GraphProto::default();
        let dims = |names: &[&str]| names.iter().map(|n| (*n).into()).collect::<Vec<Dimension>>();
        for (name, dims) in [(INPUT_IDS, dims(&["b", "s"])), ("past", dims(&["b", "h", "c", "d"]))] {
            graph.input.push(ValueInfoProto::tensor(name, DataType::Int64, dims));
        }
        let output = ValueInfoProto::tensor("y", DataType::Float, dims(&["b"]));
        graph.output.push(output);
        let mut own = GraphBuilder::part_of(&graph);
        let lengths = SequenceLengths::new(&mut graph, &mut own, OPSET, padding).unwrap();
        let mut inputs = vec![""; input::COUNT];
        inputs[input::SEQLENS_K] = &lengths.seqlens_k;
        inputs[input::TOTAL_SEQUENCE_LENGTH] = &lengths.total_sequence_length;
        graph.node = lengths.nodes;
        graph
            .node
            .push(NodeProto::new(DOMAIN, OP_TYPE, "attention", &inputs, &["y"]));
        (graph, lengths.seqlens_k)
    }

    fn accepts(graph: &mut GraphProto, lengths: &str, padding: bool) -> bool {
        let matched = AttentionMatch {
            length_source: LengthSource::FromMask { padding },
            past_key: "past".into(),
            ..Default::default()
        };
        let attention = Attention {
            layer: 0,
            node: None,
            name: "attention".into(),
            op_type: "MatMul".into(),
            rule: None,
            found: Ok(Box::new(matched.clone())),
            takes_tokens_again: true,
        };
        let conversion = Conversion {
            attention: &attention,
            matched: &matched,
            node: 0,
            mode: Mode::Retro,
        };
        let mut builder = GraphBuilder::part_of(graph);
        accept(graph, &[conversion], lengths, OPSET, &mut builder)
    }

    /// What the operator reads for masks of one width, tokens fed and a cache's capacity.
    fn seqlens_k(graph: &GraphProto, rows: &[Vec<i64>], fed: usize, capacity: usize) -> Vec<i64> {
        let view = GraphView::new(graph, OPSET);
        let program = Program::new(&view, None, &HashSet::new(), &HashSet::new());
        let (b, int) = (rows.len(), DataType::Int64);
        let mask = rows.iter().flatten().map(|x| *x as f64).collect();
        let mut env = Env::default();
        env.set(ATTENTION_MASK, Tensor::new(vec![b, rows[0].len()], int, mask));
        env.set(INPUT_IDS, Tensor::unknown(vec![b, fed], int));
        env.set("past", Tensor::unknown(vec![b, 1, capacity, 1], int));
        let env = program.run(env);
        let operator = graph.node.iter().find(|n| is_operator(n)).unwrap();
        let found = env.need(operator.input(input::SEQLENS_K)).unwrap();
        assert_eq!(found.shape, [b]);
        found.data.iter().flatten().map(|x| *x as i64).collect()
    }

    #[test]
    fn a_mask_as_wide_as_the_cache_may_end_with_zeros() {
        for padding in [false, true] {
            let (mut graph, lengths) = graph(padding);
            assert!(accepts(&mut graph, &lengths, padding));
            let old = graph.node.iter().filter(|n| n.name().starts_with("retro/mask/"));
            assert_eq!(old.count(), 0, "the check that it replaces is gone");
            for (width, capacity, fed) in [(5, 5, 1), (5, 5, 3), (4, 5, 1), (4, 5, 2), (1, 1, 1), (1, 2, 1)] {
                let bit = |m: i64, i: i64| m >> i & 1;
                let rows: Vec<Vec<i64>> = (0..1 << width)
                    .map(|m| (0..width).map(|i| bit(m, i)).collect())
                    .collect();
                let expected: Vec<i64> = rows
                    .iter()
                    .map(|row| {
                        let n = row.iter().sum::<i64>();
                        let zeros = row.iter().take_while(|x| **x == 0).count();
                        let end = row.iter().rposition(|x| *x == 1).map_or(0, |i| i + 1);
                        let together = n > 0 && (end - zeros) as i64 == n;
                        let begins = padding || zeros == 0;
                        let at_end = end as i64 == width;
                        let room = width as usize == capacity && n >= fed as i64;
                        let valid = together && begins && (at_end || room);
                        if valid { n - 1 } else { i64::from(MASK_NOT_UNDERSTOOD) }
                    })
                    .collect();
                let found = seqlens_k(&graph, &rows, fed, capacity);
                assert_eq!(
                    found, expected,
                    "{padding}, {fed} tokens, capacity {capacity}: {rows:?}"
                );
            }
        }
    }

    #[test]
    fn what_else_reads_the_mask_keeps_its_width() {
        for op_type in ["Shape", "Neg"] {
            let (mut graph, lengths) = graph(true);
            // Before what it depends on: order is not what tells.
            graph
                .node
                .insert(0, NodeProto::new("", "Cast", "", &["positions"], &["z"]));
            graph
                .node
                .push(NodeProto::new("", op_type, "", &[ATTENTION_MASK], &["positions"]));
            assert!(accepts(&mut graph.clone(), &lengths, true), "nothing needs it");
            graph
                .output
                .push(ValueInfoProto::tensor("z", DataType::Int64, ["b".into()]));
            let before = graph.clone();
            assert!(!accepts(&mut graph, &lengths, true));
            assert!(graph == before, "{op_type}");
        }
        // The operator itself, by another of its inputs.
        let (mut graph, lengths) = graph(true);
        let operator = graph.node.last_mut().unwrap();
        operator.input[input::PAGE_BUDGET] = ATTENTION_MASK.into();
        assert!(!accepts(&mut graph, &lengths, true));
    }
}
