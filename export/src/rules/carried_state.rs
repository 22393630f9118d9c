//! State that a model carries from call to call beside the keys and values of its attention: of convolutions, of recurrent
//! layers, counters. Each call moves it on by the tokens fed, so that a token that is fed again is taken for two.

use super::attention::Attention;
use crate::prove::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS};
use retro_onnx::{Dimension, NodeProto, ValueInfoProto, graph::GraphView};
use std::collections::HashSet;

const LOGITS: &str = "logits";
/// Words by which names of what comes in and what goes out differ.
const DIRECTIONS: [&str; 16] = [
    "past", "present", "input", "output", "inputs", "outputs", "in", "out", "prev", "previous", "next", "new", "old",
    "current", "cur", "updated",
];

/// An input and the output that it comes back as, changed; the first of these that is no cache of an attention.
pub fn carried<'a>(view: &GraphView<'a>, found: &[Attention]) -> Option<[&'a str; 2]> {
    all_carried(view, found).into_iter().next()
}

/// All of them.
pub fn all_carried<'a>(view: &GraphView<'a>, found: &[Attention]) -> Vec<[&'a str; 2]> {
    let mut known: HashSet<&str> = [INPUT_IDS, INPUTS_EMBEDS, ATTENTION_MASK, POSITION_IDS, LOGITS].into();
    for attention in found {
        if let Ok(matched) = &attention.found {
            known.extend(
                [
                    &matched.past_key,
                    &matched.past_value,
                    &matched.present_key,
                    &matched.present_value,
                ]
                .map(String::as_str),
            );
        }
        // Layers that stay as they are speak for themselves (`takes_tokens_again`).
        if let Some(node) = attention.node.and_then(|n| view.graph.node.get(n)) {
            known.extend(node.input.iter().chain(&node.output).map(String::as_str));
        }
    }
    let other = |v: &&ValueInfoProto| !known.contains(v.name()) && view.initializer(v.name()).is_none();
    let outputs: Vec<&ValueInfoProto> = view.graph.output.iter().filter(other).collect();
    if outputs.is_empty() {
        return Vec::new();
    }
    let tokens = dependents(view, &[INPUT_IDS, INPUTS_EMBEDS]);
    let pair = |past: &'a ValueInfoProto| Some([past.name(), returned(view, past, &outputs, &tokens)?]);
    view.graph.input.iter().filter(other).filter_map(pair).collect()
}

/// Whether an input comes back changed.
pub fn comes_back(view: &GraphView, name: &str) -> bool {
    let past = view.graph.input.iter().find(|i| i.name() == name);
    let outputs: Vec<&ValueInfoProto> = view.graph.output.iter().filter(|o| o.name() != LOGITS).collect();
    let tokens = dependents(view, &[INPUT_IDS, INPUTS_EMBEDS]);
    past.is_some_and(|past| returned(view, past, &outputs, &tokens).is_some())
}

/// The output that an input comes back as, changed: the one of its name, else of its sizes.
fn returned<'a>(
    view: &GraphView<'a>,
    past: &'a ValueInfoProto,
    outputs: &[&'a ValueInfoProto],
    tokens: &HashSet<&str>,
) -> Option<&'a str> {
    let after = dependents(view, &[past.name()]);
    let comes_back = |present: &&ValueInfoProto| {
        let name = present.name();
        after.contains(name) && fits(past, present) && !copies(view, past.name(), name)
    };
    let mut candidates = outputs.iter().copied().filter(comes_back).collect::<Vec<_>>();
    let named = candidates.iter().position(|present| alike(past.name(), present.name()));
    let sized = |present: &&ValueInfoProto| tokens.contains(present.name()) && fixed(past) && fixed(present);
    let at = named.or_else(|| candidates.iter().position(sized))?;
    Some(candidates.swap_remove(at).name())
}

/// Values that depend on these other than through their shapes.
pub fn dependents<'a>(view: &GraphView<'a>, roots: &[&'a str]) -> HashSet<&'a str> {
    let mut found: HashSet<&str> = HashSet::new();
    let mut open = roots.to_vec();
    while let Some(name) = open.pop() {
        if found.insert(name) {
            let readers = view.readers(name).filter(|n| !n.is("", "Shape") && !n.is("", "Size"));
            open.extend(
                readers
                    .flat_map(|n| &n.output)
                    .map(String::as_str)
                    .filter(|o| !o.is_empty()),
            );
        }
    }
    found
}

/// Whether names are the same but for which of them comes in: `past.0.conv` and `present.0.conv`.
pub fn alike(past: &str, present: &str) -> bool {
    let words = |name: &str| -> Vec<String> {
        let name = name.to_lowercase();
        let name = name
            .replace("past_key_values", "past")
            .replace("present_key_values", "present");
        let words = name
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|w| !w.is_empty());
        words.filter(|w| !DIRECTIONS.contains(w)).map(str::to_owned).collect()
    };
    let of_past = words(past);
    (!of_past.is_empty() || past.to_lowercase().contains("past")) && of_past == words(present)
}

