//! What can be wrong with a model's folder.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Each is one line that says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no model at {0}, which doesn't exist")]
    NotFound(PathBuf),

    #[error("{0} is not a file: name a model's file, or a folder that holds one")]
    NotAFile(PathBuf),

    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },

    #[error("{path} is not valid JSON (damaged, or not JSON at all)")]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },

    #[error(
        "genai_config.json in {folder} names the model {name:?}, which is not a file of that folder: write its path from \
         the folder on, without a leading / and without \"..\""
    )]
    OutsideFolder { folder: PathBuf, name: String },

    #[error("genai_config.json in {folder} names the model {name}, which is not there")]
    MissingGraph { folder: PathBuf, name: String },

    #[error(
        "there is no ONNX model in {0} (no ONNX graph there or in its folder onnx, no genai_config.json that names one); \
         Llama weights become one with: retro-models build --weights DIR -o OUT"
    )]
    NoGraph(PathBuf),

    #[error(
        "there are {} ONNX models in {folder} ({}); name the one to convert or to run with --graph: its file's name or its \
         variant, as q4f16",
        .graphs.len(), list(.folder, .graphs)
    )]
    SeveralGraphs { folder: PathBuf, graphs: Vec<PathBuf> },

    #[error("--graph {choice}: {folder} has no such graph; it has {}", list(.folder, .graphs))]
    NoSuchGraph {
        folder: PathBuf,
        choice: String,
        graphs: Vec<PathBuf>,
    },

    #[error("--graph {choice} fits several graphs of {folder}: {}; name the file", list(.folder, .graphs))]
    AmbiguousChoice {
        folder: PathBuf,
        choice: String,
        graphs: Vec<PathBuf>,
    },

    #[error("--graph {choice} chooses in a folder, but {file} is a file: name the folder, or leave --graph out")]
    ChoiceOfFile { file: PathBuf, choice: String },
}

fn list(folder: &Path, graphs: &[PathBuf]) -> String {
    let name = |graph: &PathBuf| graph.strip_prefix(folder).unwrap_or(graph).display().to_string();
    graphs.iter().map(name).collect::<Vec<_>>().join(", ")
}
