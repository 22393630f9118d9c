//! State named and shaped as onnxruntime-genai's recurrent state, which it zeroes, carries from call to call and knows nothing of.
//!
//! That has two tensors a layer, `past_key_values.N.conv_state` of rank 3 and `past_key_values.N.recurrent_state` of rank 4, which come
//! back as `present.N.*`. All their dimensions but the batch are numbers, and the same in all layers. So the page summary is the
//! recurrent state, as it is; page steps, outputs, their log-sum-exps and the window share the other one:
//!
//! | w | conv_state |
//! |---|---|
//! | 1 | page steps, int32 `[B, Hkv, P]`. Outputs are not read again |
//! | more | float32 `[B, 1, X]`: page steps, outputs, log-sum-exps, the window, which layers behind the first leave alone |
//!
//! Whole numbers up to 2^24 are whole in float32: page steps and positions are below the context, token ids below a vocabulary.
//!
//! One buffer is bound as past and present. That is safe: one node reads all of a past before anything can be made of it.

use super::{Error, operator_node::is_operator};
use crate::{
    host_state::{CONV, RECURRENT, is_state, names},
    rules::Conversion,
    settings::Settings,
};
use retro_contract::{
    SKETCH_BLOCK, StateElement,
    graph::{PAST_WINDOW, PAST_WINDOW_EMBEDS, PRESENT_WINDOW, State, past},
    input, output, pages_for,
};
use retro_onnx::{DataType, Dimension, GraphBuilder, GraphProto, NodeProto, ValueInfoProto};

/// From here on Split takes its sizes as an input.
const SPLIT_OPSET: i64 = 13;
/// Float32 holds every whole number below this.
const MOST_CONTEXT: usize = 1 << 24;

/// Sizes of a layer's state.
#[derive(Clone, Debug, PartialEq)]
struct LayerSizes {
    batch: Dimension,
    summary_type: DataType,
    /// Behind the batch.
    summary: Vec<i64>,
    kv_heads: i64,
    pages: i64,
    /// R, Hq, D.
    outputs: [i64; 3],
}

/// Renames and packs the state of a converted graph. `context`: tokens that it is made for.
///
/// # Errors
/// Layers have state of different or open sizes, or names are taken.
pub fn name_state(
    graph: &mut GraphProto,
    conversions: &[Conversion],
    context: usize,
    opset: i64,
    settings: &Settings,
    b: &mut GraphBuilder,
) -> Result<(), Error> {
    let keeps_window = settings.keeps_window_in_graph();
    if keeps_window && context >= MOST_CONTEXT {
        return Err(Error::HostContext(context));
    }
    if graph.input.iter().any(|i| i.name() == PAST_WINDOW_EMBEDS) {
        return Err(Error::HostEmbeds);
    }
    let layers: Vec<usize> = conversions.iter().map(|c| c.attention.layer).collect();
    let mut all_sizes = layers
        .iter()
        .map(|&layer| LayerSizes::of(graph, layer, context, settings));
    let sizes = all_sizes.next().ok_or(Error::NoAttention)??;
    for other in all_sizes {
        if other? != sizes {
            return Err(Error::HostLayers);
        }
    }
    let mut state = HostState {
        window: window_columns(graph),
        opset,
        sizes,
        inputs: Vec::new(),
        outputs: Vec::new(),
        front: Vec::new(),
        back: Vec::new(),
    };
    graph.input.retain(|i| !i.name().starts_with("past_retro."));
    graph.output.retain(|o| !o.name().starts_with("present_retro."));
    b.set_prefix("retro/genai/");
    let unread = (!keeps_window).then(|| state.unread_outputs(b, graph)).transpose()?;
    for (place, &layer) in layers.iter().enumerate() {
        let summary = past(layer, State::PageSummary);
        let mut nodes = graph.node.iter_mut();
        let operator = nodes.find(|n| n.input(input::PAST_PAGE_SUMMARY) == summary);
        let operator = operator.ok_or(Error::NoAttention)?;
        state.recurrent(operator, layer);
        match &unread {
            Some(unread) => state.steps(b, operator, layer, unread),
            None => state.packed(b, operator, layer, place == 0),
        }
    }
    let taken = |value: &&ValueInfoProto| {
        let mut known = graph.input.iter().chain(&graph.output);
        known.any(|k| k.name() == value.name() || is_state(k.name()))
    };
    if let Some(value) = state.inputs.iter().chain(&state.outputs).find(taken) {
        return Err(Error::HostNameTaken(value.name().to_owned()));
    }
    graph.input.append(&mut state.inputs);
    graph.output.append(&mut state.outputs);
    graph.node.splice(0..0, state.front);
    graph.node.append(&mut state.back);
    graph.initializer.append(&mut b.take_initializers());
    Ok(())
}

