//! Whether a graph takes attention masks as wide as its caches: ones first, zeros for what is still to come.
//!
//! A step then has the same shapes at every length, as a CUDA graph needs them. GroupQueryAttention and the operator read no mask:
//! they get a count of its ones, and an upper bound of it. But positions, masks of other layers or the count itself may be made from
//! the mask's width, and would be those of a full cache.

use crate::{
    eval::{Env, Program, Tensor, leading_to, reads},
    rules::gqa,
};
use retro_contract::input;
use retro_onnx::{DataType, Dimension, GraphProto, NodeProto, TensorProto, ValueInfoProto, graph::GraphView};
use std::collections::{BTreeSet, HashSet};

/// Why a graph does not take such masks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WidthMatters {
    /// Something other than lengths is made from the mask. The node's label.
    #[error("the node {0} reads the attention mask, and more than the number of tokens may come of its width")]
    Read(String),
    /// The value that attention takes for the number of tokens.
    #[error("the lengths {0} are not known to count the attention mask's ones alone")]
    NoCount(String),
}

/// C in the calls that are tried.
const CAPACITY: usize = 4;
/// Masks that are tried, and the tokens fed with them.
const CALLS: [(&[&str], usize); 5] = [
    (&["1000"], 1),
    (&["1110"], 2),
    (&["1111"], 1),
    (&["1100", "1110"], 1),
    (&["1110", "1100"], 2),
];

/// Checks that a graph takes such masks. `mask` and `tokens`: names of its inputs.
///
/// # Errors
/// It doesn't, or it cannot be told.
pub fn takes_wide_masks(view: &GraphView, mask: &str, tokens: &str) -> Result<(), WidthMatters> {
    if !view.is_input(mask) {
        return Ok(());
    }
    if let Some(node) = reader_beside_lengths(view, mask) {
        return Err(WidthMatters::Read(node.label()));
    }
    let attention = view.graph.node.iter().filter(|node| takes_lengths(node));
    let counts: BTreeSet<&str> = attention.map(|node| node.input(input::SEQLENS_K)).collect();
    match counts
        .into_iter()
        .find(|count| !counts_ones_of_wide(view, mask, tokens, count))
    {
        Some(count) => Err(WidthMatters::NoCount(count.to_owned())),
        None => Ok(()),
    }
}

/// A node that reads the mask and leads to an output of the graph otherwise than by the lengths of an attention.
pub fn reader_beside_lengths<'a>(view: &GraphView<'a>, mask: &str) -> Option<&'a NodeProto> {
    let outputs = view.graph.output.iter().map(ValueInfoProto::name);
    let leads = leading_to(view.graph, outputs, |node| read(node, takes_lengths(node)));
    let mut nodes = view.graph.node.iter().zip(leads);
    let reader = nodes.find(|(node, leads)| *leads && read(node, takes_lengths(node)).contains(&mask));
    reader.map(|(node, _)| node)
}

/// What a node reads, `cut`: but for its lengths.
fn read(node: &NodeProto, cut: bool) -> Vec<&str> {
    if !cut {
        return reads(node).collect();
    }
    let lengths = [input::SEQLENS_K, input::TOTAL_SEQUENCE_LENGTH];
    let others = node.input.iter().enumerate().filter(|(i, _)| !lengths.contains(i));
    others.map(|(_, name)| name.as_str()).collect()
}

/// Whether a node takes `seqlens_k` and `total_sequence_length`, which have the same places in both operators.
fn takes_lengths(node: &NodeProto) -> bool {
    node.is(retro_contract::DOMAIN, retro_contract::OP_TYPE) || gqa::is_one(node)
}

/// Whether a value is the number of the mask's ones less one, as far as calls that are wide tell.
fn counts_ones_of_wide(view: &GraphView, mask: &str, tokens: &str, count: &str) -> bool {
    let calls = CALLS.iter().map(|(rows, fed)| {
        let mut env = Env::default();
        for declared in &view.graph.input {
            let (name, data_type) = (declared.name(), declared.data_type().unwrap_or(DataType::Undefined));
            if let Some(dims) = declared.dims() {
                let shape = shape(dims, name == tokens, rows.len(), *fed);
                env.set(name, Tensor::unknown(shape, data_type));
            }
        }
        (*rows, env)
    });
    counts_ones(view, mask, count, calls)
}

