//! Source patterns: one rule a file. A rule looks at one node and says that it is not its business, or what it found, or
//! why it can't be converted, with the value that failed. To add one: write the file, name it in [`RULES`].

mod cache_names;
mod carried_state;
mod cross_attention;
mod decomposed;
mod explain;
mod functions;
pub(crate) mod gqa;
mod mha;
mod onnx_attention;
mod unsupported;

pub use crate::prove::{
    input_sizes::{Size, named_sizes, sizes, width},
    sample_calls::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS, SampleCalls, noise},
};
pub use carried_state::{all_carried, carried};
pub use explain::none_found;

use explain::{Explain, INLINE};
use functions::Functions;
use retro_contract::Mode;
use retro_onnx::{
    DataType, GraphProto, ModelProto, NodeProto,
    graph::{GraphView, subgraphs},
};
use std::collections::{HashMap, HashSet};

/// A source pattern.
pub trait Rule: Sync {
    /// How reports call it.
    fn name(&self) -> &'static str;
    /// What this node is to the rule.
    fn match_node<'a>(&self, view: &GraphView<'a>, samples: &SampleCalls<'a>, node: &'a NodeProto) -> MatchResult;
}

/// All rules; the first that has something to say about a node decides.
pub const RULES: &[&dyn Rule] = &[
    &gqa::GroupQueryAttention,
    &mha::MultiHeadAttention,
    &onnx_attention::OnnxAttention,
    &decomposed::Decomposed,
];

/// What a rule says about a node.
pub enum MatchResult {
    /// Not an attention of this kind.
    NotMine,
    /// One that can be converted.
    Match(Box<AttentionMatch>),
    /// One that can't, and why.
    Refused(String),
}

/// An attention that can be converted, whatever pattern it was written in. Names of values; "" is an absent one.
///
/// Shapes: B batch, S tokens fed, Hq and Hkv heads, C cache capacity, D head size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionMatch {
    /// `[B, S, Hq*D]`, or packed `[B, S, (Hq+2*Hkv)*D]` with `key` and `value` absent.
    pub query: String,
    pub key: String,
    pub value: String,
    /// `[B, Hkv, C, D]`, graph inputs.
    pub past_key: String,
    pub past_value: String,
    /// int32 `[B]`.
    pub seqlens_k: String,
    /// int32, one number.
    pub total_sequence_length: String,
    pub cos_cache: String,
    pub sin_cache: String,
    /// `[Hq]`.
    pub head_sink: String,
    /// `[B, S, Hq*D]`.
    pub output: String,
    /// As the past ones, graph outputs.
    pub present_key: String,
    pub present_value: String,

    pub q_heads: i64,
    pub kv_heads: i64,
    /// D, where the graph tells it.
    pub head_size: Option<i64>,
    pub data_type: DataType,
    /// 0: 1/sqrt(D).
    pub scale: f32,
    /// 0: off.
    pub softcap: f32,
    pub rope: Rope,
    /// Tokens of a sliding window; -1: none.
    pub local_window_size: i64,
    /// The source layer keeps a cache of about its window's size and shifts it. The operator's cache holds everything.
    pub sliding_cache: bool,

    // What follows is for attention of several nodes; the defaults are those of a single one.
    /// How the values named above are laid out.
    pub query_layout: Layout,
    pub key_layout: Layout,
    pub value_layout: Layout,
    pub output_layout: Layout,
    /// Their element types; undefined: that of the cache.
    pub query_type: DataType,
    pub kv_type: DataType,
    pub output_type: DataType,
    /// Past and new keys or values together, as the source makes them; "" where only the graph's output has them.
    pub total_key: String,
    pub total_value: String,
    /// Index of the node that makes `output` and gives way; none: the attention node itself.
    pub replaces: Option<usize>,
    pub lengths: LengthSource,
    /// Added to queries, keys and values: `[(Hq+2*Hkv)*D]`.
    pub bias: String,
    /// Head sinks that are no tensor of their own in the source.
    pub sinks: Option<Vec<f32>>,

    // What a single node may have beside it or inside.
    /// Values that are nothing but the cache, between the graph's inputs and outputs and the node.
    pub copies: Vec<String>,
    /// How the node normalises queries and keys before anything else.
    pub qk_norm: Option<QkNorm>,
}

impl AttentionMatch {
    /// One of the types of queries, keys and values, or outputs.
    pub fn typed(&self, t: DataType) -> DataType {
        if t == DataType::Undefined { self.data_type } else { t }
    }
}

/// Root mean square normalisation of every head of queries and keys.
#[derive(Clone, Debug, PartialEq)]
pub struct QkNorm {
    /// Weights `[D]`, of the queries' type.
    pub query: String,
    pub key: String,
    pub epsilon: f32,
}

/// How heads are laid out in a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// `[B, S, H*D]`, as the operator takes and gives it.
    #[default]
    Flat,
    /// `[B, S, H, D]`.
    TokenHeads,
    /// `[B, H, S, D]`.
    Heads,
}

