//! From attentions to `ai.retro::RetroAttention` nodes: the nodes, the state that the graph takes and returns, the metadata.

mod cache_aliases;
mod decomposed;
mod mask_check;
mod prune;
mod sequence_lengths;
mod single;

use crate::{
    logits::{self, Logits},
    rules::{AttentionMatch, Conversion, LengthSource, Rope},
    settings::Settings,
    verify::graph_facts,
};
use anyhow::{Context, Result, ensure};
pub(crate) use mask_check::depends as reads_mask;
use retro_contract::{
    self as contract, Mode, attribute,
    graph::{PAGE_BUDGET, RETRO_LENGTH, State, past, present},
    input, metadata, output, pages_for, ring_slots,
};
use retro_onnx::{
    AttributeProto, DataType, Dimension, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    ValueInfoProto, graph::GraphView,
};
use std::collections::{HashMap, HashSet};

/// The first version of the format in which an initializer that is an input too is a default, as `retro_length` has one.
const FEEDABLE_INITIALIZERS: i64 = 4;

/// Rewrites the model's attentions, which must be of this model.
///
/// # Errors
/// A name that the converted model needs is taken.
pub fn rewrite(model: &mut ModelProto, conversions: &[Conversion], logits: &Logits, settings: &Settings) -> Result<()> {
    let opset = model.onnx_opset();
    let version = model.ir_version.unwrap_or(FEEDABLE_INITIALIZERS);
    let graph = model.graph.as_mut().context("the model has no graph")?;
    let names = Names::free_in(&GraphView::new(graph, opset), conversions)?;
    if version < FEEDABLE_INITIALIZERS {
        // All initializers were inputs there, and none could be fed.
        let constant: HashSet<String> = graph.initializer.iter().map(|t| t.name().to_owned()).collect();
        graph.input.retain(|i| !constant.contains(i.name()));
        model.ir_version = Some(FEEDABLE_INITIALIZERS);
    }
    let mut pages = PageDims::new(settings.page_size);
    declare_sizes(graph, conversions, opset);
    graph
        .input
        .push(ValueInfoProto::tensor(RETRO_LENGTH, DataType::Int32, [1.into()]));
    graph
        .input
        // One number, or one a sequence; the default has one.
        .push(ValueInfoProto::tensor(
            PAGE_BUDGET,
            DataType::Int32,
            ["retro_sequences".into()],
        ));
    graph.initializer.push(TensorProto::int32s(RETRO_LENGTH, &[1], &[0]));
    graph.initializer.push(TensorProto::int32s(PAGE_BUDGET, &[1], &[0]));
    let capacity = conversions
        .iter()
        .filter(|c| !c.matched.sliding_cache)
        .find_map(|c| capacity_of(graph, &c.matched.past_key));
    let capacity = capacity.unwrap_or_else(|| "past_sequence_length".into());
    for conversion in conversions {
        if conversion.matched.sliding_cache {
            widen(graph, conversion.matched, &capacity);
        }
        let state = state_of(graph, conversion.matched, settings, &mut pages)?;
        let layer = conversion.attention.layer;
        for (kind, data_type, dims) in state {
            graph
                .input
                .push(ValueInfoProto::tensor(&past(layer, kind), data_type, dims.clone()));
            graph
                .output
                .push(ValueInfoProto::tensor(&present(layer, kind), data_type, dims));
        }
        keep_capacity(graph, conversion.matched);
        if conversion.matched.replaces.is_some() {
            continue;
        }
        let node = graph
            .node
            .get_mut(conversion.node)
            .context("an attention's node is gone")?;
        replace(node, conversion, settings);
    }
    decomposed::rewrite(graph, conversions, settings, opset)?;
    single::surround(graph, conversions, settings, opset)?;
    mask_check::check_masks(graph, conversions, opset);
    // Nodes have moved: the lm_head is the one that makes the first of the values after it.
    if let Logits::Newest { after, .. } = logits {
        let makes = |n: &NodeProto| after.last().is_some_and(|v| n.output.contains(v));
        let lm_head = graph.node.iter().position(makes).context("the lm_head is gone")?;
        logits::keep_newest(graph, lm_head, after, (&names.rows, &names.index));
    }
    model
        .opset_import
        .push(OperatorSetIdProto::new(contract::DOMAIN, contract::OPSET_VERSION));
    describe(model, conversions, settings);
    Ok(())
}

