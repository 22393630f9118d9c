//! Caches by other names. Conversions to float16 that leave the graph's inputs and outputs alone put a Cast behind each, exporters
//! leave an Identity or a Concat of one value: what is behind them is the same cache.

use super::refusal::CacheRefusal;
use retro_onnx::{DataType, NodeProto, graph::GraphView};

/// Names of one cache, at most.
const MOST: usize = 8;

/// What a node copies, if that is all it does, in whatever floating point type.
pub(crate) fn copied(node: &NodeProto) -> Option<&str> {
    let [from] = node.input.as_slice() else { return None };
    let copies = match node.op_type() {
        "Identity" | "Concat" => node.op_domain().is_empty(),
        "Cast" => node.op_domain().is_empty() && cast_to(node).is_some(),
        _ => false,
    };
    (copies && node.output.len() == 1).then_some(from.as_str())
}

/// The type that a Cast gives, if an operator's cache may have it.
pub(crate) fn cast_to(node: &NodeProto) -> Option<DataType> {
    let to = node.attribute("to").filter(|_| node.is("", "Cast"))?.i();
    [DataType::Float, DataType::Float16, DataType::Bfloat16]
        .into_iter()
        .find(|t| i64::from(i32::from(*t)) == to)
}

/// The value itself, what it is a copy of, and so on.
pub(crate) fn back<'a>(view: &GraphView<'a>, from: &'a str) -> Vec<&'a str> {
    let mut names = vec![from];
    let mut name = from;
    while let Some(before) = view.producer(name).and_then(copied).filter(|_| names.len() < MOST) {
        names.push(before);
        name = before;
    }
    names
}

/// The value itself and its copies, copies of copies too, each with its place in the list of what it is a copy of.
pub(crate) fn ahead<'a>(view: &GraphView<'a>, from: &'a str) -> Vec<(&'a str, usize)> {
    let mut names = vec![(from, 0)];
    let mut at = 0;
    while let Some((name, _)) = names.get(at).copied() {
        for node in view.readers(name).filter(|n| copied(n) == Some(name)) {
            if names.len() < MOST && names.iter().all(|(known, _)| *known != node.output(0)) {
                names.push((node.output(0), at));
            }
        }
        at += 1;
    }
    names
}

/// The output of the graph that a value becomes, and the names before it: the value's own and of the copies between them. Where
/// the value is one itself, that.
pub(crate) fn output<'a>(view: &GraphView<'a>, from: &'a str) -> Option<(&'a str, Vec<&'a str>)> {
    let names = ahead(view, from);
    let mut at = names.iter().position(|(name, _)| view.is_output(name))?;
    let found = names.get(at)?.0;
    let mut between = Vec::new();
    while let Some((_, before)) = names.get(at).filter(|_| at > 0) {
        at = *before;
        between.extend(names.get(at).map(|(name, _)| *name));
    }
    Some((found, between))
}

/// Past and present are one tensor to the operator, of one type.
///
/// # Errors
/// Names both types.
pub(crate) fn same_type(view: &GraphView, past: &str, present: &str) -> Result<(), CacheRefusal> {
    match (view.data_type(past), view.data_type(present)) {
        (Some(past_type), Some(present_type)) if past_type != present_type => Err(CacheRefusal::TypeChanges {
            past: past.to_owned(),
            past_type,
            present: present.to_owned(),
            present_type,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retro_onnx::{AttributeProto, GraphProto, ValueInfoProto};

    fn cast(from: &str, to: &str, data_type: DataType) -> NodeProto {
        let to_type = AttributeProto::int("to", i64::from(i32::from(data_type)));
        NodeProto::new("", "Cast", "", &[from], &[to]).with(to_type)
    }

    #[test]
    fn copies_are_found_in_both_directions() {
        let graph = GraphProto {
            node: vec![
                cast("past", "half", DataType::Float16),
                NodeProto::new("", "Concat", "", &["half"], &["one"]),
                NodeProto::new("", "Concat", "", &["one", "new"], &["total"]),
                NodeProto::new("", "Identity", "", &["total"], &["same"]),
                NodeProto::new("", "Shape", "", &["total"], &["shape"]),
                cast("total", "present", DataType::Float),
                cast("same", "whole", DataType::Int32),
            ],
            output: vec![ValueInfoProto::tensor("present", DataType::Float, [])],
            ..Default::default()
        };
        let view = GraphView::new(&graph, 21);
        assert_eq!(back(&view, "one"), ["one", "half", "past"]);
        assert_eq!(back(&view, "total"), ["total"]);
        assert_eq!(ahead(&view, "total"), [("total", 0), ("same", 0), ("present", 0)]);
        assert_eq!(output(&view, "total"), Some(("present", vec!["total"])));
        assert_eq!(output(&view, "present"), Some(("present", vec![])));
        assert_eq!(output(&view, "half"), None);
    }

    #[test]
    fn a_circle_ends() {
        let graph = GraphProto {
            node: vec![
                NodeProto::new("", "Identity", "", &["a"], &["b"]),
                NodeProto::new("", "Identity", "", &["b"], &["a"]),
            ],
            ..Default::default()
        };
        let view = GraphView::new(&graph, 21);
        assert!(back(&view, "a").len() <= MOST);
        assert_eq!(output(&view, "a"), None);
    }
}
