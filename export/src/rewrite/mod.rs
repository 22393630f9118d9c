//! Rewrites the attentions of a graph to `ai.retro::RetroAttention` nodes, and declares the state that the graph takes and returns.
//!
//! In this order: products of packed weights ([`packed_products`]), inputs and outputs ([`graph_io`]), the attentions of one node,
//! those of several nodes ([`decomposed`]), what a node of one needs around it ([`single`]), the check of the attention mask where
//! the source counts its ones ([`mask_check`]), masks as wide as the caches where the source reads its mask's width
//! ([`wide_mask`]), the logits readback, the window where the graph keeps it ([`window`]), state by a host's own names
//! ([`genai`]), and the metadata.

mod cache_aliases;
mod decomposed;
mod dense_below;
mod error;
mod genai;
mod graph_io;
mod mask_check;
mod operator_node;
mod packed_products;
mod prune;
mod second_row;
mod sequence_lengths;
mod single;
mod wide_mask;
mod window;

use crate::{
    logits::{self, Logits},
    rules::Conversion,
    settings::Settings,
};
use dense_below::dense_below;
pub use error::Error;
pub(crate) use mask_check::depends as reads_mask;
use operator_node::replace;
pub use packed_products::{Kept, PackedProducts, Target};
use retro_contract::{self as contract, Mode, metadata};
use retro_onnx::{GraphBuilder, ModelProto, OperatorSetIdProto, graph::GraphView};
pub use second_row::costly_share;
use std::collections::HashSet;
use window::Window;

/// The first version of the format in which an initializer that is an input too is a default, as `retro_length` has one.
const FEEDABLE_INITIALIZERS: i64 = 4;

/// Rewrites the model's attentions and products, which must be of this model.
///
/// # Errors
/// A name that the converted model needs is taken, a cache has no declared shape, or something else needs what attention of
/// several nodes gives way to. The model is not usable then.
pub fn rewrite(
    model: &mut ModelProto,
    conversions: &[Conversion],
    products: &PackedProducts,
    logits: &Logits,
    settings: &Settings,
) -> Result<(), Error> {
    let opset = model.onnx_opset();
    let version = model.ir_version.unwrap_or(FEEDABLE_INITIALIZERS);
    let graph = model.graph.as_mut().ok_or(Error::NoGraph)?;
    let view = GraphView::new(graph, opset);
    graph_io::check_names(&view, conversions)?;
    let dense_below = dense_below(&view, conversions, products, logits, settings);
    // The one generator of names for all that is added.
    let mut builder = GraphBuilder::part_of(graph);
    if version < FEEDABLE_INITIALIZERS {
        // All initializers were inputs there, and none could be fed.
        let constant: HashSet<String> = graph.initializer.iter().map(|t| t.name().to_owned()).collect();
        graph.input.retain(|i| !constant.contains(i.name()));
        model.ir_version = Some(FEEDABLE_INITIALIZERS);
    }
    products.replace(graph);
    graph_io::declare(graph, conversions, settings, opset)?;
    for conversion in conversions.iter().filter(|c| c.matched.output_node.is_none()) {
        let node = graph.node.get_mut(conversion.node).ok_or(Error::NoAttention)?;
        replace(node, conversion, settings);
    }
    let lengths = decomposed::rewrite(graph, conversions, settings, opset, &mut builder)?;
    single::surround(graph, conversions, settings, opset, &mut builder)?;
    let window = settings.keeps_window_in_graph();
    let window = window.then(|| Window::new(graph, &mut builder, settings.window, opset));
    let window = window.transpose()?;
    mask_check::check_masks(graph, conversions, opset, &mut builder);
    let kept = lengths.is_some_and(|name| !wide_mask::accept(graph, conversions, &name, opset, &mut builder));
    // Once the window's nodes are there, or a host has its form, nobody can tell it from the graph.
    let unreadable = window.is_some() || settings.host.is_some();
    let of_width = kept || (unreadable && wide_mask::needs_width(graph, opset));
    if let Logits::Newest { after, products, .. } = logits
        && !logits::keep_newest(graph, products, after, &mut builder)
    {
        return Err(Error::NoLmHead);
    }
    if let Some(window) = window {
        window.finish(graph, &mut builder, logits)?;
    }
    if let Some(context) = settings.host_context() {
        genai::name_state(graph, conversions, context, opset, settings, &mut builder)?;
    }
    model
        .opset_import
        .push(OperatorSetIdProto::new(contract::DOMAIN, contract::OPSET_VERSION));
    describe(model, conversions, settings);
    if of_width {
        model.set_metadata(metadata::LENGTHS, metadata::MASK_WIDTH.to_owned());
    }
    if dense_below > 0 {
        model.set_metadata(metadata::DENSE_BELOW, dense_below.to_string());
    }
    Ok(())
}

