//! What a model is, without changing anything: what it takes and gives, its attention, its sizes, whether it is converted.

use crate::{
    merged::unfold,
    report::{Action, LayerReport, ModelReport},
    rules::{SampleCalls, find_attention},
    source::{self, find_source},
    state_share::{StateShare, state_share},
    table,
    validate::validate,
};
use retro_contract::{self as contract, matmul_nbits, metadata};
use retro_onnx::{
    DataType, Dimension, GraphProto, LoadedModel, ValueInfoProto, external_files, graph::GraphView, read_model,
    stay_inside,
};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

/// A model as it is.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// The model's file.
    pub path: PathBuf,
    /// Where it comes from.
    pub model: ModelReport,
    /// Bytes of the model's file, and of its files of weights.
    pub bytes: u64,
    /// Files of weights, relative to the model's folder, with their lengths in bytes.
    pub external_data: BTreeMap<String, u64>,
    /// Nodes of the graph.
    pub nodes: usize,
    /// Initializers of the graph.
    pub initializers: usize,
    /// Functions that the model defines.
    pub functions: usize,
    /// The graph's inputs, in order.
    pub inputs: Vec<ValueReport>,
    /// The graph's outputs, in order.
    pub outputs: Vec<ValueReport>,
    /// Why a runtime could not load it; none: it is a valid model.
    #[serde(rename = "unsound")]
    pub invalid: Option<String>,
    /// Metadata of a converted model, without the record of its original; none: it is not converted.
    pub converted: Option<BTreeMap<String, String>>,
    /// Whether the original can be restored.
    pub revertible: bool,
    /// RetroAttention nodes of a converted model.
    pub retro_nodes: usize,
    /// Products of packed weights (MatMulNBits), ONNX Runtime's and the operator's.
    pub packed_products: PackedProductCounts,
    /// What the state of a converted model takes, as a share of its key/value caches; none where its sizes are open.
    pub state_share: Option<StateShare>,
    /// Attention that a conversion would find.
    pub attention: Vec<LayerReport>,
    /// What a conversion would make of the If of a merged decoder.
    pub merged: Option<String>,
}

/// Products of packed weights by the operator that computes them.
#[derive(Debug, Default, Serialize)]
pub struct PackedProductCounts {
    /// `com.microsoft::MatMulNBits`.
    pub microsoft: usize,
    /// `ai.retro::MatMulNBits`.
    pub retro: usize,
}

impl PackedProductCounts {
    fn of(graph: &GraphProto) -> Self {
        let count = |domain: &str| {
            graph
                .node
                .iter()
                .filter(|n| n.is(domain, matmul_nbits::OP_TYPE))
                .count()
        };
        Self {
            microsoft: count(matmul_nbits::SOURCE_DOMAIN),
            retro: count(contract::DOMAIN),
        }
    }
}

/// An input or output.
#[derive(Debug, Serialize)]
pub struct ValueReport {
    /// Its name.
    pub name: String,
    /// Its element type, where it is declared.
    pub data_type: Option<&'static str>,
    /// Numbers, names, or "?"; none: of unknown rank.
    pub shape: Option<Vec<String>>,
}

impl ValueReport {
    fn new(value: &ValueInfoProto) -> Self {
        let dim = |d: &Dimension| {
            d.fixed()
                .map_or_else(|| d.symbol().unwrap_or("?").to_owned(), |n| n.to_string())
        };
        Self {
            name: value.name().to_owned(),
            data_type: value.data_type().map(DataType::label),
            shape: value.dims().map(|dims| dims.iter().map(dim).collect()),
        }
    }
}

/// Why a model can't be inspected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no model, or it isn't clear which.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The model can't be read, or is no ONNX model.
    #[error(transparent)]
    Read(#[from] retro_onnx::Error),
    /// A file of weights is not there, too short, or out of the model's folder.
    #[error("{}", .path.display())]
    Weights {
        /// The model's file.
        path: PathBuf,
        /// Which tensor, and why.
        source: Box<retro_onnx::Error>,
    },
}

