//! Merged decoders, as optimum writes them: the graph is an If, and an input (`use_cache_branch`) chooses one of its branches. One
//! branch is the decoder without a past, for a prompt; the other one takes caches and appends to them. A past may be empty, so the
//! branch with a past does the work of both: [`unfold`] puts its nodes in the If's place.
//!
//! That would lose what the branch with a past leaves to the other one. In an encoder-decoder the branch without a past computes
//! keys and values of the encoder's output, and the branch with a past only hands them on. Such a model is refused.

use crate::{
    eval::reads,
    rules::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS},
};
use retro_onnx::{
    DataType, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto,
    graph::{subgraphs, subgraphs_mut},
};
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt,
};

/// Constants up to this many bytes go when nothing reads them any more. A weight that only the other branch needs stays, as
/// everything of the source does.
const SMALL: usize = 4096;

/// What a decoder computes with each token from, by the names of its inputs.
const TOKENS: [&str; 4] = [INPUT_IDS, INPUTS_EMBEDS, "decoder_input_ids", "decoder_inputs_embeds"];
/// What a branch may leave unread: the attention that is converted takes both into account itself.
const MAY_BE_UNREAD: [&str; 2] = [ATTENTION_MASK, POSITION_IDS];

/// An output that only the branch without a past computes. With that branch gone nothing would compute it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "of node {node} (If), the branch without a past computes {output} from {from}, and the branch with a past, which would take \
     the If's place, {instead}; in an encoder-decoder the first call makes the encoder's keys and values: convert its decoder \
     with a past as a model of its own (decoder_with_past_model.onnx)"
)]
pub struct LostOutput {
    /// The If, as messages call it.
    pub node: String,
    /// Its output.
    pub output: String,
    /// An input of the graph that the branch without a past computes it from.
    pub from: String,
    /// What the branch with a past does.
    pub instead: Instead,
}

/// How a branch with a past gives an output that it does not compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Instead {
    /// It lacks an input of the graph that the other branch reads.
    DoesNotRead(String),
    /// It gives a cache of the graph, as it is or in another type or shape.
    HandsOn(String),
    /// It gives a constant.
    Constant,
}

impl fmt::Display for Instead {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::DoesNotRead(input) => write!(f, "does not read {input}"),
            Self::HandsOn(past) => write!(f, "only hands {past} on"),
            Self::Constant => f.write_str("gives a constant for it"),
        }
    }
}

/// A branch of an If.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Branch {
    Then,
    Else,
}

impl Branch {
    fn other(self) -> Self {
        match self {
            Self::Then => Self::Else,
            Self::Else => Self::Then,
        }
    }

    fn of(self, node: &NodeProto) -> Option<&GraphProto> {
        let name = match self {
            Self::Then => "then_branch",
            Self::Else => "else_branch",
        };
        node.attribute(name)?.g.as_deref()
    }
}

/// Replaces the If of a merged decoder by its branch with a past. Says what was done; none if the model is no merged decoder.
///
/// # Errors
/// The branch without a past computes what the other one does not. The model is as it was then.
pub fn unfold(model: &mut ModelProto) -> Result<Option<String>, LostOutput> {
    let Some(graph) = model.graph.as_mut() else {
        return Ok(None);
    };
    let mut nodes = graph.node.iter().enumerate();
    let found = nodes.find_map(|(place, node)| Some((place, node.input(0), branch_with_past(graph, node)?)));
    let Some((place, condition, kept)) = found else {
        return Ok(None);
    };
    // Others that the same input chooses by will be as they are with a past too: the input gets that as its default.
    let alike = graph.node.iter().filter(|n| n.is("", "If") && n.input(0) == condition);
    if let Some(lost) = alike.filter_map(|node| lost_output(graph, node, kept)).next() {
        return Err(lost);
    }
    Ok(replace_if(graph, place, kept))
}

