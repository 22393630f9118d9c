//! The conversion of a model in memory: validate, find attention, choose, rewrite, check the result.

use super::{
    Error, Options, Unconvertible,
    choose::{choose_conversions, choose_logits, choose_products, layer_reports},
    facts::Facts,
    window::choose_window,
};
use crate::{
    merged::unfold,
    report::{PackedProductsReport, Report},
    rewrite::{self, rewrite},
    rules::{INPUT_IDS, INPUTS_EMBEDS, SampleCalls, find_attention},
    state_share::state_share,
    validate::validate,
    verify::{OtherInput, graph_facts},
};
use retro_contract::{self as contract, metadata};
use retro_onnx::{Bytes, LoadedModel, ModelProto, graph::GraphView, stay_inside};
use std::path::Path;

/// A model as it will be written, but for its record and its weights' place.
pub struct ConvertedModel {
    pub model: ModelProto,
    pub report: Report,
    /// The window that it was converted with.
    pub window: usize,
    /// What a comparison with the original needs.
    pub facts: Facts,
    /// The source's bytes.
    pub bytes: Bytes,
}

/// Converts a model, all but files of weights beside it, which `folder` may hold.
pub fn convert_in_memory(loaded: LoadedModel, folder: &Path, options: &Options) -> Result<ConvertedModel, Error> {
    let LoadedModel {
        mut model, bytes, path, ..
    } = loaded;
    let unconvertible = |source| Error::Unconvertible {
        path: path.clone(),
        source,
    };
    check_source(&model, &path, folder)?;
    let merged = unfold(&mut model).map_err(|why| unconvertible(Unconvertible::Merged(why.to_string())))?;

    let graph = model
        .graph
        .as_ref()
        .ok_or_else(|| retro_onnx::Error::NoGraph(path.clone()))?;
    let view = GraphView::new(graph, model.onnx_opset());
    let samples = SampleCalls::new(&view, Some(folder.to_owned()));
    let found = find_attention(&model, &samples);

    let logits = choose_logits(&view, options);
    let chosen = choose_window(&view, &found, &logits, options);
    let options = &options.with_window(chosen.window);
    let conversions = choose_conversions(&view, &found, options).map_err(unconvertible)?;
    check_tokens_at_once(&view, options.settings.window).map_err(unconvertible)?;
    let products = choose_products(&view, &found, options);
    let facts = Facts::new(&view, &found, &conversions);
    if options.settings.keeps_window_in_graph()
        && let Some(other) = facts.other_inputs.iter().find(|other| cant_be_kept(other))
    {
        let why = rewrite::Error::WindowOtherInput(other.name.clone());
        return Err(unconvertible(Unconvertible::Rewrite(why)));
    }
    let layers = layer_reports(&found, &conversions);
    let mut report = Report::new(&path, &model, &options.settings, layers, &logits);
    report.dry_run = options.dry_run;
    report.merged = merged;
    report.window_why = chosen.why;
    report.packed_products = PackedProductsReport::new(&products);

    rewrite(&mut model, &conversions, &products, &logits, &options.settings)
        .map_err(|why| unconvertible(Unconvertible::Rewrite(why)))?;

    let result = model
        .graph
        .as_ref()
        .ok_or_else(|| retro_onnx::Error::NoGraph(path.clone()))?;
    validate(result).map_err(|why| unconvertible(Unconvertible::InvalidResult(why.to_string())))?;
    report.state_share = state_share(result);
    Ok(ConvertedModel {
        model,
        report,
        window: chosen.window,
        facts,
        bytes,
    })
}

/// Whether the source is a model that a runtime would load and that is not converted yet.
fn check_source(model: &ModelProto, path: &Path, folder: &Path) -> Result<(), Error> {
    if is_converted(model) {
        return Err(Error::AlreadyConverted(path.to_owned()));
    }
    stay_inside(model, path, folder).map_err(|source| Error::WeightsOutside {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let graph = model
        .graph
        .as_ref()
        .ok_or_else(|| retro_onnx::Error::NoGraph(path.to_owned()))?;
    validate(graph).map_err(|why| Error::Invalid {
        path: path.to_owned(),
        why: why.to_string(),
    })?;
    check_operator_sets(model, path)
}

fn is_converted(model: &ModelProto) -> bool {
    let mut nodes = model.graph.iter().flat_map(|g| &g.node);
    model.metadata(metadata::VERSION).is_some() || nodes.any(|n| n.domain() == contract::DOMAIN)
}

/// Whether a runtime would know any operators: ONNX Runtime takes no model that imports none, nor ONNX's of version 0. The
/// import of this program's operator must not make up for that.
fn check_operator_sets(model: &ModelProto, path: &Path) -> Result<(), Error> {
    let opset = model.onnx_opset();
    if model.opset_import.is_empty() {
        return Err(Error::NoOperatorSet(path.to_owned()));
    }
    if opset <= 0 {
        return Err(Error::OperatorSetVersion {
            path: path.to_owned(),
            opset,
        });
    }
    Ok(())
}

/// Whether a graph that keeps its window can't keep what this input was fed.
fn cant_be_kept(other: &OtherInput) -> bool {
    other.moves_with_tokens() && other.name != INPUTS_EMBEDS
}

/// Steps of a window above 1 feed different numbers of tokens.
fn check_tokens_at_once(view: &GraphView, window: usize) -> Result<(), Unconvertible> {
    match graph_facts::tokens_at_once(view) {
        Some(count) if window > 1 => Err(Unconvertible::FixedTokens {
            input: INPUT_IDS,
            count,
            window,
        }),
        _ => Ok(()),
    }
}