/// Where the lengths of sequences come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LengthSource {
    /// `seqlens_k` and `total_sequence_length` are values of the source.
    #[default]
    Given,
    /// From the width of the attention mask, and its zeros where the source masks padding.
    FromMask { padding: bool },
}

/// Where rotary position embedding happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rope {
    /// Not in the attention node, and not right before it.
    #[default]
    None,
    /// An own node before the attention.
    Before,
    /// In the node.
    Inside {
        interleaved: bool,
        /// Elements of a head that are rotated, where the graph tells it.
        dims: Option<i64>,
    },
}

/// An attention node of a model.
pub struct Attention {
    /// Number from the name of its cache, else its place among the attentions.
    pub layer: usize,
    /// Index in the main graph; none in a subgraph or function.
    pub node: Option<usize>,
    pub name: String,
    pub op_type: String,
    /// The rule that spoke.
    pub rule: Option<&'static str>,
    pub found: Result<Box<AttentionMatch>, String>,
    /// Whether the node as it is gives right results when tokens that are in its cache are fed again with a total length
    /// that counts them once: GQA with a cache of fixed capacity does, and attention to what an encoder gave.
    pub takes_tokens_again: bool,
}

/// what is to become of an attention.
pub struct Conversion<'a> {
    pub attention: &'a Attention,
    pub matched: &'a AttentionMatch,
    pub node: usize,
    pub mode: Mode,
}

/// Finds every attention of a model, in graph order, those in subgraphs and functions last.
pub fn find_attention<'a>(model: &'a ModelProto, samples: &SampleCalls<'a>) -> Vec<Attention> {
    let view = samples.view;
    let explain = Explain::new(samples, &model.functions);
    let functions = Functions::of(model);
    let mut found = Vec::new();
    for (index, node) in view.graph.node.iter().enumerate() {
        let spoke = RULES
            .iter()
            .find_map(|rule| match rule.match_node(view, samples, node) {
                MatchResult::NotMine => None,
                MatchResult::Match(matched) => Some((Some(rule.name()), Ok(matched))),
                MatchResult::Refused(why) => Some((Some(rule.name()), Err(why))),
            });
        let spoke = spoke.or_else(|| unsupported::attention(view, node).map(|why| (None, Err(why))));
        let spoke = spoke.or_else(|| functions.softmax(view, node).map(|why| (None, Err(why))));
        if let Some((rule, result)) = spoke {
            let result = match (explain.returned(node), result) {
                (Some(why), _) => Err(why),
                (None, Err(why)) => Err(explain.cause(node, &why).unwrap_or(why)),
                (None, result) => result,
            };
            found.push(Attention {
                layer: 0,
                node: Some(index),
                name: node.label(),
                op_type: node.op_type().to_owned(),
                rule,
                found: result,
                takes_tokens_again: gqa::takes_tokens_again(node),
            });
        }
        for subgraph in subgraphs(node) {
            let place = format!("it is in a branch of node {} ({})", node.label(), node.op_type());
            nested(subgraph, &place, ONLY_MAIN, &mut found);
        }
    }
    let named: HashSet<usize> = found.iter().filter_map(|a: &Attention| a.node).collect();
    for function in functions.unknown(model, view.graph, &named) {
        let place = format!("it is in the model's function {}", function.name());
        let body = GraphProto {
            node: function.node.clone(),
            ..Default::default()
        };
        nested(&body, &place, &format!("{ONLY_MAIN}: {INLINE}"), &mut found);
    }
    for attention in found.iter_mut().filter(|a| a.found.is_err()) {
        let node = attention.node.and_then(|n| view.graph.node.get(n));
        attention.takes_tokens_again |= node.is_some_and(|node| cross_attention::keeps_nothing(samples, node));
    }
    refuse_shared_caches(&mut found);
    cache_names::refuse_crossed(view, &mut found);
    number_layers(view, &mut found);
    found
}

/// Layers that read one cache between them: one appends to it, the others have no keys and values of their own. An operator's node
/// appends to its own cache, so all of them stay.
fn refuse_shared_caches(found: &mut [Attention]) {
    let mut times: HashMap<String, usize> = HashMap::new();
    for matched in found.iter().filter_map(|a| a.found.as_ref().ok()) {
        let caches: HashSet<&String> = [&matched.past_key, &matched.past_value].into_iter().collect();
        for cache in caches {
            *times.entry(cache.clone()).or_default() += 1;
        }
    }
    let why = |matched: &AttentionMatch| {
        let mut caches = [&matched.past_key, &matched.past_value].into_iter();
        let (cache, layers) = caches.find_map(|cache| Some((cache, times.get(cache).filter(|n| **n > 1)?)))?;
        Some(format!(
            "{layers} layers share the cache {cache}; layers without a cache of their own are not supported by this version"
        ))
    };
    for attention in found {
        if let Some(why) = attention.found.as_ref().ok().and_then(|matched| why(matched)) {
            attention.found = Err(why);
        }
    }
}