/// Numbers that the window's state has of a sequence; 0 where the graph keeps none.
fn window_columns(graph: &GraphProto) -> i64 {
    let declared = graph.input.iter().find(|i| i.name() == PAST_WINDOW);
    let columns = declared.and_then(ValueInfoProto::dims).and_then(|dims| dims.get(1));
    columns.and_then(Dimension::fixed).unwrap_or(0)
}

impl LayerSizes {
    /// Of a layer whose state has the contract's names.
    fn of(graph: &GraphProto, layer: usize, context: usize, settings: &Settings) -> Result<Self, Error> {
        let declared = |state: State| {
            let name = past(layer, state);
            let value = graph
                .input
                .iter()
                .find(|i| i.name() == name)
                .ok_or(Error::NoAttention)?;
            let dims = value.dims().unwrap_or_default().to_vec();
            let data_type = value.data_type().unwrap_or(DataType::Undefined);
            Ok::<_, Error>((name, data_type, dims))
        };
        let number = |name: &str, dims: &[Dimension], axis: usize| {
            let size = dims.get(axis).and_then(Dimension::fixed);
            size.ok_or_else(|| Error::HostSize(name.to_owned()))
        };
        let pages = pages_for(context, settings.page_size);
        let (name, summary_type, dims) = declared(State::PageSummary)?;
        let kv_heads = number(&name, &dims, 1)?;
        let summary = match settings.selector.state_element() {
            // Two vectors a page: the rank is one too many.
            StateElement::Cache => vec![kv_heads, 2 * pages as i64, number(&name, &dims, 4)?],
            StateElement::Byte => vec![
                kv_heads,
                context.div_ceil(SKETCH_BLOCK) as i64,
                number(&name, &dims, 3)?,
            ],
        };
        let (name, _, dims) = declared(State::Outputs)?;
        let mut outputs = [0; 3];
        for (axis, size) in outputs.iter_mut().enumerate() {
            *size = number(&name, &dims, axis + 1)?;
        }
        Ok(Self {
            batch: dims.first().cloned().unwrap_or_default(),
            summary_type,
            summary,
            kv_heads,
            pages: pages as i64,
            outputs,
        })
    }
}

/// State under its host's names, and the nodes that it needs.
struct HostState {
    sizes: LayerSizes,
    /// Numbers of the window.
    window: i64,
    opset: i64,
    inputs: Vec<ValueInfoProto>,
    outputs: Vec<ValueInfoProto>,
    /// Nodes before all others, and behind them.
    front: Vec<NodeProto>,
    back: Vec<NodeProto>,
}

impl HostState {
    fn declare(&mut self, [past, present]: &[String; 2], data_type: DataType, sizes: &[i64]) {
        let dims = || std::iter::once(self.sizes.batch.clone()).chain(sizes.iter().map(|&size| size.into()));
        let (taken, given) = (
            ValueInfoProto::tensor(past, data_type, dims().collect::<Vec<_>>()),
            ValueInfoProto::tensor(present, data_type, dims().collect::<Vec<_>>()),
        );
        self.inputs.push(taken);
        self.outputs.push(given);
    }

    /// The page summary.
    fn recurrent(&mut self, operator: &mut NodeProto, layer: usize) {
        let names = names(layer, RECURRENT);
        let (data_type, sizes) = (self.sizes.summary_type, self.sizes.summary.clone());
        self.declare(&names, data_type, &sizes);
        let [past, present] = names;
        set(&mut operator.input, input::PAST_PAGE_SUMMARY, past);
        set(&mut operator.output, output::PRESENT_PAGE_SUMMARY, present);
    }

    /// Outputs and log-sum-exps that are written and not read: zeros for those that come in, as many as there are sequences.
    fn unread_outputs(&mut self, b: &mut GraphBuilder, graph: &GraphProto) -> Result<[String; 2], Error> {
        let operator = graph.node.iter().find(|n| is_operator(n));
        let cache = operator.ok_or(Error::NoAttention)?.input(input::PAST_KEY).to_owned();
        let [_, heads, size] = self.sizes.outputs;
        let first = b.int64s("first", &[1], &[0]);
        let shape = b.node("Shape", &[&cache]).output("cache_shape");
        let batch = b.node("Gather", &[&shape, &first]).output("batch");
        let zeros = [("outputs", vec![1, heads, size]), ("lse", vec![1, heads])].map(|(base, sizes)| {
            let sizes = b.int64s(&format!("{base}_sizes"), &[sizes.len() as i64], &sizes);
            let shape = b
                .node("Concat", &[&batch, &sizes])
                .int("axis", 0)
                .output(&format!("{base}_shape"));
            b.node("ConstantOfShape", &[&shape]).output(base)
        });
        self.front.append(&mut b.take_nodes());
        Ok(zeros)
    }

