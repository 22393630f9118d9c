//! Graphs of N attention nodes side by side.

use prost::Message;
use retro_contract::{DOMAIN, Mode, OP_TYPE, OPSET_VERSION, StateElement, attribute, limits};
use retro_onnx::{AttributeProto, DataType, GraphBuilder, TensorProto, ValueInfoProto};

use retro_run::bench::args::PageSelection;

/// Sizes that all nodes share.
#[derive(Clone, Copy, Debug)]
pub struct NodeShape {
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub size: usize,
    pub page: usize,
    /// Bits of an element of a sketch.
    pub sketch_bits: usize,
    pub rotary: bool,
    pub dtype: DataType,
}

impl NodeShape {
    /// Width of a token's packed query, key and value.
    pub fn packed(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.size
    }
}

/// Which operator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NodeKind {
    Gqa,
    Retro {
        mode: Mode,
        selection: PageSelection,
        window: usize,
    },
}

/// How queries, keys and values reach the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feeding {
    /// Inputs `qkv` and `seqlens_k`.
    Direct,
    /// Decoding without the host: `lengths` is counted up in place, and picks rows of `bank`.
    Steps,
}

/// Rows of `bank`.
pub const BANK: usize = 16;
/// Past and present names of a Retro node's state, without the layer.
pub const STATE: [(&str, &str); 4] = [
    ("past_page_summary", "present_page_summary"),
    ("past_page_steps", "present_page_steps"),
    ("past_outputs", "present_outputs"),
    ("past_lse", "present_lse"),
];

pub fn of_layer(name: &str, layer: usize) -> String {
    format!("{name}.{layer}")
}

fn value(name: &str, data_type: DataType) -> ValueInfoProto {
    ValueInfoProto::unshaped(name, data_type)
}

/// The model as bytes.
pub fn model(kind: NodeKind, feeding: Feeding, shape: &NodeShape) -> Vec<u8> {
    let int = DataType::Int32;
    let mut b = GraphBuilder::new("nodes");
    match feeding {
        Feeding::Direct => {
            b.input(value("qkv", shape.dtype));
            b.input(value("seqlens_k", int));
        }
        Feeding::Steps => {
            b.input(value("bank", shape.dtype));
            b.input(value("lengths", int));
            b.initializer(TensorProto::int32s("one", &[1], &[1]));
            b.initializer(TensorProto::int32s("rows", &[1], &[BANK as i32]));
            b.node("Add", &["lengths", "one"]).named("count", &["seqlens_k"]);
            b.node("Mod", &["seqlens_k", "rows"]).named("row", &["row"]);
            b.node("Gather", &["bank", "row"]).named("pick", &["qkv"]);
            b.output(value("seqlens_k", int));
            if shape.layers == 0 {
                b.output(value("qkv", shape.dtype));
            }
        }
    }
    b.input(value("total_sequence_length", int));
    if shape.rotary {
        b.input(value("cos", shape.dtype));
        b.input(value("sin", shape.dtype));
    }
    if kind != NodeKind::Gqa {
        b.input(value("retro_length", int));
        b.input(value("page_budget", int));
    }
    for layer in 0..shape.layers {
        attention(&mut b, kind, shape, layer);
    }
    let opsets = [("", 21), ("com.microsoft", 1), (DOMAIN, OPSET_VERSION)];
    b.into_model(10, &opsets).encode_to_vec()
}

/// One node with its caches and state.
fn attention(b: &mut GraphBuilder, kind: NodeKind, shape: &NodeShape, layer: usize) {
    let name = |name: &str| of_layer(name, layer);
    let cache = [("past_key", "present_key"), ("past_value", "present_value")];
    let (rotary_cos, rotary_sin) = if shape.rotary { ("cos", "sin") } else { ("", "") };
    let past = cache.map(|c| name(c.0));
    let mut inputs = vec![
        "qkv",
        "",
        "",
        &past[0],
        &past[1],
        "seqlens_k",
        "total_sequence_length",
        rotary_cos,
        rotary_sin,
    ];
    let mut outputs = vec![name("output"), name(cache[0].1), name(cache[1].1)];
    past.iter().for_each(|n| b.input(value(n, shape.dtype)));
    outputs.iter().for_each(|n| b.output(value(n, shape.dtype)));
    let state = STATE.map(|s| name(s.0));
    let (domain, op_type) = match kind {
        NodeKind::Gqa => {
            let last = inputs.iter().rposition(|n| !n.is_empty()).unwrap_or(0);
            inputs.truncate(last + 1);
            ("com.microsoft", "GroupQueryAttention")
        }
        NodeKind::Retro { selection, .. } => {
            let own = match selection.selector.state_element() {
                StateElement::Cache => shape.dtype,
                StateElement::Byte => DataType::Uint8,
            };
            let types = [own, DataType::Int32, DataType::Float, DataType::Float];
            inputs.push("retro_length");
            inputs.extend(state.iter().map(String::as_str));
            inputs.push("page_budget");
            for ((names, data_type), past) in STATE.iter().zip(types).zip(&state) {
                b.input(value(past, data_type));
                b.output(value(&name(names.1), data_type));
                outputs.push(name(names.1));
            }
            (DOMAIN, OP_TYPE)
        }
    };
    let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
    let node = b.node(op_type, &inputs).domain(domain);
    let node = node.attributes(attributes(kind, shape));
    node.named(&name("attention"), &outputs);
}

fn attributes(kind: NodeKind, shape: &NodeShape) -> Vec<AttributeProto> {
    let mut list = vec![
        AttributeProto::int(attribute::NUM_HEADS, shape.heads as i64),
        AttributeProto::int(attribute::KV_NUM_HEADS, shape.kv_heads as i64),
        AttributeProto::int(attribute::DO_ROTARY, shape.rotary.into()),
    ];
    if let NodeKind::Retro {
        mode,
        selection,
        window,
    } = kind
    {
        list.extend([
            AttributeProto::int(attribute::PAGE_SIZE, shape.page as i64),
            AttributeProto::int(attribute::SKETCH_BITS, shape.sketch_bits as i64),
            AttributeProto::int(attribute::WINDOW, window as i64),
            AttributeProto::int(attribute::SINK_PAGES, limits::SINK_PAGES as i64),
            AttributeProto::string(attribute::SELECTOR, selection.selector.as_str()),
            AttributeProto::string(attribute::GROUP_SCORE, selection.group_score.as_str()),
            AttributeProto::string(attribute::MODE, mode.as_str()),
        ]);
    }
    list
}
