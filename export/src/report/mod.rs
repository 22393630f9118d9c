//! What was found and done, as text and as JSON.

use crate::{
    logits::Logits,
    rules::{Attention, AttentionMatch, LengthSource, Rope},
    settings::Settings,
    table,
    verify::Verification,
};
use retro_contract::{Budget, Mode};
use retro_onnx::{ModelProto, OperatorSetIdProto};
use serde::{Serialize, Serializer};
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// The report of a conversion.
#[derive(Debug, Serialize)]
pub struct Report {
    pub source: PathBuf,
    /// The converted model's file; none in a dry run without an output.
    pub target: Option<PathBuf>,
    pub dry_run: bool,
    pub model: ModelReport,
    pub settings: SettingsReport,
    /// What became of the If of a merged decoder.
    pub merged: Option<String>,
    /// Every attention found, in graph order.
    pub layers: Vec<LayerReport>,
    pub converted_layers: usize,
    pub logits: LogitsReport,
    /// Length of the converted model's file; none in a dry run.
    pub bytes: Option<u64>,
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
    pub producer: String,
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
    pub window: usize,
    /// "0.15" or "2048", as on the command line.
    pub budget: String,
    pub min_pages: usize,
    pub page_size: usize,
    pub sink_pages: usize,
    pub selector: &'static str,
    pub group_score: &'static str,
    pub selector_lambda: f32,
    pub selector_correlation: f32,
    pub dense_layers: Vec<usize>,
}

/// An attention, what was found of it, and what became of it.
#[derive(Debug, Serialize)]
pub struct LayerReport {
    pub layer: usize,
    pub node: String,
    pub op_type: String,
    /// The rule that knows it; none for an attention of no known pattern.
    pub rule: Option<&'static str>,
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
    Converted {
        #[serde(serialize_with = "as_text")]
        mode: Mode,
    },
    Kept {
        why: String,
    },
    /// Nothing yet: it was only looked at.
    Convertible,
}

/// The facts of an attention.
#[derive(Debug, Serialize)]
pub struct FoundReport {
    pub heads: i64,
    pub kv_heads: i64,
    pub head_size: Option<i64>,
    pub data_type: &'static str,
    pub inputs: &'static str,
    pub rope: String,
    pub mask: String,
    /// 0: 1/sqrt(head size).
    pub scale: f32,
    /// 0: off.
    pub softcap: f32,
    pub head_sink: bool,
    /// The source's cache holds about its window; a converted layer's holds everything.
    pub sliding_cache: bool,
    pub past: [String; 2],
}

/// What became of the logits.
#[derive(Debug, Serialize)]
pub struct LogitsReport {
    /// "newest": only the newest position's now; "unchanged": the model returns them as before.
    pub rows: &'static str,
    pub detail: String,
}

/// A file of weights.
#[derive(Debug, Serialize)]
pub struct ExternalReport {
    pub location: PathBuf,
    pub bytes: u64,
    /// "referenced", "linked", "copied" or "already there".
    pub how: &'static str,
}

fn as_text<S: Serializer>(mode: &Mode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(mode.as_str())
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
            merged: None,
            layers,
            converted_layers: converted,
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
                Budget::Ratio(_) => settings.min_pages,
                Budget::Tokens(tokens) => tokens.div_ceil(settings.page_size),
            },
            page_size: settings.page_size,
            sink_pages: settings.sink_pages,
            selector: settings.selector.as_str(),
            group_score: settings.group_score.as_str(),
            selector_lambda: settings.selector_lambda,
            selector_correlation: settings.selector_correlation,
            dense_layers: dense.map(|l| l.layer).collect(),
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
        let padding = match matched.lengths {
            LengthSource::Given => "",
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

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (m, s) = (&self.model, &self.settings);
        writeln!(f, "model    {}", self.source.display())?;
        writeln!(f, "         by {m}")?;
        let lambda = match s.selector {
            "moments" => format!(" (lambda {})", s.selector_lambda),
            "signed_moments" => format!(
                " (lambda {}, correlation {})",
                s.selector_lambda, s.selector_correlation
            ),
            _ => String::new(),
        };
        let plural = |n: usize| if n == 1 { "" } else { "s" };
        writeln!(
            f,
            "settings window {}, budget {} (at least {} page{}), pages of {} tokens, {} sink page{}, selector {}{lambda}, \
             group score {}",
            s.window,
            s.budget,
            s.min_pages,
            plural(s.min_pages),
            s.page_size,
            s.sink_pages,
            plural(s.sink_pages),
            s.selector,
            s.group_score
        )?;
        if let Some(merged) = &self.merged {
            writeln!(f, "merged   {merged}")?;
        }
        f.write_str(&table::layers(&self.layers))?;
        writeln!(f, "logits   {}", self.logits.detail)?;
        for e in &self.external_data {
            writeln!(f, "weights  {} {}, {} bytes", e.location.display(), e.how, e.bytes)?;
        }
        for file in &self.files {
            writeln!(f, "file     {}", file.display())?;
        }
        for skipped in &self.skipped {
            writeln!(f, "skipped  {skipped}")?;
        }
        if let Some(verification) = &self.verification {
            write!(f, "{verification}")?;
        }
        if let Some(why) = &self.unverified {
            writeln!(f, "verify   NOT VERIFIED: {why}")?;
        }
        let total = self.layers.len();
        let share = format!(
            "{} of {total} attention layer{} converted",
            self.converted_layers,
            plural(total)
        );
        match (&self.target, self.bytes) {
            (Some(target), Some(bytes)) => writeln!(f, "wrote    {} ({bytes} bytes): {share}", target.display())?,
            _ => writeln!(f, "dry run  nothing is written; {share} otherwise")?,
        }
        match &self.graph {
            Some(graph) => writeln!(
                f,
                "graph    the folder has others too: run it with --graph {}",
                graph.display()
            ),
            None => Ok(()),
        }
    }
}