/// Declares heads and their size where caches leave them open: hosts make their caches by what is declared.
fn declare_sizes(graph: &mut GraphProto, conversions: &[Conversion], opset: i64) {
    let mut sizes: HashMap<String, [Option<i64>; 2]> = HashMap::new();
    let view = GraphView::new(graph, opset);
    for matched in conversions.iter().map(|c| c.matched) {
        let head_size = matched
            .head_size
            .or_else(|| graph_facts::weighed_head_size(&view, matched));
        for name in [
            &matched.past_key,
            &matched.past_value,
            &matched.present_key,
            &matched.present_value,
        ] {
            sizes.insert(name.clone(), [Some(matched.kv_heads), head_size]);
        }
    }
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        let Some(sizes) = sizes.get(value.name()) else { continue };
        for (axis, size) in [1, 3].into_iter().zip(sizes) {
            let dim = value.dims_mut().filter(|d| d.len() == 4).and_then(|d| d.get_mut(axis));
            if let Some((dim, size)) = dim.zip(*size).filter(|(dim, _)| dim.fixed().is_none()) {
                *dim = size.into();
            }
        }
    }
}

/// Names for values that only this program refers to.
struct Names {
    rows: String,
    index: String,
}

impl Names {
    /// Makes sure that the names of the contract are free, and finds names for the rest.
    fn free_in(view: &GraphView, conversions: &[Conversion]) -> Result<Self> {
        let layers = conversions.iter().map(|c| c.attention.layer);
        let state = layers.flat_map(|n| State::ALL.into_iter().flat_map(move |s| [past(n, s), present(n, s)]));
        for name in [RETRO_LENGTH.to_owned(), PAGE_BUDGET.to_owned()]
            .into_iter()
            .chain(state)
        {
            ensure!(
                !view.mentions(&name),
                "the model has a value named {name} already, which a converted model needs"
            );
        }
        Ok(Self {
            rows: view.fresh_name("retro/newest_hidden_state"),
            index: view.fresh_name("retro/newest_position"),
        })
    }
}

/// The dimension P for each kind of capacity: a number for a fixed one, a name of its own for each named one.
struct PageDims {
    page_size: usize,
    named: Vec<String>,
}

impl PageDims {
    fn new(page_size: usize) -> Self {
        Self {
            page_size,
            named: Vec::new(),
        }
    }

    fn of(&mut self, capacity: &Dimension) -> Dimension {
        if let Some(tokens) = capacity.fixed().and_then(|c| usize::try_from(c).ok()) {
            return (pages_for(tokens, self.page_size) as i64).into();
        }
        let name = capacity.symbol().unwrap_or_default();
        let known = self.named.iter().position(|n| n == name);
        let place = known.unwrap_or_else(|| {
            self.named.push(name.to_owned());
            self.named.len() - 1
        });
        match place {
            0 => "retro_pages".into(),
            more => format!("retro_pages_{}", more + 1).as_str().into(),
        }
    }
}

/// The declared capacity of a cache.
fn capacity_of(graph: &GraphProto, past: &str) -> Option<Dimension> {
    graph.input.iter().find(|i| i.name() == past)?.dims()?.get(2).cloned()
}

/// Declares a sliding-window cache as large as the others: the operator's caches hold the whole context.
fn widen(graph: &mut GraphProto, matched: &AttentionMatch, capacity: &Dimension) {
    for past in [&matched.past_key, &matched.past_value] {
        let declared = graph
            .input
            .iter_mut()
            .find(|i| i.name() == past)
            .and_then(ValueInfoProto::dims_mut);
        if let Some(tokens) = declared.and_then(|d| d.get_mut(2)) {
            *tokens = capacity.clone();
        }
    }
}

