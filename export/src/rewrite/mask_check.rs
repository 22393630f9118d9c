//! The check of the attention mask: seqlens_k from the mask itself, negative where the operator would read the mask otherwise than
//! the source does. The operator then reports an error, where it would compute wrong numbers.
//!
//! It is used where the source tells lengths by the shape of its cache ([`super::sequence_lengths`]), and where the source counts
//! the ones of its mask ([`check_masks`]), as GroupQueryAttention has it: a count says nothing about where the ones are.
//!
//! The operator takes what is fed as the newest tokens of its cache: with n valid tokens and S fed, n < S, the first S - n rows
//! are padding. So n ones side by side are right at the end of the mask (padding on the left), and anywhere if n >= S (masks
//! as wide as a cache, ones first). Ones that are not side by side, or a padded end of what is fed, are not. Where a
//! GroupQueryAttention is left in the graph, which takes the first n tokens of its cache, the ones must begin the mask as well.
//!
//! All is computed where the mask is: a number that crosses from the CPU to a GPU would forbid to capture a CUDA graph. And it is
//! computed in float32, which holds every length below 2^24: ONNX Runtime's CUDA kernel adds up int64 with a single block, which takes
//! as long at 128k tokens as a layer. For the same reason the source's own count gives way, where it is no more than that.

use super::{
    operator_node::is_operator,
    prune::{needed, prune},
};
use crate::{
    eval::{Env, leading_to, reads},
    mask_width,
    rules::{self, ATTENTION_MASK, Conversion, INPUT_IDS, INPUTS_EMBEDS},
};
use retro_contract::{input, limits::MASK_NOT_UNDERSTOOD};
use retro_onnx::{DataType, GraphBuilder, GraphProto, ValueInfoProto, graph::GraphView};
use std::collections::{BTreeSet, HashSet};

/// Nodes that a count of ones may be made of.
const MOST_NODES: usize = 16;
/// What tells a count of ones from other things that one may do with a mask.
const MASKS: [&[&str]; 4] = [
    &["1"],
    &["1111", "0110"],
    &["0010110", "1110000"],
    &["0000011", "0000000"],
];

/// Lets the operator's nodes read checked lengths where the source counts the ones of its attention mask.
pub fn check_masks(graph: &mut GraphProto, conversions: &[Conversion], opset: i64, builder: &mut GraphBuilder) {
    let counted = conversions
        .iter()
        .filter(|c| c.matched.length_source == rules::LengthSource::FromGraph);
    let counts: BTreeSet<&str> = counted.map(|c| c.matched.seqlens_k.as_str()).collect();
    let Some(tokens) = TokensFed::of(graph) else { return };
    let check = MaskCheck {
        data_type: data_type(graph),
        end: OnesEnd::WithTokensFed(tokens),
        from_start: graph.node.iter().any(rules::gqa::is_one),
        opset,
    };
    builder.set_prefix("retro/given/");
    for count in counts {
        let view = GraphView::new(graph, opset);
        let Some(producer) = view.producer_index(count).filter(|_| depends(&view, count)) else {
            continue;
        };
        let own = counts_ones(&view, count);
        let was = own.then(|| needed(graph));
        let checked = check.seqlens_k(builder, (!own).then_some(count));
        graph.initializer.append(&mut builder.take_initializers());
        graph.node.splice(producer + 1..=producer, builder.take_nodes());
        let operators = graph.node.iter_mut().filter(|n| is_operator(n));
        for slot in operators
            .filter_map(|n| n.input.get_mut(input::SEQLENS_K))
            .filter(|s| *s == count)
        {
            slot.clone_from(&checked);
        }
        if let Some(was) = was {
            prune(graph, &was);
        }
    }
}

/// The declared type of the graph's attention mask.
pub fn data_type(graph: &GraphProto) -> Option<DataType> {
    let mask = graph.input.iter().find(|i| i.name() == ATTENTION_MASK);
    mask.and_then(ValueInfoProto::data_type)
}

/// Whether a value is the number of the attention mask's ones less one, made from nothing else.
fn counts_ones(view: &GraphView, count: &str) -> bool {
    let leads = leading_to(view.graph, [count], |node| reads(node).collect());
    // Exporters use three or four nodes.
    leads.into_iter().filter(|leads| *leads).count() <= MOST_NODES
        && mask_width::counts_ones(view, ATTENTION_MASK, count, MASKS.map(|rows| (rows, Env::default())))
}

