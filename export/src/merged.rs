//! Merged decoders: one If whose branches are the model without and with a past, as optimum writes them. The branch with a past
//! does all that is needed (a past may be empty), so it takes the If's place.

use crate::{
    eval::reads,
    rules::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS},
};
use retro_onnx::{
    DataType, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto,
    graph::{subgraphs, subgraphs_mut},
};
use std::collections::{BTreeSet, HashMap, HashSet};

/// A weight that only the other branch needs stays, as everything of the source does; smaller constants go.
const SMALL: usize = 4096;

/// What a decoder computes with each token from, by the names of its inputs.
const TOKENS: [&str; 4] = [INPUT_IDS, INPUTS_EMBEDS, "decoder_input_ids", "decoder_inputs_embeds"];
/// What a branch may leave unread: the attention that is converted takes both into account itself.
const GIVEN: [&str; 2] = [ATTENTION_MASK, POSITION_IDS];

/// Replaces the If of a merged decoder. Says what was done; none if the model is no merged decoder.
///
/// # Errors
/// The branch without a past computes what the other one only hands on, as the encoder's keys and values: with that branch
/// gone nothing would compute it. The model is as it was then.
pub fn unfold(model: &mut ModelProto) -> Result<Option<String>, String> {
    let Some(graph) = model.graph.as_ref() else {
        return Ok(None);
    };
    let mut nodes = graph.node.iter();
    let Some((first, kept)) = nodes.find_map(|node| Some((node, chosen(graph, node)?))) else {
        return Ok(None);
    };
    // Others that the same input chooses by will be as they are with a past too: the input gets that as its default.
    let mut alike = graph
        .node
        .iter()
        .filter(|n| n.is("", "If") && n.input(0) == first.input(0));
    match alike.find_map(|node| only_the_other_computes(graph, node, kept)) {
        Some(why) => Err(why),
        None => Ok(replaced(model)),
    }
}

fn replaced(model: &mut ModelProto) -> Option<String> {
    let graph = model.graph.as_mut()?;
    let place = graph.node.iter().position(|n| chosen(graph, n).is_some())?;
    let name = chosen(graph, graph.node.get(place)?)?;
    let node = graph.node.get(place)?.clone();
    let condition = node.input(0).to_owned();
    let branch = node.attribute(name).and_then(|a| a.g.as_deref().cloned())?;
    let nodes = inlined(&branch, &node)?;
    graph.node.remove(place);
    graph.node.splice(place..place, nodes);
    graph.initializer.extend(branch.initializer);
    graph.value_info.extend(branch.value_info);
    // Whoever sets the condition may go on doing so; whoever doesn't need not.
    let always = u8::from(name == "then_branch");
    graph
        .initializer
        .push(TensorProto::raw(&condition, DataType::Bool, &[1], vec![always].into()));
    let read: HashSet<&str> = graph.node.iter().flat_map(reads).collect();
    let kept: HashSet<&str> = graph
        .input
        .iter()
        .chain(&graph.output)
        .map(ValueInfoProto::name)
        .collect();
    graph.initializer.retain(|t| {
        let bytes = t.raw_data.as_ref().map_or(usize::MAX, bytes::Bytes::len);
        bytes > SMALL || read.contains(t.name()) || kept.contains(t.name())
    });
    Some(format!(
        "the branch with a past takes the place of node {} (If): {condition} is not needed any more",
        node.label()
    ))
}

/// The branch that appends to the graph's caches, of an If that chooses by an input; none for any other node.
fn chosen(graph: &GraphProto, node: &NodeProto) -> Option<&'static str> {
    let input = |name: &str| graph.input.iter().find(|i| i.name() == name);
    let condition = input(node.input(0)).filter(|_| node.is("", "If"))?;
    let free = graph.initializer.iter().all(|t| t.name() != condition.name());
    if condition.data_type() != Some(DataType::Bool) || !free || condition.dims()?.len() > 1 {
        return None;
    }
    let caches: HashSet<&str> = graph
        .input
        .iter()
        .filter(|i| i.dims().is_some_and(|d| d.len() == 4))
        .map(ValueInfoProto::name)
        .collect();
    let appends = |name: &str| {
        let branch = node.attribute(name).and_then(|a| a.g.as_deref())?;
        Some(
            branch
                .node
                .iter()
                .any(|n| !n.is("", "Shape") && n.input.iter().any(|i| caches.contains(i.as_str()))),
        )
    };
    match (appends("then_branch")?, appends("else_branch")?) {
        (true, false) => Some("then_branch"),
        (false, true) => Some("else_branch"),
        _ => None,
    }
}

