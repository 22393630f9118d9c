//! The logits readback: decoding needs the newest token's logits alone. Here the lm_head is found, and its input cut to the newest
//! token's hidden state, so that nothing else is computed and read back.

use retro_contract::{DOMAIN, matmul_nbits};
use retro_onnx::{Dimension, GraphBuilder, GraphProto, NodeProto, graph::GraphView};

/// Elementwise nodes that may stand between the lm_head and the logits.
const ELEMENTWISE: [&str; 10] = [
    "Add", "Cast", "Clip", "Div", "Identity", "Max", "Min", "Mul", "Sub", "Tanh",
];
/// Nodes that multiply rows of their first input with weights.
const LM_HEADS: [(&str, &str); 5] = [
    ("", "MatMul"),
    (matmul_nbits::SOURCE_DOMAIN, matmul_nbits::OP_TYPE),
    (DOMAIN, matmul_nbits::OP_TYPE),
    ("com.microsoft", "MatMulBnb4"),
    ("com.microsoft", "MatMulFpQ4"),
];
/// Nodes that cut a value: the model does it itself.
const SLICES: [&str; 5] = ["Gather", "GatherElements", "GatherND", "Slice", "Split"];
/// Most nodes between the lm_head and the logits.
const MAX_STEPS: usize = 64;
/// Opset from which Gather takes negative indices.
pub const GATHER_OPSET: i64 = 11;

/// What becomes of the logits of the tokens before the newest. Whoever decodes reads back the newest token's alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Logits {
    /// The lm_head computes the newest token's alone: the others can be cut from its first input.
    Newest {
        /// Label of the lm_head.
        label: String,
        /// Values after it, from the logits back to its own output. Their sequence dimension becomes 1.
        after: Vec<String>,
        /// Its own output, the last of those. Two where it is a sum of two products, of codes' upper and lower halves.
        products: Vec<String>,
    },
    /// The model cuts them already, and how.
    Already(String),
    /// They stay, and why.
    All(KeepAll),
}

/// Why all tokens' logits stay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeepAll {
    #[error("as asked")]
    Asked,

    #[error("opset {0} has no Gather that takes the last position")]
    OldOpset(i64),

    #[error("no output is named logits")]
    NoLogits,

    #[error("the logits have no declared shape")]
    NoShape,

    #[error("the logits have {0} dimensions, not 3 (batch, tokens, vocabulary)")]
    Rank(usize),

    /// Cutting the lm_head's input would change what else reads its result.
    #[error("{0}, on the way to the logits, is used elsewhere too")]
    UsedElsewhere(String),

    #[error("no node makes {0}")]
    NoNode(String),

    #[error("node {node} ({op_type}) is between the lm_head and the logits")]
    Between { node: String, op_type: String },

    #[error("there is no lm_head near the logits")]
    NoLmHead,

    #[error("node {node} ({op_type}), before the logits, mixes rows")]
    MixesRows { node: String, op_type: String },

    #[error("node {node}, which makes the logits, multiplies with {operand}, which is no weight")]
    NotAWeight { node: String, operand: String },

    #[error("the weights of node {node} have {rank} dimensions, not 2")]
    WeightRank { node: String, rank: usize },

    #[error("the shape of the weights of node {node} ({weight}) is unknown")]
    UnknownWeight { node: String, weight: String },
}

/// Finds the lm_head, and whether its first input can be cut to the newest token.
pub fn find_lm_head(view: &GraphView) -> Logits {
    find(view).unwrap_or_else(Logits::All)
}

fn find(view: &GraphView) -> Result<Logits, KeepAll> {
    let logits = view.graph.output.iter().find(|o| o.name() == "logits");
    let logits = logits.ok_or(KeepAll::NoLogits)?;
    let dims = logits.dims().ok_or(KeepAll::NoShape)?;
    if dims.len() != 3 {
        return Err(KeepAll::Rank(dims.len()));
    }
    if dims.get(1).and_then(Dimension::fixed) == Some(1) {
        return Ok(Logits::Already("the model returns one position's logits".to_owned()));
    }
    let mut after = Vec::new();
    let mut name = logits.name();
    for _ in 0..MAX_STEPS {
        let readers = view.readers(name).count();
        let others = if after.is_empty() {
            readers
        } else {
            readers - 1 + usize::from(view.is_output(name))
        };
        if others > 0 {
            return Err(KeepAll::UsedElsewhere(name.to_owned()));
        }
        after.push(name.to_owned());
        let no_node = || KeepAll::NoNode(name.to_owned());
        let node = view.producer(name).ok_or_else(no_node)?;
        if is_lm_head(node) {
            return lm_head(view, node, after);
        }
        let op_type = node.op_type();
        if node.op_domain().is_empty() && SLICES.contains(&op_type) {
            return Ok(Logits::Already(format!(
                "node {} ({op_type}) cuts the logits already",
                node.label()
            )));
        }
        if !(node.op_domain().is_empty() && ELEMENTWISE.contains(&op_type)) {
            return Err(KeepAll::Between {
                node: node.label(),
                op_type: op_type.to_owned(),
            });
        }
        if let Some(products) = sum_of_lm_heads(view, node) {
            return lm_head_of_two(view, products, after);
        }
        name = row_operand(view, node)?;
    }
    Err(KeepAll::NoLmHead)
}

