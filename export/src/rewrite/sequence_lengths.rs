//! How long sequences are, when the source tells it by the shape of its cache: that shape is the capacity now, so the length
//! comes from the attention mask instead. P = T - S: past tokens, all tokens, tokens fed.

use super::{
    Error,
    mask_check::{self, MaskCheck, OnesEnd},
    operator_node::is_operator,
};
use crate::rules::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS};
use retro_onnx::{DataType, Dimension, GraphBuilder, GraphProto, NodeProto, ValueInfoProto, graph::subgraphs_mut};
use std::collections::HashMap;

/// Values that tell lengths, and the nodes that make them.
pub struct SequenceLengths {
    /// Valid tokens of each sequence less one, int32 `[B]`; negative where the mask is refused.
    pub seqlens_k: String,
    /// T, an int32 scalar.
    pub total_sequence_length: String,
    /// T, int64 `[1]`.
    total: String,
    /// P, int64 `[1]`.
    past: String,
    /// In order. They read the graph's inputs alone.
    pub nodes: Vec<NodeProto>,
}

impl SequenceLengths {
    /// `padding`: zeros at the mask's beginning are padding; else every zero is an error.
    ///
    /// # Errors
    /// The graph has no input of tokens.
    pub fn new(graph: &mut GraphProto, builder: &mut GraphBuilder, opset: i64, padding: bool) -> Result<Self, Error> {
        let has = |graph: &GraphProto, name: &str| graph.input.iter().any(|i| i.name() == name);
        let mut tokens = [INPUT_IDS, INPUTS_EMBEDS].into_iter();
        let tokens = tokens.find(|name| has(graph, name)).ok_or(Error::NoTokens)?;
        if !has(graph, ATTENTION_MASK) {
            let dims: [Dimension; 2] = ["batch_size".into(), "total_sequence_length".into()];
            let mask = ValueInfoProto::tensor(ATTENTION_MASK, DataType::Int64, dims);
            graph.input.push(mask);
        }
        builder.set_prefix("retro/");
        let one = builder.int64s("one", &[1], &[1]);
        let axis = builder.int64s("axis", &[], &[1]);
        let shape = builder.node("Shape", &[ATTENTION_MASK]).output("mask_shape");
        let total = builder.node("Gather", &[&shape, &one]).output("total");
        let scalar = builder.node("Gather", &[&shape, &axis]).output("total_scalar");
        let total_sequence_length = builder.cast(&scalar, DataType::Int32, "total_sequence_length");
        let fed_shape = builder.node("Shape", &[tokens]).output("fed_shape");
        let fed = builder.node("Gather", &[&fed_shape, &one]).output("fed");
        let past = builder.node("Sub", &[&total, &fed]).output("past");
        builder.set_prefix("retro/mask/");
        let check = MaskCheck {
            data_type: mask_check::data_type(graph),
            end: OnesEnd::WithMask,
            from_start: !padding,
            opset,
        };
        let seqlens_k = check.seqlens_k(builder, None);
        graph.initializer.append(&mut builder.take_initializers());
        Ok(Self {
            seqlens_k,
            total_sequence_length,
            total,
            past,
            nodes: builder.take_nodes(),
        })
    }

    /// Lets what reads the shape of a converted cache read the shape it would have had. `past` and `present`: names of
    /// caches. Gives the places left that read a cache otherwise: node and cache.
    pub fn rewire(
        &mut self,
        graph: &mut GraphProto,
        builder: &mut GraphBuilder,
        past: &[String],
        present: &[String],
    ) -> Vec<(String, String)> {
        let mut shapes = TrueShapes {
            builder,
            total: &self.total,
            past: &self.past,
            made: HashMap::new(),
            indices: HashMap::new(),
        };
        let mut others = Vec::new();
        let mut open: Vec<&mut NodeProto> = graph.node.iter_mut().collect();
        while let Some(node) = open.pop() {
            let which = |name: &String| {
                let is_past = past.contains(name);
                (is_past || present.contains(name)).then(|| (name.clone(), is_past))
            };
            let touched: Vec<(String, bool)> = node.input.iter().filter_map(which).collect();
            if let (Some(cache), true) = (touched.first(), node.is("", "Shape")) {
                shapes.stand_for(node, cache);
            } else if !is_operator(node) {
                others.extend(touched.into_iter().map(|(name, _)| (node.label(), name)));
            }
            open.extend(subgraphs_mut(node).flat_map(|g| &mut g.node));
        }
        self.nodes.append(&mut builder.take_nodes());
        graph.initializer.append(&mut builder.take_initializers());
        others
    }
}

