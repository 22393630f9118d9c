//! What a mask lets a token see: causal, a sliding window, padding; or none of these, and then why not.
//!
//! The mask is found by reading what is added to the scores ([`reader`]) in many calls ([`calls`]), at the constants of its
//! computation ([`window_candidates`]) and far from them.

mod bias;
mod calls;
mod classify;
mod difference;
mod key;
mod reader;
mod window_candidates;

pub use bias::{ScorePlaces, read_places};

use super::{
    candidate::AttentionCandidate, refusal::MaskRefusal, sample_calls::SampleCalls, supported_mask::SupportedMask,
};
use classify::classify;
use key::mask_key;
use reader::BiasReader;
use window_candidates::WindowCandidates;

/// Numbers that are tried as windows, at most.
const MAX_CANDIDATES: usize = 96;

/// The mask of an attention. Attentions whose masks are computed alike are read once.
///
/// # Errors
/// It is none that the operator can do; or it can't be computed.
pub fn find_mask<'a>(
    samples: &SampleCalls<'a>,
    candidate: &AttentionCandidate<'a>,
) -> Result<SupportedMask, MaskRefusal> {
    let key = mask_key(samples, candidate);
    let read = samples.masks.borrow().get(&key).cloned();
    if let Some(mask) = read {
        return mask;
    }
    let found = read_mask(samples, candidate);
    samples.masks.borrow_mut().insert(key, found.clone());
    found
}

fn read_mask<'a>(samples: &SampleCalls<'a>, candidate: &AttentionCandidate<'a>) -> Result<SupportedMask, MaskRefusal> {
    let windows = WindowCandidates::find(samples, candidate);
    let count = windows.numbers.len().max(windows.sizes.len());
    if count > MAX_CANDIDATES {
        return Err(MaskRefusal::TooManyNumbers { count });
    }
    let reader = BiasReader::new(samples, candidate);
    classify(
        &|call, places| reader.read(call, places),
        &windows.numbers,
        &windows.far(),
    )
}
