//! What the computation of a mask mentions: numbers, and tables with their sizes. A window may be either, be computed from
//! several, or lie inside a table.

use super::{
    Core, Scores,
    sample_calls::{CallShape, SampleCalls},
};
use crate::eval::{Tensor, reads, windows};
use retro_onnx::{GraphProto, NodeProto, graph::subgraphs};
use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

/// Constants up to this many elements are numbers that are mentioned; larger ones are tables.
const FEW: usize = 8;
const MAX_VALUES: usize = 20_000;
/// Past tokens of calls that are looked at whatever is mentioned: a window may be computed from other numbers. The larger ones are
/// primes: what recurs with any smaller period shows there too.
const FAR: [usize; 7] = [64, 256, 1024, 4096, 9001, 30_011, 131_071];
/// Tokens that a table may be for.
const SIZES: std::ops::RangeInclusive<usize> = 10..=1_000_000;
/// Numbers that may bound what a token sees: no model takes more tokens.
const BOUNDS: std::ops::RangeInclusive<f64> = 2.0..=2_097_152.0;
/// Calls in which numbers are computed.
const COMPUTED: [CallShape; 2] = [CallShape::new(1, 1, 9, 0), CallShape::new(1, 3, 5, 0)];
/// Computed numbers up to this may be the sizes of those calls; the calls of a mask's proof show windows of so few tokens anyway.
const SMALL: usize = 16;

/// What may bound what a token sees.
#[derive(Default)]
pub struct WindowCandidates {
    /// Integers, and their neighbours, that may be a window.
    pub numbers: Vec<usize>,
    /// Sizes of tables.
    pub sizes: Vec<usize>,
}

#[derive(Default)]
struct Found {
    numbers: BTreeSet<usize>,
    sizes: BTreeSet<usize>,
}

impl Found {
    fn constant(&mut self, t: &Tensor) {
        match &t.data {
            Some(data) if data.len() <= FEW => data.iter().for_each(|x| self.number(*x, 0)),
            _ => self.sizes.extend(t.shape.iter().copied().filter(|d| SIZES.contains(d))),
        }
    }

    /// A number, whole or not; also what it is the square or the reciprocal of, where distances are squared or scaled.
    fn number(&mut self, x: f64, above: usize) {
        let x = x.abs();
        let square = Some(x.sqrt()).filter(|root| x > *BOUNDS.end() && root.fract() == 0.0);
        let reciprocal = (x > 0.0 && x < 1.0).then(|| x.recip());
        for x in [Some(x), square, reciprocal].into_iter().flatten() {
            for bound in [x.floor(), x.ceil()] {
                if BOUNDS.contains(&bound) && bound as usize > above {
                    self.numbers.insert(bound as usize);
                }
            }
        }
    }

    /// A value that was computed, if it is one number or a few.
    fn computed(&mut self, t: &Tensor) {
        let Some(data) = t.data.as_ref() else { return };
        let first = data.first().copied().unwrap_or_default();
        if data.len() <= FEW {
            data.iter().for_each(|x| self.number(*x, SMALL));
        } else if data.iter().all(|x| *x == first) {
            self.number(first, SMALL);
        }
    }

    /// Constants of graphs inside a node.
    fn inside(&mut self, node: &NodeProto) {
        let mut open: Vec<&GraphProto> = subgraphs(node).collect();
        while let Some(graph) = open.pop() {
            let tensors = graph.initializer.iter().filter_map(Tensor::small);
            tensors.for_each(|t| self.constant(&t));
            for inner in &graph.node {
                if inner.is("", "Constant")
                    && let Some(t) = Tensor::of_constant(inner)
                {
                    self.constant(&t);
                }
                open.extend(subgraphs(inner));
            }
        }
    }
}

/// What a mask is computed from, beside the scores.
fn roots<'a>(core: &Core<'a>) -> Vec<&'a str> {
    match core.scores {
        Scores::Spelled { masked, .. } => vec![masked],
        Scores::Fused(node) => node.input.iter().skip(3).map(String::as_str).collect(),
    }
}