/// Whether a value is made from the attention mask's numbers.
pub fn depends(view: &GraphView, from: &str) -> bool {
    let mut open = vec![from];
    let mut seen = HashSet::new();
    while let Some(name) = open.pop() {
        if name == ATTENTION_MASK {
            return true;
        }
        if let Some(node) = view.producer(name).filter(|_| seen.insert(name)) {
            // How wide the mask is, is no count of its ones.
            open.extend(node.input.iter().filter(|_| !node.is("", "Shape")).map(String::as_str));
        }
    }
    false
}

/// Which masks are right: n ones side by side, n > 0, at this place.
pub struct MaskCheck<'a> {
    /// The mask's declared type.
    pub data_type: Option<DataType>,
    /// Where the ones end.
    pub end: OnesEnd<'a>,
    /// Whether the ones must begin the mask.
    pub from_start: bool,
    /// Version of ONNX's operators, 10 or newer.
    pub opset: i64,
}

/// Where a mask's ones end.
pub enum OnesEnd<'a> {
    /// At the mask's end.
    WithMask,
    /// At the mask's end, or anywhere if they are at least as many as the tokens fed.
    WithTokensFed(TokensFed),
    /// As [`Self::WithTokensFed`] in a mask as wide as this cache, `[B, H, C, D]`; at the mask's end in any other.
    ByWidth(TokensFed, &'a str),
}

