//! A model's own functions. ONNX Runtime takes an operator's kernel before a function of the same name, so a node that a rule knows
//! is that operator; all others are what their bodies say, which no rule reads.

use super::unsupported;
use crate::prove::OperatorRefusal;
use retro_onnx::{
    FunctionProto, GraphProto, ModelProto, NodeProto,
    graph::{GraphView, subgraphs},
};
use std::collections::{HashMap, HashSet};

pub struct Functions<'a> {
    by_name: HashMap<(&'a str, &'a str), &'a FunctionProto>,
}

impl<'a> Functions<'a> {
    pub fn of(model: &'a ModelProto) -> Self {
        let domain = |f: &'a FunctionProto| if f.domain() == "ai.onnx" { "" } else { f.domain() };
        let named = |f: &'a FunctionProto| ((domain(f), f.name()), f);
        Self {
            by_name: model.functions.iter().map(named).collect(),
        }
    }

    fn get(&self, node: &NodeProto) -> Option<&'a FunctionProto> {
        self.by_name.get(&(node.op_domain(), node.op_type())).copied()
    }

    /// All functions but those that only nodes that are known as operators call.
    pub fn unknown(
        &self,
        model: &'a ModelProto,
        graph: &'a GraphProto,
        known: &HashSet<usize>,
    ) -> Vec<&'a FunctionProto> {
        let calls = |of_known: bool| {
            let nodes = graph.node.iter().enumerate();
            let nodes = nodes.filter(|(index, _)| known.contains(index) == of_known);
            self.called(nodes.map(|(_, node)| node).collect())
        };
        let (by_known, by_others) = (calls(true), calls(false));
        let has = |of: &[&FunctionProto], f: &FunctionProto| of.iter().any(|other| std::ptr::eq(*other, f));
        let functions = model.functions.iter();
        functions.filter(|f| !has(&by_known, f) || has(&by_others, f)).collect()
    }

    /// Functions that nodes call, and that those call.
    fn called(&self, nodes: Vec<&'a NodeProto>) -> Vec<&'a FunctionProto> {
        let mut found: Vec<&FunctionProto> = Vec::new();
        let mut open = nodes;
        while let Some(node) = open.pop() {
            open.extend(subgraphs(node).flat_map(|g| &g.node));
            if let Some(function) = self.get(node)
                && !found.iter().any(|f| std::ptr::eq(*f, function))
            {
                found.push(function);
                open.extend(&function.node);
            }
        }
        found
    }

    /// Why a call whose function holds the Softmax of an attention that is otherwise in the graph stays as it is.
    pub fn softmax(&self, view: &GraphView, node: &NodeProto) -> Option<OperatorRefusal> {
        let function = self.get(node)?;
        let mut inside = self.called(function.node.iter().collect());
        inside.push(function);
        let softmax = |f: &&FunctionProto| f.node.iter().any(|n| n.is("", "Softmax"));
        if !inside.iter().any(softmax) || !unsupported::weighs_values(view, node) {
            return None;
        }
        // A whole attention in the function is named as such.
        let whole = |f: &&FunctionProto| {
            let body = GraphProto {
                node: f.node.clone(),
                ..Default::default()
            };
            let view = GraphView::new(&body, 0);
            body.node.iter().any(|n| unsupported::attention(&view, n).is_some())
        };
        if inside.iter().any(whole) {
            return None;
        }
        Some(OperatorRefusal::SoftmaxInFunction {
            function: function.name().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::{SampleCalls, find_attention};

    fn function(domain: &str, name: &str, nodes: &[NodeProto]) -> FunctionProto {
        FunctionProto {
            name: Some(name.into()),
            domain: Some(domain.into()),
            node: nodes.to_vec(),
            ..Default::default()
        }
    }

    fn said(nodes: &[NodeProto], functions: Vec<FunctionProto>) -> Vec<String> {
        let graph = GraphProto {
            node: nodes.to_vec(),
            ..Default::default()
        };
        let model = ModelProto {
            graph: Some(graph),
            functions,
            ..Default::default()
        };
        let view = GraphView::new(model.graph.as_ref().unwrap(), 21);
        let found = find_attention(&model, &SampleCalls::new(&view, None));
        found
            .into_iter()
            .filter_map(|a| Some(a.found.err()?.to_string()))
            .collect()
    }

    fn softmax() -> NodeProto {
        NodeProto::new("", "Softmax", "softmax", &["s"], &["w"])
    }

    fn weighed() -> NodeProto {
        NodeProto::new("", "MatMul", "weighed", &["w", "v"], &["y"])
    }

    #[test]
    fn a_softmax_in_a_function_is_an_attention_where_it_weighs_values() {
        let call = NodeProto::new("own", "Soft", "call", &["s"], &["w"]);
        let inner = NodeProto::new("own", "Inner", "inner", &["s"], &["w"]);
        for functions in [
            vec![function("own", "Soft", &[softmax()])],
            vec![
                function("own", "Soft", &[inner]),
                function("own", "Inner", &[softmax()]),
            ],
        ] {
            let why = said(&[call.clone(), weighed()], functions.clone());
            assert!(
                why.len() == 1 && why[0].contains("its Softmax is in the model's function Soft"),
                "{why:?}"
            );
            assert_eq!(
                said(std::slice::from_ref(&call), functions).len(),
                0,
                "it weighs nothing"
            );
        }
    }

    #[test]
    fn an_attention_in_a_function_in_a_function_is_named() {
        let call = NodeProto::new("own", "Layer", "call", &["x"], &["y"]);
        let inner = NodeProto::new("own", "Attend", "inner", &["s"], &["y"]);
        let functions = vec![
            function("own", "Layer", &[inner]),
            function("own", "Attend", &[softmax(), weighed()]),
        ];
        let why = said(&[call], functions);
        assert!(
            why.len() == 1 && why[0].contains("in the model's function Attend") && why[0].contains("inline"),
            "{why:?}"
        );
    }

    /// ONNX Runtime has kernels for these: the function is for runtimes that don't.
    #[test]
    fn functions_of_known_operators_are_not_searched() {
        let call = NodeProto::new("com.microsoft", "GroupQueryAttention", "call", &["q"], &["y"]);
        let body = function("com.microsoft", "GroupQueryAttention", &[softmax(), weighed()]);
        let why = said(&[call], vec![body]);
        assert!(why.len() == 1 && !why[0].contains("function"), "{why:?}");
    }
}
