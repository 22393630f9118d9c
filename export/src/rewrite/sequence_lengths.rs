//! How long sequences are, when the source tells it by the shape of its cache: that shape is the capacity now, so the length
//! comes from the attention mask instead. P = T - S: past tokens, all tokens, tokens fed.

use crate::rules::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS};
use anyhow::{Result, bail};
use retro_contract::limits::MASK_NOT_UNDERSTOOD;
use retro_onnx::FreshNames;
use retro_onnx::{
    AttributeProto, DataType, Dimension, GraphProto, NodeProto, TensorProto, ValueInfoProto, graph::subgraphs_mut,
};
use std::collections::HashMap;

/// From here on Slice takes its bounds as inputs.
const SLICE_OPSET: i64 = 10;

/// Values that tell lengths, and the nodes that make them.
pub struct SequenceLengths {
    pub seqlens_k: String,
    pub total_sequence_length: String,
    /// int64 `[1]`.
    total: String,
    past: String,
    pub nodes: Vec<NodeProto>,
}

fn cast(from: &str, to: DataType, name: &str) -> NodeProto {
    NodeProto::new("", "Cast", name, &[from], &[name]).with(AttributeProto::int("to", i64::from(i32::from(to))))
}

/// Inputs and attributes of a ReduceSum along the second axis, which `axis` names.
fn sum<'n>(from: &'n str, axis: &'n str, opset: i64) -> (Vec<&'n str>, Vec<AttributeProto>) {
    let keep = AttributeProto::int("keepdims", 0);
    if opset >= 13 {
        (vec![from, axis], vec![keep])
    } else {
        (vec![from], vec![AttributeProto::ints("axes", &[1]), keep])
    }
}