/// The input that says how many tokens are fed: its name, and its rank of `[B, S]` or `[B, S, hidden]`.
#[derive(Clone, Copy, Debug)]
pub struct TokensFed(&'static str, usize);

impl TokensFed {
    /// That of a graph which takes an attention mask `[B, T]`; none where either is declared otherwise.
    pub fn of(graph: &GraphProto) -> Option<Self> {
        let input_of = |name: &str, rank: usize| {
            let declared = graph.input.iter().find(|i| i.name() == name);
            declared.is_some_and(|i| i.dims().is_some_and(|d| d.len() == rank))
        };
        let mut fed = [Self(INPUT_IDS, 2), Self(INPUTS_EMBEDS, 3)].into_iter();
        fed.find(|Self(name, rank)| input_of(name, *rank) && input_of(ATTENTION_MASK, 2))
    }

    /// B and S, int64 `[2]`.
    fn shape(self, b: &mut GraphBuilder) -> String {
        let shape = b.node("Shape", &[self.0]).output("fed_shape");
        if self.1 == 2 {
            return shape;
        }
        let front = b.int64s("front", &[2], &[0, 1]);
        b.node("Gather", &[&shape, &front]).output("fed_front")
    }
}

impl MaskCheck<'_> {
    /// n - 1 as int32 `[B]`, MASK_NOT_UNDERSTOOD where the mask is not right. `count`: a value that has n - 1, of any shape with B
    /// elements; none: the mask's ones are counted. Returns the value's name.
    pub fn seqlens_k(&self, b: &mut GraphBuilder, count: Option<&str>) -> String {
        let [from, minus, end] =
            [("from", 1), ("minus_one", -1), ("end", i64::MAX)].map(|(base, x)| b.int64s(base, &[1], &[x]));
        let [one, two] = [("one", 1.0), ("two", 2.0)].map(|(base, x)| b.floats(base, &[1], &[x]));
        let mask = match self.data_type {
            Some(DataType::Float) => ATTENTION_MASK.to_owned(),
            _ => b.cast(ATTENTION_MASK, DataType::Float, "mask"),
        };
        // n - 1, as it came and as a float, `[B, 1]`.
        let (newest, newest_float) = match count {
            Some(count) => {
                let column = b.int64s("column", &[2], &[-1, 1]);
                let newest = b.node("Reshape", &[count, &column]).output("newest");
                let float = b.cast(&newest, DataType::Float, "newest_float");
                (newest, float)
            }
            None => {
                let valid = self.sum(b, &mask, "valid");
                let float = b.node("Sub", &[&valid, &one]).output("newest_float");
                (b.cast(&float, DataType::Int32, "newest"), float)
            }
        };
        // Pairs of neighbours that are both valid, the last one being its own: n - 1 + last if all are side by side, else fewer.
        let last = b.node("Slice", &[&mask, &minus, &end, &from]).output("last");
        let longer = b.node("Concat", &[&mask, &last]).int("axis", 1).output("longer");
        let next = b.node("Slice", &[&longer, &from, &end, &from]).output("next");
        let both = b.node("Mul", &[&mask, &next]).output("both");
        let pairs = self.sum(b, &both, "pairs");
        let mut valid_mask = match self.end {
            OnesEnd::WithMask => {
                // pairs + last is n + 1 only if all are side by side and the last one is valid.
                let found = b.node("Add", &[&pairs, &last]).output("pairs_and_last");
                let expected = b.node("Add", &[&newest_float, &two]).output("expected");
                self.equal(b, &found, &expected, "mask_is_sound")
            }
            OnesEnd::WithTokensFed(tokens) | OnesEnd::ByWidth(tokens, _) => {
                let expected = b.node("Add", &[&newest_float, &last]).output("expected");
                let together = self.equal(b, &pairs, &expected, "together");
                // n >= S, unless the last one is valid: S times 1 - last, which is less than n + 1.
                let mut shape = tokens.shape(b);
                if let OnesEnd::ByWidth(_, cache) = self.end {
                    shape = more_than_fit(b, &shape, cache);
                }
                let open = b.node("Sub", &[&one, &last]).output("open");
                let rows = b.node("Expand", &[&open, &shape]).output("open_rows");
                let needed = self.sum(b, &rows, "needed");
                let more = b.node("Add", &[&newest_float, &two]).output("more");
                let enough = b.node("Less", &[&needed, &more]).output("enough");
                b.node("And", &[&together, &enough]).output("mask_is_sound")
            }
        };
        if self.from_start {
            let start = b.int64s("start", &[1], &[0]);
            let first = b.node("Slice", &[&mask, &start, &from, &from]).output("first");
            let begins = self.equal(b, &first, &one, "begins");
            valid_mask = b.node("And", &[&valid_mask, &begins]).output("mask_is_sound_for_all");
        }
        let bad = b.int32s("mask_not_understood", &[1, 1], &[MASK_NOT_UNDERSTOOD]);
        let marked = b.node("Where", &[&valid_mask, &newest, &bad]).output("marked");
        let flat = b.int64s("flat", &[1], &[-1]);
        b.node("Reshape", &[&marked, &flat]).output("seqlens_k")
    }

    /// Whether whole numbers are equal. Equal takes floats from opset 11 on.
    fn equal(&self, b: &mut GraphBuilder, x: &str, y: &str, base: &str) -> String {
        if self.opset >= 11 {
            return b.node("Equal", &[x, y]).output(base);
        }
        let [x, y] = [x, y].map(|value| b.cast(value, DataType::Int64, &format!("{base}_64")));
        b.node("Equal", &[&x, &y]).output(base)
    }

    /// Sums along the second axis, `[B, 1]`.
    fn sum(&self, b: &mut GraphBuilder, from: &str, base: &str) -> String {
        if self.opset < 13 {
            return b.node("ReduceSum", &[from]).ints("axes", &[1]).output(base);
        }
        let axis = b.int64s(&format!("{base}_axis"), &[1], &[1]);
        b.node("ReduceSum", &[from, &axis]).output(base)
    }
}

