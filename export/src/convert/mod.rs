//! A conversion from beginning to end: read, check, find, decide, rewrite, write.

use crate::{
    files::{ExternalMode, Output},
    logits::{self, KeepAll, Logits},
    merged::unfold,
    report::{Action, LayerReport, Report},
    revert,
    rewrite::{reads_mask, rewrite},
    rules::{
        Attention, AttentionMatch, Conversion, INPUT_IDS, LengthSource, SampleCalls, carried, find_attention,
        none_found,
    },
    settings::Settings,
    source::{Source, find_source},
    spill::spill,
    validate::validate,
    verify::{
        CacheFacts, DYNAMIC, OtherInput, Padding, Plan, Runtime, Verification, compare, graph_facts, other_inputs, ulp,
    },
};
use anyhow::{Context, Result, anyhow, bail, ensure};
use prost::Message;
use retro_contract::{self as contract, Mode, metadata};
use retro_onnx::{
    Bytes, Content, DataType, LoadedModel, MAX_MODEL_BYTES, ModelProto, external_files, graph::GraphView,
    new_file_beside, read_bytes, read_model, rename_locations, stay_inside,
};
use retro_runtime::Device;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    str::FromStr,
};

/// What to convert, how, and where to.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A model file, or a folder that holds one.
    pub source: PathBuf,
    /// Which graph of a folder, by its file's name or its variant; none: the usual one.
    pub graph: Option<String>,
    /// A file or a folder for a file, a folder for a folder. May be absent in a dry run.
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
    pub verify: Verify,
    /// Where both models run when they are compared.
    pub device: Device,
    /// Largest logit difference that is rounding, for logits of up to 1; none: by the model's types.
    pub tolerance: Option<f32>,
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

/// Whether and how the result is compared with the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    #[default]
    Never,
    /// If the model is small and ONNX Runtime is found; else the report says why not.
    IfPossible,
    Always,
}

/// Models of less than this are compared without being asked.
const SMALL_MODEL: u64 = 1 << 30;
/// Windows that a comparison tries.
const WINDOWS: [usize; 3] = [1, 2, 4];

/// Converts a model and says what was done.
///
/// # Errors
/// The settings are out of range; the source can't be read, is no sound ONNX model or is converted already; none of its
/// attention can be converted, or not all and `partial` is not set; the output can't be written. Nothing is written then.
/// Or a comparison that was asked for can't be made; its result is in the report, not an error.
pub fn convert(options: &Options) -> Result<Report> {
    options.settings.check()?;
    if let Some(tolerance) = options.tolerance {
        ensure!(
            tolerance.is_finite() && tolerance >= 0.0,
            "the tolerance is {tolerance}; it must be a finite number of at least 0"
        );
    }
    let source = find_source(&options.source, options.graph.as_deref(), options.target.as_deref())?;
    let output = match &options.target {
        Some(target) => Some(Output::plan(&source, target, options.external_data, options.force)?),
        None if options.dry_run => None,
        None => bail!("no output is named; give one with -o"),
    };
    // Whatever is missing for a comparison that was asked for is said before anything is written.
    let runtime = match options.verify {
        Verify::Always if !options.dry_run => Some(Runtime::find(options.device).context("--verify")?),
        _ => None,
    };
    let Prepared {
        mut model,
        mut report,
        facts,
        bytes,
    } = prepare(read_model(&source.model)?, source.folder(), options)?;
    let mut external = external_files(&model, source.folder())?;
    let Some(output) = output else { return Ok(report) };
    report.target = Some(output.model_path());
    if options.dry_run {
        return Ok(report);
    }
    let shown = source.model.display();
    let renamed = output.settle(&mut external)?;
    rename_locations(&mut model, &renamed);
    output.mark(&mut model, &external, &renamed);
    revert::record(&mut model, &bytes).with_context(|| format!("{shown}"))?;
    let spilled = spill(&mut model, output.spill_name(), 0);
    let written = output.write(&Content::Model(&model), &external, &spilled)?;
    report.bytes = Some(written.bytes);
    report.external_data = written.external;
    report.files = written.files;
    report.skipped = written.skipped;
    report.graph = output.to_choose();
    let weights: u64 = external.iter().map(|e| e.len).sum();
    let size = bytes.len() as u64 + weights;
    match options.verify {
        Verify::Never => {}
        Verify::IfPossible if size >= SMALL_MODEL => {
            report.unverified = Some(format!("the model has {size} bytes; --verify compares it all the same"));
        }
        Verify::IfPossible => {
            match Runtime::find(options.device)
                .and_then(|runtime| verify(&runtime, &source, (&output, &renamed), options, &facts))
            {
                Ok(verification) => report.verification = Some(verification),
                Err(why) => report.unverified = Some(format!("{why:#}")),
            }
        }
        Verify::Always => {
            let runtime = runtime.context("no ONNX Runtime")?;
            let verification = verify(&runtime, &source, (&output, &renamed), options, &facts);
            report.verification = Some(verification.context("the comparison can't be made")?);
        }
    }
    Ok(report)
}