/// Whether two declarations can be of one value.
fn fits(a: &ValueInfoProto, b: &ValueInfoProto) -> bool {
    let types = a.data_type().zip(b.data_type()).is_none_or(|(a, b)| a == b);
    let same = |(a, b): (&Dimension, &Dimension)| a.fixed().zip(b.fixed()).is_none_or(|(a, b)| a == b);
    let dims = |(a, b): (&[Dimension], &[Dimension])| a.len() == b.len() && a.iter().zip(b).all(same);
    types && a.dims().zip(b.dims()).is_none_or(dims)
}

/// Whether a value has one size whatever is fed, but for the number of sequences.
fn fixed(value: &ValueInfoProto) -> bool {
    value.dims().is_some_and(|dims| {
        let open = dims.iter().filter(|d| d.fixed().is_none()).count();
        open <= 1 && dims.iter().any(|d| d.fixed().is_some_and(|d| d > 1))
    })
}

/// Whether one value is another as it came.
fn copies(view: &GraphView, past: &str, present: &str) -> bool {
    let copy = |n: &&NodeProto| n.is("", "Identity") || n.is("", "Cast");
    let mut name = present;
    for _ in 0..16 {
        if name == past {
            return true;
        }
        match view.producer(name).filter(copy) {
            Some(node) => name = node.input(0),
            None => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use retro_onnx::{DataType, GraphProto};

    /// A model of two inputs beside its tokens, which nodes bring to outputs of the same sizes.
    fn state(past: &str, present: &str, dims: &[Dimension], nodes: &[(&str, &[&str], &str)]) -> bool {
        let value = |name: &str| ValueInfoProto::tensor(name, DataType::Float, dims.to_vec());
        let ids = ValueInfoProto::tensor(INPUT_IDS, DataType::Int64, ["batch".into(), "tokens".into()]);
        let nodes = nodes.iter().map(|(op, i, o)| NodeProto::new("", op, o, i, &[o]));
        let graph = GraphProto {
            node: nodes.collect(),
            input: vec![ids, value(past)],
            output: vec![value(LOGITS), value(present)],
            ..Default::default()
        };
        all_carried(&GraphView::new(&graph, 21), &[]) == [[past, present]]
    }

    #[test]
    fn what_comes_back_changed_is_state() {
        let dims = || ["batch".into(), 64.into(), 2.into()];
        for (past, present) in [
            ("past.0.conv", "present.0.conv"),
            ("past_conv.0", "present_conv.0"),
            ("past_key_values.0.recurrent_state", "present.0.recurrent_state"),
            (
                "input.past_key_values.layers.0.conv_states",
                "output.past_key_values.layers.0.conv_states",
            ),
            // By their sizes alone.
            ("instate7", "outstate7"),
        ] {
            assert!(
                state(past, present, &dims(), &[("Add", &[past, INPUT_IDS], present)]),
                "{past}"
            );
            assert!(
                !state(past, present, &dims(), &[("Identity", &[past], present)]),
                "{past} as it came"
            );
        }
        let counts = [("Add", &["past_length", "past_length"][..], "present_length")];
        assert!(state("past_length", "present_length", &[], &counts), "a counter");
    }

    #[test]
    fn states_of_one_size_are_paired_by_their_names() {
        let dims = || vec!["batch".into(), 64.into(), 2.into()];
        let value = |name: &str| ValueInfoProto::tensor(name, DataType::Float, dims());
        let node = |inputs: &[&str], output: &str| NodeProto::new("", "Add", output, inputs, &[output]);
        let graph = GraphProto {
            node: vec![
                node(&["past_conv.0", INPUT_IDS], "present_conv.0"),
                node(&["past_conv.1", "present_conv.0"], "present_conv.1"),
            ],
            input: [INPUT_IDS, "past_conv.0", "past_conv.1"].map(value).to_vec(),
            output: [LOGITS, "present_conv.1", "present_conv.0"].map(value).to_vec(),
            ..Default::default()
        };
        assert_eq!(
            all_carried(&GraphView::new(&graph, 21), &[]),
            [["past_conv.0", "present_conv.0"], ["past_conv.1", "present_conv.1"]]
        );
    }

    #[test]
    fn what_is_read_only_or_does_not_come_back_is_none() {
        let open = || ["batch".into(), "images".into(), 64.into()];
        let nodes = [("Add", &["image_features", INPUT_IDS][..], "hidden_states")];
        assert!(!state("image_features", "hidden_states", &open(), &nodes));
        let shape = [
            ("Shape", &["past.0.conv"][..], "s"),
            ("Expand", &[INPUT_IDS, "s"], "present.0.conv"),
        ];
        assert!(
            !state("past.0.conv", "present.0.conv", &[64.into()], &shape),
            "its shape alone"
        );
        let nodes = [("Add", &["past.0.conv", INPUT_IDS][..], LOGITS)];
        assert!(!state("past.0.conv", "present.0.conv", &[64.into()], &nodes));
    }
}
