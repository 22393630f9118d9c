//! Generates text with ONNX language models, converted by `retro-export` or not.
//!
//! [`Runtime`] finds and loads ONNX Runtime, [`Model`] opens a folder,
//! [`generate`](decoder::generate::generate) makes text from a prompt, [`Chat`](chat::Chat) holds a conversation, and
//! [`Prefilled`](decoder::batch::Prefilled) decodes many documents at once. [`cli`] is the program around them.

// println! and eprintln! panic on a closed pipe: commands write with errors, progress::note without.
#![deny(clippy::print_stdout, clippy::print_stderr)]
#![warn(missing_docs)]

pub mod bench;
pub mod built_model_cache;
pub mod chat;
pub mod cli;
pub mod decoder;
pub mod eval;
mod huge_pages;
pub mod interrupt;
pub mod model_folder;
pub mod model_spec;
mod progress;
pub mod runtime;
pub mod serve;
pub mod tables;
pub mod text;

pub use decoder::{inputs::Feed, logits::Logits, model::Model, session::OpenOptions, step::DecoderState};
pub use interrupt::{Interrupt, Interrupted};
pub use model_folder::ModelFolder;
pub use retro_runtime::{Device, alone, device, disable_telemetry, gpu};
pub use runtime::Runtime;
pub use text::ModelTokenizer;