    /// The page steps alone.
    fn steps(&mut self, b: &mut GraphBuilder, operator: &mut NodeProto, layer: usize, unread: &[String; 2]) {
        let names = names(layer, CONV);
        let sizes = [self.sizes.kv_heads, self.sizes.pages];
        self.declare(&names, DataType::Int32, &sizes);
        let [past, present] = names;
        set(&mut operator.input, input::PAST_PAGE_STEPS, past);
        set(&mut operator.output, output::PRESENT_PAGE_STEPS, present);
        let [outputs, lse] = unread;
        set(&mut operator.input, input::PAST_OUTPUTS, outputs.clone());
        set(&mut operator.input, input::PAST_LSE, lse.clone());
        set(
            &mut operator.output,
            output::PRESENT_OUTPUTS,
            b.fresh_name("outputs_after"),
        );
        set(&mut operator.output, output::PRESENT_LSE, b.fresh_name("lse_after"));
    }

    /// All but the page summary. `first`: the layer keeps the window.
    fn packed(&mut self, b: &mut GraphBuilder, operator: &mut NodeProto, layer: usize, first: bool) {
        let names = names(layer, CONV);
        let [ring, heads, size] = self.sizes.outputs;
        let parts = [
            self.sizes.kv_heads * self.sizes.pages,
            ring * heads * size,
            ring * heads,
            self.window,
        ];
        self.declare(&names, DataType::Float, &[1, parts.iter().sum()]);
        b.set_prefix(format!("retro/genai/layer.{layer}/"));
        let [steps, outputs, lse, window] = self.split(b, &names[0], &parts);
        let steps = b.cast(&steps, DataType::Int32, "page_steps");
        if first {
            let flat = b.int64s("window_shape", &[2], &[0, -1]);
            let alone = b.node("Reshape", &[&window, &flat]).output("window_alone");
            b.cast(&alone, DataType::Int32, "window");
            b.rename_last_output(PAST_WINDOW);
        }
        self.front.append(&mut b.take_nodes());
        for (slot, name) in [
            (input::PAST_PAGE_STEPS, steps),
            (input::PAST_OUTPUTS, outputs),
            (input::PAST_LSE, lse),
        ] {
            set(&mut operator.input, slot, name);
        }
        let after = ["steps_after", "outputs_after", "lse_after"].map(|base| b.fresh_name(base));
        let slots = [output::PRESENT_PAGE_STEPS, output::PRESENT_OUTPUTS, output::PRESENT_LSE];
        for (slot, name) in slots.into_iter().zip(&after) {
            set(&mut operator.output, slot, name.clone());
        }
        let [steps, outputs, lse] = &after;
        let steps = b.cast(steps, DataType::Float, "steps_as_float");
        let window = if first {
            let flat = b.int64s("window_after_shape", &[3], &[0, 1, -1]);
            let float = b.cast(PRESENT_WINDOW, DataType::Float, "window_as_float");
            b.node("Reshape", &[&float, &flat]).output("window_after")
        } else {
            window
        };
        let name = b.fresh_name("state_after");
        let joined = b.node("Concat", &[&steps, outputs, lse, &window]).int("axis", 2);
        joined.named(&name, &[&names[1]]);
        self.back.append(&mut b.take_nodes());
    }

    /// Cuts a value of rank 3 along its last axis.
    fn split(&self, b: &mut GraphBuilder, from: &str, sizes: &[i64; 4]) -> [String; 4] {
        let parts = ["steps_part", "outputs_part", "lse_part", "window_part"].map(|base| b.fresh_name(base));
        let outputs: Vec<&str> = parts.iter().map(String::as_str).collect();
        let name = b.fresh_name("parts");
        if self.opset >= SPLIT_OPSET {
            let sizes = b.int64s("part_sizes", &[4], sizes);
            b.node("Split", &[from, &sizes]).int("axis", 2).named(&name, &outputs);
        } else {
            let node = b.node("Split", &[from]).int("axis", 2).ints("split", sizes);
            node.named(&name, &outputs);
        }
        parts
    }
}

fn set(names: &mut [String], slot: usize, name: String) {
    if let Some(place) = names.get_mut(slot) {
        *place = name;
    }
}
