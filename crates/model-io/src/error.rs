//! What can be wrong with a model's folder.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Each is one line that says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path leads to nothing.
    #[error("there is no model at {0}, which doesn't exist")]
    NotFound(PathBuf),

    /// The path leads to a pipe or a device.
    #[error("{0} is not a file: name a model's file, or a folder that holds one")]
    NotAFile(PathBuf),

    /// A folder or a configuration file can't be read.
    #[error("cannot read {path}")]
    Read {
        /// The folder or file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },

    /// A configuration file is damaged.
    #[error("{path} is not valid JSON (damaged, or not JSON at all)")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where reading stopped.
        #[source]
        source: serde_json::Error,
    },

    /// genai_config.json names a file that lies elsewhere.
    #[error(
        "genai_config.json in {folder} names the model {name:?}, which is not a file of that folder: write its path from \
         the folder on, without a leading / and without \"..\""
    )]
    OutsideFolder {
        /// The model's folder.
        folder: PathBuf,
        /// The name as the configuration has it.
        name: String,
    },

    /// genai_config.json names a file that isn't there.
    #[error("genai_config.json in {folder} names the model {name}, which is not there")]
    MissingGraph {
        /// The model's folder.
        folder: PathBuf,
        /// The name as the configuration has it.
        name: String,
    },

    /// The folder has no graph.
    #[error(
        "there is no ONNX model in {0} (no ONNX graph there or in its folder onnx, no genai_config.json that names one); \
         Llama weights become one with: retro-models build --weights DIR -o OUT"
    )]
    NoGraph(PathBuf),

    /// The folder has several graphs, and none was chosen.
    #[error(
        "there are {} ONNX models in {folder} ({}); name the one to convert or to run with --graph: its file's name or its \
         variant, as q4f16",
        .graphs.len(), list(.folder, .graphs)
    )]
    SeveralGraphs {
        /// The folder.
        folder: PathBuf,
        /// The graphs in it.
        graphs: Vec<PathBuf>,
    },

    /// The folder has no graph of the name that was chosen.
    #[error("--graph {choice}: {folder} has no such graph; it has {}", list(.folder, .graphs))]
    NoSuchGraph {
        /// The folder.
        folder: PathBuf,
        /// The name that was chosen.
        choice: String,
        /// The graphs in it.
        graphs: Vec<PathBuf>,
    },

    /// Several graphs of the folder fit the name that was chosen.
    #[error("--graph {choice} fits several graphs of {folder}: {}; name the file", list(.folder, .graphs))]
    AmbiguousChoice {
        /// The folder.
        folder: PathBuf,
        /// The name that was chosen.
        choice: String,
        /// The graphs that fit.
        graphs: Vec<PathBuf>,
    },

    /// A graph was chosen of a path that is a file itself.
    #[error("--graph {choice} chooses in a folder, but {file} is a file: name the folder, or leave --graph out")]
    ChoiceOfFile {
        /// The file.
        file: PathBuf,
        /// The name that was chosen.
        choice: String,
    },
}

fn list(folder: &Path, graphs: &[PathBuf]) -> String {
    let name = |graph: &PathBuf| graph.strip_prefix(folder).unwrap_or(graph).display().to_string();
    graphs.iter().map(name).collect::<Vec<_>>().join(", ")
}
