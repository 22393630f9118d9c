//! What stands in an attention's way, in a user's terms. The rules say what failed; where its cause is one that exporters are known
//! for (another layout of the cache, merged keys and values, a mask made by the caller), that is what a reader can act on.

mod cache;
mod mask;
mod outputs;
mod trace;

use super::{
    cross_attention::{inputs_of, keeps_nothing},
    shown::shown,
};
use crate::{
    eval::Error,
    prove::{
        CacheRefusal, FunctionPart, INPUT_IDS, INPUTS_EMBEDS, MaskRefusal, NodeRefusal, OperatorRefusal, Refusal,
        SampleCalls, Unread,
    },
};
use cache::{has_cache, layout, merged, sliding};
use mask::{made_by_caller, other_input};
use outputs::{graph_output_from, graph_output_of};
use retro_onnx::{FunctionProto, NodeProto, graph::GraphView};
use std::collections::HashSet;
use trace::{Trace, TracedOperands};

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
    fn is_call(&self, node: &NodeProto) -> bool {
        let named = (node.op_domain().to_owned(), node.op_type().to_owned());
        self.functions.contains(&named)
    }

    /// The cause of a refusal, if it is one that this module looks for; `why`: what the rule said.
    pub fn cause(&self, node: &'a NodeProto, why: &Refusal) -> Option<Refusal> {
        let view = self.samples.view;
        let operands = TracedOperands::of(view, node)?;
        let text = [INPUT_IDS, INPUTS_EMBEDS, "decoder_input_ids"];
        if text.iter().all(|name| !view.is_input(name)) {
            return Some(not_text(view).into());
        }
        let is_call = |node: &NodeProto| self.is_call(node);
        let appends = operands.inside.then_some(node);
        let keys = Trace::of(view, operands.key, appends, &is_call);
        let values = Trace::of(view, operands.value, appends, &is_call);
        if let Some(cause) = self.cause_in_cache(node, &operands, &keys, &values) {
            return Some(cause);
        }
        let mask = Trace::between(view, operands.masked, operands.product, &is_call);
        if let Some(cause) = self.cause_in_mask(&mask, why) {
            return Some(cause);
        }
        if let Some(cause) = self.cause_in_function(why) {
            return Some(cause.into());
        }
        // Sizes that don't fit one another, where the cache is one that keeps the newest tokens.
        let mut origins = keys.origins.iter().chain(&values.origins);
        let cause = origins.find_map(|origin| sliding(view, origin))?;
        is_of_sizes(why).then(|| cause.into())
    }

    /// The cause, where a function of the model computes what can't be computed here.
    fn cause_in_function(&self, why: &Refusal) -> Option<OperatorRefusal> {
        let why = why.evaluation()?;
        let Error::NotSupported { domain, op_type } = why.cause() else {
            return None;
        };
        let called = self.functions.contains(&(domain.clone(), op_type.clone()));
        called.then(|| OperatorRefusal::DependsOnFunction {
            function: op_type.clone(),
            node: why.node().unwrap_or_default().to_owned(),
        })
    }

    /// The cause, where it lies in what keys and values come from.
    fn cause_in_cache(
        &self,
        node: &'a NodeProto,
        operands: &TracedOperands<'a>,
        keys: &Trace,
        values: &Trace,
    ) -> Option<Refusal> {
        let view = self.samples.view;
        let both = || keys.origins.iter().chain(&values.origins);
        if let Some(cause) = both().find_map(|origin| merged(view, origin)) {
            return Some(cause.into());
        }
        if let Some(cause) = both().find_map(|origin| layout(view, origin)) {
            return Some(cause.into());
        }
        if let Some(call) = keys.calls.iter().chain(&values.calls).next() {
            return Some(made_in_function(FunctionPart::KeysOrValues, call).into());
        }
        if keeps_nothing(self.samples, node) {
            let from = inputs_of(view, &[operands.key])
                .first()
                .copied()
                .unwrap_or(operands.key);
            let from = from.to_owned();
            return Some(CacheRefusal::CrossAttention { from }.into());
        }
        let grows = both().any(|o| o.append.is_some() || o.written.is_some());
        (!grows && !has_cache(view)).then(|| CacheRefusal::GraphReturnsNone.into())
    }

    /// The cause, where it lies in what the mask comes from.
    fn cause_in_mask(&self, mask: &Trace, why: &Refusal) -> Option<Refusal> {
        if let Some(call) = mask.calls.first() {
            return Some(made_in_function(FunctionPart::Mask, call).into());
        }
        let made_by_caller = |origin| made_by_caller(self.samples.view, origin);
        if let Some(cause) = mask.origins.iter().find_map(made_by_caller) {
            return Some(cause.into());
        }
        if !depends_on_more(why) {
            return None;
        }
        let cause = mask
            .origins
            .iter()
            .find_map(|origin| other_input(self.samples, origin))?;
        Some(cause.into())
    }

    /// An attention's probabilities or scores among the graph's outputs.
    pub fn returned(&self, node: &'a NodeProto) -> Option<Refusal> {
        if !node.is("", "Softmax") {
            return None;
        }
        let view = self.samples.view;
        let said = |what: &'static str, name: &str| {
            let name = name.to_owned();
            NodeRefusal::GraphReturns { what, name }.into()
        };
        let weights = node.output(0);
        if let Some(name) = graph_output_of(view, weights).or_else(|| graph_output_from(view, weights)) {
            return Some(said("attention probabilities", name));
        }
        let operands = TracedOperands::of(view, node)?;
        let name = graph_output_of(view, operands.masked).or_else(|| graph_output_of(view, operands.product?))?;
        Some(said("attention scores", name))
    }
}

/// Whether a mask was refused because it is not computed from masks and positions alone.
fn depends_on_more(why: &Refusal) -> bool {
    matches!(
        why,
        Refusal::Mask(
            MaskRefusal::Unread {
                why: Unread::DependsOnMore { .. }
            } | MaskRefusal::UnreadAt {
                why: Unread::DependsOnMore { .. },
                ..
            }
        )
    )
}

/// Whether an attention was refused over sizes that don't fit one another.
fn is_of_sizes(why: &Refusal) -> bool {
    let by_cache = matches!(
        why,
        Refusal::Cache(CacheRefusal::OtherNumbers { .. } | CacheRefusal::TotalShape { .. })
    );
    let by_evaluation = |why: &Error| matches!(why.cause(), Error::Broadcast { .. });
    by_cache || why.evaluation().is_some_and(by_evaluation)
}

fn domain(name: &str) -> &str {
    if name == "ai.onnx" { "" } else { name }
}

fn made_in_function(part: FunctionPart, node: &NodeProto) -> OperatorRefusal {
    OperatorRefusal::MadeInFunction {
        part,
        function: node.op_type().to_owned(),
        node: node.label(),
    }
}

fn not_text(view: &GraphView) -> OperatorRefusal {
    let first = view.graph.input.iter().find(|i| view.initializer(i.name()).is_none());
    OperatorRefusal::NotText {
        input: first.map_or("nothing".to_owned(), |i| shown(view, i.name())),
    }
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
mod tests;
