//! Which past a caller feeds back as which present. Hosts know them by their names alone: `past_key_values.0.key` comes back from
//! `present.0.key`. A graph whose names say another thing than its nodes would be fed another layer's cache, or keys for values.

use super::{attention::Attention, carried_state::alike};
use crate::prove::{AttentionMatch, CacheRefusal};
use retro_model_io::exporters_present_names;
use retro_onnx::{ValueInfoProto, graph::GraphView};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Refuses attentions whose caches go other ways than their names say.
pub fn refuse_crossed(view: &GraphView, found: &mut [Attention]) {
    if found.iter().all(|a| a.found.is_err()) {
        return;
    }
    let names = Names::of(view);
    for attention in found {
        if let Some(why) = attention.found.as_ref().ok().and_then(|matched| names.crossed(matched)) {
            attention.found = Err(why.into());
        }
    }
}

/// The graph's inputs and outputs that go together by their names.
struct Names<'a> {
    present_of: HashMap<&'a str, HashSet<&'a str>>,
    past_of: HashMap<&'a str, HashSet<&'a str>>,
}

impl<'a> Names<'a> {
    fn of(view: &GraphView<'a>) -> Self {
        let mut names = Self {
            present_of: HashMap::new(),
            past_of: HashMap::new(),
        };
        let outputs: Vec<&str> = view.graph.output.iter().map(ValueInfoProto::name).collect();
        for past in view.graph.input.iter().map(ValueInfoProto::name) {
            let usual = exporters_present_names(past);
            let pairs = |present: &str| alike(past, present) || usual.iter().any(|name| name == present);
            for present in outputs.iter().filter(|present| pairs(present)) {
                names.present_of.entry(past).or_default().insert(present);
                names.past_of.entry(present).or_default().insert(past);
            }
        }
        names.pair_by_layers(view);
        names
    }

    /// What no word pairs goes together by layer and kind, where all of it does: `cache_k_0` and `present_k_0`.
    fn pair_by_layers(&mut self, view: &GraphView<'a>) {
        let left = |values: &'a [ValueInfoProto], paired: &HashMap<&str, _>| -> Option<BTreeMap<Place, &'a str>> {
            let names = values.iter().map(ValueInfoProto::name);
            let placed: Vec<_> = names
                .filter(|name| !paired.contains_key(name))
                .filter_map(|name| Some((place(name)?, name)))
                .collect();
            let map: BTreeMap<_, _> = placed.iter().cloned().collect();
            (map.len() == placed.len()).then_some(map)
        };
        let pasts = left(&view.graph.input, &self.present_of);
        let presents = left(&view.graph.output, &self.past_of);
        let Some((pasts, presents)) = pasts.zip(presents).filter(|(a, b)| a.keys().eq(b.keys())) else {
            return;
        };
        for (past, present) in pasts.into_values().zip(presents.into_values()) {
            self.present_of.entry(past).or_default().insert(present);
            self.past_of.entry(present).or_default().insert(past);
        }
    }

    /// Why a host that goes by names would feed a cache into another's place.
    fn crossed(&self, matched: &AttentionMatch) -> Option<CacheRefusal> {
        let pairs = [
            (&matched.past_key, &matched.present_key),
            (&matched.past_value, &matched.present_value),
        ];
        if pairs[0].0 == pairs[1].0 {
            let name = pairs[0].0.clone();
            return Some(CacheRefusal::OnePast { name });
        }
        if pairs[0].1 == pairs[1].1 {
            let name = pairs[0].1.clone();
            return Some(CacheRefusal::OnePresent { name });
        }
        pairs.into_iter().find_map(|(past, present)| {
            let named = self.present_of.get(past.as_str());
            let back = self.past_of.get(present.as_str());
            let (other, named) = match (named, back) {
                (Some(named), _) if !named.contains(present.as_str()) => (named.iter().min()?, past),
                (None, Some(back)) => (back.iter().min()?, present),
                _ => return None,
            };
            Some(CacheRefusal::Crossed {
                past: past.clone(),
                present: present.clone(),
                named: named.clone(),
                other: (*other).to_owned(),
            })
        })
    }
}