const ONLY_MAIN: &str = "only the main graph is converted";

/// Attentions of a subgraph: named, and left alone.
fn nested(graph: &GraphProto, place: &str, advice: &str, found: &mut Vec<Attention>) {
    let view = GraphView::new(graph, 0);
    for node in &graph.node {
        let known = gqa::is_one(node) || unsupported::attention(&view, node).is_some();
        if known {
            found.push(Attention {
                layer: 0,
                node: None,
                name: node.label(),
                op_type: node.op_type().to_owned(),
                rule: None,
                found: Err(format!("{place}; {advice}")),
                takes_tokens_again: false,
            });
        }
        for subgraph in subgraphs(node) {
            nested(subgraph, place, advice, found);
        }
    }
}

/// Gives every attention a number that no other has: those in the names of the caches when all have one, else their order.
fn number_layers(view: &GraphView, found: &mut [Attention]) {
    let named: Vec<Option<usize>> = found
        .iter()
        .map(|a| match &a.found {
            Ok(matched) => layer_in(&matched.past_key),
            Err(_) => a
                .node
                .and_then(|n| view.graph.node.get(n))
                .and_then(|n| layer_in(n.input(3))),
        })
        .collect();
    let distinct: HashSet<usize> = named.iter().flatten().copied().collect();
    let all_named = distinct.len() == found.len();
    for (order, (attention, name)) in found.iter_mut().zip(named).enumerate() {
        attention.layer = name.filter(|_| all_named).unwrap_or(order);
    }
}

/// The one number in a name: "past_key_values.12.key" is 12; none when there are none or several.
fn layer_in(name: &str) -> Option<usize> {
    let mut numbers = name
        .split(|c: char| !c.is_ascii_digit())
        .filter(|part| !part.is_empty());
    let number = numbers.next()?.parse().ok()?;
    numbers.next().is_none().then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use retro_onnx::AttributeProto;

    #[test]
    fn layer_numbers_come_from_names_with_one_number() {
        assert_eq!(layer_in("past_key_values.12.key"), Some(12));
        assert_eq!(layer_in("past_key_self_3"), Some(3));
        assert_eq!(layer_in("past_key"), None);
        assert_eq!(layer_in("past.0.block.1"), None);
        assert_eq!(layer_in("past.99999999999999999999999"), None);
    }

    #[test]
    fn layers_that_share_a_cache_are_refused_together() {
        let attention = |key: &str, value: &str| Attention {
            layer: 0,
            node: None,
            name: String::new(),
            op_type: String::new(),
            rule: None,
            found: Ok(Box::new(AttentionMatch {
                past_key: key.into(),
                past_value: value.into(),
                ..Default::default()
            })),
            takes_tokens_again: false,
        };
        let mut found = vec![
            attention("k0", "v0"),
            attention("k1", "v1"),
            attention("k0", "v0"),
            attention("k2", "v1"),
            attention("k3", "k3"),
        ];
        refuse_shared_caches(&mut found);
        let said: Vec<_> = found.iter().map(|a| a.found.as_ref().err()).collect();
        let why = said[0].expect("refused");
        assert!(why.contains("2 layers share the cache k0"), "{why}");
        assert_eq!(said[2], Some(why), "one reason, so that a summary has it once");
        assert!(said[1].is_some_and(|why| why.contains("the cache v1")), "{said:?}");
        assert_eq!(said[3], said[1]);
        assert_eq!(said[4], None);
    }

    #[test]
    fn attention_in_a_branch_or_a_function_is_named_and_left() {
        let gqa = NodeProto::new("com.microsoft", "GroupQueryAttention", "inner", &["q"], &["y"]);
        let branch = GraphProto {
            node: vec![gqa.clone()],
            ..Default::default()
        };
        let holder = NodeProto::new("", "If", "if", &["c"], &["y"]).with(AttributeProto::graph("then_branch", branch));
        let graph = GraphProto {
            node: vec![holder],
            ..Default::default()
        };
        let mut model = ModelProto {
            graph: Some(graph),
            ..Default::default()
        };
        let function = retro_onnx::FunctionProto {
            name: Some("Block".into()),
            node: vec![gqa],
            ..Default::default()
        };
        model.functions.push(function);
        let view = GraphView::new(model.graph.as_ref().unwrap(), 21);
        let found = find_attention(&model, &SampleCalls::new(&view, None));
        let reasons: Vec<_> = found.iter().map(|a| a.found.clone().unwrap_err()).collect();
        assert!(reasons[0].contains("branch of node if (If)"), "{reasons:?}");
        assert!(reasons[1].contains("function Block"), "{reasons:?}");
        assert_eq!(found.iter().map(|a| a.layer).collect::<Vec<_>>(), [0, 1]);
    }
}
