//! What was found and done, as text and as JSON.

mod text;

use crate::{
    logits::Logits,
    rewrite::{Kept, PackedProducts},
    rules::{Attention, AttentionMatch, LengthSource, Rope},
    settings::{Host, Settings},
    state_share::StateShare,
    verify::Verification,
};
use retro_contract::{Budget, GroupScore, Mode, Selector};
use retro_onnx::{ModelProto, OperatorSetIdProto};
use serde::{Serialize, Serializer};
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// The report of a conversion.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The source's model file.
    pub source: PathBuf,
    /// The converted model's file; none in a dry run without an output.
    pub target: Option<PathBuf>,
    /// Nothing was written.
    pub dry_run: bool,
    /// Where the source comes from.
    pub model: ModelReport,
    /// What the operator was set to.
    pub settings: SettingsReport,
    /// Why the window is 1 where none was asked for; none where it was, or is another.
    pub window_why: Option<String>,
    /// What became of the If of a merged decoder.
    pub merged: Option<String>,
    /// Every attention found, in graph order.
    pub layers: Vec<LayerReport>,
    /// How many attention layers became the operator.
    pub converted_layers: usize,
    /// What their state takes, as a share of their key/value caches; none where the sizes are open.
    pub state_share: Option<StateShare>,
    /// What became of the products of packed weights (MatMulNBits); none where there are none.
    pub packed_products: Option<PackedProductsReport>,
    /// What became of the logits.
    pub logits: LogitsReport,
    /// Length of the converted model's file; none in a dry run.
    pub bytes: Option<u64>,
    /// Files of weights beside the converted model.
    pub external_data: Vec<ExternalReport>,
    /// Other files of the folder that came along.
    pub files: Vec<PathBuf>,
    /// What did not come along, and why.
    pub skipped: Vec<String>,
    /// What `--graph` must name for the output's folder to stand for the converted model; none where it does by itself.
    pub graph: Option<PathBuf>,
    /// The comparison with the source, if one was made.
    pub verification: Option<Verification>,
    /// Why none was made, when one was to be.
    pub unverified: Option<String>,
}

/// The source model.
#[derive(Debug, Serialize)]
pub struct ModelReport {
    /// The exporter and its version.
    pub producer: String,
    /// Version of ONNX's file format.
    pub ir_version: i64,
    /// "domain version"; ONNX's own domain is "ai.onnx".
    pub opsets: Vec<String>,
}

impl fmt::Display for ModelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let producer = if self.producer.is_empty() {
            "an unnamed producer"
        } else {
            &self.producer
        };
        write!(f, "{producer}, IR {}, {}", self.ir_version, self.opsets.join(", "))
    }
}

/// The settings the model was given.
#[derive(Debug, Serialize)]
pub struct SettingsReport {
    /// w, tokens fed a step at most.
    pub window: usize,
    /// "0.15" or "2048", as on the command line.
    pub budget: String,
    /// Fewest pages that a step reads; for a budget of tokens, the pages that hold them.
    pub min_pages: usize,
    /// Tokens in a page.
    pub page_size: usize,
    /// First pages of the context, which every step reads.
    pub sink_pages: usize,
    /// As on the command line.
    #[serde(serialize_with = "as_text")]
    pub selector: Selector,
    /// How the page scores of query heads that share a key/value head are combined.
    #[serde(serialize_with = "as_text")]
    pub group_score: GroupScore,
    /// Standard deviations that the selector adds to the mean.
    pub selector_lambda: f32,
    /// Share of the standard deviation along a page's principal direction, 0 to 1.
    pub selector_correlation: f32,
    /// Bits of an element of a key's sketch.
    pub sketch_bits: usize,
    /// Converted layers that read the whole cache, by index.
    pub dense_layers: Vec<usize>,
    /// The graph feeds tokens again by itself.
    pub window_in_graph: bool,
    /// The host that the output is ready for.
    pub host: Option<&'static str>,
    /// Tokens that its state is made for.
    pub context: Option<usize>,
}