/// The numbers in a cache's name, and whether it is of keys.
type Place = (Vec<String>, bool);

fn place(name: &str) -> Option<Place> {
    let name = name.to_lowercase();
    let alphanumeric = name.split(|c: char| !c.is_ascii_alphanumeric());
    let kind = |c: char| c.is_ascii_digit();
    let words: Vec<&str> = alphanumeric
        .flat_map(|word| {
            word.as_bytes()
                .chunk_by(|a, b| kind(char::from(*a)) == kind(char::from(*b)))
        })
        .filter_map(|word| std::str::from_utf8(word).ok())
        .collect();
    let is = |kinds: [&str; 3]| words.iter().any(|word| kinds.contains(word));
    let (keys, values) = (is(["k", "key", "keys"]), is(["v", "value", "values"]));
    let numbers = words.iter().filter(|word| word.starts_with(kind));
    (keys != values).then(|| (numbers.map(|n| (*n).to_owned()).collect(), keys))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rules::{SampleCalls, find_attention},
        testing::{gqa_model, gqa_node_mut},
    };
    use retro_onnx::{DataType, GraphProto};

    fn crossed(inputs: &[&str], outputs: &[&str], key: [&str; 2], value: [&str; 2]) -> Option<String> {
        let values = |names: &[&str]| {
            let value = |name: &&str| ValueInfoProto::tensor(name, DataType::Float, []);
            names.iter().map(value).collect()
        };
        let graph = GraphProto {
            input: values(inputs),
            output: values(outputs),
            ..Default::default()
        };
        let matched = AttentionMatch {
            past_key: key[0].into(),
            present_key: key[1].into(),
            past_value: value[0].into(),
            present_value: value[1].into(),
            ..Default::default()
        };
        Names::of(&GraphView::new(&graph, 21))
            .crossed(&matched)
            .map(|why| why.to_string())
    }

    /// Of two layers: the first one's caches under names that follow a pattern, `{}` for what comes in or goes out.
    fn named(past: [&str; 2], present: [&str; 2], other: [&str; 2]) -> [Option<String>; 3] {
        let (inputs, outputs) = ([past[0], past[1], other[0]], [present[0], present[1], other[1]]);
        [
            crossed(&inputs, &outputs, [past[0], present[0]], [past[1], present[1]]),
            // Keys and values crossed, then the key of another layer.
            crossed(&inputs, &outputs, [past[0], present[1]], [past[1], present[0]]),
            crossed(&inputs, &outputs, [past[0], other[1]], [past[1], present[1]]),
        ]
    }

    #[test]
    fn names_that_pair_pass_and_crossed_ones_are_named_both() {
        for (past, present, other) in [
            (
                ["past_key_values.0.key", "past_key_values.0.value"],
                ["present.0.key", "present.0.value"],
                ["past_key_values.1.key", "present.1.key"],
            ),
            (
                ["past_key_values.0.key", "past_key_values.0.value"],
                ["present_key_values.0.key", "present_key_values.0.value"],
                ["past_key_values.1.key", "present_key_values.1.key"],
            ),
            (
                ["past_key_0", "past_value_0"],
                ["present_key_0", "present_value_0"],
                ["past_key_1", "present_key_1"],
            ),
            (
                [
                    "input.past_key_values.layers.0.keys",
                    "input.past_key_values.layers.0.values",
                ],
                [
                    "output.past_key_values.layers.0.keys",
                    "output.past_key_values.layers.0.values",
                ],
                [
                    "input.past_key_values.layers.1.keys",
                    "output.past_key_values.layers.1.keys",
                ],
            ),
            (["k_in.0", "v_in.0"], ["k_out.0", "v_out.0"], ["k_in.1", "k_out.1"]),
            (
                ["pastkey0", "pastvalue0"],
                ["presentkey0", "presentvalue0"],
                ["pastkey1", "presentkey1"],
            ),
        ] {
            let [right, values, layer] = named(past, present, other);
            assert_eq!(right, None, "{past:?}");
            let values = values.expect("keys and values crossed");
            assert!(values.contains(past[0]) && values.contains(present[1]), "{values}");
            let layer = layer.expect("layers crossed");
            assert!(layer.contains(past[0]) && layer.contains(other[1]), "{layer}");
        }
    }

    #[test]
    fn names_that_share_no_words_pair_by_layer_and_kind() {
        let inputs = ["cache_k_0", "cache_v_0", "cache_k_1", "cache_v_1", "input_ids"];
        let outputs = ["logits", "pres0k", "pres0v", "pres1k", "pres1v"];
        let of = |key: &str, value: &str| crossed(&inputs, &outputs, ["cache_k_0", key], ["cache_v_0", value]);
        assert_eq!(of("pres0k", "pres0v"), None);
        let why = of("pres0v", "pres0k").expect("keys and values crossed");
        assert!(why.contains("cache_k_0 goes with pres0k"), "{why}");
        assert!(of("pres1k", "pres0v").is_some_and(|why| why.contains("cache_k_0 goes with pres0k")));
        // Counted otherwise, or not all of a kind: nothing is known of them.
        let counted = ["logits", "pres1k", "pres1v", "pres2k", "pres2v"];
        for outputs in [counted, ["logits", "pres0k", "pres0v", "pres1k", "other"]] {
            let found = crossed(&inputs, &outputs, ["cache_k_0", outputs[1]], ["cache_v_0", outputs[2]]);
            assert_eq!(found, None, "{outputs:?}");
        }
    }

    #[test]
    fn names_that_tell_nothing_are_believed() {
        let (key, value) = (["a", "b"], ["c", "d"]);
        assert_eq!(crossed(&["a", "c"], &["b", "d"], key, value), None);
        // A past of no name, but a present that is another's.
        let why = crossed(
            &["a", "past.k"],
            &["present.k", "d"],
            ["a", "present.k"],
            ["past.k", "d"],
        );
        assert!(why.is_some_and(|why| why.contains("present.k goes with past.k")));
    }

    #[test]
    fn one_cache_for_keys_and_values_is_refused() {
        let why = crossed(&["a"], &["b", "c"], ["a", "b"], ["a", "c"]).expect("one past");
        assert!(why.contains("a is its cache of keys and its cache of values"), "{why}");
        let why = crossed(&["a", "b"], &["c"], ["a", "c"], ["b", "c"]).expect("one present");
        assert!(
            why.contains("output c is the cache of both its keys and its values"),
            "{why}"
        );
    }

    /// Why each of two layers is refused once their nodes have been changed.
    fn refusals(change: impl Fn(&mut [String], &mut [String])) -> Vec<Option<String>> {
        let mut model = gqa_model(2);
        let graph = model.graph.as_mut().unwrap();
        for layer in 0..2 {
            let node = gqa_node_mut(graph, layer);
            change(&mut node.input, &mut node.output);
        }
        let view = GraphView::new(model.graph.as_ref().unwrap(), 21);
        let found = find_attention(&model, &SampleCalls::new(&view, None));
        found
            .into_iter()
            .map(|a| a.found.err().map(|why| why.to_string()))
            .collect()
    }

    #[test]
    fn layers_with_crossed_caches_are_refused() {
        assert_eq!(refusals(|_, _| {}), [None, None]);
        let other = |name: &mut String| {
            *name = if name.contains(".0.") {
                name.replace(".0.", ".1.")
            } else {
                name.replace(".1.", ".0.")
            };
        };
        let whys = [
            refusals(|_, outputs| other(&mut outputs[1])),
            refusals(|_, outputs| outputs.swap(1, 2)),
            refusals(|inputs, _| inputs.swap(3, 4)),
            refusals(|inputs, _| inputs[4] = inputs[3].clone()),
        ];
        for why in whys.iter().flatten() {
            let why = why.as_deref().expect("it should be refused");
            assert!(why.contains("past_key_values."), "{why}");
        }
        let first = whys[0][0].as_deref().unwrap_or_default();
        assert!(
            first.contains("past_key_values.0.key") && first.contains("present.1.key"),
            "{first}"
        );
    }
}