/// The branch that reads the graph's caches, of an If that chooses by an input; none for any other node.
fn branch_with_past(graph: &GraphProto, node: &NodeProto) -> Option<Branch> {
    let condition = graph.input.iter().find(|i| i.name() == node.input(0));
    let condition = condition.filter(|_| node.is("", "If"))?;
    let free = graph.initializer.iter().all(|t| t.name() != condition.name());
    if condition.data_type() != Some(DataType::Bool) || !free || condition.dims()?.len() > 1 {
        return None;
    }
    let caches = graph.input.iter().filter(|i| has_cache_shape(i));
    let caches: HashSet<&str> = caches.map(ValueInfoProto::name).collect();
    let appends = |branch: Branch| {
        let reads_cache = |n: &NodeProto| n.input.iter().any(|i| caches.contains(i.as_str()));
        let mut nodes = branch.of(node)?.node.iter();
        Some(nodes.any(|n| !n.is("", "Shape") && reads_cache(n)))
    };
    match (appends(Branch::Then)?, appends(Branch::Else)?) {
        (true, false) => Some(Branch::Then),
        (false, true) => Some(Branch::Else),
        _ => None,
    }
}

/// Caches are `[B, H, T, D]`.
fn has_cache_shape(input: &ValueInfoProto) -> bool {
    input.dims().is_some_and(|d| d.len() == 4)
}

fn is_cache(graph: &GraphProto, name: &str) -> bool {
    graph.input.iter().any(|i| i.name() == name && has_cache_shape(i))
}

/// Puts the branch of the If at `place` in its place. Says what was done; none if the branch's names don't allow it.
fn replace_if(graph: &mut GraphProto, place: usize, kept: Branch) -> Option<String> {
    let node = graph.node.get(place)?.clone();
    let branch = kept.of(&node)?;
    let nodes = inline(branch, &node)?;
    graph.node.splice(place..=place, nodes);
    graph.initializer.extend(branch.initializer.iter().cloned());
    graph.value_info.extend(branch.value_info.iter().cloned());
    // Whoever sets the condition may go on doing so; whoever doesn't need not.
    let condition = node.input(0);
    let always = u8::from(kept == Branch::Then);
    let default = TensorProto::raw(condition, DataType::Bool, &[1], vec![always].into());
    graph.initializer.push(default);
    let read: HashSet<&str> = graph.node.iter().flat_map(reads).collect();
    let values = graph.input.iter().chain(&graph.output);
    let declared: HashSet<&str> = values.map(ValueInfoProto::name).collect();
    graph.initializer.retain(|t| {
        let bytes = t.raw_data.as_ref().map_or(usize::MAX, bytes::Bytes::len);
        bytes > SMALL || read.contains(t.name()) || declared.contains(t.name())
    });
    Some(format!(
        "the branch with a past takes the place of node {} (If): {condition} is not needed any more",
        node.label()
    ))
}

/// An output of an If for which the dropped branch reads an input that the kept one does not, or computes what the kept one only
/// hands on from an input, copied or reshaped.
fn lost_output(graph: &GraphProto, node: &NodeProto, kept: Branch) -> Option<LostOutput> {
    let condition = node.input(0);
    let dropped = BranchInputs::new(graph, kept.other().of(node)?);
    let kept = BranchInputs::new(graph, kept.of(node)?);
    let counts = |name: &str| !MAY_BE_UNREAD.contains(&name) && name != condition;
    let has_tokens = TOKENS.iter().any(|name| kept.inputs.contains(name));
    let mut found = None;
    for ((with, without), output) in kept.graph.output.iter().zip(&dropped.graph.output).zip(&node.output) {
        let (with, without) = (kept.of(with.name()), dropped.of(without.name()));
        let no_token = has_tokens && !TOKENS.iter().any(|t| with.contains(t));
        let hands_on = no_token || with.iter().all(|name| is_cache(graph, name));
        let unread = without.iter().find(|name| counts(name) && !with.contains(**name));
        let mut computed = without.iter().filter(|name| counts(name) && !is_cache(graph, name));
        let from = unread.or_else(|| computed.next().filter(|_| hands_on));
        let Some(from) = from else { continue };
        // An output that is handed on explains more than one that lacks something.
        if found.is_none() || hands_on {
            let past = with.iter().find(|name| is_cache(graph, name));
            let instead = match past {
                _ if !hands_on => Instead::DoesNotRead((*from).to_owned()),
                Some(past) => Instead::HandsOn((*past).to_owned()),
                None => Instead::Constant,
            };
            found = Some(LostOutput {
                node: node.label(),
                output: output.clone(),
                from: (*from).to_owned(),
                instead,
            });
        }
        if hands_on {
            break;
        }
    }
    found
}

