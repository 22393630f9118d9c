//! From a loaded model to text: one call of ONNX Runtime a step, the state between steps, and the loops around it.

pub mod batch;
mod cuda_graph;
pub mod device_buffers;
pub mod generate;
mod integers;
pub mod io;
pub mod kv_cache;
mod logits;
pub mod model;
pub mod page_reads;
pub mod sampling;
pub mod stats;
mod upcast;