/// Looks at a model, a file or a folder, of which `graph` may choose one.
///
/// # Errors
/// It can't be read, or its files of weights are not there.
pub fn inspect(path: &Path, graph: Option<&str>) -> Result<Inspection, Error> {
    let source = find_source(path, graph, None)?;
    let LoadedModel { mut model, len, .. } = read_model(&source.model)?;
    let weights = |source_error| Error::Weights {
        path: source.model.clone(),
        source: Box::new(source_error),
    };
    stay_inside(&model, &source.model, source.folder()).map_err(weights)?;
    let external = external_files(&model, source.folder()).map_err(weights)?;
    let report = ModelReport::new(&model);
    let functions = model.functions.len();
    let graph = model
        .graph
        .as_ref()
        .ok_or_else(|| retro_onnx::Error::NoGraph(source.model.clone()))?;
    let invalid = validate(graph).err().map(|why| why.to_string());
    let (nodes, initializers) = (graph.node.len(), graph.initializer.len());
    let values = |values: &[ValueInfoProto]| values.iter().map(ValueReport::new).collect();
    let (inputs, outputs) = (values(&graph.input), values(&graph.output));
    let retro_nodes = graph
        .node
        .iter()
        .filter(|n| n.is(contract::DOMAIN, contract::OP_TYPE))
        .count();
    let share = state_share(graph);
    let packed_products = PackedProductCounts::of(graph);
    let settings: BTreeMap<String, String> = model
        .metadata_props
        .iter()
        .filter(|e| e.key().starts_with("retro.") && ![crate::revert::RECORD, metadata::HOST_CONFIG].contains(&e.key()))
        .map(|e| (e.key().to_owned(), e.value().to_owned()))
        .collect();
    let revertible = model.metadata(crate::revert::RECORD).is_some();
    let mut merged = None;
    let mut attention = Vec::new();
    if invalid.is_none() && retro_nodes == 0 {
        // Where it can't be unfolded its attention is in branches, which the layers say.
        merged = unfold(&mut model).unwrap_or_else(|why| Some(format!("as it is: {why}")));
        let graph = model
            .graph
            .as_ref()
            .ok_or_else(|| retro_onnx::Error::NoGraph(source.model.clone()))?;
        let view = GraphView::new(graph, model.onnx_opset());
        let found = find_attention(&model, &SampleCalls::new(&view, Some(source.folder().to_owned())));
        let action = |a: &crate::rules::Attention| match &a.found {
            Ok(_) => Action::Convertible,
            Err(why) => Action::Kept { why: why.to_string() },
        };
        attention = found.iter().map(|a| LayerReport::new(a, action(a))).collect();
    }
    Ok(Inspection {
        path: source.model.clone(),
        model: report,
        bytes: len,
        external_data: external
            .iter()
            .map(|e| (e.location.display().to_string(), e.len))
            .collect(),
        nodes,
        initializers,
        functions,
        inputs,
        outputs,
        invalid,
        converted: (retro_nodes > 0 || !settings.is_empty()).then_some(settings),
        revertible,
        retro_nodes,
        packed_products,
        state_share: share,
        attention,
        merged,
    })
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = &self.model;
        writeln!(f, "model    {} ({} bytes)", self.path.display(), self.bytes)?;
        writeln!(f, "         by {m}")?;
        writeln!(
            f,
            "graph    {} nodes, {} initializers, {} functions",
            self.nodes, self.initializers, self.functions
        )?;
        for (location, bytes) in &self.external_data {
            writeln!(f, "weights  {location}, {bytes} bytes")?;
        }
        let products = &self.packed_products;
        match (products.microsoft, products.retro) {
            (0, 0) => {}
            (stay, 0) => writeln!(f, "products {stay} MatMulNBits")?,
            (0, retro) => writeln!(f, "products {retro} ai.retro::MatMulNBits")?,
            (stay, retro) => writeln!(
                f,
                "products {retro} ai.retro::MatMulNBits, {stay} com.microsoft::MatMulNBits"
            )?,
        }
        for (what, values) in [("input ", &self.inputs), ("output", &self.outputs)] {
            let value = |v: &ValueReport| {
                let shape = v
                    .shape
                    .as_ref()
                    .map_or_else(|| "of unknown rank".to_owned(), |s| format!("[{}]", s.join(", ")));
                (v.name.clone(), format!("{} {shape}", v.data_type.unwrap_or("?")))
            };
            for (names, is) in table::alike(&values.iter().map(value).collect::<Vec<_>>()) {
                writeln!(f, "{what}   {names}: {is}")?;
            }
        }
        if let Some(why) = &self.invalid {
            writeln!(f, "invalid  {why}")?;
        }
        if let Some(settings) = &self.converted {
            let back = if self.revertible {
                "--revert gives the original back"
            } else {
                "without a record of its original"
            };
            writeln!(
                f,
                "retro    converted: {} RetroAttention nodes; {back}",
                self.retro_nodes
            )?;
            if let Some(share) = &self.state_share {
                writeln!(f, "         state: {share}")?;
            }
            for (key, value) in settings {
                writeln!(f, "         {key} = {value}")?;
            }
        }
        if let Some(merged) = &self.merged {
            writeln!(f, "merged   {merged}")?;
        }
        f.write_str(&table::layers(&self.attention))?;
        if self.converted.is_none() && self.invalid.is_none() {
            let good = self
                .attention
                .iter()
                .filter(|l| matches!(l.action, Action::Convertible))
                .count();
            writeln!(
                f,
                "retro    not converted: {good} of {} attention layers can be",
                self.attention.len()
            )?;
        }
        Ok(())
    }
}
