//! The CPU execution provider: the method of [`crate::method`], spread over a thread pool.
//!
//! [`run`] is the whole operator on plain buffers. Tasks are independent pairs of a sequence and a KV head, split
//! further over pages where that leaves cores idle.

mod angle_cache;
mod call;
mod decode;
mod kv_write;
mod merge;
mod op_kernel;
mod pool;
mod prefill;
mod run;
mod scratch;
mod shared;

pub use call::{CpuCall, Dense, Inputs, LayerState};
pub(crate) use op_kernel::OrtPool;
pub use op_kernel::{CpuKernel, CpuOperator};
pub use pool::{Pool, Serial};
pub use run::run;
pub(crate) use scratch::Lines;
pub use scratch::ScratchPool;
pub use shared::Shared;