/// An attention, what was found of it, and what became of it.
#[derive(Debug, Serialize)]
pub struct LayerReport {
    /// The layer's index.
    pub layer: usize,
    /// The node's name, or of several nodes the one that the rule goes by.
    pub node: String,
    /// Its operator.
    pub op_type: String,
    /// The rule that knows it; none for an attention of no known pattern.
    pub rule: Option<&'static str>,
    /// What became of it.
    #[serde(flatten)]
    pub action: Action,
    /// What was found; none for one that can't be converted.
    #[serde(flatten)]
    pub found: Option<FoundReport>,
}

/// What became of an attention.
#[derive(Debug, Serialize)]
#[serde(tag = "action", rename_all = "lowercase")]
pub enum Action {
    /// It is the operator now.
    Converted {
        /// Which pages its steps read.
        #[serde(serialize_with = "as_text")]
        mode: Mode,
    },
    /// It is as it was.
    Kept {
        /// The reason.
        why: String,
    },
    /// Nothing yet: it was only checked.
    Convertible,
}

/// The facts of an attention.
#[derive(Debug, Serialize)]
pub struct FoundReport {
    /// Query heads.
    pub heads: i64,
    /// Key/value heads.
    pub kv_heads: i64,
    /// Elements of a head, where the graph tells it.
    pub head_size: Option<i64>,
    /// Element type of the caches.
    pub data_type: &'static str,
    /// `packed` queries, keys and values, or `separate` ones.
    pub inputs: &'static str,
    /// Where queries and keys are rotated by their positions.
    pub rope: String,
    /// What the mask leaves visible, and whether it takes padding.
    pub mask: String,
    /// 0: 1/sqrt(head size).
    pub scale: f32,
    /// 0: off.
    pub softcap: f32,
    /// It has attention sinks, a number a head.
    pub head_sink: bool,
    /// The source's cache holds about its window; a converted layer's holds everything.
    pub sliding_cache: bool,
    /// The graph's inputs for its keys and values.
    pub past: [String; 2],
}

/// What became of the products of packed weights.
#[derive(Debug, Serialize)]
pub struct PackedProductsReport {
    /// How many are the operator's now.
    pub replaced: usize,
    /// Those that are ONNX Runtime's as before, by the reason.
    pub kept: Vec<KeptProducts>,
}

/// Products of packed weights that stayed for one reason.
#[derive(Debug, Serialize)]
pub struct KeptProducts {
    /// How many.
    pub count: usize,
    /// The reason.
    pub why: String,
}

/// What became of the logits.
#[derive(Debug, Serialize)]
pub struct LogitsReport {
    /// "newest": only the newest position's now; "unchanged": the model returns them as before.
    pub rows: &'static str,
    /// Where rows are dropped, or why none are.
    pub detail: String,
}

/// A file of weights.
#[derive(Debug, Serialize)]
pub struct ExternalReport {
    /// The file, relative to the model's folder.
    pub location: PathBuf,
    /// The length of the file, in bytes.
    pub bytes: u64,
    /// What became of it.
    pub how: Placement,
}

/// What became of a file of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Placement {
    /// The output refers to the source's file.
    #[serde(rename = "referenced")]
    Referenced,
    /// A hard link.
    #[serde(rename = "linked")]
    Linked,
    /// A copy.
    #[serde(rename = "copied")]
    Copied,
    /// The file was at its place before.
    #[serde(rename = "already there")]
    AlreadyThere,
    /// Weights that were in the source's model file, which would be larger than an ONNX file may be.
    #[serde(rename = "moved out of the model")]
    MovedOut,
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

