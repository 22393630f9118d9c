//! What stands in an attention's way, in a user's terms. The rules say what failed; where its cause is one that exporters are known
//! for (another layout of the cache, merged keys and values, a mask made by the caller), that is what a reader can act on.

mod trace;

use super::{
    ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS, SampleCalls,
    carried_state::alike,
    cross_attention::{inputs_of, keeps_nothing},
};
use crate::prove::MORE;
use retro_onnx::{DataType, Dimension, FunctionProto, NodeProto, ValueInfoProto, graph::GraphView};
use std::collections::HashSet;
use trace::{Origin, Trace, is_product, operands};

/// What to do about functions.
pub const INLINE: &str = "inline the model's functions first (onnx.inliner.inline_local_functions)";
const LAYOUT: &str = "[B, H, T, D] (batch, heads, tokens, head size)";

/// What explains refusals of a model's attention.
pub struct Explain<'p, 'a> {
    samples: &'p SampleCalls<'a>,
    functions: HashSet<(String, String)>,
}

impl<'p, 'a> Explain<'p, 'a> {
    pub fn new(samples: &'p SampleCalls<'a>, functions: &[FunctionProto]) -> Self {
        let names = functions
            .iter()
            .map(|f| (domain(f.domain()).to_owned(), f.name().to_owned()));
        Self {
            samples,
            functions: names.collect(),
        }
    }

    /// Whether a node calls a function of the model.
    pub fn is_call(&self, node: &NodeProto) -> bool {
        let named = (node.op_domain().to_owned(), node.op_type().to_owned());
        self.functions.contains(&named)
    }

    /// The cause of a refusal, if it is one of those known; `why`: what the rule said.
    pub fn cause(&self, node: &'a NodeProto, why: &str) -> Option<String> {
        let view = self.samples.view;
        let operands = operands(view, node)?;
        if [INPUT_IDS, INPUTS_EMBEDS, "decoder_input_ids"]
            .iter()
            .all(|name| !view.is_input(name))
        {
            return Some(no_text(view));
        }
        let is_call = |node: &NodeProto| self.is_call(node);
        let appends = operands.inside.then_some(node);
        let keys = Trace::of(view, operands.key, appends, &is_call);
        let values = Trace::of(view, operands.value, appends, &is_call);
        let both = || keys.origins.iter().chain(&values.origins);
        if let Some(cause) = both().find_map(|origin| merged(view, origin)) {
            return Some(cause);
        }
        if let Some(cause) = both().find_map(|origin| layout(view, origin)) {
            return Some(cause);
        }
        if let Some(call) = keys.calls.iter().chain(&values.calls).next() {
            return Some(called("its keys or values", call));
        }
        if keeps_nothing(self.samples, node) {
            let from = inputs_of(view, &[operands.key]);
            let from = from.first().copied().unwrap_or(operands.key);
            return Some(format!(
                "cross-attention of an encoder-decoder: its keys come from {from}, to which the tokens fed add nothing, so that there is no \
                 cache to select from"
            ));
        }
        if !both().any(|o| o.append.is_some() || o.written.is_some()) && !has_cache(view) {
            return Some(
                "the graph keeps no cache: it recomputes every token, as encoders do (BERT) and decoders exported without a past; export \
                 it with past key values (of split decoders, convert the one with past: decoder_with_past_model.onnx)"
                    .to_owned(),
            );
        }
        let mask = Trace::between(view, operands.masked, operands.product, &is_call);
        if let Some(call) = mask.calls.first() {
            return Some(called("its mask", call));
        }
        if let Some(cause) = mask.origins.iter().find_map(|origin| ready_made(view, origin)) {
            return Some(cause);
        }
        if why.contains(MORE)
            && let Some(cause) = mask.origins.iter().find_map(|origin| other_input(self.samples, origin))
        {
            return Some(cause);
        }
        // What an evaluation stumbled over, where the cache is one that keeps the newest tokens.
        let stumbled = why.contains("do not go together")
            || why.contains("is not the past followed by")
            || why.contains("becomes");
        both().find_map(|origin| kept_length(view, origin)).filter(|_| stumbled)
    }

