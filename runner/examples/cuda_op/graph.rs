//! Graphs of N attention nodes side by side.

use prost::Message;
use retro_contract::{DOMAIN, Mode, OP_TYPE, OPSET_VERSION, attribute, limits};
use retro_onnx::{
    AttributeProto, DataType, Dimension, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    ValueInfoProto,
};

use retro_run::bench::args::PageSelection;

/// Sizes that all nodes share.
#[derive(Clone, Copy, Debug)]
pub struct NodeShape {
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub size: usize,
    pub page: usize,
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
    let mut value = ValueInfoProto::tensor(name, data_type, std::iter::empty::<Dimension>());
    if let Some(tensor) = value.r#type.as_mut().and_then(|t| t.tensor_type.as_mut()) {
        tensor.shape = None;
    }
    value
}

/// The model as bytes.
pub fn model(kind: NodeKind, feeding: Feeding, shape: &NodeShape) -> Vec<u8> {
    let int = DataType::Int32;
    let mut graph = GraphProto {
        name: Some("nodes".to_owned()),
        ..Default::default()
    };
    match feeding {
        Feeding::Direct => graph.input.extend([value("qkv", shape.dtype), value("seqlens_k", int)]),
        Feeding::Steps => {
            graph.input.extend([value("bank", shape.dtype), value("lengths", int)]);
            graph.initializer.push(TensorProto::int32s("one", &[1], &[1]));
            graph
                .initializer
                .push(TensorProto::int32s("rows", &[1], &[BANK as i32]));
            graph
                .node
                .push(NodeProto::new("", "Add", "count", &["lengths", "one"], &["seqlens_k"]));
            graph
                .node
                .push(NodeProto::new("", "Mod", "row", &["seqlens_k", "rows"], &["row"]));
            graph
                .node
                .push(NodeProto::new("", "Gather", "pick", &["bank", "row"], &["qkv"]));
            graph.output.push(value("seqlens_k", int));
            if shape.layers == 0 {
                graph.output.push(value("qkv", shape.dtype));
            }
        }
    }
    graph.input.push(value("total_sequence_length", int));
    if shape.rotary {
        graph
            .input
            .extend([value("cos", shape.dtype), value("sin", shape.dtype)]);
    }
    if kind != NodeKind::Gqa {
        graph
            .input
            .extend([value("retro_length", int), value("page_budget", int)]);
    }
    for layer in 0..shape.layers {
        let name = |name: &str| of_layer(name, layer);
        let cache = [("past_key", "present_key"), ("past_value", "present_value")];
        let (rotary_cos, rotary_sin) = if shape.rotary { ("cos", "sin") } else { ("", "") };
        let past: Vec<String> = cache.iter().map(|c| name(c.0)).collect();
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
        graph.input.extend(past.iter().map(|n| value(n, shape.dtype)));
        let state: Vec<String> = STATE.iter().map(|s| name(s.0)).collect();
        let types = [shape.dtype, int, DataType::Float, DataType::Float];
        graph.output.extend(outputs.iter().map(|n| value(n, shape.dtype)));
        let (domain, op) = match kind {
            NodeKind::Gqa => ("com.microsoft", "GroupQueryAttention"),
            NodeKind::Retro { .. } => {
                inputs.push("retro_length");
                inputs.extend(state.iter().map(String::as_str));
                inputs.push("page_budget");
                for ((names, data_type), past) in STATE.iter().zip(types).zip(&state) {
                    graph.input.push(value(past, data_type));
                    graph.output.push(value(&name(names.1), data_type));
                    outputs.push(name(names.1));
                }
                (DOMAIN, OP_TYPE)
            }
        };
        if kind == NodeKind::Gqa {
            let last = inputs.iter().rposition(|n| !n.is_empty()).unwrap_or(0);
            inputs.truncate(last + 1);
        }
        let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
        let mut node = NodeProto::new(domain, op, &name("attention"), &inputs, &outputs);
        node.attribute = attributes(kind, shape);
        graph.node.push(node);
    }
    let model = ModelProto {
        ir_version: Some(10),
        opset_import: vec![
            OperatorSetIdProto::new("", 21),
            OperatorSetIdProto::new("com.microsoft", 1),
            OperatorSetIdProto::new(DOMAIN, OPSET_VERSION),
        ],
        graph: Some(graph),
        ..Default::default()
    };
    model.encode_to_vec()
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
            AttributeProto::int(attribute::WINDOW, window as i64),
            AttributeProto::int(attribute::SINK_PAGES, limits::SINK_PAGES as i64),
            AttributeProto::string(attribute::SELECTOR, selection.selector.as_str()),
            AttributeProto::string(attribute::GROUP_SCORE, selection.group_score.as_str()),
            AttributeProto::string(attribute::MODE, mode.as_str()),
        ]);
    }
    list
}