impl SequenceLengths {
    /// `padding`: zeros at the mask's beginning are padding; else every zero is an error.
    pub fn new(graph: &mut GraphProto, fresh: &mut FreshNames, opset: i64, padding: bool) -> Result<Self> {
        let tokens = [INPUT_IDS, INPUTS_EMBEDS]
            .into_iter()
            .find(|n| graph.input.iter().any(|i| i.name() == *n));
        let Some(tokens) = tokens else {
            bail!("the graph has no input {INPUT_IDS} or {INPUTS_EMBEDS} that tells how many tokens are fed")
        };
        if padding && opset < SLICE_OPSET {
            bail!(
                "opset {opset} has no Slice that takes its bounds as inputs, which the check of the attention mask needs; export with opset {SLICE_OPSET} or newer"
            )
        }
        if !graph.input.iter().any(|i| i.name() == ATTENTION_MASK) {
            let dims: [Dimension; 2] = ["batch_size".into(), "total_sequence_length".into()];
            graph
                .input
                .push(ValueInfoProto::tensor(ATTENTION_MASK, DataType::Int64, dims));
        }
        let mut nodes = Vec::new();
        let mut constant = |fresh: &mut FreshNames, base: &str, tensor: &dyn Fn(&str) -> TensorProto| {
            let name = fresh.name(base);
            graph.initializer.push(tensor(&name));
            name
        };
        let one = constant(fresh, "retro/one", &|n| TensorProto::int64s(n, &[1], &[1]));
        let axis = constant(fresh, "retro/axis", &|n| TensorProto::int64s(n, &[], &[1]));
        let minus = constant(fresh, "retro/minus_one", &|n| TensorProto::int32s(n, &[], &[-1]));
        let bad = constant(fresh, "retro/mask_not_understood", &|n| {
            TensorProto::int32s(n, &[], &[MASK_NOT_UNDERSTOOD])
        });
        let mut add =
            |fresh: &mut FreshNames, base: &str, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>| {
                let name = fresh.name(base);
                let mut node = NodeProto::new("", op, &name, inputs, &[&name]);
                node.attribute = attributes;
                nodes.push(node);
                name
            };
        let to = |t: DataType| vec![AttributeProto::int("to", i64::from(i32::from(t)))];
        let shape = add(fresh, "retro/mask_shape", "Shape", &[ATTENTION_MASK], vec![]);
        let total = add(fresh, "retro/total", "Gather", &[&shape, &one], vec![]);
        let total_scalar = add(fresh, "retro/total_scalar", "Gather", &[&shape, &axis], vec![]);
        let total32 = add(
            fresh,
            "retro/total_sequence_length",
            "Cast",
            &[&total_scalar],
            to(DataType::Int32),
        );
        let fed_shape = add(fresh, "retro/fed_shape", "Shape", &[tokens], vec![]);
        let fed = add(fresh, "retro/fed", "Gather", &[&fed_shape, &one], vec![]);
        let past = add(fresh, "retro/past", "Sub", &[&total, &fed], vec![]);
        let mask = add(fresh, "retro/mask", "Cast", &[ATTENTION_MASK], to(DataType::Int32));
        let (inputs, attributes) = sum(&mask, &one, opset);
        let valid = add(fresh, "retro/valid", "ReduceSum", &inputs, attributes);
        // All is computed where the mask is, by operators that have CUDA kernels for int32: ArgMax has none, and a number that
        // crosses to the GPU would forbid to capture a graph.
        let sound = if padding {
            // Ones at the end and nothing but padding before them: neighbours that are both valid, the last one being its own, are
            // as many as are valid, and the last one is.
            let [newest_on, end] = [(-1, "retro/newest_on"), (i64::MAX, "retro/end")]
                .map(|(x, base)| constant(fresh, base, &|n| TensorProto::int64s(n, &[1], &[x])));
            let last = add(
                fresh,
                "retro/mask_last",
                "Slice",
                &[&mask, &newest_on, &end, &one],
                vec![],
            );
            let axis = || vec![AttributeProto::int("axis", 1)];
            let longer = add(fresh, "retro/mask_longer", "Concat", &[&mask, &last], axis());
            let next = add(fresh, "retro/mask_next", "Slice", &[&longer, &one, &end, &one], vec![]);
            let both = add(fresh, "retro/neighbours", "Mul", &[&mask, &next], vec![]);
            let (inputs, attributes) = sum(&both, &one, opset);
            let pairs = add(fresh, "retro/pairs", "ReduceSum", &inputs, attributes);
            let (inputs, attributes) = sum(&last, &one, opset);
            let newest = add(fresh, "retro/newest", "ReduceSum", &inputs, attributes);
            let got = add(fresh, "retro/pairs_and_newest", "Add", &[&pairs, &newest], vec![]);
            let wanted = add(fresh, "retro/valid_and_one", "Sub", &[&valid, &minus], vec![]);
            add(fresh, "retro/mask_is_sound", "Equal", &[&got, &wanted], vec![])
        } else {
            let value = AttributeProto::tensor("value", TensorProto::int32s("one", &[1], &[1]));
            let ones = add(fresh, "retro/ones", "ConstantOfShape", &[&shape], vec![value]);
            let (inputs, attributes) = sum(&ones, &one, opset);
            let width = add(fresh, "retro/width", "ReduceSum", &inputs, attributes);
            add(fresh, "retro/mask_is_sound", "Equal", &[&valid, &width], vec![])
        };
        let last = add(fresh, "retro/last", "Add", &[&valid, &minus], vec![]);
        let seqlens_k = add(fresh, "retro/seqlens_k", "Where", &[&sound, &last, &bad], vec![]);
        Ok(Self {
            seqlens_k,
            total_sequence_length: total32,
            total,
            past,
            nodes,
        })
    }

    /// Lets what reads the shape of a converted cache read the shape it would have had. `past` and `present`: names of
    /// caches. Gives the places left that read a cache otherwise.
    pub fn rewire(
        &mut self,
        graph: &mut GraphProto,
        fresh: &mut FreshNames,
        past: &[String],
        present: &[String],
    ) -> Vec<(String, String)> {
        let mut made: HashMap<(String, bool), String> = HashMap::new();
        let mut indices: HashMap<Vec<i64>, String> = HashMap::new();
        let mut others = Vec::new();
        let mut nodes = std::mem::take(&mut graph.node);
        let mut constants = Vec::new();
        let mut open: Vec<&mut NodeProto> = nodes.iter_mut().collect();
        while let Some(node) = open.pop() {
            let which = |name: &String| {
                let is_past = past.contains(name);
                (is_past || present.contains(name)).then(|| (name.clone(), is_past))
            };
            let touched: Vec<(String, bool)> = node.input.iter().filter_map(which).collect();
            if let (Some(key), true) = (touched.first(), node.is("", "Shape")) {
                let dims = made
                    .entry(key.clone())
                    .or_insert_with(|| self.true_shape(fresh, &mut constants, &mut indices, key))
                    .clone();
                let (start, end) = (
                    node.attribute("start").map(|a| a.i()),
                    node.attribute("end").map(|a| a.i()),
                );
                let bound = |x: i64| (if x < 0 { x + 4 } else { x }).clamp(0, 4);
                let places: Vec<i64> = (bound(start.unwrap_or(0))..bound(end.unwrap_or(4))).collect();
                node.attribute.clear();
                if places.len() == 4 {
                    node.op_type = Some("Identity".to_owned());
                    node.input = vec![dims];
                } else {
                    node.op_type = Some("Gather".to_owned());
                    node.input = vec![dims, index(fresh, &mut constants, &mut indices, &places)];
                }
            } else if !node.is(retro_contract::DOMAIN, retro_contract::OP_TYPE) {
                others.extend(touched.into_iter().map(|(name, _)| (node.label(), name)));
            }
            open.extend(subgraphs_mut(node).flat_map(|g| &mut g.node));
        }
        graph.node = nodes;
        graph.initializer.append(&mut constants);
        others
    }