/// A branch, indexed to find out which inputs of the graph its values come from.
struct BranchInputs<'a> {
    graph: &'a GraphProto,
    /// Of the graph around the branch, without those that are initializers too.
    inputs: HashSet<&'a str>,
    /// Nodes by their outputs, in the branch.
    inner: HashMap<&'a str, &'a NodeProto>,
    /// The same, in the graph around it.
    outer: HashMap<&'a str, &'a NodeProto>,
    /// The branch's own.
    constants: HashSet<&'a str>,
}

impl<'a> BranchInputs<'a> {
    fn new(outer: &'a GraphProto, graph: &'a GraphProto) -> Self {
        let producers = |graph: &'a GraphProto| {
            let outputs = |n: &'a NodeProto| n.output.iter().map(move |o| (o.as_str(), n));
            graph
                .node
                .iter()
                .flat_map(outputs)
                .filter(|(o, _)| !o.is_empty())
                .collect()
        };
        let constants: HashSet<&str> = outer.initializer.iter().map(TensorProto::name).collect();
        let inputs = outer.input.iter().map(ValueInfoProto::name);
        Self {
            graph,
            inputs: inputs.filter(|name| !constants.contains(name)).collect(),
            inner: producers(graph),
            outer: producers(outer),
            constants: graph.initializer.iter().map(TensorProto::name).collect(),
        }
    }

    /// The graph's inputs that a value of the branch depends on, other than through their shapes.
    fn of(&self, name: &'a str) -> BTreeSet<&'a str> {
        let mut found = BTreeSet::new();
        let mut seen: HashSet<&str> = HashSet::new();
        let mut open = vec![name];
        while let Some(name) = open.pop() {
            if self.constants.contains(name) || !seen.insert(name) {
                continue;
            }
            match self.inner.get(name).or_else(|| self.outer.get(name)) {
                Some(node) if node.is("", "Shape") || node.is("", "Size") => {}
                Some(node) => open.extend(reads(node)),
                None if self.inputs.contains(name) => {
                    found.insert(name);
                }
                None => {}
            }
        }
        found
    }
}

/// A branch's nodes, which make the If's outputs by the If's names. None if a name of the If is one of the branch's own.
fn inline(branch: &GraphProto, node: &NodeProto) -> Option<Vec<NodeProto>> {
    let made: HashSet<&str> = branch.node.iter().flat_map(|n| &n.output).map(String::as_str).collect();
    let mut renamed: HashMap<String, String> = HashMap::new();
    let mut copies = Vec::new();
    if branch.output.len() != node.output.len() {
        return None;
    }
    for (inner, outer) in branch.output.iter().map(ValueInfoProto::name).zip(&node.output) {
        if inner == outer {
            continue;
        }
        if !made.contains(inner) || renamed.contains_key(inner) {
            copies.push(NodeProto::new("", "Identity", "", &[inner], &[outer]));
        } else if made.contains(outer.as_str()) {
            return None;
        } else {
            renamed.insert(inner.to_owned(), outer.clone());
        }
    }
    let mut nodes = branch.node.clone();
    let mut open: Vec<&mut NodeProto> = nodes.iter_mut().collect();
    while let Some(node) = open.pop() {
        for name in node.input.iter_mut().chain(&mut node.output) {
            if let Some(new) = renamed.get(name.as_str()) {
                name.clone_from(new);
            }
        }
        if subgraphs(node).next().is_some() {
            for graph in subgraphs_mut(node) {
                for output in &mut graph.output {
                    if let Some(new) = renamed.get(output.name()) {
                        output.name = Some(new.clone());
                    }
                }
                open.extend(&mut graph.node);
            }
        }
    }
    nodes.extend(copies);
    Some(nodes)
}

#[cfg(test)]
mod tests;
