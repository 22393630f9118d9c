//! The whole operator on plain buffers.

use super::call::{CpuCall, Dense};
use super::pool::Pool;
use super::{decode, prefill};
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
