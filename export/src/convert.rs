//! A conversion from beginning to end: read, check, find, decide, rewrite, write.

use crate::{
    files::{self, ExternalMode, Output},
    graph::GraphView,
    logits::{self, Logits},
    onnx::{LoadedModel, ModelProto, external_files, read_model},
    report::{Action, LayerReport, Report},
    rewrite::rewrite,
    rules::{Attention, Conversion, survey},
    settings::Settings,
    validate::validate,
};
use anyhow::{Context, Result, anyhow, bail, ensure};
use retro_contract::{self as contract, Mode, metadata};
use std::{path::PathBuf, str::FromStr};

/// What to convert, how, and where to.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A model file, or a folder that holds one.
    pub source: PathBuf,
    /// A file for a file, a folder for a folder. May be absent in a dry run.
    pub target: Option<PathBuf>,
    pub settings: Settings,
    /// Return the logits of all tokens fed, as the source does, not the newest one's alone.
    pub all_logits: bool,
    /// Convert what can be, even if some attention can't.
    pub partial: bool,
    /// What becomes of layers that keep a sliding-window cache; none: kept with a window of 1, else given a full one.
    pub sliding_cache: Option<SlidingCache>,
    /// What becomes of weights in files of their own; none: what fits the place of the output.
    pub external_data: Option<ExternalMode>,
    /// Replace what is at the target.
    pub force: bool,
    /// Find and decide, but write nothing.
    pub dry_run: bool,
}

/// What becomes of a layer whose cache holds about its sliding window and shifts. Such a cache can't take tokens that it
/// holds already: measured with ONNX Runtime 1.31.1, the results are wrong from the first shift on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlidingCache {
    /// The layer stays as it is; every token must be fed once.
    Keep,
    /// The layer becomes a RetroAttention of mode dense with the same window and a cache of the whole context.
    Full,
}

impl SlidingCache {
    pub const VALUES: [&'static str; 2] = ["keep", "full"];
}

impl FromStr for SlidingCache {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "keep" => Ok(Self::Keep),
            "full" => Ok(Self::Full),
            _ => Err(format!("{s:?} is none of {}", Self::VALUES.join(", "))),
        }
    }
}

impl Options {
    fn keeps_sliding_caches(&self) -> bool {
        match self.sliding_cache {
            Some(choice) => choice == SlidingCache::Keep,
            None => self.settings.window == 1,
        }
    }
}

/// Converts a model and says what was done.
///
/// # Errors
/// The settings are out of range; the source can't be read, is no sound ONNX model or is converted already; none of its
/// attention can be converted, or not all and `partial` is not set; the output can't be written. Nothing is written then.
pub fn convert(options: &Options) -> Result<Report> {
    options.settings.check()?;
    let source = files::find_source(&options.source)?;
    let output = match &options.target {
        Some(target) => Some(Output::plan(&source, target, options.external_data, options.force)?),
        None if options.dry_run => None,
        None => bail!("no output is named; give one with -o"),
    };
    let LoadedModel { mut model, .. } = read_model(&source.model)?;
    let shown = source.model.display();
    is_unconverted(&model).with_context(|| format!("{shown}"))?;
    let graph = model.graph.as_ref().context("the model has no graph")?;
    validate(graph).map_err(|why| anyhow!("{shown} is not a sound model as its exporter wrote it: {why}"))?;
    let view = GraphView::new(graph, model.opset_version("").unwrap_or(0));
    let found = survey(&model, &view);
    let conversions = decide(&found, options).with_context(|| format!("{shown} can't be converted"))?;
    let logits = decide_logits(&view, options);
    let layers = layers(&found, &conversions);
    let mut report = Report::new(&source.model, &model, &options.settings, layers, &logits);
    rewrite(&mut model, &conversions, &logits, &options.settings).with_context(|| format!("{shown}"))?;
    let external = external_files(&model, source.folder())?;
    report.dry_run = options.dry_run;
    if let Some(output) = output {
        report.target = Some(output.model_path());
        if !options.dry_run {
            let written = output.write(&model, &external)?;
            report.bytes = Some(written.bytes);
            report.external_data = written.external;
            report.files = written.files;
            report.skipped = written.skipped;
        }
    }
    Ok(report)
}

fn is_unconverted(model: &ModelProto) -> Result<()> {
    let nodes = model.graph.iter().flat_map(|g| &g.node);
    let converted =
        model.metadata(metadata::VERSION).is_some() || nodes.into_iter().any(|n| n.domain() == contract::DOMAIN);
    ensure!(
        !converted,
        "the model is converted already; convert the original again to change its settings"
    );
    Ok(())
}

