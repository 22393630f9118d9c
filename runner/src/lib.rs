//! Generates text with ONNX language models, converted by `retro-export` or not.
//!
//! [`Runtime`] finds and loads ONNX Runtime, [`Model`] opens a folder, [`generate`](generate::generate) makes text from a prompt,
//! and [`Prefilled`](batch::Prefilled) decodes many documents at once. [`commands`] is the program around them.

// println! and its like panic when nobody reads: commands write with errors, progress::note without.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod arena;
pub mod batch;
pub mod bench;
pub mod commands;
pub mod eval;
pub mod generate;
pub mod interface;
pub mod interrupt;
mod landing;
pub mod measure;
pub mod model;
pub mod named;
mod numbers;
pub mod prepare;
pub mod pretend;
mod progress;
pub mod runtime;
pub mod sampling;
pub mod score;
pub mod session;
pub mod state;
pub mod stats;
mod steps;
pub mod text;
pub mod tokenizer;
mod widen;

pub use interrupt::{Interrupt, Interrupted};
pub use model::ModelFolder;
pub use retro_runtime::{Device, device, disable_telemetry, gpu};
pub use runtime::Runtime;
pub use session::{Feed, Logits, Model, OpenOptions};
pub use state::State;
pub use text::Text;