/// Why the branch with a past does not do all that is needed: an output for which the other branch reads an input that this one
/// does not, or computes what this one only hands on from an input, copied or reshaped.
fn only_the_other_computes(graph: &GraphProto, node: &NodeProto, kept: &str) -> Option<String> {
    let dropped = if kept == "then_branch" {
        "else_branch"
    } else {
        "then_branch"
    };
    let branch = |name: &str| node.attribute(name).and_then(|a| a.g.as_deref());
    let (kept, dropped) = (
        Sources::new(graph, branch(kept)?),
        Sources::new(graph, branch(dropped)?),
    );
    let told = TOKENS.iter().any(|name| kept.inputs.contains(name));
    let mut found = None;
    for ((with, without), output) in kept.graph.output.iter().zip(&dropped.graph.output).zip(&node.output) {
        let (with, without) = (kept.of(with.name()), dropped.of(without.name()));
        let unread = |name: &&&str| !with.contains(**name) && !GIVEN.contains(name) && **name != node.input(0);
        let computed = |name: &&&str| !is_cache(graph, name) && !GIVEN.contains(name) && **name != node.input(0);
        let hands_on =
            with.iter().all(|name| is_cache(graph, name)) || !TOKENS.iter().any(|t| with.contains(t)) && told;
        let from = without.iter().find(unread);
        let from = from.or_else(|| without.iter().find(computed).filter(|_| hands_on));
        let Some(from) = from else { continue };
        let how = match with.iter().find(|name| is_cache(graph, name)) {
            _ if !hands_on => format!("does not read {from}"),
            Some(past) => format!("only hands {past} on"),
            None => "gives a constant for it".to_owned(),
        };
        // An output that is handed on explains more than one that lacks something.
        if found.is_none() || hands_on {
            found = Some((output, *from, how));
        }
        if hands_on {
            break;
        }
    }
    let (output, from, how) = found?;
    Some(format!(
        "of node {} (If), the branch without a past computes {output} from {from}, and the branch with a past, which would take \
         the If's place, {how}; in an encoder-decoder the first call makes the encoder's keys and values: convert its decoder \
         with a past as a model of its own (decoder_with_past_model.onnx)",
        node.label()
    ))
}

fn is_cache(graph: &GraphProto, name: &str) -> bool {
    let mut inputs = graph.input.iter();
    inputs.any(|i| i.name() == name && i.dims().is_some_and(|d| d.len() == 4))
}

/// A branch, to find out which inputs of the graph its values come from.
struct Sources<'a> {
    graph: &'a GraphProto,
    inputs: HashSet<&'a str>,
    inner: HashMap<&'a str, &'a NodeProto>,
    outer: HashMap<&'a str, &'a NodeProto>,
    constants: HashSet<&'a str>,
}