/// Writes the settings and the converted layers into the model's metadata.
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
        (metadata::MIN_PAGES, settings.least_pages().to_string()),
        (metadata::SINK_PAGES, settings.sink_pages.to_string()),
        (metadata::SELECTOR, settings.selector.to_string()),
        (metadata::GROUP_SCORE, settings.group_score.to_string()),
        (metadata::LAYERS, all),
        (metadata::DENSE_LAYERS, dense),
    ] {
        model.set_metadata(key, value);
    }
    if settings.keeps_window_in_graph() {
        model.set_metadata(metadata::WINDOW_IN_GRAPH, "1");
    }
    if let Some(host) = settings.host {
        model.set_metadata(metadata::HOST, host.as_str());
    }
    if let Some(context) = settings.host_context() {
        model.set_metadata(metadata::CONTEXT, context.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rules::{SampleCalls, find_attention},
        settings::Host,
        testing::gqa_model,
        validate::validate,
    };
    use retro_contract::{Selector, input, output};
    use retro_onnx::{AttributeProto, DataType, NodeProto, TensorProto, ValueInfoProto};

    fn rewritten(model: &ModelProto, settings: &Settings, keep_all: bool) -> Result<ModelProto, Error> {
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
            Logits::All(logits::KeepAll::Asked)
        } else {
            logits::find_lm_head(&view)
        };
        let mut out = model.clone();
        let products = PackedProducts::default();
        rewrite(&mut out, &conversions.collect::<Vec<_>>(), &products, &logits, settings)?;
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
            selector: Selector::SignedMoments,
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
        let sketch = Settings {
            selector: Selector::Sketch,
            sketch_bits: 1,
            ..settings.clone()
        };
        let sketched = rewritten(&gqa_model(2), &sketch, false).unwrap();
        let state = shape(&sketched.graph.as_ref().unwrap().input, "past_retro.0.page_summary");
        assert_eq!(state, format!("uint8 batch_size 2 retro_blocks {}", 128 * 3 + 8 * 4));
        assert_eq!(past("past_retro.0.page_steps"), "int32 batch_size 2 retro_pages");
        assert_eq!(past("past_retro.1.outputs"), "float32 batch_size 3 4 8");
        assert_eq!(past("past_retro.1.lse"), "float32 batch_size 3 4");
        assert_eq!(past("retro_length"), "int32 retro_lengths");
        assert_eq!(shape(&graph.output, "present_retro.0.lse"), past("past_retro.0.lse"));
        assert_eq!(shape(&graph.output, "present.0.key"), past("past_key_values.0.key"));
        assert_eq!(shape(&graph.output, "logits"), "float32 batch_size 1 10");
        assert_eq!(model.opset_version("ai.retro"), Some(1));
        for (key, value) in [
            ("version", "1"),
            ("window", "4"),
            ("budget", "0.1"),
            ("min_pages", "64"),
            ("layers", "0,1"),
            ("dense_layers", "1"),
        ] {
            assert_eq!(model.metadata(&format!("retro.{key}")), Some(value));
        }
    }

    #[test]
    fn a_head_size_without_whole_bytes_of_codes_is_refused() {
        let mut model = gqa_model(1);
        let graph = model.graph.as_mut().unwrap();
        for value in graph.input.iter_mut().chain(&mut graph.output) {
            if let Some(size) = value.dims_mut().and_then(|dims| dims.get_mut(3)) {
                *size = 6.into();
            }
        }
        graph.value_info.clear();
        graph.initializer = vec![
            TensorProto::floats("cos_cache", &[16, 3], &[1.0; 48]),
            TensorProto::floats("sin_cache", &[16, 3], &[0.0; 48]),
            TensorProto::floats("qkv.0.weight", &[32, 48], &[0.01; 1536]),
            TensorProto::floats("lm_head.weight", &[24, 10], &[0.1; 240]),
        ];
        let why = rewritten(&model, &Settings::default(), false).unwrap_err().to_string();
        assert!(
            why.contains("heads of 6 elements") && why.contains("multiple of 4 with 2 bits"),
            "{why}"
        );
        let other = Settings {
            selector: Selector::SignedMoments,
            ..Settings::default()
        };
        assert!(rewritten(&model, &other, false).is_ok());
    }

    /// A model that takes embeddings and a mask, and makes lengths of the mask as exporters do.
    fn masked_model() -> ModelProto {
        let mut model = gqa_model(1);
        let graph = model.graph.as_mut().unwrap();
        graph.input.retain(|i| !["seqlens_k", "total"].contains(&i.name()));
        graph.input[0].name = Some("inputs_embeds".into());
        graph.input.push(ValueInfoProto::tensor(
            "attention_mask",
            DataType::Int64,
            ["batch_size".into(), "total_sequence_length".into()],
        ));
        graph.initializer.extend([
            TensorProto::int64s("one", &[1], &[1]),
            TensorProto::int64s("axis", &[], &[1]),
        ]);
        let to = |data_type: DataType| AttributeProto::int("to", i64::from(i32::from(data_type)));
        let node =
            |op_type: &str, inputs: &[&str], output: &str| NodeProto::new("", op_type, output, inputs, &[output]);
        let flat = AttributeProto::int("keepdims", 0);
        let mut nodes = vec![
            node("ReduceSum", &["attention_mask", "one"], "sum").with(flat),
            node("Sub", &["sum", "one"], "newest"),
            node("Cast", &["newest"], "seqlens_k").with(to(DataType::Int32)),
            node("Shape", &["attention_mask"], "mask_shape"),
            node("Gather", &["mask_shape", "axis"], "width"),
            node("Cast", &["width"], "total").with(to(DataType::Int32)),
            node("Identity", &["inputs_embeds"], "x"),
        ];
        nodes.append(&mut graph.node);
        graph.node = nodes;
        model
    }

    /// [`masked_model`] whose embeddings get positions from the mask's width: width - S, ..., width - 1.
    fn positions_of_width() -> ModelProto {
        let mut model = masked_model();
        let graph = model.graph.as_mut().unwrap();
        graph.initializer.push(TensorProto::int64s("step", &[], &[1]));
        graph.initializer.push(TensorProto::int64s("last", &[1], &[-1]));
        let to = AttributeProto::int("to", i64::from(i32::from(DataType::Float)));
        let node =
            |op_type: &str, inputs: &[&str], output: &str| NodeProto::new("", op_type, output, inputs, &[output]);
        graph.node.splice(
            6..7,
            [
                node("Shape", &["inputs_embeds"], "embeds_shape"),
                node("Gather", &["embeds_shape", "axis"], "fed"),
                node("Sub", &["width", "fed"], "first"),
                node("Range", &["first", "width", "step"], "positions"),
                node("Cast", &["positions"], "numbers").with(to),
                node("Unsqueeze", &["numbers", "last"], "column"),
                node("Add", &["inputs_embeds", "column"], "x"),
            ],
        );
        model
    }

    /// A captured step has a mask as wide as the cache: what the window's own nodes read of it is right then, and a source's
    /// positions are not.
    #[test]
    fn a_window_in_the_graph_says_what_else_needs_the_masks_width() {
        let lengths = |model: &ModelProto, settings: &Settings| {
            let model = rewritten(model, settings, true).unwrap();
            assert_eq!(validate(model.graph.as_ref().unwrap()), Ok(()));
            model.metadata(metadata::LENGTHS).map(str::to_owned)
        };
        let in_graph = Settings {
            window: 2,
            window_in_graph: true,
            ..Settings::default()
        };
        let host = Settings {
            window: 1,
            host: Some(Host::Genai),
            context: Some(256),
            ..Settings::default()
        };
        let mut lengths_of_width = masked_model();
        lengths_of_width.graph.as_mut().unwrap().node[1].input[0] = "width".into();
        for settings in [&in_graph, &host] {
            assert_eq!(lengths(&masked_model(), settings), None);
            for model in [&positions_of_width(), &lengths_of_width] {
                assert_eq!(lengths(model, settings).as_deref(), Some(metadata::MASK_WIDTH));
            }
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
    fn a_taken_name_is_refused() {
        let mut model = gqa_model(1);
        let graph = model.graph.as_mut().unwrap();
        graph.initializer.push(TensorProto::int32s("retro_length", &[1], &[0]));
        let why = rewritten(&model, &Settings::default(), false).unwrap_err().to_string();
        assert!(why.contains("named retro_length already"), "{why}");
    }
}
