//! The operator's node: which value goes to which input and output, and its attributes.

use crate::{
    rules::{AttentionMatch, Conversion, Rope},
    settings::Settings,
};
use retro_contract::{
    self as contract, Mode, attribute,
    graph::{PAGE_BUDGET, RETRO_LENGTH, State, past, present},
    input, output,
};
use retro_onnx::{AttributeProto, NodeProto};

/// Whether a node is the operator's.
pub fn is_operator(node: &NodeProto) -> bool {
    node.is(contract::DOMAIN, contract::OP_TYPE)
}

/// Turns an attention's node into the operator's; its name, doc string and notes stay.
pub fn replace(node: &mut NodeProto, conversion: &Conversion, settings: &Settings) {
    let (matched, layer) = (conversion.matched, conversion.attention.layer);
    let mut inputs = vec![String::new(); input::COUNT];
    let mut outputs = vec![String::new(); output::COUNT];
    for (slot, name) in [
        (input::QUERY, matched.query.clone()),
        (input::KEY, matched.key.clone()),
        (input::VALUE, matched.value.clone()),
        (input::PAST_KEY, matched.past_key.clone()),
        (input::PAST_VALUE, matched.past_value.clone()),
        (input::SEQLENS_K, matched.seqlens_k.clone()),
        (input::TOTAL_SEQUENCE_LENGTH, matched.total_sequence_length.clone()),
        (input::COS_CACHE, matched.cos_cache.clone()),
        (input::SIN_CACHE, matched.sin_cache.clone()),
        (input::RETRO_LENGTH, RETRO_LENGTH.to_owned()),
        (input::PAST_PAGE_SUMMARY, past(layer, State::PageSummary)),
        (input::PAST_PAGE_STEPS, past(layer, State::PageSteps)),
        (input::PAST_OUTPUTS, past(layer, State::Outputs)),
        (input::PAST_LSE, past(layer, State::Lse)),
        (input::PAGE_BUDGET, PAGE_BUDGET.to_owned()),
        (input::HEAD_SINK, matched.head_sink.clone()),
    ] {
        inputs[slot] = name;
    }
    for (slot, name) in [
        (output::OUTPUT, matched.output.clone()),
        (output::PRESENT_KEY, matched.present_key.clone()),
        (output::PRESENT_VALUE, matched.present_value.clone()),
        (output::PRESENT_PAGE_SUMMARY, present(layer, State::PageSummary)),
        (output::PRESENT_PAGE_STEPS, present(layer, State::PageSteps)),
        (output::PRESENT_OUTPUTS, present(layer, State::Outputs)),
        (output::PRESENT_LSE, present(layer, State::Lse)),
    ] {
        outputs[slot] = name;
    }
    while inputs.last().is_some_and(String::is_empty) {
        inputs.pop();
    }
    node.input = inputs;
    node.output = outputs;
    node.domain = Some(contract::DOMAIN.to_owned());
    node.op_type = Some(contract::OP_TYPE.to_owned());
    node.overload = None;
    node.attribute = attributes(matched, conversion.mode, settings);
}

fn attributes(matched: &AttentionMatch, mode: Mode, settings: &Settings) -> Vec<AttributeProto> {
    let (ratio, min_pages) = settings.budget.attributes(settings.least_pages(), settings.page_size);
    let (rotary, interleaved) = match matched.rope {
        Rope::Inside { interleaved, .. } => (1, i64::from(interleaved)),
        Rope::None | Rope::Before => (0, 0),
    };
    vec![
        AttributeProto::int(attribute::NUM_HEADS, matched.q_heads),
        AttributeProto::int(attribute::KV_NUM_HEADS, matched.kv_heads),
        AttributeProto::float(attribute::SCALE, matched.scale),
        AttributeProto::float(attribute::SOFTCAP, matched.softcap),
        AttributeProto::int(attribute::DO_ROTARY, rotary),
        AttributeProto::int(attribute::ROTARY_INTERLEAVED, interleaved),
        AttributeProto::int(attribute::LOCAL_WINDOW_SIZE, matched.local_window_size),
        AttributeProto::int(attribute::PAGE_SIZE, settings.page_size as i64),
        AttributeProto::int(attribute::WINDOW, settings.window as i64),
        AttributeProto::float(attribute::BUDGET_RATIO, ratio),
        AttributeProto::int(attribute::BUDGET_MIN_PAGES, min_pages as i64),
        AttributeProto::int(attribute::SINK_PAGES, settings.sink_pages as i64),
        AttributeProto::string(attribute::SELECTOR, settings.selector.as_str()),
        AttributeProto::string(attribute::GROUP_SCORE, settings.group_score.as_str()),
        AttributeProto::float(attribute::SELECTOR_LAMBDA, settings.selector_lambda),
        AttributeProto::float(attribute::SELECTOR_CORRELATION, settings.selector_correlation),
        AttributeProto::int(attribute::SKETCH_BITS, settings.sketch_bits as i64),
        AttributeProto::string(attribute::MODE, mode.as_str()),
    ]
}
