//! The CPU execution provider: the method of [`crate::method`], spread over a thread pool.
//!
//! [`run`] is the whole operator on plain buffers. Tasks are independent pairs of a sequence and a KV head, split further
//! over pages where that leaves cores idle.

mod decode;
mod op_kernel;
mod prefill;
mod scratch;
mod shared;
mod tensors;

pub use op_kernel::{CpuKernel, CpuOperator};
pub use scratch::ScratchPool;
pub use shared::Shared;
pub use tensors::{Inputs, State};

use crate::contract::{Attributes, Dims, Phase, Plan};
use crate::method::element::Element;
use crate::ort::Result;

/// Who runs the tasks: the session's thread pool, or the calling thread.
pub trait Pool {
    /// Runs `task(0..count)` and waits for all.
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()>;

    /// Threads that may run tasks at once: how finely work is split.
    fn width(&self) -> usize;
}

/// Runs every task on the calling thread.
pub struct Serial;

impl Pool for Serial {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        (0..count).for_each(task);
        Ok(())
    }

    fn width(&self) -> usize {
        1
    }
}

/// Everything that one call needs.
pub struct Call<'a, E: Element> {
    pub attributes: &'a Attributes,
    pub dims: &'a Dims,
    pub plan: &'a Plan,
    pub inputs: Inputs<'a, E>,
    /// `[B, S, Hq, D]`.
    pub output: Shared<'a, E>,
    /// The present state, already holding the past.
    pub state: State<'a, E>,
    pub scratch: &'a ScratchPool,
}

/// How the dense attention of a prefill is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dense {
    /// By our own kernels.
    Own,
    /// By the host, already: keys and values are appended and the outputs written.
    Done,
}

/// Runs a call whose inputs were checked by [`Dims::read`] and [`Plan::read`].
pub fn run<E: Element>(call: &Call<'_, E>, pool: &dyn Pool, dense: Dense) -> Result<()> {
    match call.plan.phase {
        Phase::Prefill => prefill::prefill(call, pool, dense),
        Phase::Decode => decode::decode(call, pool),
    }
}
