//! Comparing, and calls that must succeed.

use proptest::prelude::*;
use retro_attention::method::element::Element;

use crate::bed::{Bed, Feed};

/// What a property gives.
pub type Check = Result<(), TestCaseError>;

pub fn is_half<E: Element>() -> bool {
    std::mem::size_of::<E>() == 2
}

pub fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) -> Check {
    prop_assert_eq!(got.len(), want.len(), "{}", what);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        prop_assert!(
            (g - w).abs() <= tolerance * w.abs().max(1.0),
            "{}: element {}: {} instead of {}",
            what,
            i,
            g,
            w
        );
    }
    Ok(())
}

/// Outputs are rounded to `E`; log-sum-exps are not.
pub fn output_tolerance<E: Element>() -> f32 {
    if is_half::<E>() { 2e-3 } else { 2e-5 }
}

/// A call that is not what another property is about.
pub fn run<E: Element>(bed: &mut Bed<E>, feed: &Feed<'_>) -> Result<Vec<Vec<f32>>, TestCaseError> {
    bed.run(feed).map_err(TestCaseError::fail)
}