/// Types and dimensions of a layer's state.
fn state_of(
    graph: &GraphProto,
    matched: &AttentionMatch,
    settings: &Settings,
    pages: &mut PageDims,
) -> Result<[(State, DataType, Vec<Dimension>); 4]> {
    let cache = graph
        .input
        .iter()
        .find(|i| i.name() == matched.past_key)
        .and_then(ValueInfoProto::dims);
    let Some([batch, _, capacity, size]) = cache else {
        anyhow::bail!("{} has no declared shape of 4 dimensions", matched.past_key)
    };
    let plain = |d: &Dimension| Dimension {
        denotation: None,
        ..d.clone()
    };
    let (b, p) = (plain(batch), pages.of(capacity));
    let d = matched.head_size.map_or_else(|| plain(size), Dimension::from);
    let r = Dimension::from(ring_slots(settings.window) as i64);
    let (hq, hkv) = (Dimension::from(matched.q_heads), Dimension::from(matched.kv_heads));
    Ok([
        (
            State::PageSummary,
            matched.data_type,
            vec![b.clone(), hkv.clone(), p.clone(), 2.into(), d.clone()],
        ),
        (State::PageSteps, DataType::Int32, vec![b.clone(), hkv, p]),
        (
            State::Outputs,
            DataType::Float,
            vec![b.clone(), r.clone(), hq.clone(), d],
        ),
        (State::Lse, DataType::Float, vec![b, r, hq]),
    ])
}

/// The operator's cache keeps its capacity, so the present one is declared as the past one.
fn keep_capacity(graph: &mut GraphProto, matched: &AttentionMatch) {
    for (past, present) in [
        (&matched.past_key, &matched.present_key),
        (&matched.past_value, &matched.present_value),
    ] {
        let dims = graph
            .input
            .iter()
            .find(|i| i.name() == past)
            .and_then(|i| i.dims().map(<[_]>::to_vec));
        let declared = graph
            .output
            .iter_mut()
            .find(|o| o.name() == present)
            .and_then(ValueInfoProto::dims_mut);
        if let (Some(dims), Some(declared)) = (dims, declared) {
            *declared = dims;
        }
    }
}

/// Turns an attention's node into the operator's; its name, doc string and notes stay.
fn replace(node: &mut NodeProto, conversion: &Conversion, settings: &Settings) {
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
    let (ratio, min_pages) = settings.budget.attributes(settings.min_pages, settings.page_size);
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
        AttributeProto::string(attribute::MODE, mode.as_str()),
    ]
}

