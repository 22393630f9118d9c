//! Where the source counts the ones of its attention mask (GroupQueryAttention): a count says nothing about where the ones
//! are. Here the mask itself is looked at, so that one which the operator would read otherwise is an error when the model runs.
//!
//! The operator takes what is fed as the newest tokens of its cache: with n valid tokens and S fed, n < S, the first S - n rows
//! are padding. So n ones side by side are right at the end of the mask (padding on the left), and anywhere if n >= S (masks
//! as wide as a cache, ones first). Ones that are not side by side, or a padded end of what is fed, are not. Where a
//! GroupQueryAttention is left in the graph, which takes the first n tokens of its cache, the ones must begin the mask as well.
//!
//! All is computed where the mask is: a number that crosses from the CPU to a GPU would forbid to capture a CUDA graph.

use super::names::Fresh;
use crate::{
    graph::GraphView,
    onnx::{AttributeProto, DataType, GraphProto, NodeProto, TensorProto, ValueInfoProto},
    rules::{self, ATTENTION_MASK, Conversion, INPUT_IDS, INPUTS_EMBEDS},
};
use retro_contract::{input, limits::MASK_NOT_UNDERSTOOD};
use std::collections::{BTreeSet, HashSet};

/// Lets the operator's nodes read lengths that are marked where the mask is not understood.
pub fn check_masks(graph: &mut GraphProto, conversions: &[Conversion], opset: i64) {
    let given = conversions.iter().filter(|c| c.site.lengths == rules::Lengths::Given);
    let counts: BTreeSet<&str> = given.map(|c| c.site.seqlens_k.as_str()).collect();
    let input_of = |name: &&str, rank: usize| {
        let declared = graph.input.iter().find(|i| i.name() == *name);
        declared.is_some_and(|i| i.dims().is_some_and(|d| d.len() == rank))
    };
    let fed = [(INPUT_IDS, 2), (INPUTS_EMBEDS, 3)]
        .into_iter()
        .find(|(name, rank)| input_of(name, *rank));
    let Some((tokens, rank)) = fed.filter(|_| input_of(&ATTENTION_MASK, 2)) else {
        return;
    };
    let left = graph.node.iter().any(rules::gqa::is_one);
    let mask_type = graph
        .input
        .iter()
        .find(|i| i.name() == ATTENTION_MASK)
        .and_then(ValueInfoProto::data_type);
    for count in counts {
        let view = GraphView::new(graph, opset);
        let Some(maker) = view.producer_index(count).filter(|_| depends(&view, count)) else {
            continue;
        };
        let mut made = Made {
            fresh: Fresh::of(graph),
            nodes: Vec::new(),
            constants: Vec::new(),
        };
        let checked = made.checked(count, mask_type, (tokens, rank), left, opset);
        graph.initializer.append(&mut made.constants);
        graph.node.splice(maker + 1..=maker, made.nodes);
        let operators = graph
            .node
            .iter_mut()
            .filter(|n| n.is(retro_contract::DOMAIN, retro_contract::OP_TYPE));
        for slot in operators
            .filter_map(|n| n.input.get_mut(input::SEQLENS_K))
            .filter(|s| *s == count)
        {
            slot.clone_from(&checked);
        }
    }
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

struct Made {
    fresh: Fresh,
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
}

impl Made {
    fn add(&mut self, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>, base: &str) -> String {
        let name = self.fresh.name(&format!("retro/given/{base}"));
        let mut node = NodeProto::new("", op, &name, inputs, &[&name]);
        node.attribute = attributes;
        self.nodes.push(node);
        name
    }

    fn longs(&mut self, values: &[i64], base: &str) -> String {
        let name = self.fresh.name(&format!("retro/given/{base}"));
        self.constants
            .push(TensorProto::int64s(&name, &[values.len() as i64], values));
        name
    }

    fn cast(&mut self, from: &str, to: DataType, base: &str) -> String {
        self.add(
            "Cast",
            &[from],
            vec![AttributeProto::int("to", i64::from(i32::from(to)))],
            base,
        )
    }

    /// Sums along the second axis, `[B, 1]`.
    fn sum(&mut self, from: &str, opset: i64, base: &str) -> String {
        if opset < 13 {
            return self.add("ReduceSum", &[from], vec![AttributeProto::ints("axes", &[1])], base);
        }
        let axis = self.longs(&[1], &format!("{base}_axis"));
        self.add("ReduceSum", &[from, &axis], vec![], base)
    }

    /// `count` (n - 1, of any shape with B elements) as `[B]`, marked where the mask is not understood, or does not begin with a
    /// one although it must.
    fn checked(
        &mut self,
        count: &str,
        mask_type: Option<DataType>,
        (tokens, rank): (&str, usize),
        must_begin: bool,
        opset: i64,
    ) -> String {
        let [one, two, minus, end] =
            [(1, "one"), (2, "two"), (-1, "minus_one"), (i64::MAX, "end")].map(|(x, base)| self.longs(&[x], base));
        let mask = match mask_type {
            Some(DataType::Int64) => ATTENTION_MASK.to_owned(),
            _ => self.cast(ATTENTION_MASK, DataType::Int64, "mask"),
        };
        // Pairs of neighbours that are both valid, the last one being its own: n - 1 + last if all are side by side.
        let last = self.add("Slice", &[&mask, &minus, &end, &one], vec![], "last");
        let longer = self.add(
            "Concat",
            &[&mask, &last],
            vec![AttributeProto::int("axis", 1)],
            "longer",
        );
        let next = self.add("Slice", &[&longer, &one, &end, &one], vec![], "next");
        let both = self.add("Mul", &[&mask, &next], vec![], "both");
        let pairs = self.sum(&both, opset, "pairs");
        let column = self.longs(&[-1, 1], "column");
        let newest = self.add("Reshape", &[count, &column], vec![], "newest");
        let newest64 = self.cast(&newest, DataType::Int64, "newest64");
        let expected = self.add("Add", &[&newest64, &last], vec![], "expected");
        let together = self.add("Equal", &[&pairs, &expected], vec![], "together");
        // n >= S, unless the last one is valid.
        let mut shape = self.add("Shape", &[tokens], vec![], "fed_shape");
        if rank > 2 {
            let front = self.longs(&[0, 1], "front");
            shape = self.add("Gather", &[&shape, &front], vec![], "fed_front");
        }
        let ones = AttributeProto::tensor("value", TensorProto::int64s("one", &[1], &[1]));
        let ones = self.add("ConstantOfShape", &[&shape], vec![ones], "ones");
        let fed = self.sum(&ones, opset, "fed");
        let open = self.add("Sub", &[&one, &last], vec![], "open");
        let needed = self.add("Mul", &[&fed, &open], vec![], "needed");
        let more = self.add("Add", &[&newest64, &two], vec![], "more");
        let enough = self.add("Less", &[&needed, &more], vec![], "enough");
        let mut sound = self.add("And", &[&together, &enough], vec![], "mask_is_sound");
        if must_begin {
            let start = self.longs(&[0], "start");
            let first = self.add("Slice", &[&mask, &start, &one, &one], vec![], "first");
            let begins = self.add("Equal", &[&first, &one], vec![], "begins");
            sound = self.add("And", &[&sound, &begins], vec![], "mask_is_sound_for_all");
        }
        let bad = self.fresh.name("retro/given/mask_not_understood");
        self.constants
            .push(TensorProto::int32s(&bad, &[1, 1], &[MASK_NOT_UNDERSTOOD]));
        let marked = self.add("Where", &[&sound, &newest, &bad], vec![], "marked");
        let flat = self.longs(&[-1], "flat");
        self.add("Reshape", &[&marked, &flat], vec![], "seqlens_k")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        eval::{Env, Program, Tensor},
        onnx::Dimension,
        rules::{Attention, Site},
    };
    use retro_contract::Mode;

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
        let site = Site {
            seqlens_k: "count".into(),
            ..Default::default()
        };
        let attention = Attention {
            layer: 0,
            node: Some(3),
            name: "attention".into(),
            op_type: "GroupQueryAttention".into(),
            rule: None,
            found: Ok(Box::new(site.clone())),
            takes_tokens_again: true,
        };
        check_masks(
            graph,
            &[Conversion {
                attention: &attention,
                site: &site,
                node: 3,
                mode: Mode::Retro,
            }],
            opset,
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

    #[test]
    fn ones_must_be_side_by_side_and_end_with_what_is_fed() {
        const BAD: i64 = MASK_NOT_UNDERSTOOD as i64;
        for (opset, tokens) in [(22, &["b", "s"][..]), (11, &["b", "s"]), (14, &["b", "s", "h"])] {
            let mut graph = counted(opset, tokens);
            check(&mut graph, opset);
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
        for opset in [22, 11] {
            let mut graph = counted(opset, &["b", "s"]);
            let left = NodeProto::new(
                "com.microsoft",
                "GroupQueryAttention",
                "left",
                &["", "", "", "", "", "count"],
                &["z"],
            );
            graph.node.insert(3, left);
            check(&mut graph, opset);
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
        // Given by the caller.
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