    /// Batch, heads, true length, head size.
    fn true_shape(
        &mut self,
        fresh: &mut FreshNames,
        constants: &mut Vec<TensorProto>,
        indices: &mut HashMap<Vec<i64>, String>,
        (cache, is_past): &(String, bool),
    ) -> String {
        let [shape, front, back, dims] =
            ["shape", "front", "back", "true_shape"].map(|n| fresh.name(&format!("retro/{cache}/{n}")));
        let (first, last) = (
            index(fresh, constants, indices, &[0, 1]),
            index(fresh, constants, indices, &[3]),
        );
        let length = if *is_past { &self.past } else { &self.total };
        let joined = NodeProto::new("", "Concat", &dims, &[&front, length, &back], &[&dims]);
        let nodes = [
            NodeProto::new("", "Shape", &shape, &[cache], &[&shape]),
            NodeProto::new("", "Gather", &front, &[&shape, &first], &[&front]),
            NodeProto::new("", "Gather", &back, &[&shape, &last], &[&back]),
            joined.with(AttributeProto::int("axis", 0)),
        ];
        self.nodes.extend(nodes);
        dims
    }
}

fn index(
    fresh: &mut FreshNames,
    constants: &mut Vec<TensorProto>,
    indices: &mut HashMap<Vec<i64>, String>,
    places: &[i64],
) -> String {
    let known = indices.entry(places.to_vec()).or_insert_with(|| {
        let name = fresh.name("retro/index");
        constants.push(TensorProto::int64s(&name, &[places.len() as i64], places));
        name
    });
    known.clone()
}

/// A Cast node, where types differ.
pub fn cast_to(from: &str, to: DataType, name: &str) -> NodeProto {
    cast(from, to, name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{Env, Program, Tensor};
    use retro_onnx::graph::GraphView;
    use std::collections::HashSet;

    /// seqlens_k for masks of one width.
    fn seqlens_k(rows: &[Vec<i64>], opset: i64, padding: bool) -> Vec<i64> {
        let mut graph = GraphProto::default();
        let (dims, int): ([Dimension; 2], _) = (["b".into(), "s".into()], DataType::Int64);
        graph.input.push(ValueInfoProto::tensor(INPUT_IDS, int, dims));
        let mut fresh = FreshNames::of(&graph);
        let lengths = SequenceLengths::new(&mut graph, &mut fresh, opset, padding).unwrap();
        graph.node = lengths.nodes;
        let view = GraphView::new(&graph, opset);
        let program = Program::new(&view, None, &HashSet::new(), &HashSet::new());
        let mut env = Env::default();
        let mask = rows.iter().flatten().map(|x| *x as f64).collect();
        env.set(ATTENTION_MASK, Tensor::new(vec![rows.len(), rows[0].len()], int, mask));
        env.set(INPUT_IDS, Tensor::unknown(vec![rows.len(), 1], int));
        let env = program.run(env);
        let found = env.need(&lengths.seqlens_k).unwrap();
        assert_eq!(found.shape, [rows.len()]);
        found.data.iter().flatten().map(|x| *x as i64).collect()
    }

    #[test]
    fn every_mask_is_a_length_or_an_error() {
        for opset in [11, 22] {
            for width in 1..=6 {
                let rows: Vec<Vec<i64>> = (0..1 << width)
                    .map(|m| (0..width).map(|i| m >> i & 1).collect())
                    .collect();
                for padding in [false, true] {
                    let expected = rows.iter().map(|row| {
                        let n = row.iter().sum::<i64>();
                        let zeros = row.iter().take_while(|x| **x == 0).count();
                        let sound = n > 0 && zeros as i64 + n == width && (padding || zeros == 0);
                        if sound { n - 1 } else { i64::from(MASK_NOT_UNDERSTOOD) }
                    });
                    let expected: Vec<i64> = expected.collect();
                    assert_eq!(
                        seqlens_k(&rows, opset, padding),
                        expected,
                        "opset {opset}, {padding}: {rows:?}"
                    );
                }
            }
        }
    }
}
