//! Weights at addresses that their elements can be used at.

use super::{Elements, Info, Plain, Result, Tensor};

/// Copies of the weights among a node's inputs that the host keeps at misaligned addresses, made once.
pub struct AlignedWeights(Vec<Elements>);

impl AlignedWeights {
    /// Looks at the inputs in these slots.
    ///
    /// # Safety
    /// The node's inputs are on the CPU, and this does not outlive its kernel.
    pub unsafe fn of(info: &Info, slots: &[usize]) -> Result<Self> {
        let mut copies = Vec::new();
        for &slot in slots {
            if let Some(weight) = info.constant_input(slot)? {
                // SAFETY: a weight of a node on the CPU, which nobody writes.
                copies.push(unsafe { Elements::of(&weight)? });
            }
        }
        copies.retain(Elements::is_copy);
        Ok(Self(copies))
    }

    /// The elements of an input, empty where it is absent. `place` keeps a copy, if one is needed, for the call.
    ///
    /// # Safety
    /// The tensor lives on the CPU, and nothing writes to it while the slice is in use.
    pub unsafe fn elements<'a, T: Plain>(
        &'a self,
        tensor: Option<Tensor>,
        place: &'a mut Option<Elements>,
    ) -> Result<&'a [T]> {
        let Some(tensor) = tensor else { return Ok(&[]) };
        for weight in &self.0 {
            if weight.is_of(&tensor)? {
                // SAFETY: the caller's promise.
                return unsafe { weight.slice() };
            }
        }
        // SAFETY: the caller's promise.
        unsafe { place.insert(Elements::of(&tensor)?).slice() }
    }
}