fn is_lm_head(node: &NodeProto) -> bool {
    LM_HEADS.iter().any(|(domain, op_type)| node.is(domain, op_type))
}

/// The two products that a node adds up, of the same rows and used nowhere else.
fn sum_of_lm_heads<'a>(view: &GraphView<'a>, node: &NodeProto) -> Option<[&'a NodeProto; 2]> {
    let [a, b] = node.input.as_slice() else { return None };
    let product = |name: &str| {
        let node = view.producer(name).filter(|n| is_lm_head(n))?;
        (view.readers(name).count() == 1 && !view.is_output(name)).then_some(node)
    };
    let (a, b) = (product(a)?, product(b)?);
    (node.is("", "Add") && a.input(0) == b.input(0)).then_some([a, b])
}

fn lm_head_of_two(view: &GraphView, products: [&NodeProto; 2], mut after: Vec<String>) -> Result<Logits, KeepAll> {
    let mut names = Vec::new();
    for node in products {
        after.push(node.output(0).to_owned());
        match lm_head(view, node, Vec::new())? {
            Logits::Newest { .. } => names.push(node.output(0).to_owned()),
            already => return Ok(already),
        }
    }
    Ok(Logits::Newest {
        label: products.map(NodeProto::label).join(" and "),
        after,
        products: names,
    })
}

/// The one input of an elementwise node that has rows; the others must be the same for every row.
fn row_operand<'a>(view: &GraphView, node: &'a NodeProto) -> Result<&'a str, KeepAll> {
    let inputs = node.input.iter().map(String::as_str).filter(|i| !i.is_empty());
    let (constant, rows): (Vec<&str>, Vec<&str>) = inputs.partition(|i| view.is_constant(i));
    let same_for_every_row = |name: &&str| {
        view.tensor_dims(name).is_some_and(|dims| {
            let rows = dims.len().checked_sub(2).and_then(|i| dims.get(i));
            rows.is_none_or(|rows| *rows == 1) && dims.len() <= 3
        })
    };
    match rows.as_slice() {
        [one] if constant.iter().all(same_for_every_row) => Ok(one),
        _ => Err(KeepAll::MixesRows {
            node: node.label(),
            op_type: node.op_type().to_owned(),
        }),
    }
}

fn lm_head(view: &GraphView, node: &NodeProto, after: Vec<String>) -> Result<Logits, KeepAll> {
    let label = node.label();
    if node.op_type() == "MatMul" {
        let weight = node.input(1);
        if !view.is_constant(weight) {
            return Err(KeepAll::NotAWeight {
                node: label,
                operand: weight.to_owned(),
            });
        }
        match weight_rank(view, weight) {
            Some(2) => {}
            Some(rank) => return Err(KeepAll::WeightRank { node: label, rank }),
            None => {
                return Err(KeepAll::UnknownWeight {
                    node: label,
                    weight: weight.to_owned(),
                });
            }
        }
    }
    if let Some(slice) = view.producer(node.input(0)).filter(|n| SLICES.contains(&n.op_type())) {
        return Ok(Logits::Already(format!(
            "node {} ({}) before the lm_head",
            slice.label(),
            slice.op_type()
        )));
    }
    Ok(Logits::Newest {
        label,
        after,
        products: vec![node.output(0).to_owned()],
    })
}

