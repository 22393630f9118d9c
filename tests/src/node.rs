//! Models of one attention node.

use prost::Message;
use retro_contract::{DOMAIN, OP_TYPE, OPSET_VERSION, attribute, input, output};
use retro_onnx::{AttributeProto, DataType, GraphBuilder, ValueInfoProto};

use crate::{attrs::Attrs, tensor::Dtype};

/// Which of the optional inputs the node has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slots {
    /// Query, key and value in one input.
    pub packed: bool,
    pub rotary: bool,
    pub page_budget: bool,
    pub head_sink: bool,
}

impl Slots {
    fn has(self, slot: usize) -> bool {
        match slot {
            input::KEY | input::VALUE => !self.packed,
            input::COS_CACHE | input::SIN_CACHE => self.rotary,
            input::PAGE_BUDGET => self.page_budget,
            input::HEAD_SINK => self.head_sink,
            // With step_rows alone.
            input::RETRO_COUNT => false,
            _ => true,
        }
    }
}

pub fn data_type(dtype: Dtype) -> DataType {
    match dtype {
        Dtype::F32 => DataType::Float,
        Dtype::F16 => DataType::Float16,
        Dtype::Bf16 => DataType::Bfloat16,
        Dtype::I32 => DataType::Int32,
        Dtype::I64 => DataType::Int64,
        Dtype::U8 => DataType::Uint8,
    }
}

fn slot_type(name: &str, dtype: Dtype, state: Dtype) -> DataType {
    match name {
        "seqlens_k"
        | "total_sequence_length"
        | "retro_length"
        | "past_page_steps"
        | "present_page_steps"
        | "page_budget" => DataType::Int32,
        "past_page_summary" | "present_page_summary" => data_type(state),
        "past_outputs" | "past_lse" | "present_outputs" | "present_lse" => DataType::Float,
        _ => data_type(dtype),
    }
}

/// The node's attributes, every one written out.
pub fn attributes(a: &Attrs) -> Vec<AttributeProto> {
    vec![
        AttributeProto::int(attribute::NUM_HEADS, a.heads as i64),
        AttributeProto::int(attribute::KV_NUM_HEADS, a.kv_heads as i64),
        AttributeProto::float(attribute::SCALE, a.scale),
        AttributeProto::float(attribute::SOFTCAP, a.softcap),
        AttributeProto::int(attribute::DO_ROTARY, a.do_rotary.into()),
        AttributeProto::int(attribute::ROTARY_INTERLEAVED, a.rotary_interleaved.into()),
        AttributeProto::int(attribute::LOCAL_WINDOW_SIZE, a.local_window_size),
        AttributeProto::int(attribute::PAGE_SIZE, a.page as i64),
        AttributeProto::int(attribute::WINDOW, a.window as i64),
        AttributeProto::float(attribute::BUDGET_RATIO, a.budget_ratio),
        AttributeProto::int(attribute::BUDGET_MIN_PAGES, a.budget_min_pages as i64),
        AttributeProto::int(attribute::SINK_PAGES, a.sink_pages as i64),
        AttributeProto::string(attribute::SELECTOR, a.selector.as_str()),
        AttributeProto::string(attribute::GROUP_SCORE, a.group_score.as_str()),
        AttributeProto::float(attribute::SELECTOR_LAMBDA, a.lambda),
        AttributeProto::float(attribute::SELECTOR_CORRELATION, a.correlation),
        AttributeProto::int(attribute::SKETCH_BITS, a.sketch_bits as i64),
        AttributeProto::string(attribute::MODE, a.mode.as_str()),
    ]
}

/// One RetroAttention node whose inputs and outputs are the graph's, under the operator's own names; its selector's
/// state has the caches' type.
pub fn retro(attributes: Vec<AttributeProto>, slots: Slots, dtype: Dtype) -> Vec<u8> {
    retro_with_state(attributes, slots, dtype, dtype)
}

/// As [`retro`], with a selector's state of type `state`.
pub fn retro_with_state(attributes: Vec<AttributeProto>, slots: Slots, dtype: Dtype, state: Dtype) -> Vec<u8> {
    let inputs: Vec<&str> = (0..input::COUNT)
        .map(|slot| if slots.has(slot) { input::NAMES[slot] } else { "" })
        .collect();
    one_node(
        (DOMAIN, OP_TYPE, OPSET_VERSION),
        attributes,
        &inputs,
        &output::NAMES,
        (dtype, state),
    )
}

/// The names of GroupQueryAttention's inputs, under those of RetroAttention where both have the notion.
pub const GQA_INPUTS: [&str; 12] = [
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "seqlens_k",
    "total_sequence_length",
    "cos_cache",
    "sin_cache",
    "",
    "",
    "head_sink",
];

/// One GroupQueryAttention node with the same attributes: what a dense node must agree with.
pub fn gqa(a: &Attrs, slots: Slots, dtype: Dtype) -> Vec<u8> {
    let inputs = GQA_INPUTS.map(|name| {
        let slot = input::NAMES.iter().position(|n| *n == name);
        if slot.is_some_and(|slot| slots.has(slot)) {
            name
        } else {
            ""
        }
    });
    let attributes = attributes(a).into_iter().take(7).collect();
    let operator = ("com.microsoft", "GroupQueryAttention", 1);
    one_node(operator, attributes, &inputs, &output::NAMES[..3], (dtype, dtype))
}

/// A model of one node whose inputs and outputs are the graph's. `operator`: domain, type and version.
fn one_node(
    (domain, op_type, version): (&str, &str, i64),
    attributes: Vec<AttributeProto>,
    inputs: &[&str],
    outputs: &[&str],
    (dtype, state): (Dtype, Dtype),
) -> Vec<u8> {
    let mut b = GraphBuilder::new("one_node");
    let value = |name: &str| ValueInfoProto::unshaped(name, slot_type(name, dtype, state));
    let present = |name: &&&str| !name.is_empty();
    inputs.iter().filter(present).for_each(|name| b.input(value(name)));
    outputs.iter().filter(present).for_each(|name| b.output(value(name)));
    let last = inputs.iter().rposition(|name| !name.is_empty()).expect("inputs");
    let node = b.node(op_type, &inputs[..=last]).domain(domain);
    node.attributes(attributes).named("node", outputs);
    b.into_model(10, &[("", 21), (domain, version)]).encode_to_vec()
}
