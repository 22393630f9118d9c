//! Builds ONNX graphs of decoders of the Llama family in the style of onnxruntime-genai's model builder: any size,
//! weights from safetensors, GGUF or random, f32, f16 or 4-bit, weights inline or in an external data file.
//!
//! `models/ledger` and `models/code` beside this crate are two small trained models to build from.

#![warn(missing_docs)]

mod build;
mod config;
mod config_json;
mod dtype;
mod error;
mod genai;
mod gguf;
pub mod graph;
mod initializer;
pub mod ledger;
mod part;
mod proto;
mod python_random;
mod quantised;
mod random;
mod rope;
mod rounded;
mod safetensors;
mod source;

pub use build::{Built, EXTERNAL_THRESHOLD, Options, build, build_random, check_gguf, check_out};
pub use config::{Family, LlamaConfig};
pub use dtype::Dtype;
pub use error::{ConfigError, Error, Result, TokenizerError};
pub use quantised::Activations;
pub use rope::RopeScaling;
pub use rounded::Rounded;