/// Whether a value is the number of the mask's ones less one in all of these calls: the mask's rows, and what else is fed.
pub fn counts_ones<'a>(
    view: &GraphView<'a>,
    mask: &'a str,
    count: &'a str,
    calls: impl IntoIterator<Item = (&'static [&'static str], Env<'a>)>,
) -> bool {
    let leads = leading_to(view.graph, [count], |node| reads(node).collect());
    let nodes = view.graph.node.iter().zip(leads).filter(|(_, leads)| *leads);
    let node: Vec<NodeProto> = nodes.map(|(node, _)| node.clone()).collect();
    let names: BTreeSet<&str> = node.iter().flat_map(reads).collect();
    let constants = names.into_iter().filter_map(|name| view.initializer(name).cloned());
    let initializer: Vec<TensorProto> = constants.collect();
    if initializer.iter().any(TensorProto::is_external) {
        return false;
    }
    let part = GraphProto {
        initializer,
        node,
        ..Default::default()
    };
    let part = GraphView::new(&part, view.opset);
    let program = Program::new(&part, None, &HashSet::new(), &HashSet::new());
    let data_type = view.data_type(mask).unwrap_or(DataType::Int64);
    calls.into_iter().all(|(rows, mut env)| {
        let numbers = rows.iter().flat_map(|row| row.bytes().map(|b| f64::from(b - b'0')));
        let shape = vec![rows.len(), rows.first().map_or(0, |row| row.len())];
        env.set(mask, Tensor::new(shape, data_type, numbers.collect()));
        let env = program.run(env);
        let ones = rows.iter().map(|row| row.matches('1').count() as f64 - 1.0);
        env.need(count).is_ok_and(|t| t.data.iter().flatten().copied().eq(ones))
    })
}

/// The shape of an input of tokens, `[B, S]` or `[B, S, ...]`, or of a cache, `[B, H, C, D]`.
fn shape(dims: &[Dimension], tokens: bool, batch: usize, fed: usize) -> Vec<usize> {
    let size = |(axis, d): (usize, &Dimension)| match axis {
        0 => batch,
        1 if tokens => fed,
        2 if dims.len() == 4 => CAPACITY,
        _ => d.fixed().and_then(|d| usize::try_from(d).ok()).unwrap_or(1),
    };
    dims.iter().enumerate().map(size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use retro_onnx::AttributeProto;

    /// A GroupQueryAttention whose lengths are made as exporters make them: from the mask's ones and its width.
    fn graph() -> GraphProto {
        let mut graph = GraphProto::default();
        let int = DataType::Int64;
        for (name, dims) in [
            ("input_ids", vec!["b", "s"]),
            ("attention_mask", vec!["b", "t"]),
            ("past", vec!["b", "h", "c", "d"]),
        ] {
            let dims: Vec<Dimension> = dims.into_iter().map(Into::into).collect();
            graph.input.push(ValueInfoProto::tensor(name, int, dims));
        }
        graph.initializer = vec![
            TensorProto::int64s("one", &[1], &[1]),
            TensorProto::int64s("axis", &[], &[1]),
        ];
        let int32 = || AttributeProto::int("to", i64::from(i32::from(DataType::Int32)));
        let node =
            |op_type: &str, inputs: &[&str], output: &str| NodeProto::new("", op_type, output, inputs, &[output]);
        let inputs = ["q", "k", "v", "past", "past", "lengths", "total"];
        let attention = NodeProto::new("com.microsoft", "GroupQueryAttention", "attention", &inputs, &["y"]);
        graph.node = vec![
            node("ReduceSum", &["attention_mask", "one"], "sum"),
            node("Sub", &["sum", "one"], "newest"),
            node("Cast", &["newest"], "lengths").with(int32()),
            node("Shape", &["attention_mask"], "shape"),
            node("Gather", &["shape", "axis"], "width"),
            node("Cast", &["width"], "total").with(int32()),
            node("Gather", &["embeddings", "input_ids"], "q"),
            attention,
        ];
        graph
            .output
            .push(ValueInfoProto::tensor("y", DataType::Float, ["b".into()]));
        graph
    }

    fn check(graph: &GraphProto) -> Result<(), WidthMatters> {
        takes_wide_masks(&GraphView::new(graph, 13), "attention_mask", "input_ids")
    }

    #[test]
    fn a_count_of_ones_and_an_upper_bound_do_not_need_the_width() {
        assert_eq!(check(&graph()), Ok(()));
        let mut unmasked = graph();
        unmasked.input.retain(|i| i.name() != "attention_mask");
        assert_eq!(check(&unmasked), Ok(()));
    }

    #[test]
    fn lengths_that_are_the_width_do() {
        let mut graph = graph();
        graph.node[1].input[0] = "width".into();
        let why = check(&graph).unwrap_err();
        assert_eq!(why, WidthMatters::NoCount("lengths".into()));
    }

    #[test]
    fn positions_that_come_of_the_mask_do() {
        let mut positions = graph();
        positions.node[6].input[1] = "width".into();
        assert_eq!(check(&positions), Err(WidthMatters::Read("shape".into())));
        let mut numbers = graph();
        numbers.node[6].input[1] = "sum".into();
        assert_eq!(check(&numbers), Err(WidthMatters::Read("sum".into())));
        let mut handed_on = graph();
        handed_on.node[7].input[1] = "total".into();
        assert_eq!(check(&handed_on), Err(WidthMatters::Read("shape".into())));
    }
}
