//! Where an attention's keys, values and mask come from: back through nodes that move and scale numbers, up to the graph's inputs.

use crate::eval::reads;
use retro_onnx::{NodeProto, ValueInfoProto, graph::GraphView};
use std::collections::HashSet;

const MAX_STEPS: usize = 2000;
const PRODUCTS: [&str; 8] = [
    "MatMul",
    "FusedMatMul",
    "Einsum",
    "Gemm",
    "MatMulNBits",
    "MatMulBnb4",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
];
const WRITES: [&str; 4] = ["ScatterND", "ScatterElements", "Scatter", "TensorScatter"];

/// What an attention works on, found by following nodes alone.
pub struct TracedOperands<'a> {
    pub key: &'a str,
    pub value: &'a str,
    /// What the Softmax takes, or the mask of a fused node.
    pub masked: &'a str,
    /// The product of queries and keys.
    pub product: Option<&'a str>,
    /// The keys and values are caches that the node appends to itself.
    pub inside: bool,
}

impl<'a> TracedOperands<'a> {
    /// The operands of a Softmax between two products, or of a fused node.
    pub fn of(view: &GraphView<'a>, node: &'a NodeProto) -> Option<Self> {
        match (node.op_domain(), node.op_type()) {
            ("", "Attention") => Some(Self::of_fused(node, [4, 5], 3)),
            ("com.microsoft", "MultiHeadAttention") => Some(Self::of_fused(node, [6, 7], 5)),
            ("com.microsoft", "GroupQueryAttention") => Some(Self::of_fused(node, [3, 4], 10)),
            ("", "Softmax") => {
                let scores = nearest_product(view, node.input(0))?;
                let (values, by) = values(view, node)?;
                Some(Self {
                    key: scores.input(1),
                    value: values.input.iter().map(String::as_str).find(|i| *i != by)?,
                    masked: node.input(0),
                    product: Some(scores.output(0)),
                    inside: false,
                })
            }
            _ => None,
        }
    }

    /// `past`: the slots of past key and value; `mask`: that of the mask.
    fn of_fused(node: &'a NodeProto, past: [usize; 2], mask: usize) -> Self {
        let past = past.map(|slot| node.input(slot));
        let own = |slot: usize, past: &'a str| if past.is_empty() { node.input(slot) } else { past };
        Self {
            key: own(1, past[0]),
            value: own(2, past[1]),
            masked: node.input(mask),
            product: None,
            inside: past.iter().any(|name| !name.is_empty()),
        }
    }
}

/// Whether a node multiplies matrices.
pub fn is_product(node: &NodeProto) -> bool {
    matches!(node.op_domain(), "" | "com.microsoft") && PRODUCTS.contains(&node.op_type())
}

fn nearest_product<'a>(view: &GraphView<'a>, from: &'a str) -> Option<&'a NodeProto> {
    let mut open = vec![from];
    let mut at = 0;
    while let Some(name) = open.get(at).copied().filter(|_| at < 64) {
        at += 1;
        let Some(node) = view.producer(name) else { continue };
        if is_product(node) && node.input.iter().take(2).all(|i| !view.is_constant(i)) {
            return Some(node);
        }
        open.extend(node.input.iter().map(String::as_str).filter(|i| !i.is_empty()));
    }
    None
}

fn values<'a>(view: &GraphView<'a>, softmax: &'a NodeProto) -> Option<(&'a NodeProto, &'a str)> {
    let mut open = vec![softmax.output(0)];
    let mut at = 0;
    while let Some(name) = open.get(at).copied().filter(|_| at < 64) {
        at += 1;
        for reader in view.readers(name) {
            if is_product(reader) {
                return Some((reader, name));
            }
            open.push(reader.output(0));
        }
    }
    None
}

/// An input of the graph that a value comes from, and what lies between.
pub struct Origin<'a> {
    pub input: &'a str,
    /// The Concat that puts other values beside it, or the attention that does.
    pub append: Option<&'a NodeProto>,
    /// Orders of dimensions between the input and that Concat, from the Concat on; none: they can't be followed.
    turns: Option<Vec<&'a [i64]>>,
    /// A node that writes into it.
    pub written: Option<&'a NodeProto>,
    /// A Slice behind the Concat.
    pub cut: Option<&'a NodeProto>,
    /// The product with weights that stands in between.
    pub projected_by: Option<&'a NodeProto>,
}

impl Origin<'_> {
    /// The input's dimension that grows.
    pub fn axis(&self, rank: usize) -> Option<usize> {
        let append = self.append?;
        let axis = if append.is("", "Concat") {
            append.attribute("axis")?.i()
        } else {
            2
        };
        let axis = if axis < 0 { axis + rank as i64 } else { axis };
        let mut axis = usize::try_from(axis).ok()?;
        for turn in self.turns.as_ref()? {
            axis = usize::try_from(*turn.get(axis)?).ok()?;
        }
        (axis < rank).then_some(axis)
    }
}

