//! Models of N parallel attention nodes: each has its own caches and state, all share the rows fed.

use prost::Message;
use retro_contract::{DOMAIN, OP_TYPE, OPSET_VERSION, StateElement, attribute, input, output};
use retro_onnx::{AttributeProto, DataType, GraphBuilder, ValueInfoProto};

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

/// The name of node `node`'s input or output.
pub fn name_of(name: &str, node: usize) -> String {
    format!("{name}.{node}")
}

/// A model of `nodes` nodes, serialized.
pub fn model(shape: &AttentionShape, operator: &Operator, nodes: usize) -> Vec<u8> {
    let mut b = GraphBuilder::new("bench");
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
    let (domain, op_type, version) = match operator {
        Operator::Gqa => ("com.microsoft", "GroupQueryAttention", 1),
        Operator::Retro(_) => (DOMAIN, OP_TYPE, OPSET_VERSION),
    };
    // No declared shapes: steps differ in the number of rows, and the operators check them.
    let value = |name: &str, plain: &str| ValueInfoProto::unshaped(name, data_type(plain, shape, operator));
    for name in SHARED {
        if inputs.iter().any(|&slot| input::NAMES[slot] == name) {
            b.input(value(name, name));
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
                b.input(value(&name, plain));
                name
            };
        }
        let used = names.iter().rposition(|n| !n.is_empty()).map_or(0, |last| last + 1);
        let names: Vec<&str> = names[..used].iter().map(String::as_str).collect();
        let results: Vec<String> = output::NAMES[..outputs].iter().map(|n| name_of(n, node)).collect();
        for (name, plain) in results.iter().zip(output::NAMES) {
            b.output(value(name, plain));
        }
        let results: Vec<&str> = results.iter().map(String::as_str).collect();
        let attention = b.node(op_type, &names).domain(domain);
        let attention = attention.attributes(attributes(shape, operator));
        attention.named(&format!("node.{node}"), &results);
    }
    b.into_model(10, &[("", 21), (domain, version)]).encode_to_vec()
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
            AttributeProto::int(attribute::SKETCH_BITS, shape.sketch_bits as i64),
        ]);
    }
    list
}
