//! Finds every attention of a model.

use super::{
    attention::Attention,
    cache_names::refuse_crossed,
    cross_attention::keeps_nothing,
    decomposed::Decomposed,
    explain::Explain,
    functions::Functions,
    gqa::{self, GroupQueryAttention},
    mha::MultiHeadAttention,
    onnx_attention::OnnxAttention,
    rule::{MatchResult, Rule},
    unsupported,
};
use crate::prove::{AttentionMatch, CacheRefusal, OperatorRefusal, Refusal, SampleCalls};
use retro_onnx::{
    GraphProto, ModelProto, NodeProto,
    graph::{GraphView, subgraphs},
};
use std::collections::{HashMap, HashSet};

/// All rules; the first that has something to say about a node decides.
pub const RULES: &[&dyn Rule] = &[&GroupQueryAttention, &MultiHeadAttention, &OnnxAttention, &Decomposed];

/// Finds every attention of a model, in graph order, those in subgraphs and functions last.
pub fn find_attention<'a>(model: &'a ModelProto, samples: &SampleCalls<'a>) -> Vec<Attention> {
    let view = samples.view;
    let functions = Functions::of(model);
    let mut found = in_main_graph(model, samples, &functions);
    let named: HashSet<usize> = found.iter().filter_map(|a: &Attention| a.node).collect();
    for function in functions.unknown(model, view.graph, &named) {
        let why = OperatorRefusal::InFunction {
            function: function.name().to_owned(),
        };
        let body = GraphProto {
            node: function.node.clone(),
            ..Default::default()
        };
        nested(&body, &why, &mut found);
    }
    for attention in found.iter_mut().filter(|a| a.found.is_err()) {
        let node = attention.node.and_then(|n| view.graph.node.get(n));
        attention.takes_tokens_again |= node.is_some_and(|node| keeps_nothing(samples, node));
    }
    refuse_shared_caches(&mut found);
    refuse_crossed(view, &mut found);
    number_layers(view, &mut found);
    found
}

/// Attentions of the main graph, and those of its branches where the branching node stands.
fn in_main_graph<'a>(model: &'a ModelProto, samples: &SampleCalls<'a>, functions: &Functions<'a>) -> Vec<Attention> {
    let view = samples.view;
    let explain = Explain::new(samples, &model.functions);
    let mut found = Vec::new();
    for (index, node) in view.graph.node.iter().enumerate() {
        if let Some((rule, result)) = match_any(samples, functions, node) {
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
            let why = OperatorRefusal::InBranch {
                node: node.label(),
                op_type: node.op_type().to_owned(),
            };
            nested(subgraph, &why, &mut found);
        }
    }
    found
}

/// The rule that has something to say about a node, and what; none of a rule for attention that no rule is about.
type Matched = (Option<&'static str>, Result<Box<AttentionMatch>, Refusal>);

fn match_any<'a>(samples: &SampleCalls<'a>, functions: &Functions<'a>, node: &'a NodeProto) -> Option<Matched> {
    let view = samples.view;
    let matched = RULES
        .iter()
        .find_map(|rule| match rule.match_node(view, samples, node) {
            MatchResult::NotMine => None,
            MatchResult::Match(matched) => Some((Some(rule.name()), Ok(matched))),
            MatchResult::Refused(why) => Some((Some(rule.name()), Err(why))),
        });
    let refused = |why: OperatorRefusal| (None, Err(why.into()));
    matched
        .or_else(|| unsupported::attention(view, node).map(refused))
        .or_else(|| functions.softmax(view, node).map(refused))
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
        Some(CacheRefusal::Shared {
            layers: *layers,
            cache: cache.clone(),
        })
    };
    for attention in found {
        if let Some(why) = attention.found.as_ref().ok().and_then(|matched| why(matched)) {
            attention.found = Err(why.into());
        }
    }
}

/// Attentions of a subgraph: named, and left alone. `why`: where it stands.
fn nested(graph: &GraphProto, why: &OperatorRefusal, found: &mut Vec<Attention>) {
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
                found: Err(why.clone().into()),
                takes_tokens_again: false,
            });
        }
        for subgraph in subgraphs(node) {
            nested(subgraph, why, found);
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
        let said: Vec<_> = found
            .iter()
            .map(|a| a.found.as_ref().err().map(ToString::to_string))
            .collect();
        let why = said[0].as_deref().expect("refused");
        assert!(why.contains("2 layers share the cache k0"), "{why}");
        assert_eq!(
            said[2].as_deref(),
            Some(why),
            "one reason, so that a summary has it once"
        );
        assert!(
            said[1].as_ref().is_some_and(|why| why.contains("the cache v1")),
            "{said:?}"
        );
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
        let reasons: Vec<_> = found.iter().map(|a| a.found.clone().unwrap_err().to_string()).collect();
        assert!(reasons[0].contains("branch of node if (If)"), "{reasons:?}");
        assert!(reasons[1].contains("function Block"), "{reasons:?}");
        assert_eq!(found.iter().map(|a| a.layer).collect::<Vec<_>>(), [0, 1]);
    }
}