/// A model as it will be written, but for its record and its weights' place.
struct Prepared {
    model: ModelProto,
    report: Report,
    facts: Facts,
    /// The source's bytes.
    bytes: Bytes,
}

/// What a comparison needs to know of a model.
struct Facts {
    caches: Vec<CacheFacts>,
    /// Inputs that may be fed anything.
    idle: Vec<String>,
    others: Vec<OtherInput>,
    /// What comes out of attention, where a graph quantises activations.
    perturbed: Vec<(String, DataType)>,
    vocabulary: usize,
    padding: Padding,
    /// All attention is converted and there is no other state, so that tokens may be fed again.
    again: bool,
    quantized: bool,
    together: bool,
    single_precision: bool,
}

/// Converts a model in memory, all but files of weights beside it, which `folder` may hold.
///
/// # Errors
/// As [`convert`].
pub fn convert_bytes(bytes: Bytes, folder: &Path, options: &Options) -> Result<Vec<u8>> {
    options.settings.check()?;
    let loaded = read_bytes(bytes, Path::new("the model"))?;
    let mut prepared = prepare(loaded, folder, options)?;
    external_files(&prepared.model, folder)?;
    revert::record(&mut prepared.model, &prepared.bytes)?;
    Ok(prepared.model.encode_to_vec())
}

fn prepare(loaded: LoadedModel, folder: &Path, options: &Options) -> Result<Prepared> {
    let LoadedModel {
        mut model, bytes, path, ..
    } = loaded;
    let shown = path.display();
    is_unconverted(&model).with_context(|| format!("{shown}"))?;
    stay_inside(&model, &path, folder).with_context(|| format!("{shown}"))?;
    let graph = model.graph.as_ref().context("the model has no graph")?;
    validate(graph).map_err(|why| anyhow!("{shown} is not a sound model as its exporter wrote it: {why}"))?;
    has_operators(&model).with_context(|| format!("{shown}"))?;
    let merged = unfold(&mut model).map_err(|why| anyhow!("{shown} can't be converted: {why}"))?;
    let graph = model.graph.as_ref().context("the model has no graph")?;
    let view = GraphView::new(graph, model.onnx_opset());
    let samples = SampleCalls::new(&view, Some(folder.to_owned()));
    let found = find_attention(&model, &samples);
    let conversions = decide(&view, &found, options).with_context(|| format!("{shown} can't be converted"))?;
    let fixed = graph_facts::tokens_at_once(&view).filter(|_| options.settings.window > 1);
    if let Some(count) = fixed {
        bail!(
            "{shown} can't be converted: {INPUT_IDS} takes {count} tokens a call and no other number, but steps of a window of {} feed 1 \
             to {} of them; convert with --window 1, or export it with an open sequence length",
            options.settings.window,
            options.settings.window
        );
    }
    let logits = decide_logits(&view, options);
    let layers = layers(&found, &conversions);
    let facts = facts(&view, &found, &conversions);
    let mut report = Report::new(&path, &model, &options.settings, layers, &logits);
    rewrite(&mut model, &conversions, &logits, &options.settings)
        .with_context(|| format!("{shown} can't be converted"))?;
    let result = model.graph.as_ref().context("the model has no graph")?;
    validate(result).map_err(|why| anyhow!("{shown} can't be converted: the result would not be sound: {why}"))?;
    report.dry_run = options.dry_run;
    report.merged = merged;
    Ok(Prepared {
        model,
        report,
        facts,
        bytes,
    })
}

