//! Model folders: the graph, the tokenizer, end-of-text tokens, context length.

use std::path::{Path, PathBuf};

use retro_model_io::{Error, graphs, locate};

pub use retro_model_io::{ModelFolder, Names};

/// Whether `path` is a folder of Llama weights without a graph.
pub fn is_weights_folder(path: &Path) -> bool {
    let weights = ["model.safetensors", "model.safetensors.index.json"];
    path.is_dir()
        && graphs(path).is_ok_and(|found| found.is_empty())
        && path.join("config.json").is_file()
        && weights.iter().any(|w| path.join(w).is_file())
}

/// The graph file that `choice` names in a folder; without a choice `path` itself.
///
/// # Errors
/// The folder has no such graph, or several.
pub fn chosen(path: &Path, choice: Option<&str>) -> Result<PathBuf, Error> {
    match choice {
        Some(_) => locate(path, choice).map(|located| located.graph),
        None => Ok(path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn weights_without_a_graph_are_recognised() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("config.json", "{}"), ("model.safetensors", "")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        assert!(is_weights_folder(dir.path()));
        fs::write(dir.path().join("model.onnx"), "").unwrap();
        assert!(!is_weights_folder(dir.path()));
    }
}