/// Rank of a weight through what may be done to it before use: transposed (tied embeddings), dequantised, cast.
fn weight_rank(view: &GraphView, weight: &str) -> Option<usize> {
    let mut name = weight;
    for _ in 0..8 {
        if let Some(dims) = view.tensor_dims(name) {
            return Some(dims.len());
        }
        let node = view.producer(name)?;
        if !matches!(node.op_type(), "Transpose" | "DequantizeLinear" | "Cast" | "Identity") {
            return None;
        }
        name = node.input.first()?;
    }
    None
}

/// Puts a Gather of the last position before the lm_head, the nodes that make `products`, and corrects the declared
/// shapes. Gives false if there is no such node.
pub fn keep_newest(graph: &mut GraphProto, products: &[String], after: &[String], builder: &mut GraphBuilder) -> bool {
    let makes = |node: &NodeProto| node.output.iter().any(|name| products.contains(name));
    let Some(first) = graph.node.iter().position(makes) else {
        return false;
    };
    let hidden = graph.node.get(first).map(|node| node.input(0).to_owned());
    let hidden = hidden.unwrap_or_default();
    builder.set_prefix("retro/");
    let index = builder.int64s("newest_position", &[1], &[-1]);
    let gather = builder.node("Gather", &[hidden.as_str(), &index]).int("axis", 1);
    let newest = gather.output("newest_hidden_state");
    for node in graph.node.iter_mut().filter(|node| makes(node)) {
        if let Some(input) = node.input.first_mut() {
            input.clone_from(&newest);
        }
    }
    graph.node.splice(first..first, builder.take_nodes());
    graph.initializer.append(&mut builder.take_initializers());
    let declared = graph.value_info.iter_mut().chain(&mut graph.output);
    for value in declared.filter(|v| after.iter().any(|name| name == v.name())) {
        if let Some(tokens) = value.dims_mut().filter(|d| d.len() == 3).and_then(|d| d.get_mut(1)) {
            *tokens = 1.into();
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gqa_graph;
    use retro_onnx::TensorProto;

    fn looked(change: impl FnOnce(&mut GraphProto)) -> Logits {
        let mut graph = gqa_graph(1);
        change(&mut graph);
        find_lm_head(&GraphView::new(&graph, 21))
    }

    fn last(graph: &mut GraphProto) -> &mut NodeProto {
        graph.node.last_mut().unwrap()
    }

    /// lm_head -> raw, then `node` makes the logits.
    fn after_head(graph: &mut GraphProto, node: NodeProto) {
        last(graph).output[0] = "raw".into();
        graph.node.push(node);
    }

    #[test]
    fn the_lm_head_is_found_through_softcap_bias_and_cast() {
        let found = looked(|g| {
            last(g).output[0] = "raw".into();
            g.initializer.push(TensorProto::floats("cap", &[], &[30.0]));
            g.initializer.push(TensorProto::floats("bias", &[10], &[0.0; 10]));
            g.node
                .push(NodeProto::new("", "Add", "add", &["raw", "bias"], &["biased"]));
            g.node
                .push(NodeProto::new("", "Div", "div", &["biased", "cap"], &["small"]));
            g.node.push(NodeProto::new("", "Tanh", "tanh", &["small"], &["bent"]));
            g.node
                .push(NodeProto::new("", "Mul", "mul", &["bent", "cap"], &["half"]));
            g.node.push(NodeProto::new("", "Cast", "cast", &["half"], &["logits"]));
        });
        let Logits::Newest { label, after, .. } = found else {
            panic!("{found:?}")
        };
        assert_eq!(label, "lm_head");
        assert_eq!(after, ["logits", "half", "bent", "small", "biased", "raw"]);
    }

    #[test]
    fn tied_embeddings_are_weights() {
        let found = looked(|g| {
            g.node
                .insert(0, NodeProto::new("", "Transpose", "t", &["lm_head.weight"], &["tied"]));
            last(g).input[1] = "tied".into();
        });
        let Logits::Newest { label, products, .. } = found else {
            panic!("{found:?}")
        };
        assert_eq!(
            (label.as_str(), products.as_slice()),
            ("lm_head", ["logits".to_owned()].as_slice())
        );
    }

    /// The lm_head as the sum of two products.
    fn halves(graph: &mut GraphProto) {
        last(graph).output[0] = "high".into();
        let hidden = last(graph).input[0].clone();
        let low = NodeProto::new(
            "com.microsoft",
            "MatMulNBits",
            "low",
            &[&hidden, "codes", "scales"],
            &["l"],
        );
        graph.node.push(low);
        graph.initializer.push(TensorProto::floats("codes", &[10], &[0.0; 10]));
        graph.initializer.push(TensorProto::floats("scales", &[10], &[0.0; 10]));
        graph
            .node
            .push(NodeProto::new("", "Add", "add", &["high", "l"], &["logits"]));
    }

    #[test]
    fn the_lm_head_may_be_a_sum_of_two_products() {
        let found = looked(halves);
        let Logits::Newest { label, after, products } = found else {
            panic!("{found:?}")
        };
        assert_eq!((label.as_str(), products.len()), ("lm_head and low", 2));
        assert_eq!(after, ["logits", "high", "l"]);
        let mut graph = gqa_graph(1);
        halves(&mut graph);
        let mut builder = GraphBuilder::part_of(&graph);
        assert!(keep_newest(&mut graph, &products, &after, &mut builder));
        assert_eq!(graph.node[2].input, ["attn.0", "retro/newest_position"]);
        for product in &graph.node[3..5] {
            assert_eq!(product.input(0), "retro/newest_hidden_state");
        }
        assert_eq!(graph.output[0].dims().unwrap()[1].fixed(), Some(1));
        assert_eq!(crate::validate::validate(&graph), Ok(()));

        let kept = |change: fn(&mut GraphProto)| {
            let found = looked(|g| {
                halves(g);
                change(g);
            });
            assert!(matches!(found, Logits::All(KeepAll::MixesRows { .. })), "{found:?}");
        };
        // Of other rows, or read elsewhere.
        kept(|g| g.node[3].input[0] = "x".into());
        kept(|g| g.node.push(NodeProto::new("", "Neg", "n", &["l"], &["more"])));
    }

    #[test]
    fn a_model_that_cuts_already_is_left() {
        let found = looked(|g| {
            let head = last(g);
            let hidden = std::mem::replace(&mut head.input[0], "cut".into());
            let at = g.node.len() - 1;
            g.node
                .insert(at, NodeProto::new("", "Slice", "slice", &[&hidden, "s", "e"], &["cut"]));
        });
        assert_eq!(found, Logits::Already("node slice (Slice) before the lm_head".into()));
        let found = looked(|g| g.output[0].dims_mut().unwrap()[1] = 1.into());
        assert!(matches!(found, Logits::Already(_)));
    }

    #[test]
    fn whatever_is_unclear_keeps_all_logits_and_says_why() {
        let all = |why: &str, change: fn(&mut GraphProto)| match looked(change) {
            Logits::All(reason) => assert!(reason.to_string().contains(why), "{reason}"),
            other => panic!("{other:?}"),
        };
        all("no output is named", |g| drop(g.output.remove(0)));
        all("2 dimensions", |g| drop(g.output[0].dims_mut().unwrap().pop()));
        all("node r (Reshape) is between", |g| {
            after_head(g, NodeProto::new("", "Reshape", "r", &["raw", "shape"], &["logits"]))
        });
        all("mixes rows", |g| {
            after_head(g, NodeProto::new("", "Add", "a", &["raw", "x"], &["logits"]))
        });
        all("mixes rows", |g| {
            g.initializer.push(TensorProto::floats("rows", &[3, 10], &[0.0; 30]));
            after_head(g, NodeProto::new("", "Add", "a", &["raw", "rows"], &["logits"]))
        });
        all("used elsewhere", |g| {
            after_head(g, NodeProto::new("", "Tanh", "t", &["raw"], &["logits"]));
            g.node.push(NodeProto::new("", "Neg", "n", &["raw"], &["more"]));
        });
        all("which is no weight", |g| last(g).input[1] = "x".into());
        all("have 3 dimensions", |g| {
            let weight = g.initializer.iter_mut().find(|t| t.name() == "lm_head.weight").unwrap();
            weight.dims.insert(0, 1);
        });
    }

    #[test]
    fn the_gather_and_the_shapes_are_right() {
        let mut graph = gqa_graph(1);
        let mut builder = GraphBuilder::part_of(&graph);
        let logits = ["logits".to_owned()];
        assert!(keep_newest(&mut graph, &logits, &logits, &mut builder));
        assert_eq!(graph.node[2].input, ["attn.0", "retro/newest_position"]);
        assert_eq!(graph.node[3].input, ["retro/newest_hidden_state", "lm_head.weight"]);
        assert_eq!(graph.node[2].attribute[0].i(), 1);
        assert_eq!(graph.output[0].dims().unwrap()[1].fixed(), Some(1));
        assert_eq!(crate::validate::validate(&graph), Ok(()));
    }
}
