//! The converted-model cache of a comparison: the source model and its conversions, in a temporary folder.

use std::path::{Path, PathBuf};

use retro_contract::metadata;
use retro_export::{ExternalMode, Options, Settings};
use retro_onnx::read_model;

use super::{Error, Result, policy::ModelSource};
use crate::Device;
use crate::decoder::require;
use crate::model_folder::{ModelFolder, chosen, is_weights_folder};

/// Converts the source model once per setting.
pub struct ConvertedModelCache {
    folder: tempfile::TempDir,
    /// The source model's graph: a folder or a file.
    graph: PathBuf,
    /// What conversions are for.
    device: Device,
    made: Vec<(Settings, PathBuf)>,
}

impl ConvertedModelCache {
    /// A cache for the source model at `path`: a model folder (`choice` names one of its graphs), an ONNX file, or a
    /// folder of Llama weights, which is built first. Conversions are for `device`.
    ///
    /// # Errors
    /// When there is no model, it is converted already, or no temporary folder can be made.
    pub fn new(path: &Path, choice: Option<&str>, device: Device) -> Result<Self> {
        require!(path.exists(), Error::NoModel(path.to_owned()));
        let path = &chosen(path, choice)?;
        let folder = tempfile::tempdir().map_err(Error::NoTemporaryFolder)?;
        let graph = if is_weights_folder(path) {
            let built = folder.path().join("source");
            retro_models::build(path, &built, &retro_models::Options::default())?;
            built
        } else {
            path.to_owned()
        };
        let file = ModelFolder::open(&graph, None)?.graph;
        let converted = read_model(&file).is_ok_and(|loaded| loaded.model.metadata(metadata::VERSION).is_some());
        require!(!converted, Error::Converted(path.to_owned()));
        Ok(Self {
            folder,
            graph,
            device,
            made: Vec::new(),
        })
    }

    /// A cache that converts nothing: every model is run as it is.
    ///
    /// # Errors
    /// When no temporary folder can be made.
    pub fn of_nothing(graph: &Path) -> Result<Self> {
        Ok(Self {
            folder: tempfile::tempdir().map_err(Error::NoTemporaryFolder)?,
            graph: graph.to_owned(),
            device: Device::default(),
            made: Vec::new(),
        })
    }

    /// The source model's graph.
    pub fn graph(&self) -> &Path {
        &self.graph
    }

    /// The path of a row's model, which is converted if it was not yet.
    ///
    /// # Errors
    /// When it cannot be converted.
    pub fn open(&mut self, source: &ModelSource) -> Result<PathBuf> {
        let settings = match source {
            ModelSource::Graph(path) => return Ok(path.clone()),
            ModelSource::Converted(settings) => &**settings,
        };
        if let Some((_, path)) = self.made.iter().find(|(s, _)| s == settings) {
            return Ok(path.clone());
        }
        let mut target = self.folder.path().join(format!("converted-{}", self.made.len()));
        if self.graph.is_file() {
            target.set_extension("onnx");
        }
        let convert = |external_data| {
            retro_export::convert(&Options {
                source: self.graph.clone(),
                target: Some(target.clone()),
                settings: settings.clone(),
                device: Some(self.device),
                external_data: Some(external_data),
                force: true,
                ..Default::default()
            })
        };
        // Weights are hard links where the file system has them.
        let converted = convert(ExternalMode::Link).or_else(|_| convert(ExternalMode::Copy));
        converted.map_err(Box::new)?;
        if self.graph.is_file() {
            // The converted file has a folder of its own.
            bring_companions(&self.graph, self.folder.path())?;
        }
        self.made.push((settings.clone(), target.clone()));
        Ok(target)
    }
}

/// Copies configuration and tokenizer of a model that is given as a file.
fn bring_companions(graph: &Path, folder: &Path) -> Result<()> {
    let place = retro_model_io::locate(graph, None)?.folder;
    for name in [
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ] {
        let from = place.join(name);
        if from.is_file() {
            std::fs::copy(&from, folder.join(name)).map_err(|source| Error::Copy { path: from, source })?;
        }
    }
    Ok(())
}
