//! What lies in a model's folder: which graph is meant, which configuration and tokenizer belong to it, and what the
//! configuration files say.
//!
//! [`locate`] finds the graph that a path stands for. [`ModelFolder`] reads what Hugging Face's and onnxruntime-genai's
//! configuration files say about it. [`present_names`] pairs a graph's past inputs with its present outputs.

#![warn(missing_docs)]

mod config;
mod config_files;
mod error;
mod json;
mod locate;
mod names;

pub use config::{ModelFolder, Names};
pub use config_files::SamplingDefaults;
pub use error::Error;
pub use json::read_json;
pub use locate::{Located, configured_graph, graphs, locate};
pub use names::{exporters_present_names, present_names};

/// onnxruntime-genai's configuration of a model.
pub const GENAI_CONFIG: &str = "genai_config.json";