/// What becomes of each attention; an error if the model stays as it is.
fn decide<'a>(found: &'a [Attention], options: &Options) -> Result<Vec<Conversion<'a>>> {
    let settings = &options.settings;
    if found.is_empty() {
        bail!("there is no attention in its graph");
    }
    let mut conversions = Vec::new();
    let mut refused = Vec::new();
    for attention in found {
        match (&attention.found, attention.node) {
            (Ok(site), Some(node)) => {
                if site.sliding_cache && options.keeps_sliding_caches() {
                    continue;
                }
                let dense = site.sliding_cache || settings.dense_layers.contains(&attention.layer);
                let mode = if dense { Mode::Dense } else { settings.mode };
                conversions.push(Conversion {
                    attention,
                    site,
                    node,
                    mode,
                });
            }
            (Ok(_), None) => {}
            (Err(why), _) => refused.push((attention, why.as_str())),
        }
    }
    if conversions.is_empty() && !refused.is_empty() {
        bail!("{}", summary(&refused));
    }
    if !refused.is_empty() && !options.partial {
        let (bad, all) = (refused.len(), found.len());
        bail!(
            "{bad} of {all} attention layers can't: {}; --partial converts the others",
            summary(&refused)
        );
    }
    let sliding: Vec<_> = found.iter().filter(|a| stays_for_its_cache(a, options)).collect();
    if let Some(first) = sliding.first() {
        if settings.window > 1 {
            bail!(
                "layer {} (node {}) keeps a sliding-window cache, which gives wrong results when tokens are fed again; \
                 convert with --window 1 or --sliding-cache full",
                first.layer,
                first.name
            );
        }
        ensure!(
            !conversions.is_empty(),
            "every layer keeps a sliding-window cache: there is nothing to gain"
        );
    }
    let stuck = refused.iter().find(|(attention, _)| !attention.takes_tokens_again);
    if let Some((attention, _)) = stuck.filter(|_| settings.window > 1) {
        bail!(
            "node {} ({}) stays as it is, and tokens must not be fed to it again; convert with --window 1",
            attention.name,
            attention.op_type
        );
    }
    let known = |layer: &usize| conversions.iter().any(|c| c.attention.layer == *layer);
    if let Some(layer) = settings.dense_layers.iter().find(|l| !known(l)) {
        let layers: Vec<String> = conversions.iter().map(|c| c.attention.layer.to_string()).collect();
        bail!(
            "--dense-layers names layer {layer}; the layers to convert are {}",
            layers.join(", ")
        );
    }
    Ok(conversions)
}

fn stays_for_its_cache(attention: &Attention, options: &Options) -> bool {
    options.keeps_sliding_caches() && attention.found.as_ref().is_ok_and(|site| site.sliding_cache)
}

/// Refusals as one line: each reason once, with its first node.
fn summary(refused: &[(&Attention, &str)]) -> String {
    const SHOWN: usize = 3;
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for (attention, why) in refused {
        match reasons.iter_mut().find(|(reason, _)| reason == why) {
            Some((_, nodes)) => nodes.push(&attention.name),
            None => reasons.push((why, vec![&attention.name])),
        }
    }
    let more = reasons.len().saturating_sub(SHOWN);
    let line = |(why, nodes): &(&str, Vec<&str>)| match nodes.as_slice() {
        [one] => format!("node {one}: {why}"),
        [first, rest @ ..] => format!("node {first} and {} more: {why}", rest.len()),
        [] => (*why).to_owned(),
    };
    let mut text = reasons.iter().take(SHOWN).map(line).collect::<Vec<_>>().join("; ");
    if more > 0 {
        text += &format!("; and {more} other reasons");
    }
    text
}

fn decide_logits(view: &GraphView, options: &Options) -> Logits {
    if options.all_logits {
        return Logits::All("as asked".to_owned());
    }
    match logits::look(view) {
        Logits::Newest { .. } if view.opset < logits::GATHER_OPSET => Logits::All(format!(
            "opset {} has no Gather that takes the last position",
            view.opset
        )),
        found => found,
    }
}

fn layers(found: &[Attention], conversions: &[Conversion]) -> Vec<LayerReport> {
    let action = |attention: &Attention| {
        let conversion = conversions.iter().find(|c| std::ptr::eq(c.attention, attention));
        match (conversion, &attention.found) {
            (Some(c), _) => Action::Converted { mode: c.mode },
            (None, Err(why)) => Action::Kept { why: why.clone() },
            (None, Ok(_)) => Action::Kept {
                why: "it keeps a sliding-window cache".to_owned(),
            },
        }
    };
    found
        .iter()
        .map(|attention| LayerReport::new(attention, action(attention)))
        .collect()
}
