//! Which model is to be converted, and whether it goes into a file or a folder.

use retro_model_io::{configured_graph, graphs, locate};
use retro_onnx::{folder_of, locations, read_model};
use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

/// How file names say in what type a graph's weights are, in the repositories of transformers.js and others.
const VARIANTS: [&str; 16] = [
    "fp32",
    "fp16",
    "bf16",
    "int4",
    "int8",
    "uint8",
    "q1",
    "q1f16",
    "q2",
    "q2f16",
    "q4",
    "q4f16",
    "q8",
    "bnb4",
    "quantized",
    "quant",
];

/// Why a path stands for no model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no model, or it isn't clear which.
    #[error(transparent)]
    Locate(#[from] retro_model_io::Error),
    /// The model's folder can't be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The path that was named.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// A model's file, and the folder that comes along, if one does.
#[derive(Debug)]
pub struct Source {
    pub model: PathBuf,
    /// A folder that was named, or a file's for an output that is a folder.
    pub named_folder: Option<PathBuf>,
    /// Of the folder nothing but the model and its weights comes along: it is no model's folder.
    pub alone: bool,
    /// Files of the folder that stay behind: other variants of a graph that was chosen, and their weights.
    pub behind: BTreeSet<PathBuf>,
}

impl Source {
    /// The folder that the model lies in.
    pub fn folder(&self) -> &Path {
        folder_of(&self.model)
    }

    /// The model within the folder that comes along, or its file's name.
    pub(crate) fn relative(&self) -> &Path {
        let folder = self.named_folder.as_deref();
        let inside = folder.and_then(|folder| self.model.strip_prefix(folder).ok());
        inside.unwrap_or_else(|| Path::new(self.model.file_name().unwrap_or_default()))
    }
}

/// Finds the model that a file or folder stands for ([`locate`]). For an output that is a folder, a file stands for its model's
/// folder with that graph chosen. So does a folder of graphs whose configuration lies above.
///
/// # Errors
/// There is none, or it isn't clear which.
pub fn find_source(path: &Path, choice: Option<&str>, target: Option<&Path>) -> Result<Source, Error> {
    let located = locate(path, choice)?;
    let mut source = Source {
        model: located.graph,
        named_folder: located.by_folder.then(|| path.to_owned()),
        alone: false,
        behind: BTreeSet::new(),
    };
    let below = located.by_folder && located.folder != path;
    if below || !located.by_folder && target.is_some_and(means_folder) {
        source.alone = !located.configured;
        if source.folder() != located.folder && source.model.strip_prefix(&located.folder).is_err() {
            // A folder above that the path doesn't mention.
            let own = fs::canonicalize(source.folder()).map_err(|source| Error::Read {
                path: path.to_owned(),
                source,
            })?;
            source.model = own.join(source.model.file_name().unwrap_or_default());
        }
        source.named_folder = Some(located.folder);
    }
    if let Some(folder) = source.named_folder.clone()
        && (choice.is_some() || below || !located.by_folder)
        && !source.alone
    {
        source.behind = other_variants(&source.model, &folder);
    }
    Ok(source)
}

/// Whether an output for a file is to be a folder: one that is there, a name that ends in a slash, or a new name that doesn't end
/// in .onnx.
fn means_folder(target: &Path) -> bool {
    let slash = target.as_os_str().as_encoded_bytes().ends_with(b"/");
    let new = || fs::symlink_metadata(target).is_err();
    target.is_dir() || slash || (new() && target.extension().is_none_or(|e| !e.eq_ignore_ascii_case("onnx")))
}

/// Graphs beside this one whose names differ in the variant alone, and weights that nothing else needs. The one that
/// genai_config.json names is none of them: hosts would not find it.
fn other_variants(model: &Path, folder: &Path) -> BTreeSet<PathBuf> {
    let here = folder_of(model);
    let (Ok(all), configured) = (graphs(here), configured_graph(folder).ok().flatten()) else {
        return BTreeSet::new();
    };
    let all: Vec<PathBuf> = all.into_iter().filter(|g| folder_of(g) == here).collect();
    let same = |a: &Path, b: &Path| {
        let folder = |path: &Path| fs::canonicalize(folder_of(path)).ok();
        a.file_name() == b.file_name() && folder(a) == folder(b)
    };
    let keep = |graph: &Path| same(graph, model) || configured.as_ref().is_some_and(|c| same(graph, c));
    let (others, stay): (Vec<_>, Vec<_>) = all.into_iter().partition(|g| !keep(g) && base(g) == base(model));
    let weights = |graph: &PathBuf| read_model(graph).map(|m| locations(&m.model)).ok();
    let mut behind: BTreeSet<PathBuf> = others.iter().filter_map(weights).flatten().collect();
    match stay.iter().map(weights).collect::<Option<Vec<_>>>() {
        Some(needed) => behind.retain(|name| !needed.iter().flatten().any(|n| n == name)),
        // What a graph needs that can't be read isn't known.
        None => behind.clear(),
    }
    let place = |path: PathBuf| path.strip_prefix(folder).map(Path::to_owned).ok();
    let weights = behind.into_iter().map(|name| here.join(name));
    others.into_iter().chain(weights).filter_map(place).collect()
}

/// A graph's name without its variant.
fn base(graph: &Path) -> String {
    let stem = graph.file_stem().unwrap_or_default().to_string_lossy();
    let variant = |name: &str| VARIANTS.contains(&name);
    match stem.rsplit_once(['_', '-']) {
        Some((base, end)) if variant(end) => base.to_owned(),
        _ => stem.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_a_folder_unless_it_ends_in_onnx() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("there.onnx")).unwrap();
        fs::write(path("file"), "").unwrap();
        for (name, folder) in [
            ("out", true),
            ("out/", true),
            ("out.onnx/", true),
            ("out.v2", true),
            ("there.onnx", true),
            ("out.onnx", false),
            ("out.ONNX", false),
            ("file", false),
        ] {
            assert_eq!(means_folder(&path(name)), folder, "{name}");
        }
    }

    #[test]
    fn variants_of_a_graph_have_one_base() {
        for (name, expected) in [
            ("model.onnx", "model"),
            ("model_q4f16.onnx", "model"),
            ("model-int8.onnx", "model"),
            ("decoder_model_merged_fp16.onnx", "decoder_model_merged"),
            ("decoder_with_past_model.onnx", "decoder_with_past_model"),
            ("q4.onnx", "q4"),
        ] {
            assert_eq!(base(Path::new(name)), expected);
        }
    }
}