/// All that a value comes from.
pub struct Trace<'a> {
    pub origins: Vec<Origin<'a>>,
    /// Calls of the model's functions.
    pub calls: Vec<&'a NodeProto>,
}

/// How a value was reached.
#[derive(Clone, Default)]
struct Way<'a> {
    append: Option<&'a NodeProto>,
    turns: Option<Vec<&'a [i64]>>,
    written: Option<&'a NodeProto>,
    slice: Option<&'a NodeProto>,
    cut: Option<&'a NodeProto>,
    projected_by: Option<&'a NodeProto>,
}

impl<'a> Trace<'a> {
    /// Keys or values; `appends`: the attention that appends to them itself.
    pub fn of(
        view: &GraphView<'a>,
        name: &'a str,
        appends: Option<&'a NodeProto>,
        is_call: &dyn Fn(&NodeProto) -> bool,
    ) -> Self {
        let way = Way {
            append: appends,
            turns: appends.map(|_| Vec::new()),
            ..Way::default()
        };
        Self::walk(view, (name, way), None, is_call)
    }

    /// A mask: what joins the scores between the product and the Softmax.
    pub fn between(
        view: &GraphView<'a>,
        masked: &'a str,
        product: Option<&'a str>,
        is_call: &dyn Fn(&NodeProto) -> bool,
    ) -> Self {
        Self::walk(view, (masked, Way::default()), Some(product.unwrap_or("")), is_call)
    }

    fn walk(
        view: &GraphView<'a>,
        from: (&'a str, Way<'a>),
        mask_until: Option<&'a str>,
        is_call: &dyn Fn(&NodeProto) -> bool,
    ) -> Self {
        let mut trace = Self {
            origins: Vec::new(),
            calls: Vec::new(),
        };
        let mut seen: HashSet<(&str, bool)> = HashSet::new();
        let mut open = vec![from];
        while let Some((name, way)) = open.pop().filter(|_| seen.len() < MAX_STEPS) {
            let done = name.is_empty() || mask_until == Some(name) || view.initializer(name).is_some();
            if done || !seen.insert((name, way.projected_by.is_some())) {
                continue;
            }
            let Some(node) = view.producer(name) else {
                if view.graph.input.iter().map(ValueInfoProto::name).any(|i| i == name) {
                    trace.origins.push(Origin {
                        input: name,
                        append: way.append,
                        turns: way.turns,
                        written: way.written,
                        cut: way.cut,
                        projected_by: way.projected_by,
                    });
                }
                continue;
            };
            if node.is("", "Shape") || node.is("", "Size") {
                continue;
            }
            if is_call(node) {
                trace.calls.push(node);
                continue;
            }
            let weighed = is_product(node) && node.input.iter().any(|i| !i.is_empty() && view.is_constant(i));
            // Behind weights only a cache of what they are applied to matters, not all that tokens go through.
            let further = match (mask_until.is_some(), way.projected_by.is_some()) {
                (true, _) => true,
                (false, true) => node.op_domain().is_empty() && MOVES.contains(&node.op_type()),
                (false, false) => true,
            };
            if !further || weighed && way.projected_by.is_some() {
                continue;
            }
            let next = if weighed {
                Way {
                    projected_by: Some(node),
                    ..Way::default()
                }
            } else {
                way.through(node)
            };
            for (slot, input) in reads(node).enumerate() {
                let written = WRITES.contains(&node.op_type()) && slot == 0;
                let next = Way {
                    written: if written { Some(node) } else { next.written },
                    ..next.clone()
                };
                open.push((input, next));
            }
        }
        trace
    }
}

/// What moves numbers, or scales all of a token's.
const MOVES: [&str; 13] = [
    "Concat",
    "Identity",
    "Cast",
    "Transpose",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Slice",
    "Split",
    "Expand",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
];

impl<'a> Way<'a> {
    fn through(&self, node: &'a NodeProto) -> Self {
        let mut way = self.clone();
        match node.op_type() {
            "Concat" if node.input.len() > 1 => {
                way.append = Some(node);
                way.turns = Some(Vec::new());
                way.cut = way.slice;
            }
            "Slice" => way.slice = Some(node),
            "Transpose" => {
                if let (Some(turns), Some(perm)) = (&mut way.turns, node.attribute("perm")) {
                    turns.push(&perm.ints);
                }
            }
            "Reshape" | "Unsqueeze" | "Squeeze" | "Gather" | "Split" | "Expand" => way.turns = None,
            _ => {}
        }
        way
    }
}