fn facts(view: &GraphView, found: &[Attention], conversions: &[Conversion]) -> Facts {
    let matches = || found.iter().filter_map(|a| a.found.as_ref().ok());
    let cache = |matched: &AttentionMatch, past: &str, present: &str| {
        let declared = |axis: usize| view.declared_from_end(past, axis).and_then(|d| usize::try_from(d).ok());
        CacheFacts {
            past: past.to_owned(),
            present: present.to_owned(),
            heads: usize::try_from(matched.kv_heads).unwrap_or(1),
            head_size: matched
                .head_size
                .and_then(|d| usize::try_from(d).ok())
                .or_else(|| declared(1))
                .or_else(|| graph_facts::head_size(view, matched))
                .unwrap_or(1),
            sliding: matched.sliding_cache,
            grows: false,
        }
    };
    let both = |matched: &AttentionMatch| {
        [
            cache(matched, &matched.past_key, &matched.present_key),
            cache(matched, &matched.past_value, &matched.present_value),
        ]
    };
    // LengthSource that the mask's ones are counted for, not ones that a caller gives.
    let counted =
        |matched: &AttentionMatch| matched.lengths == LengthSource::Given && reads_mask(view, &matched.seqlens_k);
    let uses = |ops: &[&str]| view.graph.node.iter().any(|n| ops.contains(&n.op_type()));
    let mut caches: Vec<CacheFacts> = matches().flat_map(|matched| both(matched)).collect();
    let grows = found.iter().any(|a| a.found.is_err() && !a.takes_tokens_again);
    caches.extend(graph_facts::other_caches(view, &caches, grows));
    let output = |matched: &AttentionMatch| (matched.output.clone(), matched.typed(matched.output_type));
    let idle = graph_facts::handed_on(view);
    let taken = caches.iter().map(|c| &c.past).chain(&idle).map(String::as_str);
    let others = other_inputs(view, found, &taken.collect::<Vec<_>>());
    let carries = carried(view, found).is_some();
    // Padding is no matter of the mask alone.
    let padding_enters = carries || others.iter().any(OtherInput::counts);
    Facts {
        others,
        caches,
        idle,
        perturbed: if ulp::quantizes_activations(view) {
            matches().map(|matched| output(matched)).collect()
        } else {
            Vec::new()
        },
        vocabulary: view
            .declared_from_end("logits", 1)
            .and_then(|v| usize::try_from(v).ok())
            .unwrap_or(32),
        padding: if matches().all(|s| s.lengths == LengthSource::FromMask { padding: true }) {
            Padding::Both
        } else if conversions.len() == found.len() && matches().all(|s| counted(s)) && !padding_enters {
            Padding::Alone
        } else {
            Padding::Not
        },
        again: conversions.len() == found.len() && !carries && graph_facts::tokens_at_once(view).is_none(),
        quantized: uses(&["MatMulNBits", "MatMulInteger", "DequantizeLinear", "QMoE", "MatMulBnb4"]),
        together: uses(&DYNAMIC),
        single_precision: matches().all(|s| {
            let inside = [s.query_type, s.kv_type, s.output_type];
            let single = |t: &DataType| matches!(t, DataType::Float | DataType::Undefined);
            s.data_type == DataType::Float && inside.iter().all(single)
        }),
    }
}

/// Compares the output with the source for the windows that it takes, and a like model with a wider window for the others.
fn verify(
    runtime: &Runtime,
    source: &Source,
    (output, renamed): (&Output, &BTreeMap<PathBuf, PathBuf>),
    options: &Options,
    facts: &Facts,
) -> Result<Verification> {
    let settings = &options.settings;
    let (own, wider): (Vec<usize>, Vec<usize>) = WINDOWS.iter().partition(|w| **w <= settings.window);
    let usual = if facts.single_precision && !facts.quantized {
        1e-4
    } else {
        2e-2
    };
    let path = output.model_path();
    let perturbed = nudged_copy(source, &path, renamed, facts)?;
    let plan = Plan {
        original: &source.model,
        converted: &path,
        windows: &own,
        caches: &facts.caches,
        idle: &facts.idle,
        others: &facts.others,
        page_size: settings.page_size,
        vocabulary: facts.vocabulary,
        padding: facts.padding,
        together: facts.together,
        perturbed: perturbed.as_ref().map(tempfile::NamedTempFile::path),
        tolerance: options.tolerance.unwrap_or(usual),
        seed: 1,
    };
    let mut verification = compare(runtime, &plan)?;
    if let Some(first) = verification
        .skipped
        .first()
        .filter(|_| verification.compared.is_empty() && verification.broken.is_none())
    {
        bail!("{}", first.why);
    }
    if !wider.is_empty() && facts.again && verification.broken.is_none() {
        let wide = Options {
            settings: Settings {
                window: 4,
                ..settings.clone()
            },
            sliding_cache: Some(SlidingCache::Full),
            ..options.clone()
        };
        let mut prepared = match prepare(read_model(&source.model)?, source.folder(), &wide) {
            Ok(prepared) => prepared,
            // The result is not converted so.
            Err(why) => {
                verification
                    .notes
                    .push(format!("wider windows are not compared: {why:#}"));
                return Ok(verification);
            }
        };
        let name = output.spill_name();
        // Weights that were moved out of the output lie there for this one too.
        drop(spill(&mut prepared.model, name, 0));
        rename_locations(&mut prepared.model, renamed);
        let mut file = new_file_beside(&path)?;
        Content::Model(&prepared.model).write_to(file.as_file_mut())?;
        let more = compare(
            runtime,
            &Plan {
                converted: file.path(),
                windows: &wider,
                ..plan
            },
        )?;
        verification.join(more);
    }
    Ok(verification)
}

