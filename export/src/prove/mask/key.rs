//! All that an attention's mask is computed from, as text. Most layers of a model share a mask, and reading one takes long.

use super::window_candidates::{COMPUTED, FEW};
use crate::prove::{
    candidate::{AttentionCandidate, ScoreSource},
    sample_calls::SampleCalls,
};
use retro_onnx::{NodeProto, graph::subgraphs};
use std::{
    collections::{HashMap, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

/// Values that a mask is computed from, if its key is to be found again.
const MAX_KEYED: usize = 4096;

/// A key of an attention's mask: attentions with the same text have the same mask. Values are numbered in the
/// order in which they are met, constants told by their numbers, so that each layer may have its own.
pub fn mask_key<'a>(samples: &SampleCalls<'a>, candidate: &AttentionCandidate<'a>) -> String {
    let mut key = MaskKey {
        samples,
        product: match candidate.scores {
            ScoreSource::Decomposed { product, .. } => product,
            ScoreSource::Fused(_) => "",
        },
        text: String::new(),
        numbered: HashMap::new(),
        open: VecDeque::new(),
    };
    match candidate.scores {
        ScoreSource::Decomposed { product, masked } => {
            key.shape(product);
            key.value(masked);
        }
        ScoreSource::Fused(node) => {
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
            key.write(&[candidate.output]);
            break;
        }
        key.computation(name);
    }
    key.text
}

/// A key as it is written.
struct MaskKey<'k, 'a> {
    samples: &'k SampleCalls<'a>,
    product: &'a str,
    text: String,
    numbered: HashMap<&'a str, usize>,
    open: VecDeque<&'a str>,
}

impl<'a> MaskKey<'_, 'a> {
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
                    // Keys are compared within one run of the program, so the hash may be another in the next.
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

    /// How a value is computed.
    fn computation(&mut self, name: &'a str) {
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
            let candidate = AttentionCandidate {
                query: "q",
                key: "k",
                value: "v",
                output: masked,
                scores: ScoreSource::Decomposed { product: "q", masked },
                cache: None,
                bias: "",
                sink: None,
            };
            mask_key(&samples, &candidate)
        };
        assert_eq!(key("masked.0"), key("masked.1"));
        assert_ne!(key("masked.0"), key("masked.2"));
        assert!(!key("masked.0").contains("masked"));
    }
}
