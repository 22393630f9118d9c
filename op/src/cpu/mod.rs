//! The CPU execution provider: the method of [`crate::method`], spread over a thread pool.
//!
//! [`run`] is the whole operator on plain buffers. Tasks are independent pairs of a sequence and a KV head, split
//! further over pages where that leaves cores idle.

mod call;
mod decode;
mod kv_write;
mod merge;
mod op_kernel;
mod pool;
mod prefill;
mod scratch;
mod shared;

pub use call::{CpuCall, Dense, Inputs, LayerState};
pub use op_kernel::{CpuKernel, CpuOperator};
pub use pool::{Pool, Serial};
pub use scratch::ScratchPool;
pub use shared::Shared;

use crate::contract::Phase;
use crate::method::element::Element;
use crate::ort::Result;
use crate::selector::PageSelector;

/// Runs a call whose inputs were checked by [`crate::contract::Dims::read`] and [`crate::contract::CallPlan::read`].
pub fn run<E: Element, P: PageSelector>(call: &CpuCall<'_, E, P>, pool: &dyn Pool, dense: Dense) -> Result<()> {
    match call.plan.phase {
        Phase::Prefill => prefill::prefill(call, pool, dense),
        Phase::Decode => decode::decode(call, pool),
    }
}