/// Makes the shapes that caches would have without their capacity.
struct TrueShapes<'s> {
    builder: &'s mut GraphBuilder,
    total: &'s str,
    past: &'s str,
    /// By cache and whether it is a past one.
    made: HashMap<(String, bool), String>,
    indices: HashMap<Vec<i64>, String>,
}

impl TrueShapes<'_> {
    /// Turns a Shape of a cache into what gives the cache's true shape, or the part of it that was asked for.
    fn stand_for(&mut self, node: &mut NodeProto, cache: &(String, bool)) {
        let shape = self.of(cache);
        let bound = |name: &str, default| {
            let x = node.attribute(name).map_or(default, |a| a.i());
            (if x < 0 { x + 4 } else { x }).clamp(0, 4)
        };
        let axes: Vec<i64> = (bound("start", 0)..bound("end", 4)).collect();
        node.attribute.clear();
        if axes.len() == 4 {
            node.op_type = Some("Identity".to_owned());
            node.input = vec![shape];
        } else {
            node.op_type = Some("Gather".to_owned());
            node.input = vec![shape, self.index(&axes)];
        }
    }

    /// Batch, heads, true length, head size: int64 `[4]`.
    fn of(&mut self, cache: &(String, bool)) -> String {
        if let Some(made) = self.made.get(cache) {
            return made.clone();
        }
        let (first, last) = (self.index(&[0, 1]), self.index(&[3]));
        let (name, is_past) = cache;
        let length = if *is_past { self.past } else { self.total };
        let builder = &mut *self.builder;
        builder.set_prefix(format!("retro/{name}/"));
        let shape = builder.node("Shape", &[name]).output("shape");
        let front = builder.node("Gather", &[&shape, &first]).output("front");
        let back = builder.node("Gather", &[&shape, &last]).output("back");
        let concat = builder.node("Concat", &[&front, length, &back]).int("axis", 0);
        let made = concat.output("true_shape");
        self.made.insert(cache.clone(), made.clone());
        made
    }

    fn index(&mut self, axes: &[i64]) -> String {
        let index = self.indices.entry(axes.to_vec()).or_insert_with(|| {
            self.builder.set_prefix("retro/");
            self.builder.int64s("index", &[axes.len() as i64], axes)
        });
        index.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{Env, Program, Tensor};
    use retro_contract::limits::MASK_NOT_UNDERSTOOD;
    use retro_onnx::graph::GraphView;
    use std::collections::HashSet;

    /// seqlens_k for masks of one width.
    fn seqlens_k(rows: &[Vec<i64>], opset: i64, padding: bool) -> Vec<i64> {
        let mut graph = GraphProto::default();
        let (dims, int): ([Dimension; 2], _) = (["b".into(), "s".into()], DataType::Int64);
        graph.input.push(ValueInfoProto::tensor(INPUT_IDS, int, dims));
        let mut builder = GraphBuilder::part_of(&graph);
        let lengths = SequenceLengths::new(&mut graph, &mut builder, opset, padding).unwrap();
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
                        let valid = n > 0 && zeros as i64 + n == width && (padding || zeros == 0);
                        if valid { n - 1 } else { i64::from(MASK_NOT_UNDERSTOOD) }
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
