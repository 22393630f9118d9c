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
    let of_width = lengths.is_some_and(|name| !wide_mask::accept(graph, conversions, &name, opset, &mut builder));
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
        testing::gqa_model,
        validate::validate,
    };
    use retro_contract::{Selector, input, output};
    use retro_onnx::{TensorProto, ValueInfoProto};

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
