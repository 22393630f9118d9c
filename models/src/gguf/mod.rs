//! Models in GGUF files, as llama.cpp's converter writes them: the shape and the tokenizer from the metadata, the
//! weights under Hugging Face's names.

mod config;
mod model_files;
mod names;
mod tokenizer;
mod weights;

use std::path::Path;

use retro_gguf::{Bytes, Gguf};

pub use names::gguf_name;
pub use weights::{GgufWeights, Tensor};

use crate::{
    config::LlamaConfig,
    error::{Error, Result, at},
};

/// A model: its shape, its weights, and the files that go beside the graph.
pub struct GgufModel {
    pub config: LlamaConfig,
    pub weights: GgufWeights,
    /// Names and contents.
    pub files: Vec<(&'static str, String)>,
}

impl GgufModel {
    /// Reads a file. `tokenizer`: the file's own becomes a tokenizer.json.
    pub fn open(path: &Path, tokenizer: bool) -> Result<Self> {
        Self::parse(retro_onnx::map_file(path)?, path, tokenizer)
    }

    /// As [`Self::open`], from a file's bytes; `path` is what errors call them.
    pub fn parse(bytes: Bytes, path: &Path, tokenizer: bool) -> Result<Self> {
        let file = Gguf::parse(bytes).map_err(at!(Gguf, path))?;
        let parts = file.metadata.integer("split.count").map_err(at!(Gguf, path))?;
        if let Some(parts) = parts.filter(|n| *n > 1) {
            let path = path.to_owned();
            return Err(Error::SplitGguf { path, parts });
        }
        let config = config::read(&file).map_err(at!(GgufModel, path))?;
        let files = model_files::make(&file, config, tokenizer).map_err(at!(GgufTokenizer, path))?;
        Ok(Self {
            weights: GgufWeights::new(file, &files.config),
            config: files.config,
            files: files.files,
        })
    }
}