impl WindowCandidates {
    /// Walks through what computes an attention's mask.
    pub fn find(samples: &SampleCalls, core: &Core) -> Self {
        let program = samples.program();
        let calls: Vec<_> = COMPUTED.iter().filter_map(|z| samples.run(*z).ok()).collect();
        let mut open = roots(core);
        let mut seen: HashSet<&str> = HashSet::new();
        let mut found = Found::default();
        if let Scores::Fused(node) = core.scores {
            for side in windows(node).into_iter().flatten().flatten() {
                found.number(side as f64, 0);
            }
        }
        while let Some(name) = open.pop() {
            if name.is_empty() || !seen.insert(name) || seen.len() > MAX_VALUES {
                continue;
            }
            match program.constant(name) {
                Some(constant) => found.constant(constant),
                None => calls
                    .iter()
                    .filter_map(|env| env.get(name))
                    .for_each(|t| found.computed(t)),
            }
            let Some(node) = samples.view.producer(name) else {
                continue;
            };
            found.inside(node);
            let scores = matches!(core.scores, Scores::Spelled { product, .. } if product == name);
            if !scores && !node.is("", "Shape") {
                open.extend(reads(node));
            }
        }
        Self {
            numbers: found.numbers.into_iter().collect(),
            sizes: found.sizes.into_iter().collect(),
        }
    }

    /// Past tokens of calls of one token that show a window that no number mentions: a few distances, and the last rows of tables.
    pub fn far(&self) -> Vec<usize> {
        let ends = self.sizes.iter().flat_map(|d| [d - 1, *d]);
        let far: BTreeSet<usize> = FAR.into_iter().chain(ends).collect();
        far.into_iter().collect()
    }
}

/// Values that a mask is computed from, if it is to be known again.
const MAX_KEYED: usize = 4096;

/// All that an attention's mask is computed from, as text: attentions with the same text have the same mask. Values are numbered in the
/// order in which they are met, constants told by their numbers, so that each layer may have its own.
pub fn mask_key<'a>(samples: &SampleCalls<'a>, core: &Core<'a>) -> String {
    let mut key = Key {
        samples,
        product: match core.scores {
            Scores::Spelled { product, .. } => product,
            Scores::Fused(_) => "",
        },
        text: String::new(),
        numbered: HashMap::new(),
        open: VecDeque::new(),
    };
    match core.scores {
        Scores::Spelled { product, masked } => {
            key.shape(product);
            key.value(masked);
        }
        Scores::Fused(node) => {
            key.node(node);
            let masks: &[usize] = if node.is("", "Attention") { &[3] } else { &[4, 5] };
            for (slot, name) in node.input.iter().enumerate() {
                // Queries, keys, values and caches count by their sizes alone.
                if masks.contains(&slot) {
                    key.value(name);
                } else {
                    key.shape(name);
                }
            }
        }
    }
    while let Some(name) = key.open.pop_front() {
        if key.numbered.len() > MAX_KEYED {
            key.write(&[core.output]);
            break;
        }
        key.made(name);
    }
    key.text
}

struct Key<'k, 'a> {
    samples: &'k SampleCalls<'a>,
    product: &'a str,
    text: String,
    numbered: HashMap<&'a str, usize>,
    open: VecDeque<&'a str>,
}