fn as_text<S: Serializer>(value: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl Report {
    pub(crate) fn new(
        source: &Path,
        model: &ModelProto,
        settings: &Settings,
        layers: Vec<LayerReport>,
        logits: &Logits,
    ) -> Self {
        let converted = layers
            .iter()
            .filter(|l| matches!(l.action, Action::Converted { .. }))
            .count();
        Self {
            source: source.to_owned(),
            target: None,
            dry_run: false,
            model: ModelReport::new(model),
            settings: SettingsReport::new(settings, &layers),
            window_why: None,
            merged: None,
            layers,
            converted_layers: converted,
            state_share: None,
            packed_products: None,
            logits: LogitsReport::new(logits),
            bytes: None,
            external_data: Vec::new(),
            files: Vec::new(),
            skipped: Vec::new(),
            graph: None,
            verification: None,
            unverified: None,
        }
    }
}

impl ModelReport {
    pub(crate) fn new(model: &ModelProto) -> Self {
        let opset = |o: &OperatorSetIdProto| {
            let domain = if o.domain().is_empty() { "ai.onnx" } else { o.domain() };
            format!("{domain} {}", o.version())
        };
        Self {
            producer: format!("{} {}", model.producer_name(), model.producer_version())
                .trim()
                .to_owned(),
            ir_version: model.ir_version(),
            opsets: model.opset_import.iter().map(opset).collect(),
        }
    }
}

impl SettingsReport {
    fn new(settings: &Settings, layers: &[LayerReport]) -> Self {
        let dense = layers
            .iter()
            .filter(|l| matches!(l.action, Action::Converted { mode: Mode::Dense }));
        Self {
            window: settings.window,
            budget: settings.budget.to_string(),
            min_pages: match settings.budget {
                Budget::Ratio(_) => settings.least_pages(),
                Budget::Tokens(tokens) => tokens.div_ceil(settings.page_size),
            },
            page_size: settings.page_size,
            sink_pages: settings.sink_pages,
            selector: settings.selector,
            group_score: settings.group_score,
            selector_lambda: settings.selector_lambda,
            selector_correlation: settings.selector_correlation,
            sketch_bits: settings.sketch_bits,
            dense_layers: dense.map(|l| l.layer).collect(),
            window_in_graph: settings.keeps_window_in_graph(),
            host: settings.host.map(Host::as_str),
            context: settings.host_context(),
        }
    }
}

impl LayerReport {
    pub(crate) fn new(attention: &Attention, action: Action) -> Self {
        Self {
            layer: attention.layer,
            node: attention.name.clone(),
            op_type: attention.op_type.clone(),
            rule: attention.rule,
            action,
            found: attention.found.as_ref().ok().map(|matched| FoundReport::new(matched)),
        }
    }
}

impl FoundReport {
    fn new(matched: &AttentionMatch) -> Self {
        let rope = match matched.rope {
            Rope::None => "none".to_owned(),
            Rope::Before => "before".to_owned(),
            Rope::Inside { interleaved, dims } => {
                let style = if interleaved { "interleaved" } else { "half" };
                let dims = dims.map_or_else(String::new, |d| format!(", {d} elements"));
                format!("in the node, {style}{dims}")
            }
        };
        let window = match matched.local_window_size {
            -1 => String::new(),
            tokens => format!(", sliding window of {tokens}"),
        };
        let padding = match matched.length_source {
            LengthSource::FromGraph => "",
            LengthSource::FromMask { padding: true } => ", padding on the left",
            LengthSource::FromMask { padding: false } => ", no padding",
        };
        let mask = format!("causal{window}{padding}");
        Self {
            heads: matched.q_heads,
            kv_heads: matched.kv_heads,
            head_size: matched.head_size,
            data_type: matched.data_type.label(),
            inputs: if matched.key.is_empty() { "packed" } else { "separate" },
            rope,
            mask,
            scale: matched.scale,
            softcap: matched.softcap,
            sliding_cache: matched.sliding_cache,
            head_sink: !matched.head_sink.is_empty() || matched.sinks.is_some(),
            past: [matched.past_key.clone(), matched.past_value.clone()],
        }
    }
}

impl PackedProductsReport {
    /// None where a graph has no such product.
    pub(crate) fn new(products: &PackedProducts) -> Option<Self> {
        let kept = |(why, count): (&Kept, &usize)| KeptProducts {
            count: *count,
            why: why.to_string(),
        };
        let any = !products.replaced.is_empty() || !products.kept.is_empty();
        any.then(|| Self {
            replaced: products.replaced.len(),
            kept: products.kept.iter().map(kept).collect(),
        })
    }
}

impl LogitsReport {
    fn new(logits: &Logits) -> Self {
        match logits {
            Logits::Newest { label, .. } => Self {
                rows: "newest",
                detail: format!("the rows of other positions are dropped before node {label}"),
            },
            Logits::Already(how) => Self {
                rows: "unchanged",
                detail: how.clone(),
            },
            Logits::All(why) => Self {
                rows: "unchanged",
                detail: format!("all logits are kept: {why}"),
            },
        }
    }
}
