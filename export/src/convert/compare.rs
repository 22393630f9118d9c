//! The comparison of what was written with its source.

use super::{Error, Options, SlidingCache, Verify, facts::Facts, in_memory::convert_in_memory};
use crate::{
    error::chain,
    files::Output,
    merged::unfold,
    report::Report,
    settings::Settings,
    source::Source,
    spill::spill,
    verify::{self, Comparison, ComparisonRuntime, Verification, ulp},
};
use prost::Message;
use retro_onnx::{Content, MAX_MODEL_BYTES, ModelProto, new_file_beside, read_model, rename_locations};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;

/// Models of less than this many bytes, with their weights, are compared without being asked.
const SMALL_MODEL: u64 = 1 << 30;
/// Windows that a comparison tries.
const WINDOWS: [usize; 3] = [1, 2, 4];
/// Logit difference that is rounding, for logits of up to 1: of float32 models, and of all others.
const TOLERANCE_SINGLE: f32 = 1e-4;
const TOLERANCE_OTHER: f32 = 2e-2;

/// What was written, and from what.
pub struct WrittenModel<'w> {
    pub source: &'w Source,
    pub output: &'w Output<'w>,
    /// Files of weights that have another name in the output: name in the source, name in the output.
    pub renamed: &'w BTreeMap<PathBuf, PathBuf>,
    pub facts: &'w Facts,
    /// Bytes of the source, weights included.
    pub bytes: u64,
}

/// What a comparison that was asked for runs in. That it is missing is known before anything is written.
pub fn runtime_asked_for(options: &Options) -> Result<Option<ComparisonRuntime>, Error> {
    match options.verify {
        Verify::Always if !options.dry_run => {
            let runtime = ComparisonRuntime::find(options.device.unwrap_or_default());
            runtime.map(Some).map_err(Error::NoRuntime)
        }
        _ => Ok(None),
    }
}

/// Compares what was written with its source, if that is asked for or possible, and says so in the report. `runtime`: of
/// [`runtime_asked_for`].
pub fn compare_written(
    written: &WrittenModel,
    runtime: Option<ComparisonRuntime>,
    options: &Options,
    report: &mut Report,
) -> Result<(), Error> {
    match options.verify {
        Verify::Never => {}
        Verify::IfPossible if written.bytes >= SMALL_MODEL => {
            let bytes = written.bytes;
            report.unverified = Some(format!(
                "the model has {bytes} bytes; --verify compares it all the same"
            ));
        }
        Verify::IfPossible => {
            let compared = ComparisonRuntime::find(options.device.unwrap_or_default())
                .and_then(|runtime| run(&runtime, written, options));
            match compared {
                Ok(verification) => report.verification = Some(verification),
                Err(why) => report.unverified = Some(chain(&why)),
            }
        }
        Verify::Always => {
            let runtime = match runtime {
                Some(runtime) => runtime,
                None => ComparisonRuntime::find(options.device.unwrap_or_default()).map_err(Error::NoRuntime)?,
            };
            report.verification = Some(run(&runtime, written, options).map_err(Error::Comparison)?);
        }
    }
    Ok(())
}

