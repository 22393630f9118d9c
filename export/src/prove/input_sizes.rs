//! Sizes of a graph's inputs, where its declarations leave them open: by the names that they share with tokens, mask and caches,
//! else by what is computed with them.

use super::model_inputs::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS};
use retro_onnx::{Dimension, NodeProto, ValueInfoProto, graph::GraphView};
use std::collections::{HashMap, HashSet, VecDeque};

/// For what nothing tells: ranks of adapters, lengths of what an encoder gave.
const OPEN: usize = 4;
/// Bound of a walk from a value to what tells its width.
const MAX_STEPS: usize = 256;

/// One dimension of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// The same in every call.
    Number(usize),
    /// Sequences of a batch.
    Sequences,
    /// Tokens fed in a call.
    Tokens,
    /// Tokens before those.
    Past,
    /// Both together.
    Total,
}

impl Size {
    /// The size in a call of so many sequences, tokens fed and tokens before those.
    pub fn of(self, sequences: usize, tokens: usize, past: usize) -> usize {
        match self {
            Self::Number(n) => n,
            Self::Sequences => sequences,
            Self::Tokens => tokens,
            Self::Past => past,
            Self::Total => past + tokens,
        }
    }
}

/// What names of dimensions stand for, by the inputs that every caller knows.
pub fn named_sizes<'a>(view: &GraphView<'a>) -> HashMap<&'a str, Size> {
    use Size::{Past, Sequences, Tokens, Total};
    let mut names = HashMap::new();
    for input in &view.graph.input {
        let dims = input.dims().unwrap_or_default();
        let sizes: &[Option<Size>] = match (input.name(), dims.len()) {
            (INPUT_IDS, 2) | (INPUTS_EMBEDS, 3) | (POSITION_IDS, 2) => &[Some(Sequences), Some(Tokens)],
            (POSITION_IDS, 3) => &[None, Some(Sequences), Some(Tokens)],
            (ATTENTION_MASK, 2) => &[Some(Sequences), Some(Total)],
            (name, 4) if name.contains("past") => &[Some(Sequences), None, Some(Past)],
            _ => &[],
        };
        for (dim, size) in dims.iter().zip(sizes) {
            if let Some((name, size)) = dim.symbol().zip(*size) {
                names.entry(name).or_insert(size);
            }
        }
    }
    names
}

/// The dimensions of an input; none where its rank is not declared.
pub fn sizes(view: &GraphView, names: &HashMap<&str, Size>, input: &ValueInfoProto) -> Option<Vec<Size>> {
    let dims = input.dims()?;
    let size = |(axis, dim): (usize, &Dimension)| {
        if let Some(n) = dim.fixed() {
            return usize::try_from(n).ok().map(Size::Number);
        }
        if let Some(size) = dim.symbol().and_then(|name| names.get(name)) {
            return Some(*size);
        }
        let batch = dim.symbol().is_some_and(|name| name.to_lowercase().contains("batch"));
        Some(match axis {
            _ if batch => Size::Sequences,
            // Of activations, batch and tokens come first.
            0 if dims.len() > 2 && dim.symbol().is_none() => Size::Sequences,
            1 if dims.len() > 2 && dim.symbol().is_none() => Size::Tokens,
            _ => {
                let width = if axis + 1 == dims.len() {
                    width(view, input.name())
                } else {
                    None
                };
                let rows = || {
                    if axis + 2 == dims.len() {
                        rows(view, input.name())
                    } else {
                        None
                    }
                };
                Size::Number(width.or_else(rows).unwrap_or(OPEN))
            }
        })
    };
    dims.iter().enumerate().map(size).collect()
}

/// The last dimension of a value, from what is computed with it.
pub fn width(view: &GraphView, name: &str) -> Option<usize> {
    let mut open = VecDeque::from([name]);
    let mut seen = HashSet::new();
    while let Some(value) = open.pop_front() {
        if !seen.insert(value) || seen.len() > MAX_STEPS {
            continue;
        }
        for node in view.readers(value) {
            if let Some(width) = told_by(view, node, value) {
                return Some(width);
            }
            // The second factor's width is the product's.
            let second = node.is("", "MatMul") && node.input(1) == value;
            if keeps_width(node) || second {
                open.extend(node.output.first().map(String::as_str));
            }
        }
    }
    None
}