/// From B and S: B and as many rows as must be valid if the mask's last one is not. Those are S in a mask as wide as the cache, and
/// in any other more than it has. From shapes alone, so that it is computed on the CPU and read there.
fn more_than_fit(b: &mut GraphBuilder, fed: &str, cache: &str) -> String {
    let [first, second, third, two] =
        [("first", 0), ("second", 1), ("third", 2), ("two_more", 2)].map(|(n, x)| b.int64s(n, &[1], &[x]));
    let mut at = |from: &str, index: &str, base: &str| b.node("Gather", &[from, index]).output(base);
    let (batch, tokens) = (at(fed, &first, "fed_batch"), at(fed, &second, "fed_tokens"));
    let mask = b.node("Shape", &[ATTENTION_MASK]).output("mask_shape");
    let width = b.node("Gather", &[&mask, &second]).output("width");
    let cache = b.node("Shape", &[cache]).output("cache_shape");
    let capacity = b.node("Gather", &[&cache, &third]).output("capacity");
    let whole = b.node("Equal", &[&width, &capacity]).output("as_wide_as_cache");
    let beyond = b.node("Add", &[&width, &two]).output("beyond");
    let rows = b.node("Where", &[&whole, &tokens, &beyond]).output("rows_needed");
    b.node("Concat", &[&batch, &rows]).int("axis", 0).output("rows_shape")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        eval::{Env, Program, Tensor},
        rules::{Attention, AttentionMatch},
    };
    use retro_contract::Mode;
    use retro_onnx::{AttributeProto, Dimension, NodeProto, TensorProto};

    /// A graph that counts its mask's ones as exporters do, and an operator's node that reads the count.
    fn counted(opset: i64, tokens: &[&str]) -> GraphProto {
        let int = DataType::Int64;
        let mut graph = GraphProto::default();
        let names: Vec<Dimension> = tokens.iter().map(|n| (*n).into()).collect();
        let name = if tokens.len() == 2 { INPUT_IDS } else { INPUTS_EMBEDS };
        graph.input.push(ValueInfoProto::tensor(name, int, names));
        graph
            .input
            .push(ValueInfoProto::tensor(ATTENTION_MASK, int, ["b".into(), "t".into()]));
        graph.initializer.push(TensorProto::int64s("axis", &[1], &[1]));
        let mut sum = NodeProto::new("", "ReduceSum", "sum", &[ATTENTION_MASK, "axis"], &["sum"]);
        if opset < 13 {
            sum.input.pop();
            sum.attribute.push(AttributeProto::ints("axes", &[1]));
        }
        let mut inputs = vec![""; input::COUNT];
        inputs[input::SEQLENS_K] = "count";
        let to = AttributeProto::int("to", i64::from(i32::from(DataType::Int32)));
        graph
            .output
            .push(ValueInfoProto::tensor("y", DataType::Float, ["b".into()]));
        graph.node = vec![
            sum,
            NodeProto::new("", "Sub", "minus", &["sum", "axis"], &["minus"]),
            NodeProto::new("", "Cast", "cast", &["minus"], &["count"]).with(to),
            NodeProto::new(
                retro_contract::DOMAIN,
                retro_contract::OP_TYPE,
                "attention",
                &inputs,
                &["y"],
            ),
        ];
        graph
    }

    fn check(graph: &mut GraphProto, opset: i64) {
        let matched = AttentionMatch {
            seqlens_k: "count".into(),
            ..Default::default()
        };
        let attention = Attention {
            layer: 0,
            node: Some(3),
            name: "attention".into(),
            op_type: "GroupQueryAttention".into(),
            rule: None,
            found: Ok(Box::new(matched.clone())),
            takes_tokens_again: true,
        };
        let mut builder = GraphBuilder::part_of(graph);
        check_masks(
            graph,
            &[Conversion {
                attention: &attention,
                matched: &matched,
                node: 3,
                mode: Mode::Retro,
            }],
            opset,
            &mut builder,
        );
    }

    /// What the operator's node reads for a mask and so many tokens fed.
    fn lengths(graph: &GraphProto, opset: i64, rows: &[&[i64]], fed: usize) -> Vec<i64> {
        let view = GraphView::new(graph, opset);
        let program = Program::new(&view, None, &HashSet::new(), &HashSet::new());
        let mut env = Env::default();
        let mask = rows.iter().flat_map(|r| r.iter().map(|x| *x as f64)).collect();
        env.set(
            ATTENTION_MASK,
            Tensor::new(vec![rows.len(), rows[0].len()], DataType::Int64, mask),
        );
        let tokens = graph.input[0].name();
        let shape = [rows.len(), fed, 7];
        let rank = graph.input[0].dims().unwrap().len();
        env.set(tokens, Tensor::unknown(shape[..rank].to_vec(), DataType::Int64));
        let env = program.run(env);
        let name = graph.node.last().unwrap().input(input::SEQLENS_K);
        let found = env.need(name).unwrap();
        assert_eq!(found.shape, [rows.len()]);
        found.data.iter().flatten().map(|x| *x as i64).collect()
    }

    fn has(graph: &GraphProto, node: &str) -> bool {
        graph.node.iter().any(|n| n.name() == node)
    }

    #[test]
    fn what_is_no_plain_count_stays() {
        // One less: the operator's node reads that, and a mask of n ones side by side has not so many neighbours.
        let mut graph = counted(22, &["b", "s"]);
        graph.initializer.push(TensorProto::int64s("two", &[1], &[2]));
        graph.node[1].input[1] = "two".into();
        check(&mut graph, 22);
        assert!(has(&graph, "sum") && has(&graph, "cast"));
        let bad = i64::from(MASK_NOT_UNDERSTOOD);
        assert_eq!(lengths(&graph, 22, &[&[1, 1, 1, 1]], 1), [bad]);
        // Not the mask's numbers alone.
        let mut graph = counted(22, &["b", "s"]);
        graph
            .input
            .push(ValueInfoProto::tensor("less", DataType::Int64, [1.into()]));
        graph.node[1].input[1] = "less".into();
        check(&mut graph, 22);
        assert!(has(&graph, "sum") && has(&graph, "cast"));
    }

    #[test]
    fn ones_must_be_side_by_side_and_end_with_what_is_fed() {
        const BAD: i64 = MASK_NOT_UNDERSTOOD as i64;
        for (opset, tokens) in [
            (22, &["b", "s"][..]),
            (10, &["b", "s"]),
            (11, &["b", "s"]),
            (14, &["b", "s", "h"]),
        ] {
            let mut graph = counted(opset, tokens);
            check(&mut graph, opset);
            assert!(!has(&graph, "sum") && !has(&graph, "cast"));
            let casts = graph.node.iter().filter(|n| n.op_type() == "Cast").count();
            assert_eq!(casts, if opset < 11 { 4 } else { 2 });
            for (rows, fed, expected) in [
                (&[&[1, 1, 1, 1][..], &[0, 1, 1, 1]][..], 4, [3, 2]),
                (&[&[1, 1, 1, 1], &[1, 1, 1, 0]], 4, [3, BAD]),
                (&[&[1, 0, 1, 1], &[0, 1, 1, 0]], 4, [BAD, BAD]),
                (&[&[0, 0, 0, 0], &[0, 0, 0, 1]], 4, [BAD, 0]),
                // As wide as a cache: ones first, at least as many as are fed.
                (&[&[1, 1, 1, 0, 0], &[1, 1, 0, 0, 0]], 3, [2, BAD]),
                (&[&[1, 1, 0, 0, 0], &[0, 1, 1, 0, 0]], 1, [1, 1]),
                (&[&[1, 1, 0, 0, 1], &[1, 0, 1, 0, 0]], 1, [BAD, BAD]),
                (&[&[1], &[1]], 1, [0, 0]),
            ] {
                assert_eq!(
                    lengths(&graph, opset, rows, fed),
                    expected,
                    "opset {opset}: {rows:?}, {fed} fed"
                );
            }
        }
    }

    #[test]
    fn ones_must_begin_the_mask_too_where_a_group_query_attention_is_left() {
        const BAD: i64 = MASK_NOT_UNDERSTOOD as i64;
        for opset in [22, 10] {
            let mut graph = counted(opset, &["b", "s"]);
            let left = NodeProto::new(
                "com.microsoft",
                "GroupQueryAttention",
                "left",
                &["", "", "", "", "", "count"],
                &["z"],
            );
            graph.node.insert(3, left);
            graph
                .output
                .push(ValueInfoProto::tensor("z", DataType::Float, ["b".into()]));
            check(&mut graph, opset);
            assert!(has(&graph, "sum") && has(&graph, "cast"));
            for (rows, fed, expected) in [
                (&[&[1, 1, 1, 1][..], &[0, 1, 1, 1]][..], 4, [3, BAD]),
                (&[&[1, 1, 1, 1], &[1, 1, 1, 0]], 4, [3, BAD]),
                (&[&[1, 1, 0, 0, 0], &[0, 1, 1, 0, 0]], 1, [1, BAD]),
            ] {
                assert_eq!(lengths(&graph, opset, rows, fed), expected, "opset {opset}: {rows:?}");
            }
        }
    }

    #[test]
    fn counts_that_come_from_elsewhere_stay() {
        // An input of the graph.
        let mut graph = counted(22, &["b", "s"]);
        graph.node.retain(|n| n.op_type() != "Cast");
        graph
            .input
            .push(ValueInfoProto::tensor("count", DataType::Int32, ["b".into()]));
        let before = graph.clone();
        check(&mut graph, 22);
        assert_eq!(graph, before);
        // From the mask's width alone.
        let mut graph = counted(22, &["b", "s"]);
        graph.node[0] = NodeProto::new("", "Shape", "sum", &[ATTENTION_MASK], &["sum"]);
        let before = graph.clone();
        check(&mut graph, 22);
        assert_eq!(graph, before);
    }
}
