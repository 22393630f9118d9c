//! From a loaded model to text: one call of ONNX Runtime a step, what sequences remember between steps, and the loops
//! around it. Each file imports only those above it:
//!
//! ```text
//! error                        what can go wrong in all of them
//! integers, upcast             numbers in the element types that graphs declare
//! state_slot                   caches and other state among a graph's inputs and outputs
//! io, metadata, session        what a graph takes and gives, how it was converted, how it is opened
//! capturable                   whether steps may be captured as a CUDA graph
//! model                        all of that together
//! inputs, logits               what a step is fed, what comes back
//! kv_cache, device_buffers     memory
//! cuda_graph                   steps from buffers at fixed addresses, captured and replayed
//! step                         one call
//! open                         a model whose steps are captured where it allows that
//! cache_rows                   calls on some sequences of a batch, each at its own place
//! page_reads, sampling, stats  what a step read, which token comes next, figures of a generation
//! step_plan                    how many tokens a step feeds, and what it reads
//! decode_loop                  prefill and the windowed loop
//! generate, batch              one prompt as text, many at once
//! ```

pub mod batch;
pub mod cache_rows;
mod capturable;
mod cuda_graph;
pub mod decode_loop;
pub mod device_buffers;
mod error;
pub mod generate;
pub mod inputs;
mod integers;
pub mod io;
pub mod kv_cache;
pub mod logits;
pub mod metadata;
pub mod model;
mod open;
pub mod page_reads;
pub mod sampling;
pub mod session;
pub mod state_slot;
pub mod stats;
pub mod step;
pub mod step_plan;
pub(crate) mod upcast;

pub(crate) use error::require;
pub use error::{Error, NotCapturable, Result};