/// What a node says of the last dimension of one of its inputs.
fn told_by(view: &GraphView, node: &NodeProto, value: &str) -> Option<usize> {
    let dims = |name: &str| {
        let of_weight = view.tensor_dims(name).map(<[i64]>::to_vec);
        let declared = || view.declared_dims(name)?.iter().map(Dimension::fixed).collect();
        of_weight.or_else(declared)
    };
    let size = |n: Option<i64>| n.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 1);
    match node.op_type() {
        "MatMul" | "FusedMatMul" if node.input(0) == value => {
            let weight: Vec<i64> = dims(node.input(1))?;
            size(weight.len().checked_sub(2).and_then(|row| weight.get(row)).copied())
        }
        "Gemm" if node.input(0) == value => {
            let turned = node.attribute("transB").is_some_and(|a| a.i() != 0);
            size(dims(node.input(1))?.get(usize::from(turned)).copied())
        }
        "MatMulInteger" if node.input(0) == value => size(dims(node.input(1))?.first().copied()),
        "MatMulNBits" | "MatMulBnb4" if node.input(0) == value => size(Some(node.attribute("K")?.i())),
        op if op.contains("LayerNorm") && node.input(0) == value => {
            size(node.input.iter().skip(1).find_map(|scale| dims(scale)?.last().copied()))
        }
        "RMSNormalization" if node.input(0) == value => size(dims(node.input(1))?.last().copied()),
        "Add" | "Mul" | "Sub" | "Div" => {
            let mut others = node.input.iter().filter(|i| *i != value);
            size(others.find_map(|other| {
                dims(other)
                    .and_then(|d| d.last().copied())
                    .or_else(|| columns(view, other))
            }))
        }
        _ => None,
    }
}

/// The last dimension of a product with weights.
fn columns(view: &GraphView, name: &str) -> Option<i64> {
    let producer = view.producer(name)?;
    match producer.op_type() {
        "MatMul" => view.tensor_dims(producer.input(1))?.last().copied(),
        "MatMulNBits" | "MatMulBnb4" => Some(producer.attribute("N")?.i()),
        "Gemm" => {
            let turned = producer.attribute("transB").is_some_and(|a| a.i() != 0);
            view.tensor_dims(producer.input(1))?.get(usize::from(!turned)).copied()
        }
        _ => None,
    }
}

/// The dimension before the last of a value that something is multiplied with.
fn rows(view: &GraphView, name: &str) -> Option<usize> {
    let mut readers = view.readers(name).filter(|n| n.is("", "MatMul") && n.input(1) == name);
    readers.find_map(|node| last_dimension(view, node.input(0)))
}

/// The last dimension of a value, from what computes it or what else reads it.
fn last_dimension(view: &GraphView, name: &str) -> Option<usize> {
    let declared = view.declared_from_end(name, 1).and_then(|n| usize::try_from(n).ok());
    let made = || columns(view, name).and_then(|n| usize::try_from(n).ok());
    declared.or_else(made).or_else(|| width(view, name)).or_else(|| {
        let producer = view.producer(name)?;
        let scale = producer
            .input
            .iter()
            .skip(1)
            .find_map(|i| view.tensor_dims(i)?.last().copied());
        scale.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 1)
    })
}

fn keeps_width(node: &NodeProto) -> bool {
    const KEEP: [&str; 19] = [
        "Add",
        "Cast",
        "Clip",
        "Div",
        "Dropout",
        "Identity",
        "LayerNormalization",
        "Mul",
        "Neg",
        "Pow",
        "Sub",
        "Tanh",
        "DynamicQuantizeLinear",
        "QuantizeLinear",
        "DequantizeLinear",
        "Sqrt",
        "Gelu",
        "Sigmoid",
        "QuickGelu",
    ];
    KEEP.contains(&node.op_type())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::projected;
    use retro_onnx::{DataType, GraphProto, TensorProto};

    fn sizes_of(graph: &GraphProto, name: &str) -> Vec<Size> {
        let view = GraphView::new(graph, 21);
        let names = named_sizes(&view);
        let input = graph.input.iter().find(|i| i.name() == name).unwrap();
        sizes(&view, &names, input).unwrap()
    }

    #[test]
    fn open_sizes_come_from_names_and_from_what_is_computed() {
        use Size::{Number, Past, Sequences, Tokens, Total};
        let mut graph = projected(2, 2);
        graph.input[0].dims_mut().unwrap()[2] = "hidden".into();
        assert_eq!(
            sizes_of(&graph, "inputs_embeds"),
            [Sequences, Tokens, Number(8)],
            "the rows of wq"
        );
        assert_eq!(sizes_of(&graph, "attention_mask"), [Sequences, Total]);
        assert_eq!(
            sizes_of(&graph, "past_key_values.0.key"),
            [Sequences, Number(2), Past, Number(4)]
        );
        // An adapter of open rank beside the queries' weights.
        let adapter = |name: &str, dims: [Dimension; 2]| ValueInfoProto::tensor(name, DataType::Float, dims);
        graph.input.push(adapter("a", ["hidden".into(), "rank".into()]));
        graph.input.push(adapter("b", ["rank".into(), "width".into()]));
        let node = |op: &str, inputs: &[&str], output: &str| NodeProto::new("", op, output, inputs, &[output]);
        graph.node.push(node("MatMul", &["inputs_embeds", "a"], "down"));
        graph.node.push(node("MatMul", &["down", "b"], "up"));
        graph.node.push(node("Add", &["up", "bias"], "adapted"));
        graph.initializer.push(TensorProto::floats("bias", &[12], &[0.0; 12]));
        assert_eq!(sizes_of(&graph, "a"), [Number(8), Number(4)]);
        assert_eq!(sizes_of(&graph, "b"), [Number(4), Number(12)]);
    }
}