impl<'a> Sources<'a> {
    fn new(outer: &'a GraphProto, graph: &'a GraphProto) -> Self {
        let makers = |graph: &'a GraphProto| {
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
            inner: makers(graph),
            outer: makers(outer),
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

/// A branch's nodes, with the names of the If's outputs.
fn inlined(branch: &GraphProto, node: &NodeProto) -> Option<Vec<NodeProto>> {
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
mod tests {
    use super::*;
    use crate::validate::validate;
    use retro_onnx::AttributeProto;

    fn merged() -> ModelProto {
        let value = |name: &str| ValueInfoProto::tensor(name, DataType::Float, []);
        let branch = |nodes: Vec<NodeProto>, output: &str| GraphProto {
            node: nodes,
            output: vec![value(output)],
            initializer: vec![TensorProto::floats(&format!("{output}.w"), &[1], &[1.0])],
            ..Default::default()
        };
        let with = branch(
            vec![NodeProto::new("", "Concat", "c", &["past", "x"], &["y_with"])],
            "y_with",
        );
        let without = branch(
            vec![NodeProto::new("", "Neg", "n", &["x"], &["y_without"])],
            "y_without",
        );
        let node = NodeProto::new("", "If", "if", &["use_cache"], &["y"])
            .with(AttributeProto::graph("then_branch", with))
            .with(AttributeProto::graph("else_branch", without));
        let four = || [1.into(), 2.into(), "past".into(), 8.into()];
        let graph = GraphProto {
            node: vec![node],
            input: vec![
                value("x"),
                ValueInfoProto::tensor("past", DataType::Float, four()),
                ValueInfoProto::tensor("use_cache", DataType::Bool, [1.into()]),
            ],
            output: vec![value("y")],
            ..Default::default()
        };
        ModelProto {
            graph: Some(graph),
            ..Default::default()
        }
    }

    #[test]
    fn the_branch_with_a_past_stays() {
        let mut model = merged();
        assert!(unfold(&mut model).unwrap().unwrap().contains("node if (If)"));
        let graph = model.graph.as_ref().unwrap();
        assert_eq!(graph.node.len(), 1);
        assert_eq!((graph.node[0].name(), graph.node[0].output(0)), ("c", "y"));
        assert!(
            graph.initializer.iter().any(|t| t.name() == "use_cache"),
            "its condition has a default"
        );
        assert_eq!(validate(graph), Ok(()));
        assert_eq!(unfold(&mut model), Ok(None));
    }

    /// A merged decoder of an encoder-decoder: what the encoder gave comes in, its keys are made by the branch without a past. How
    /// the other branch gives them is up to the caller.
    fn seq2seq(with: Vec<NodeProto>, past_first: bool) -> ModelProto {
        let value = |name: &str| ValueInfoProto::tensor(name, DataType::Float, []);
        let four = |name: &str| {
            let dims = [1.into(), 2.into(), "past".into(), 8.into()];
            ValueInfoProto::tensor(name, DataType::Float, dims)
        };
        let branch = |nodes: Vec<NodeProto>, of: &str| GraphProto {
            node: nodes,
            output: ["self", "cross"].map(|kind| value(&format!("{kind}_{of}"))).to_vec(),
            ..Default::default()
        };
        let node = |op: &str, inputs: &[&str], output: &str| NodeProto::new("", op, output, inputs, &[output]);
        let appended = node("Concat", &["past.self", INPUT_IDS], "self_with");
        let with = branch([vec![appended], with].concat(), "with");
        let made = [
            node("Neg", &[INPUT_IDS], "self_without"),
            node("MatMul", &["encoder_hidden_states", "weight"], "cross_without"),
        ];
        let without = branch(made.to_vec(), "without");
        let (yes, no) = if past_first { (with, without) } else { (without, with) };
        let outputs = ["present.self", "present.cross"];
        let choice = NodeProto::new("", "If", "choice", &["use_cache"], &outputs)
            .with(AttributeProto::graph("then_branch", yes))
            .with(AttributeProto::graph("else_branch", no));
        let graph = GraphProto {
            node: vec![choice],
            initializer: vec![TensorProto::floats("weight", &[1, 1], &[1.0])],
            input: vec![
                value(INPUT_IDS),
                value("encoder_hidden_states"),
                four("past.self"),
                four("past.cross"),
                ValueInfoProto::tensor("use_cache", DataType::Bool, [1.into()]),
            ],
            output: outputs.map(value).to_vec(),
            ..Default::default()
        };
        ModelProto {
            graph: Some(graph),
            ..Default::default()
        }
    }

    #[test]
    fn what_only_the_branch_without_a_past_computes_is_not_dropped() {
        let node = |op: &str, inputs: &[&str], output: &str| NodeProto::new("", op, output, inputs, &[output]);
        let empty = node("Slice", &["encoder_hidden_states", "zero", "zero"], "nothing");
        for (how, with) in [
            ("handed on", vec![node("Identity", &["past.cross"], "cross_with")]),
            ("in another type", vec![node("Cast", &["past.cross"], "cross_with")]),
            (
                "in another shape",
                vec![
                    node("Shape", &[INPUT_IDS], "shape"),
                    node("Reshape", &["past.cross", "shape"], "cross_with"),
                ],
            ),
            (
                "with nothing behind it",
                vec![empty, node("Concat", &["past.cross", "nothing"], "cross_with")],
            ),
            ("a constant", vec![node("Constant", &[], "cross_with")]),
        ] {
            for past_first in [true, false] {
                let mut model = seq2seq(with.clone(), past_first);
                let before = model.clone();
                let why = unfold(&mut model).expect_err(how);
                let names = ["present.cross", "encoder_hidden_states", "decoder_with_past_model.onnx"];
                assert!(names.iter().all(|name| why.contains(name)), "{how}: {why}");
                assert!(model == before, "{how}: nothing is changed");
            }
        }
    }

    /// As some exporters write it, with an If for each cache.
    #[test]
    fn other_ifs_of_the_same_condition_count() {
        let value = |name: &str| ValueInfoProto::tensor(name, DataType::Float, []);
        let branch = |op: &str, inputs: &[&str], output: &str| GraphProto {
            node: vec![NodeProto::new("", op, op, inputs, &[output])],
            output: vec![value(output)],
            ..Default::default()
        };
        let first = NodeProto::new("", "If", "first", &["use_cache"], &["y"])
            .with(AttributeProto::graph(
                "then_branch",
                branch("Concat", &["past.self", INPUT_IDS], "y_with"),
            ))
            .with(AttributeProto::graph(
                "else_branch",
                branch("Neg", &[INPUT_IDS], "y_without"),
            ));
        let handed_on = NodeProto::new("", "Identity", "", &["past.cross"], &["cross_with"]);
        let mut model = seq2seq(vec![handed_on], true);
        let graph = model.graph.as_mut().unwrap();
        graph.output.push(value("y"));
        graph.node.insert(0, first);
        let why = unfold(&mut model).expect_err("the second makes the encoder's keys");
        assert!(why.contains("node choice (If)"), "{why}");
    }

    #[test]
    fn a_branch_that_computes_everything_itself_takes_the_place() {
        let node = NodeProto::new(
            "",
            "MatMul",
            "m",
            &["encoder_hidden_states", INPUT_IDS],
            &["cross_with"],
        );
        for past_first in [true, false] {
            let mut model = seq2seq(vec![node.clone()], past_first);
            assert!(unfold(&mut model).unwrap().is_some());
        }
    }

    #[test]
    fn an_if_that_chooses_something_else_stays() {
        let mut model = merged();
        let node = &mut model.graph.as_mut().unwrap().node[0];
        let other = node.attribute[0].g.clone();
        node.attribute[1].g = other;
        assert_eq!(unfold(&mut model), Ok(None), "both branches append");
        let mut model = merged();
        model.graph.as_mut().unwrap().input.pop();
        assert_eq!(unfold(&mut model), Ok(None), "the condition is computed");
    }
}
