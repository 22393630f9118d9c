//! Builds ONNX graphs of Llama-shaped decoders in the style of onnxruntime-genai's model builder: any size, weights
//! from safetensors or random, f32 or f16, weights inline or in an external data file.
//!
//! `models/ledger` and `models/code` beside this crate are two small trained models to build from.

#![warn(missing_docs)]

mod build;
mod config;
mod dtype;
mod error;
mod genai;
pub mod graph;
mod initializer;
pub mod ledger;
mod proto;
mod python_random;
mod random;
mod safetensors;

pub use build::{Built, EXTERNAL_THRESHOLD, Options, build, build_random, check_out};
pub use config::LlamaConfig;
pub use dtype::Dtype;
pub use error::{ConfigError, Error, Result};