    /// An attention's probabilities or scores among the graph's outputs.
    pub fn returned(&self, node: &'a NodeProto) -> Option<String> {
        if !node.is("", "Softmax") {
            return None;
        }
        let view = self.samples.view;
        let said = |what: &str, name: &str| {
            format!(
                "the graph returns its {what} ({name}), which page selection doesn't compute; export it without output_attentions"
            )
        };
        if let Some(name) = leaves(view, node.output(0)).or_else(|| made_of(view, node.output(0))) {
            return Some(said("attention probabilities", name));
        }
        let operands = operands(view, node)?;
        let name = leaves(view, operands.masked).or_else(|| leaves(view, operands.product?))?;
        Some(said("attention scores", name))
    }
}

fn domain(name: &str) -> &str {
    if name == "ai.onnx" { "" } else { name }
}

fn called(what: &str, node: &NodeProto) -> String {
    format!(
        "{what} are made in the model's function {} (node {}), which is not looked into: {INLINE}",
        node.op_type(),
        node.label()
    )
    .replacen("its mask are", "its mask is", 1)
}

/// A declared shape as users read it.
pub fn shown(view: &GraphView, name: &str) -> String {
    let dims = view.declared_dims(name).unwrap_or_default().iter();
    let size = |d: &Dimension| match (d.fixed(), d.symbol()) {
        (Some(n), _) => n.to_string(),
        (None, Some(name)) if !name.is_empty() => name.to_owned(),
        _ => "?".to_owned(),
    };
    format!("{name} [{}]", dims.map(size).collect::<Vec<_>>().join(", "))
}

fn no_text(view: &GraphView) -> String {
    let first = view.graph.input.iter().find(|i| view.initializer(i.name()).is_none());
    let takes = first.map_or("nothing".to_owned(), |i| shown(view, i.name()));
    format!(
        "the graph takes {takes} and neither {INPUT_IDS} nor {INPUTS_EMBEDS}: an encoder of images or sound, or a part of a model, not a \
         decoder of text"
    )
}

/// Keys and values of a layer, or of all, in one input.
fn merged(view: &GraphView, origin: &Origin) -> Option<String> {
    let rank = view.declared_dims(origin.input)?.len();
    if rank < 5 {
        return None;
    }
    let of = if rank > 5 { "of all layers " } else { "" };
    Some(format!(
        "keys and values {of}are merged in one cache, {}; the operator takes a cache of keys and one of values for each layer, each \
         {LAYOUT}: export it with such caches",
        shown(view, origin.input)
    ))
}

/// A cache in another order of dimensions than the operator's, or of compressed keys and values.
fn layout(view: &GraphView, origin: &Origin) -> Option<String> {
    let rank = view.declared_dims(origin.input)?.len();
    let cache = shown(view, origin.input);
    let append = origin.append.or(origin.written)?;
    if !comes_back(view, origin, append) {
        return None;
    }
    if origin.projected {
        return Some(format!(
            "its keys and values are computed from the cache {cache} by node {} in each call (compressed caches, as in DeepSeek's \
             multi-head latent attention); the operator needs keys and values themselves, each {LAYOUT}",
            origin.by.map_or_else(String::new, NodeProto::label)
        ));
    }
    if let Some(write) = origin.written {
        return Some(format!(
            "its cache {cache} has a fixed capacity, which node {} ({}) writes into (a static cache); export it with a cache that grows",
            write.label(),
            write.op_type()
        ));
    }
    let order = match (rank, origin.axis(rank)?) {
        (4, 2) => return None,
        (4, 1) => "[B, T, H, D] (tokens before heads)",
        (4, 3) => "[B, H, D, T] (tokens last: transposed keys)",
        (4, _) => "[T, B, H, D] (tokens first)",
        (3, 1) => "[B, T, H*D] (heads side by side)",
        (3, _) => "in 3 dimensions",
        _ => return None,
    };
    Some(format!(
        "its cache {cache} is laid out {order}, which node {} ({}) appends to; the operator's is {LAYOUT}: export it with such caches",
        append.label(),
        append.op_type()
    ))
}

/// Whether an input is a cache: it comes back with more in it.
fn comes_back(view: &GraphView, origin: &Origin, append: &NodeProto) -> bool {
    let mut outputs = view.graph.output.iter().map(ValueInfoProto::name);
    outputs.any(|name| alike(origin.input, name)) || append.output.iter().any(|name| leaves(view, name).is_some())
}