fn describe(model: &mut ModelProto, conversions: &[Conversion], settings: &Settings) {
    let layers = |of: &dyn Fn(&Conversion) -> bool| {
        let mut layers: Vec<usize> = conversions
            .iter()
            .filter(|c| of(c))
            .map(|c| c.attention.layer)
            .collect();
        layers.sort_unstable();
        layers.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
    };
    let (all, dense) = (layers(&|_| true), layers(&|c| c.mode == Mode::Dense));
    for (key, value) in [
        (metadata::VERSION, contract::OPSET_VERSION.to_string()),
        (metadata::WINDOW, settings.window.to_string()),
        (metadata::PAGE_SIZE, settings.page_size.to_string()),
        (metadata::BUDGET, settings.budget.to_string()),
        (metadata::MIN_PAGES, settings.min_pages.to_string()),
        (metadata::SINK_PAGES, settings.sink_pages.to_string()),
        (metadata::SELECTOR, settings.selector.to_string()),
        (metadata::GROUP_SCORE, settings.group_score.to_string()),
        (metadata::LAYERS, all),
        (metadata::DENSE_LAYERS, dense),
    ] {
        model.set_metadata(key, value);
    }
    if conversions.iter().any(|c| c.matched.lengths != LengthSource::Given) {
        model.set_metadata(metadata::LENGTHS, metadata::MASK_WIDTH.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rules::{SampleCalls, find_attention},
        testing::gqa_model,
        validate::validate,
    };

    fn rewritten(model: &ModelProto, settings: &Settings, keep_all: bool) -> Result<ModelProto> {
        let graph = model.graph.as_ref().unwrap();
        let view = GraphView::new(graph, 21);
        let found = find_attention(model, &SampleCalls::new(&view, None));
        let conversions = found.iter().map(|attention| Conversion {
            attention,
            matched: attention.found.as_ref().unwrap(),
            node: attention.node.unwrap(),
            mode: if attention.layer == 1 { Mode::Dense } else { Mode::Retro },
        });
        let logits = if keep_all {
            Logits::All("asked".into())
        } else {
            logits::look(&view)
        };
        let mut out = model.clone();
        rewrite(&mut out, &conversions.collect::<Vec<_>>(), &logits, settings)?;
        Ok(out)
    }

    fn shape(values: &[ValueInfoProto], name: &str) -> String {
        let value = values.iter().find(|v| v.name() == name).unwrap();
        let dims = value.dims().unwrap().iter();
        let dims = dims.map(|d| d.fixed().map_or_else(|| d.dim_param().to_owned(), |f| f.to_string()));
        format!(
            "{} {}",
            value.data_type().unwrap().label(),
            dims.collect::<Vec<_>>().join(" ")
        )
    }

    #[test]
    fn nodes_state_and_metadata_follow_the_contract() {
        let settings = Settings {
            window: 4,
            ..Settings::default()
        };
        let model = rewritten(&gqa_model(2), &settings, false).unwrap();
        let graph = model.graph.as_ref().unwrap();
        assert_eq!(validate(graph), Ok(()));
        let nodes: Vec<_> = graph
            .node
            .iter()
            .filter(|n| n.is("ai.retro", "RetroAttention"))
            .collect();
        assert_eq!(nodes.len(), 2);
        assert_eq!(nodes[1].name(), "attention.1");
        assert_eq!(
            nodes[1].input.len(),
            15,
            "no head sink: the last input is the page budget"
        );
        assert_eq!(nodes[1].input(input::PAST_LSE), "past_retro.1.lse");
        assert_eq!(nodes[1].output(output::PRESENT_OUTPUTS), "present_retro.1.outputs");
        assert_eq!(nodes[0].attribute("mode").unwrap().s(), b"retro".as_slice());
        assert_eq!(nodes[1].attribute("mode").unwrap().s(), b"dense".as_slice());
        assert_eq!(nodes[0].attribute("window").unwrap().i(), 4);
        let past = |n| shape(&graph.input, n);
        assert_eq!(
            past("past_retro.0.page_summary"),
            "float32 batch_size 2 retro_pages 2 8"
        );
        assert_eq!(past("past_retro.0.page_steps"), "int32 batch_size 2 retro_pages");
        assert_eq!(past("past_retro.1.outputs"), "float32 batch_size 3 4 8");
        assert_eq!(past("past_retro.1.lse"), "float32 batch_size 3 4");
        assert_eq!(past("retro_length"), "int32 1");
        assert_eq!(shape(&graph.output, "present_retro.0.lse"), past("past_retro.0.lse"));
        assert_eq!(shape(&graph.output, "present.0.key"), past("past_key_values.0.key"));
        assert_eq!(shape(&graph.output, "logits"), "float32 batch_size 1 10");
        assert_eq!(model.opset_version("ai.retro"), Some(1));
        for (key, value) in [
            ("version", "1"),
            ("window", "4"),
            ("budget", "0.15"),
            ("layers", "0,1"),
            ("dense_layers", "1"),
        ] {
            assert_eq!(model.metadata(&format!("retro.{key}")), Some(value));
        }
    }

    #[test]
    fn all_logits_leaves_the_head_alone() {
        let source = gqa_model(1);
        let model = rewritten(&source, &Settings::default(), true).unwrap();
        let (old, new) = (source.graph.unwrap(), model.graph.unwrap());
        assert_eq!(old.node.last(), new.node.last());
        assert_eq!(old.output[0], new.output[0]);
        assert_eq!(new.initializer.len(), old.initializer.len() + 2);
    }

    #[test]
    fn capacities_decide_the_pages() {
        let mut pages = PageDims::new(16);
        assert_eq!(pages.of(&33.into()), 3.into());
        assert_eq!(pages.of(&"a".into()), "retro_pages".into());
        assert_eq!(pages.of(&"b".into()), "retro_pages_2".into());
        assert_eq!(pages.of(&"a".into()), "retro_pages".into());
        assert_eq!(pages.of(&Dimension::default()), "retro_pages_3".into());
    }

    #[test]
    fn a_taken_name_is_refused() {
        let mut model = gqa_model(1);
        let graph = model.graph.as_mut().unwrap();
        graph.initializer.push(TensorProto::int32s("retro_length", &[1], &[0]));
        let why = rewritten(&model, &Settings::default(), false).unwrap_err().to_string();
        assert!(why.contains("named retro_length already"), "{why}");
    }
}