impl<'a> Key<'_, 'a> {
    fn write(&mut self, words: &[&str]) {
        words.iter().for_each(|word| {
            self.text.push_str(word);
            self.text.push('\u{1f}');
        });
    }

    /// The sizes of a value in calls that differ in all sizes.
    fn shape(&mut self, name: &str) {
        for z in COMPUTED {
            let env = self.samples.run(z).ok();
            let shape = env.and_then(|env| env.get(name).map(|t| t.shape.clone()));
            self.write(&[&format!("{shape:?}")]);
        }
    }

    fn node(&mut self, node: &NodeProto) {
        self.write(&[";", node.op_domain(), node.op_type(), &format!("{:?}", node.attribute)]);
    }

    /// A value that something reads.
    fn value(&mut self, name: &'a str) {
        if name == self.product || name.is_empty() {
            self.write(&[if name.is_empty() { "-" } else { "@" }]);
        } else if let Some(constant) = self.samples.program().constant(name) {
            let about = match &constant.data {
                Some(data) if data.len() <= FEW => format!("{data:?}"),
                Some(data) => {
                    let mut hasher = DefaultHasher::new();
                    data.iter().for_each(|x| x.to_bits().hash(&mut hasher));
                    format!("{:x}", hasher.finish())
                }
                None => name.to_owned(),
            };
            self.write(&[&format!("{:?}{:?}", constant.data_type, constant.shape), &about]);
        } else {
            let next = self.numbered.len();
            let number = *self.numbered.entry(name).or_insert_with(|| {
                self.open.push_back(name);
                next
            });
            self.write(&[&format!("#{number}")]);
        }
    }

    /// How a value is made.
    fn made(&mut self, name: &'a str) {
        let Some(node) = self.samples.view.producer(name) else {
            self.write(&[name]);
            return;
        };
        self.node(node);
        let place = node.output.iter().position(|o| o == name);
        self.write(&[&format!("{place:?}")]);
        if subgraphs(node).next().is_some() {
            // What a branch reads is told by its names.
            self.write(&[name]);
        } else if node.is("", "Shape") {
            let of = node.input(0);
            // A cache, or one with what is appended to it: other values' shapes may differ in longer calls.
            let append = self.samples.view.producer(of).filter(|n| n.is("", "Concat"));
            let whole = append.is_some_and(|n| n.input.len() == 2 && self.samples.is_cache(n.input(0)));
            if whole || self.samples.is_cache(of) {
                self.write(&[if whole { "present" } else { "past" }]);
                self.shape(of);
            } else {
                self.write(&[of]);
            }
        } else {
            node.input.iter().for_each(|input| self.value(input));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::projected;
    use retro_onnx::{GraphProto, TensorProto, graph::GraphView};

    /// Two values that are computed in the same way from constants of their own, one from another, one from another input.
    #[test]
    fn masks_that_are_computed_alike_have_one_key() {
        let mut graph: GraphProto = projected(2, 2);
        for (name, value) in [("w.0", 4096), ("w.1", 4096), ("w.2", 4097)] {
            graph.initializer.push(TensorProto::int64s(name, &[], &[value]));
        }
        for layer in ["0", "1", "2"] {
            let [shape, width, mask, masked] = ["shape", "width", "mask", "masked"].map(|n| format!("{n}.{layer}"));
            let w = format!("w.{layer}");
            for (op, inputs, output) in [
                ("Shape", &["present.0.key"][..], &shape),
                ("Less", &[&shape, &w], &width),
                ("Cast", &[&width], &mask),
                ("Add", &["q", &mask], &masked),
            ] {
                graph.node.push(NodeProto::new("", op, output, inputs, &[output]));
            }
        }
        graph.node.push(NodeProto::new(
            "",
            "Concat",
            "c",
            &["past_key_values.0.key", "k"],
            &["present.0.key"],
        ));
        let view = GraphView::new(&graph, 23);
        let samples = SampleCalls::new(&view, None);
        let key = |masked: &'static str| {
            let core = Core {
                query: "q",
                key: "k",
                value: "v",
                output: masked,
                scores: Scores::Spelled { product: "q", masked },
                cache: None,
                bias: "",
                sink: None,
            };
            mask_key(&samples, &core)
        };
        assert_eq!(key("masked.0"), key("masked.1"));
        assert_ne!(key("masked.0"), key("masked.2"));
        assert!(!key("masked.0").contains("masked"));
    }
}