/// The original with its attention rounded otherwise, beside the output, where its weights are; none where that tells nothing.
fn nudged_copy(
    source: &Source,
    beside: &Path,
    renamed: &BTreeMap<PathBuf, PathBuf>,
    facts: &Facts,
) -> Result<Option<tempfile::NamedTempFile>> {
    if facts.perturbed.is_empty() {
        return Ok(None);
    }
    let mut model = read_model(&source.model)?.model;
    // Names are those of what was converted, which was unfolded.
    unfold(&mut model).map_err(anyhow::Error::msg)?;
    if !ulp::perturb(&mut model, &facts.perturbed) || model.encoded_len() > MAX_MODEL_BYTES {
        return Ok(None);
    }
    rename_locations(&mut model, renamed);
    let mut file = new_file_beside(beside)?;
    Content::Model(&model).write_to(file.as_file_mut())?;
    Ok(Some(file))
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

/// Whether a runtime would know any operators: ONNX Runtime takes no model that imports none, nor ONNX's of version 0. The
/// import of this program's operator must not make up for that.
fn has_operators(model: &ModelProto) -> Result<()> {
    ensure!(
        !model.opset_import.is_empty(),
        "the model imports no operator set (opset_import is empty), so that no runtime takes it; export it again"
    );
    let opset = model.onnx_opset();
    ensure!(
        opset > 0,
        "the model imports version {opset} of ONNX's operators, which there is not; export it again"
    );
    Ok(())
}

/// What becomes of each attention; an error if the model stays as it is.
fn decide<'a>(view: &GraphView, found: &'a [Attention], options: &Options) -> Result<Vec<Conversion<'a>>> {
    let settings = &options.settings;
    if found.is_empty() {
        bail!("{}", none_found(view));
    }
    let mut conversions = Vec::new();
    let mut refused = Vec::new();
    for attention in found {
        match (&attention.found, attention.node) {
            (Ok(matched), Some(node)) => {
                if matched.sliding_cache && options.keeps_sliding_caches() {
                    continue;
                }
                let dense = matched.sliding_cache || settings.dense_layers.contains(&attention.layer);
                let mode = if dense { Mode::Dense } else { settings.mode };
                conversions.push(Conversion {
                    attention,
                    matched,
                    node,
                    mode,
                });
            }
            (Ok(_), None) => {}
            (Err(why), _) => refused.push((attention, why.to_string())),
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
    if let Some([past, present]) = carried(view, found).filter(|_| settings.window > 1) {
        bail!(
            "the model carries {past} on to {present} beside its key and value caches, and tokens must not be fed to it again; \
             convert with --window 1"
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
    options.keeps_sliding_caches() && attention.found.as_ref().is_ok_and(|matched| matched.sliding_cache)
}

/// Refusals as one line: each reason once, with its first node.
fn summary(refused: &[(&Attention, String)]) -> String {
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
        return Logits::All(KeepAll::Asked);
    }
    match logits::find_lm_head(view) {
        Logits::Newest { .. } if view.opset < logits::GATHER_OPSET => Logits::All(KeepAll::OldOpset(view.opset)),
        found => found,
    }
}

fn layers(found: &[Attention], conversions: &[Conversion]) -> Vec<LayerReport> {
    let action = |attention: &Attention| {
        let conversion = conversions.iter().find(|c| std::ptr::eq(c.attention, attention));
        match (conversion, &attention.found) {
            (Some(c), _) => Action::Converted { mode: c.mode },
            (None, Err(why)) => Action::Kept { why: why.to_string() },
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gqa_model;
    use retro_onnx::{NodeProto, ValueInfoProto};

    #[test]
    fn a_model_with_other_state_is_fed_every_token_once() {
        let mut model = gqa_model(1);
        let graph = model.graph.as_mut().unwrap();
        let state = |name: &str| {
            let dims = ["batch_size".into(), 32.into()];
            ValueInfoProto::tensor(name, DataType::Float, dims)
        };
        graph.input.push(state("past.1.conv"));
        graph.output.push(state("present.1.conv"));
        for (op, inputs, output) in [
            ("ReduceSum", &["x"][..], "sum"),
            ("Add", &["past.1.conv", "sum"], "present.1.conv"),
        ] {
            graph.node.push(NodeProto::new("", op, output, inputs, &[output]));
        }
        let bytes = Bytes::from(model.encode_to_vec());
        let with = |window: usize| {
            let settings = Settings {
                window,
                ..Settings::default()
            };
            let options = Options {
                settings,
                ..Options::default()
            };
            convert_bytes(bytes.clone(), Path::new("."), &options)
        };
        assert!(with(1).is_ok());
        let why = format!("{:#}", with(2).expect_err("two are fed again"));
        assert!(
            why.contains("carries past.1.conv on to present.1.conv") && why.contains("convert with --window 1"),
            "{why}"
        );
    }
}
