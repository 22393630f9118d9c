//! Models of N parallel attention nodes: each has its own caches and state, all share the rows fed.

use prost::Message;
use retro_contract::{DOMAIN, OP_TYPE, OPSET_VERSION, StateElement, attribute, input, output};
use retro_onnx::{
    AttributeProto, DataType, Dimension, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, ValueInfoProto,
};

use super::operator::{AttentionShape, Operator, RetroVariant};

/// Inputs that all nodes share.
const SHARED: [&str; 6] = [
    "query",
    "key",
    "value",
    "seqlens_k",
    "total_sequence_length",
    "retro_length",
];

/// Past and present names of the tensors that a node updates in place: keys and values, then the operator's own state.
pub const STATE: [(usize, usize); 6] = [
    (input::PAST_KEY, output::PRESENT_KEY),
    (input::PAST_VALUE, output::PRESENT_VALUE),
    (input::PAST_PAGE_SUMMARY, output::PRESENT_PAGE_SUMMARY),
    (input::PAST_PAGE_STEPS, output::PRESENT_PAGE_STEPS),
    (input::PAST_OUTPUTS, output::PRESENT_OUTPUTS),
    (input::PAST_LSE, output::PRESENT_LSE),
];

/// The name of node `node`'s input or output.
pub fn name_of(name: &str, node: usize) -> String {
    format!("{name}.{node}")
}

/// A model of `nodes` nodes, serialized.
pub fn model(shape: &AttentionShape, operator: &Operator, nodes: usize) -> Vec<u8> {
    let mut graph = GraphProto {
        name: Some("bench".to_owned()),
        ..Default::default()
    };
    let (inputs, outputs): (&[usize], usize) = match operator {
        Operator::Gqa => (
            &[
                input::QUERY,
                input::KEY,
                input::VALUE,
                input::PAST_KEY,
                input::PAST_VALUE,
                input::SEQLENS_K,
                input::TOTAL_SEQUENCE_LENGTH,
            ],
            3,
        ),
        Operator::Retro(_) => (
            &[
                input::QUERY,
                input::KEY,
                input::VALUE,
                input::PAST_KEY,
                input::PAST_VALUE,
                input::SEQLENS_K,
                input::TOTAL_SEQUENCE_LENGTH,
                input::RETRO_LENGTH,
                input::PAST_PAGE_SUMMARY,
                input::PAST_PAGE_STEPS,
                input::PAST_OUTPUTS,
                input::PAST_LSE,
            ],
            output::COUNT,
        ),
    };
    let typed = |name: &str, plain: &str| {
        // No declared shapes: steps differ in the number of rows, and the operators check them.
        let mut value =
            ValueInfoProto::tensor(name, data_type(plain, shape, operator), std::iter::empty::<Dimension>());
        if let Some(tensor) = value.r#type.as_mut().and_then(|t| t.tensor_type.as_mut()) {
            tensor.shape = None;
        }
        value
    };
    for name in SHARED {
        if inputs.iter().any(|&slot| input::NAMES[slot] == name) {
            graph.input.push(typed(name, name));
        }
    }
    for node in 0..nodes {
        let mut names = vec![String::new(); input::COUNT];
        for &slot in inputs {
            let plain = input::NAMES[slot];
            names[slot] = if SHARED.contains(&plain) {
                plain.to_owned()
            } else {
                let name = name_of(plain, node);
                graph.input.push(typed(&name, plain));
                name
            };
        }
        let used = names.iter().rposition(|n| !n.is_empty()).map_or(0, |last| last + 1);
        names.truncate(used);
        let results: Vec<String> = output::NAMES[..outputs].iter().map(|n| name_of(n, node)).collect();
        graph.output.extend(
            results
                .iter()
                .zip(output::NAMES)
                .map(|(name, plain)| typed(name, plain)),
        );
        let (domain, op_type) = match operator {
            Operator::Gqa => ("com.microsoft", "GroupQueryAttention"),
            Operator::Retro(_) => (DOMAIN, OP_TYPE),
        };
        let mut proto = NodeProto::new(domain, op_type, &format!("node.{node}"), &[], &[]);
        (proto.input, proto.output) = (names, results);
        proto.attribute = attributes(shape, operator);
        graph.node.push(proto);
    }
    let domain = match operator {
        Operator::Gqa => OperatorSetIdProto::new("com.microsoft", 1),
        Operator::Retro(_) => OperatorSetIdProto::new(DOMAIN, OPSET_VERSION),
    };
    let model = ModelProto {
        ir_version: Some(10),
        opset_import: vec![OperatorSetIdProto::new("", 21), domain],
        graph: Some(graph),
        ..Default::default()
    };
    model.encode_to_vec()
}

fn data_type(plain: &str, shape: &AttentionShape, operator: &Operator) -> DataType {
    let state = match operator {
        Operator::Retro(retro) => retro.selection.selector.state_element(),
        Operator::Gqa => StateElement::Cache,
    };
    match plain {
        "seqlens_k" | "total_sequence_length" | "retro_length" | "past_page_steps" | "present_page_steps" => {
            DataType::Int32
        }
        "past_page_summary" | "present_page_summary" if state == StateElement::Byte => DataType::Uint8,
        "past_outputs" | "past_lse" | "present_outputs" | "present_lse" => DataType::Float,
        _ => shape.dtype.onnx(),
    }
}

fn attributes(shape: &AttentionShape, operator: &Operator) -> Vec<AttributeProto> {
    let mut list = vec![
        AttributeProto::int(attribute::NUM_HEADS, shape.heads as i64),
        AttributeProto::int(attribute::KV_NUM_HEADS, shape.kv_heads as i64),
    ];
    if let Operator::Retro(retro) = operator {
        let RetroVariant {
            window,
            budget,
            mode,
            selection,
        } = retro;
        let (ratio, pages) = budget.attributes(retro_contract::limits::BUDGET_MIN_PAGES, shape.page_size);
        list.extend([
            AttributeProto::int(attribute::PAGE_SIZE, shape.page_size as i64),
            AttributeProto::int(attribute::WINDOW, *window as i64),
            AttributeProto::float(attribute::BUDGET_RATIO, ratio),
            AttributeProto::int(attribute::BUDGET_MIN_PAGES, pages as i64),
            AttributeProto::string(attribute::MODE, mode.as_str()),
            AttributeProto::string(attribute::SELECTOR, selection.selector.as_str()),
            AttributeProto::string(attribute::GROUP_SCORE, selection.group_score.as_str()),
        ]);
    }
    list
}