/// A cache of the newest tokens.
fn kept_length(view: &GraphView, origin: &Origin) -> Option<String> {
    let dims = view.declared_dims(origin.input)?;
    let tokens = dims.get(2)?.fixed().filter(|_| dims.len() == 4)?;
    let cut = origin.cut?;
    Some(format!(
        "its cache {} always holds {tokens} tokens, the newest: node {} ({}) cuts off what is older (a sliding cache); export it with a \
         cache that grows",
        shown(view, origin.input),
        cut.label(),
        cut.op_type()
    ))
}

/// A mask, or anything else of the size of scores, that the caller computes.
fn ready_made(view: &GraphView, origin: &Origin) -> Option<String> {
    let dims = view.declared_dims(origin.input)?;
    if dims.len() < 3 || [INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS].contains(&origin.input) {
        return None;
    }
    let kind = view.data_type(origin.input).map_or("", DataType::label);
    Some(format!(
        "its mask is made by the caller: {}, {kind}, {} dimensions, may hide or weigh anything; export it with an {ATTENTION_MASK} of 2 \
         dimensions (batch, tokens), ones and zeros",
        shown(view, origin.input),
        dims.len()
    ))
}

/// An input that a mask depends on and no caller is known to give.
fn other_input(samples: &SampleCalls, origin: &Origin) -> Option<String> {
    let known = [INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS, ATTENTION_MASK];
    if known.contains(&origin.input) || samples.is_cache(origin.input) {
        return None;
    }
    Some(format!(
        "its mask depends on the input {}, of which nothing is known; export it with a mask that is made of {ATTENTION_MASK} and \
         {POSITION_IDS}",
        shown(samples.view, origin.input)
    ))
}

/// An output of the graph that is computed of probabilities other than by weighing values with them.
fn made_of<'a>(view: &GraphView<'a>, weights: &'a str) -> Option<&'a str> {
    let mut open = vec![weights];
    let mut at = 0;
    while let Some(name) = open.get(at).copied().filter(|_| at < 64) {
        at += 1;
        // Of them alone: no values are weighed.
        let alone = |n: &&NodeProto| n.input.iter().all(|i| i == name || i.is_empty() || view.is_constant(i));
        let readers = view
            .readers(name)
            .filter(|n| !is_product(n) && !n.is("", "Shape"))
            .filter(alone);
        let outputs = readers.flat_map(|n| &n.output).map(String::as_str);
        for output in outputs.filter(|o| !o.is_empty()) {
            if view.is_output(output) {
                return Some(output);
            }
            open.push(output);
        }
    }
    None
}

/// Whether any input comes back, by its name, as a cache does.
fn has_cache(view: &GraphView) -> bool {
    let floats = |v: &&ValueInfoProto| {
        let float = matches!(
            v.data_type(),
            Some(DataType::Float | DataType::Float16 | DataType::Bfloat16)
        );
        float && v.dims().is_none_or(|d| d.len() >= 3)
    };
    let mut inputs = view.graph.input.iter().filter(floats);
    inputs.any(|past| {
        let mut outputs = view.graph.output.iter().filter(floats);
        outputs.any(|present| alike(past.name(), present.name()))
    })
}

/// The output of the graph that a value becomes, rearranged or put together with others of its kind.
fn leaves<'a>(view: &GraphView<'a>, from: &'a str) -> Option<&'a str> {
    const KEEPS: [&str; 12] = [
        "Identity",
        "Cast",
        "Dropout",
        "Reshape",
        "Transpose",
        "Unsqueeze",
        "Squeeze",
        "Concat",
        "Where",
        "Slice",
        "Flatten",
        "ReduceMean",
    ];
    let mut seen = HashSet::new();
    let mut open = vec![from];
    while let Some(name) = open.pop().filter(|_| seen.len() < 64) {
        if view.is_output(name) {
            return Some(name);
        }
        if !seen.insert(name) {
            continue;
        }
        let keeps = |n: &&NodeProto| n.op_domain().is_empty() && KEEPS.contains(&n.op_type());
        open.extend(view.readers(name).filter(keeps).map(|n| n.output(0)));
    }
    None
}

