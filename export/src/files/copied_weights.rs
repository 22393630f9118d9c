//! The record, in a converted model, of the files of weights that were copied or linked for it.

use super::{paths::same_file, plan::Output};
use retro_onnx::{ExternalFile, ModelProto, folder_of, inside};
use std::{collections::BTreeMap, path::PathBuf};

/// Metadata: an object of name here: name in the original.
const WEIGHTS: &str = "retro.weights_brought";

/// Writes into a model which of its weights were copied or linked for it. Those are this program's to remove when the model is replaced.
/// `renamed`: their usual names and new ones ([`Output::rename_taken`]).
pub fn record_copied_weights(
    model: &mut ModelProto,
    output: &Output,
    external: &[ExternalFile],
    renamed: &BTreeMap<PathBuf, PathBuf>,
) {
    if output.source.named_folder.is_some() {
        return;
    }
    let folder = folder_of(&output.target);
    let usual: BTreeMap<_, _> = renamed.iter().map(|(old, new)| (new, old)).collect();
    let copied = external
        .iter()
        .filter(|f| !same_file(&folder.join(&f.location), &f.source));
    let names: serde_json::Map<_, _> = copied
        .map(|f| {
            let usual = usual.get(&f.location).map_or(&f.location, |old| *old);
            (
                f.location.to_string_lossy().into_owned(),
                usual.to_string_lossy().into(),
            )
        })
        .collect();
    if !names.is_empty() {
        model.set_metadata(WEIGHTS, serde_json::Value::Object(names).to_string());
    }
}

/// Weights that were copied or linked for a model, as name here: name in the original. Names that leave the folder are none of ours.
pub fn copied_weights(model: &ModelProto) -> BTreeMap<PathBuf, PathBuf> {
    let names = model.metadata(WEIGHTS).and_then(|text| serde_json::from_str(text).ok());
    let names: BTreeMap<String, String> = names.unwrap_or_default();
    names
        .iter()
        .filter_map(|(here, usual)| Some((inside(here)?, inside(usual)?)))
        .collect()
}