/// Compares the output with the source for the windows that it takes, and a copy converted with a wider window for the others.
fn run(runtime: &ComparisonRuntime, written: &WrittenModel, options: &Options) -> Result<Verification, verify::Error> {
    let (settings, facts) = (&options.settings, written.facts);
    let (own, wider) = windows(settings);
    let path = written.output.model_path();
    let perturbed = perturbed_copy(written, &path)?;
    let usual = if facts.single_precision && !facts.quantized {
        TOLERANCE_SINGLE
    } else {
        TOLERANCE_OTHER
    };
    let comparison = Comparison {
        original: &written.source.model,
        converted: &path,
        windows: &own,
        window_in_graph: settings.keeps_window_in_graph(),
        lengths_from_mask: facts.lengths_from_mask,
        caches: &facts.caches,
        unused_inputs: &facts.unused_inputs,
        other_inputs: &facts.other_inputs,
        page_size: settings.page_size,
        vocabulary: facts.vocabulary,
        padding: facts.padding,
        dynamic_quantization: facts.dynamic_quantization,
        perturbed: perturbed.as_ref().map(NamedTempFile::path),
        tolerance: options.tolerance.unwrap_or(usual),
        seed: 1,
    };
    let mut verification = verify::compare(runtime, &comparison)?;
    if verification.broken.is_some() {
        return Ok(verification);
    }
    if let (true, Some(first)) = (verification.compared.is_empty(), verification.skipped.first()) {
        return Err(verify::Error::NothingCompared(first.why.clone()));
    }
    if wider.is_empty() || !facts.takes_tokens_again {
        return Ok(verification);
    }
    match wider_copy(written, &path, options)? {
        Ok(file) => {
            let more = verify::compare(
                runtime,
                &Comparison {
                    converted: file.path(),
                    windows: &wider,
                    window_in_graph: widest(settings).keeps_window_in_graph(),
                    ..comparison
                },
            )?;
            verification.join(more);
        }
        // The result is not converted so.
        Err(why) => {
            let why = chain(&why);
            verification
                .notes
                .push(format!("wider windows are not compared: {why}"));
        }
    }
    Ok(verification)
}

/// The settings with the widest window that is compared.
fn widest(settings: &Settings) -> Settings {
    Settings {
        window: WINDOWS.into_iter().max().unwrap_or(1),
        ..settings.clone()
    }
}

/// Windows that the converted model takes, and those of a copy converted with the widest.
fn windows(settings: &Settings) -> (Vec<usize>, Vec<usize>) {
    let wide = widest(settings);
    let (mut own, mut wider): (Vec<usize>, Vec<usize>) = WINDOWS.iter().partition(|w| **w <= settings.window);
    if settings.keeps_window_in_graph() {
        own = vec![settings.window];
    }
    if wide.keeps_window_in_graph() {
        wider = vec![wide.window];
        wider.retain(|window| !own.contains(window));
    }
    (own, wider)
}

/// The model converted with the widest window that is compared, beside the output; or why it can't be.
fn wider_copy(
    written: &WrittenModel,
    beside: &Path,
    options: &Options,
) -> Result<Result<NamedTempFile, Error>, verify::Error> {
    let wide = Options {
        settings: widest(&options.settings),
        sliding_cache: Some(SlidingCache::Full),
        // Products as the converted model has them.
        keep_matmul: options.keep_matmul
            || (options.settings.window == 1 && options.device != Some(retro_runtime::Device::Cpu)),
        ..options.clone()
    };
    let loaded = read_model(&written.source.model)?;
    let mut converted = match convert_in_memory(loaded, written.source.folder(), &wide) {
        Ok(converted) => converted,
        Err(why) => return Ok(Err(why)),
    };
    // Weights that were moved out of the output lie there for this one too.
    drop(spill(&mut converted.model, written.output.spill_name(), 0));
    rename_locations(&mut converted.model, written.renamed);
    temporary(&converted.model, beside).map(Ok)
}

/// The original with its attention rounded otherwise, beside the output, where its weights are; none where that tells nothing.
fn perturbed_copy(written: &WrittenModel, beside: &Path) -> Result<Option<NamedTempFile>, verify::Error> {
    if written.facts.perturbed.is_empty() {
        return Ok(None);
    }
    let loaded = read_model(&written.source.model)?;
    let mut model = loaded.model;
    // Names are those of what was converted, which was unfolded.
    unfold(&mut model).map_err(|why| verify::Error::Perturb(why.to_string()))?;
    if !ulp::perturb(&mut model, &written.facts.perturbed) || model.encoded_len() > MAX_MODEL_BYTES {
        return Ok(None);
    }
    rename_locations(&mut model, written.renamed);
    temporary(&model, beside).map(Some)
}

/// A model in a temporary file of the output's folder, where its weights are.
fn temporary(model: &ModelProto, beside: &Path) -> Result<NamedTempFile, verify::Error> {
    let write = |source: std::io::Error| verify::Error::Write {
        folder: retro_onnx::folder_of(beside).to_owned(),
        source,
    };
    let mut file = new_file_beside(beside).map_err(write)?;
    Content::Model(model).write_to(file.as_file_mut()).map_err(write)?;
    Ok(file)
}
