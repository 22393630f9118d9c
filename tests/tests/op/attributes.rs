//! Attributes out of range, and graphs that do not fit the operator, are refused when the session is made.

use prost::Message;
use retro_contract::Selector;
use retro_onnx::{AttributeProto, ModelProto};
use retro_tests::{
    attrs::Attrs,
    host,
    node::{self, Slots},
    tensor::Dtype,
};

fn attributes() -> Vec<AttributeProto> {
    node::attributes(&Attrs::new(4, 2, 32))
}

fn refuse(attributes: Vec<AttributeProto>, says: &[&str]) {
    let error = host::open(&node::retro(attributes, Slots::default(), Dtype::F32)).err();
    let error = error.unwrap_or_else(|| panic!("a session was made, although {says:?}"));
    for word in says {
        assert!(error.contains(word), "the error does not say {word:?}: {error}");
    }
}

fn refuse_value(attribute: AttributeProto, says: &[&str]) {
    let name = attribute.name.clone().expect("a name");
    let mut all = attributes();
    all.retain(|a| a.name != attribute.name);
    all.push(attribute);
    refuse(all, &[&[name.as_str()], says].concat());
}

#[test]
fn good_attributes_make_a_session() {
    for slots in [
        Slots::default(),
        Slots {
            packed: true,
            ..Slots::default()
        },
    ] {
        for &dtype in host::dtypes() {
            host::open(&node::retro(attributes(), slots, dtype)).expect("a session");
        }
    }
}

#[test]
fn numbers_out_of_range() {
    for (name, value) in [
        ("num_heads", 0),
        ("num_heads", -4),
        ("num_heads", 3),
        ("kv_num_heads", 0),
        ("kv_num_heads", 3),
        ("page_size", 2),
        ("page_size", 12),
        ("page_size", 256),
        ("page_size", -16),
        ("sketch_bits", 0),
        ("sketch_bits", 3),
        ("window", 0),
        ("window", 65),
        ("budget_min_pages", -1),
        ("sink_pages", -1),
    ] {
        refuse_value(AttributeProto::int(name, value), &[&value.to_string()]);
    }
    refuse_value(AttributeProto::float("budget_ratio", -0.5), &["-0.5"]);
    refuse_value(AttributeProto::float("budget_ratio", f32::NAN), &["NaN"]);
    refuse_value(AttributeProto::float("budget_ratio", 1.5), &["1.5"]);
    refuse_value(AttributeProto::float("selector_correlation", 1.5), &["1.5"]);
    refuse_value(AttributeProto::float("selector_correlation", -0.5), &["-0.5"]);
}

#[test]
fn unknown_choices() {
    refuse_value(
        AttributeProto::string("selector", "best"),
        &[&["best"], Selector::VALUES].concat(),
    );
    refuse_value(AttributeProto::string("group_score", "sum"), &["sum", "max", "softmax"]);
    refuse_value(
        AttributeProto::string("mode", ""),
        &["retro", "dense", "streaming", "periodic"],
    );
}

/// Text with a NUL inside is not what stands before the NUL.
#[test]
fn text_with_a_nul() {
    for (name, text) in [
        ("selector", "moments\0"),
        ("selector", "bounds\0x"),
        ("group_score", "softmax\0max"),
        ("mode", "dense\0"),
        ("mode", "\0"),
    ] {
        refuse_value(AttributeProto::string(name, text), &["NUL"]);
    }
}

/// Attributes that the operator does not have: of operators that it stands in for, and slips of its own. Whatever their
/// type.
#[test]
fn attributes_of_other_operators_and_slips() {
    for attribute in [
        AttributeProto::int("smooth_softmax", 1),
        AttributeProto::int("is_causal", 1),
        AttributeProto::float("mask_filter_value", -1e4),
        AttributeProto::int("sliding_window", 32),
        AttributeProto::string("page_sizes", "16"),
        AttributeProto::int("widnow", 4),
        AttributeProto::int("sinkPages", 4),
    ] {
        refuse_value(attribute, &["is not one of RetroAttention's", "num_heads", "mode"]);
    }
}

#[test]
fn required_attributes() {
    for name in ["num_heads", "kv_num_heads"] {
        let mut all = attributes();
        all.retain(|a| a.name.as_deref() != Some(name));
        refuse(all, &[name]);
    }
}

#[test]
fn defaults_are_the_contracts() {
    let mut all = attributes();
    all.truncate(2);
    host::open(&node::retro(all, Slots::default(), Dtype::F32)).expect("two attributes suffice");
}

/// State of another type than the selector's: the operator is there for it, so the node says what is wrong.
#[test]
fn state_of_another_type_than_the_selectors() {
    for (selector, state, says) in [
        (
            "sketch",
            Dtype::F32,
            ["past_page_summary is float, expected uint8", "selector is sketch"],
        ),
        (
            "bounds",
            Dtype::U8,
            ["past_page_summary is uint8, expected float", "selector is bounds"],
        ),
    ] {
        let mut all = attributes();
        all.retain(|a| a.name.as_deref() != Some("selector"));
        all.push(AttributeProto::string("selector", selector));
        let model = node::retro_with_state(all, Slots::default(), Dtype::F32, state);
        let error = host::open(&model).err().expect("the session is refused");
        assert!(says.iter().all(|word| error.contains(word)), "{error}");
    }
}

/// Keys in float16 beside queries in float32: ONNX Runtime refuses the graph, with the operator's one type T.
#[test]
fn mixed_types_do_not_load() {
    let mut model = ModelProto::decode(node::retro(attributes(), Slots::default(), Dtype::F32).as_slice()).unwrap();
    let graph = model.graph.as_mut().unwrap();
    let key = graph
        .input
        .iter_mut()
        .find(|v| v.name.as_deref() == Some("key"))
        .unwrap();
    key.r#type.as_mut().unwrap().tensor_type.as_mut().unwrap().elem_type = Some(node::data_type(Dtype::F16).into());
    assert!(host::open(&model.encode_to_vec()).is_err());
}