/// Why no attention is found in a model whose functions hold none either.
pub fn none_found(view: &GraphView) -> String {
    let foreign = |n: &&NodeProto| {
        let name = n.op_type().to_lowercase();
        let like = name.contains("attention") || name.contains("attn") || name.contains("sdpa");
        like && !["", "com.microsoft"].contains(&n.op_domain())
    };
    let mut nodes = view.graph.node.iter().filter(foreign);
    match nodes.next() {
        Some(first) => {
            let more = match nodes.count() {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            format!(
                "its attention is {}::{} (node {}{more}), an operator of another runtime, fused so that nothing of it can be seen; export \
                 it with attention in ONNX's or ONNX Runtime's own operators",
                first.op_domain(),
                first.op_type(),
                first.label()
            )
        }
        None => "there is no attention in its graph".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{rules::find_attention, testing::projected};
    use retro_onnx::{AttributeProto, GraphProto, ModelProto, TensorProto};

    type Node<'n> = (&'n str, &'n [&'n str], &'n str, &'n [i64]);

    /// Two heads of 4 with caches of some shape, which nodes bring to `keys` and `values`, [B, 2, T, 4].
    fn graph(cache: &[Dimension], nodes: &[Node]) -> GraphProto {
        let mut graph = projected(2, 2);
        for value in graph.input.iter_mut().chain(&mut graph.output) {
            if value.name().contains("key") || value.name().contains("value") {
                *value = ValueInfoProto::tensor(value.name(), DataType::Float, cache.to_vec());
            }
        }
        for (name, values) in [("heads", &[0, 0, 2, 4][..]), ("flat", &[0, 0, 8]), ("one", &[1])] {
            let size = values.len() as i64;
            graph.initializer.push(TensorProto::int64s(name, &[size], values));
        }
        let weight = TensorProto::floats("weight", &[8, 8], &[0.1; 64]);
        graph.initializer.push(weight);
        let around: [&[Node]; 3] = [
            &[
                ("Reshape", &["q", "heads"], "q_tokens", &[]),
                ("Transpose", &["q_tokens"], "q_heads", &[0, 2, 1, 3]),
                ("Reshape", &["k", "heads"], "k_tokens", &[]),
                ("Transpose", &["k_tokens"], "k_heads", &[0, 2, 1, 3]),
                ("Reshape", &["v", "heads"], "v_tokens", &[]),
                ("Transpose", &["v_tokens"], "v_heads", &[0, 2, 1, 3]),
            ],
            nodes,
            &[
                ("Transpose", &["keys"], "turned", &[0, 1, 3, 2]),
                ("MatMul", &["q_heads", "turned"], "scores", &[]),
                ("Softmax", &["scores"], "weights", &[]),
                ("MatMul", &["weights", "values"], "mixed", &[]),
                ("Transpose", &["mixed"], "mixed_tokens", &[0, 2, 1, 3]),
                ("Reshape", &["mixed_tokens", "flat"], "y", &[]),
            ],
        ];
        for (op, inputs, output, numbers) in around.concat() {
            let mut node = NodeProto::new("", op, output, inputs, &[output]);
            match op {
                "Transpose" => node.attribute.push(AttributeProto::ints("perm", numbers)),
                "Concat" => node.attribute.push(AttributeProto::int("axis", numbers[0])),
                _ => {}
            }
            graph.node.push(node);
        }
        graph
    }

    fn said(graph: GraphProto) -> String {
        let model = ModelProto {
            graph: Some(graph),
            ..Default::default()
        };
        let view = GraphView::new(model.graph.as_ref().unwrap(), 21);
        let found = find_attention(&model, &SampleCalls::new(&view, None));
        assert_eq!(found.len(), 1);
        found[0].found.clone().expect_err("it should be refused")
    }

    const PAST: [&str; 2] = ["past_key_values.0.key", "past_key_values.0.value"];

    #[test]
    fn layouts_of_caches_are_named() {
        // The cache is appended to in its own order, then brought into the usual one; or the other way round.
        let rows = |axes: [usize; 4]| -> Vec<Dimension> {
            let usual: [Dimension; 4] = ["batch".into(), 2.into(), "past".into(), 4.into()];
            axes.map(|axis| usual[axis].clone()).to_vec()
        };
        let bthd = graph(
            &rows([0, 2, 1, 3]),
            &[
                ("Concat", &[PAST[0], "k_tokens"], "present.0.key", &[1]),
                ("Concat", &[PAST[1], "v_tokens"], "present.0.value", &[-3]),
                ("Transpose", &["present.0.key"], "keys", &[0, 2, 1, 3]),
                ("Transpose", &["present.0.value"], "values", &[0, 2, 1, 3]),
            ],
        );
        let why = said(bthd);
        assert!(why.contains("laid out [B, T, H, D]") && why.contains(PAST[0]), "{why}");
        let turned_before = graph(
            &rows([2, 0, 1, 3]),
            &[
                ("Transpose", &[PAST[0]], "past_key", &[1, 2, 0, 3]),
                ("Transpose", &[PAST[1]], "past_value", &[1, 2, 0, 3]),
                ("Concat", &["past_key", "k_heads"], "keys", &[2]),
                ("Concat", &["past_value", "v_heads"], "values", &[2]),
                ("Transpose", &["keys"], "present.0.key", &[2, 0, 1, 3]),
                ("Transpose", &["values"], "present.0.value", &[2, 0, 1, 3]),
            ],
        );
        let why = said(turned_before);
        assert!(why.contains("laid out [T, B, H, D]"), "{why}");
        let last = graph(
            &rows([0, 1, 3, 2]),
            &[
                ("Transpose", &["k_tokens"], "k_last", &[0, 2, 3, 1]),
                ("Concat", &[PAST[0], "k_last"], "present.0.key", &[3]),
                ("Transpose", &["present.0.key"], "keys", &[0, 1, 3, 2]),
                ("Concat", &[PAST[1], "v_heads"], "present.0.value", &[2]),
                ("Identity", &["present.0.value"], "values", &[]),
            ],
        );
        let why = said(last);
        assert!(why.contains("laid out [B, H, D, T]"), "{why}");
        let side_by_side = graph(
            &["batch".into(), "past".into(), 8.into()],
            &[
                ("Concat", &[PAST[0], "k"], "present.0.key", &[1]),
                ("Concat", &[PAST[1], "v"], "present.0.value", &[1]),
                ("Reshape", &["present.0.key", "heads"], "all_keys", &[]),
                ("Reshape", &["present.0.value", "heads"], "all_values", &[]),
                ("Transpose", &["all_keys"], "keys", &[0, 2, 1, 3]),
                ("Transpose", &["all_values"], "values", &[0, 2, 1, 3]),
            ],
        );
        let why = said(side_by_side);
        assert!(why.contains("[B, T, H*D]"), "{why}");
    }

    #[test]
    fn compressed_and_static_caches_are_named() {
        let usual = || vec!["batch".into(), 2.into(), "past".into(), 4.into()];
        let latent = graph(
            &["batch".into(), "past".into(), 8.into()],
            &[
                ("Concat", &[PAST[0], "k"], "present.0.key", &[1]),
                ("Concat", &[PAST[1], "v"], "present.0.value", &[1]),
                ("MatMul", &["present.0.key", "weight"], "up", &[]),
                ("Reshape", &["up", "heads"], "all_keys", &[]),
                ("Transpose", &["all_keys"], "keys", &[0, 2, 1, 3]),
                ("Identity", &["keys"], "values", &[]),
            ],
        );
        let why = said(latent);
        assert!(why.contains("compressed") && why.contains(PAST[0]), "{why}");
        let fixed = graph(
            &usual(),
            &[
                ("ScatterND", &[PAST[0], "one", "k_heads"], "present.0.key", &[]),
                ("ScatterND", &[PAST[1], "one", "v_heads"], "present.0.value", &[]),
                ("Identity", &["present.0.key"], "keys", &[]),
                ("Identity", &["present.0.value"], "values", &[]),
            ],
        );
        let why = said(fixed);
        assert!(why.contains("static cache") && why.contains("ScatterND"), "{why}");
    }

    #[test]
    fn merged_and_absent_caches_are_named() {
        let unsqueezed: &[Node] = &[
            ("Unsqueeze", &["k_heads", "one"], "k_five", &[]),
            ("Concat", &[PAST[0], "k_five"], "present.0.key", &[3]),
            ("Squeeze", &["present.0.key", "one"], "keys", &[]),
            ("Identity", &["keys"], "values", &[]),
        ];
        let five = vec![2.into(), "batch".into(), 2.into(), "past".into(), 4.into()];
        let why = said(graph(&five, unsqueezed));
        assert!(why.contains("keys and values are merged in one cache"), "{why}");
        let mut six = five;
        six.insert(0, 12.into());
        let why = said(graph(&six, unsqueezed));
        assert!(why.contains("keys and values of all layers are merged"), "{why}");
        let none: &[Node] = &[
            ("Identity", &["k_heads"], "keys", &[]),
            ("Identity", &["v_heads"], "values", &[]),
        ];
        let usual = ["batch".into(), 2.into(), "past".into(), 4.into()];
        let mut alone = graph(&usual, none);
        alone.input.retain(|i| !i.name().starts_with("past"));
        alone.output.retain(|o| !o.name().starts_with("present"));
        let why = said(alone.clone());
        assert!(why.contains("keeps no cache") && why.contains("encoders"), "{why}");
        // The same fed images.
        for value in alone.input.iter_mut().filter(|i| i.name() == INPUTS_EMBEDS) {
            value.name = Some("pixel_values".into());
        }
        for name in alone.node.iter_mut().flat_map(|n| &mut n.input) {
            if name == INPUTS_EMBEDS {
                *name = "pixel_values".into();
            }
        }
        let why = said(alone);
        assert!(
            why.contains("pixel_values [batch") && why.contains("encoder of images"),
            "{why}"
        );
    }

    #[test]
    fn cross_attention_is_named() {
        let usual = ["batch".into(), 2.into(), "encoded".into(), 4.into()];
        let mut crossed = graph(
            &usual,
            &[
                ("Identity", &[PAST[0]], "keys", &[]),
                ("Identity", &[PAST[1]], "values", &[]),
            ],
        );
        crossed.output.retain(|o| !o.name().starts_with("present"));
        let why = said(crossed);
        assert!(
            why.contains("cross-attention of an encoder-decoder") && why.contains(PAST[0]),
            "{why}"
        );
    }

    const USUAL: &[Node] = &[
        ("Concat", &[PAST[0], "k_heads"], "present.0.key", &[2]),
        ("Concat", &[PAST[1], "v_heads"], "present.0.value", &[2]),
        ("Identity", &["present.0.key"], "keys", &[]),
        ("Identity", &["present.0.value"], "values", &[]),
    ];

    #[test]
    fn what_leaves_the_graph_is_named() {
        for (from, by, what) in [
            ("weights", "Unsqueeze", "attention probabilities"),
            ("weights", "ReduceMax", "attention probabilities"),
            ("scores", "Unsqueeze", "attention scores"),
        ] {
            let mut graph = graph(&["batch".into(), 2.into(), "past".into(), 4.into()], USUAL);
            let nodes = [
                NodeProto::new("", by, "u", &[from, "one"], &["five"]),
                NodeProto::new("", "Identity", "i", &["five"], &["attentions"]),
            ];
            graph.node.extend(nodes);
            graph
                .output
                .push(ValueInfoProto::tensor("attentions", DataType::Float, []));
            let why = said(graph);
            assert!(why.contains(what) && why.contains("(attentions)"), "{why}");
        }
    }

    #[test]
    fn masks_that_the_caller_makes_are_named() {
        let graph = graph(&["batch".into(), 2.into(), "past".into(), 4.into()], USUAL);
        let dims = ["batch".into(), 1.into(), "tokens".into(), "total".into()];
        let why = said(masked_by(graph, "causal_mask", &dims));
        assert!(
            why.contains("made by the caller: causal_mask [batch, 1, tokens, total]"),
            "{why}"
        );
    }

    /// With an input of the caller's added to the scores.
    fn masked_by(mut graph: GraphProto, name: &str, dims: &[Dimension]) -> GraphProto {
        graph
            .input
            .push(ValueInfoProto::tensor(name, DataType::Float, dims.to_vec()));
        let add = NodeProto::new("", "Add", "add", &["scores", name], &["masked"]);
        graph.node.push(add);
        let softmax = graph.node.iter_mut().find(|n| n.is("", "Softmax")).unwrap();
        softmax.input[0] = "masked".into();
        graph
    }

    #[test]
    fn an_input_that_a_mask_depends_on_is_named() {
        let graph = graph(&["batch".into(), 2.into(), "past".into(), 4.into()], USUAL);
        let why = said(masked_by(graph, "bias_row", &["tokens".into(), "total".into()]));
        assert!(why.contains("depends on the input bias_row [tokens, total]"), "{why}");
    }

    #[test]
    fn fused_attention_of_other_runtimes_is_named() {
        let graph = GraphProto {
            node: vec![NodeProto::new("trt", "FlashAttnV2", "fused", &["q"], &["y"])],
            ..Default::default()
        };
        let why = none_found(&GraphView::new(&graph, 21));
        assert!(why.contains("trt::FlashAttnV2") && why.contains("node fused"), "{why}");
        let none = none_found(&GraphView::new(&GraphProto::default(), 21));
        assert_eq!(none, "there is no attention in its graph");
    }
}
