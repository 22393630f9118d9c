//! Which mask a bias is: reads it in call after call, and keeps the windows that fit all of them.

use super::{
    bias::{CallBiases, ReadBias},
    calls::{
        PADDED, SMALL, around, around_window, far_padded, longest_past, read_far, read_lines, read_prompts, read_small,
        read_to_the_end, several_tokens,
    },
    difference::{fits, only_masks, only_one_factor, seen_window, why_not_causal},
};
use crate::prove::{call_shape::CallShape, refusal::MaskRefusal, supported_mask::SupportedMask};
use std::collections::BTreeSet;

/// Windows up to this many tokens show in the small calls.
const SMALL_WINDOW: usize = 9;

/// Finds the mask that `read` reads. `constants`: integers that the mask's computation holds or computes: one may be the window,
/// or the place from which on the mask is another. `far`: past tokens of further calls that may show either.
///
/// # Errors
/// It is none that the operator can do; or it can't be computed.
pub fn classify(read: ReadBias, constants: &[usize], far: &[usize]) -> Result<SupportedMask, MaskRefusal> {
    let small = read_small(read, &SMALL)?;
    only_masks(&small)?;
    let bounds: BTreeSet<usize> = constants.iter().copied().filter(|c| *c > 4).collect();
    let single = read_single(read, &small, constants, &bounds, far)?;
    let window = single.window;
    let bounds: BTreeSet<usize> = bounds.into_iter().chain(window).collect();
    check_prompts(read, small, single, &bounds, far)?;
    let padding = find_padding(read, window, &bounds, far)?;
    Ok(SupportedMask { window, padding })
}

/// What calls of one token say.
struct Single {
    window: Option<usize>,
    calls: CallBiases,
    /// Past tokens of the longest call that the model is known to take.
    end: usize,
}

/// Finds the window in calls of one token, which tell most: it sees all that there is.
fn read_single(
    read: ReadBias,
    small: &CallBiases,
    constants: &[usize],
    bounds: &BTreeSet<usize>,
    far: &[usize],
) -> Result<Single, MaskRefusal> {
    // Windows that show in the small calls, and those beside its constants.
    let mut windows: Vec<Option<usize>> = vec![None];
    windows.extend((1..=SMALL_WINDOW).map(Some));
    let near = |c: &usize| [c.checked_sub(1), Some(*c), c.checked_add(1)];
    let candidates = constants.iter().flat_map(near);
    windows.extend(candidates.filter(|w| w.is_some_and(|w| w > SMALL_WINDOW)));
    windows.retain(|w| fits(unpadded(*w), small));
    if windows.is_empty() {
        return Err(why_not_causal(small));
    }
    let pasts: BTreeSet<usize> = bounds
        .iter()
        .flat_map(|c| around(*c))
        .chain(far.iter().copied())
        .collect();
    let mut calls = read_to_the_end(read, pasts.into_iter().map(|past| CallShape::new(1, 1, past, 0)))?;
    let end = longest_past(&calls);
    windows.extend(
        calls
            .iter()
            .filter_map(|(call, bias)| seen_window(*call, bias))
            .map(Some),
    );
    windows.retain(|w| fits(unpadded(*w), small) && fits(unpadded(*w), &calls));
    // What looks like a window from afar is one from nearby too.
    if let Some(Some(w)) = windows.first().copied().filter(|w| w.is_some_and(|w| w > SMALL_WINDOW)) {
        calls.extend(read_far(read, around_window(w))?);
        windows.retain(|w| fits(unpadded(*w), &calls));
    }
    match windows.first().copied() {
        Some(window) => Ok(Single { window, calls, end }),
        None => Err(why_not_causal(&calls)),
    }
}

/// Tokens fed together must see what they see one by one, with the same factor everywhere.
fn check_prompts(
    read: ReadBias,
    small: CallBiases,
    single: Single,
    bounds: &BTreeSet<usize>,
    far: &[usize],
) -> Result<(), MaskRefusal> {
    let Single { window, mut calls, end } = single;
    if small.iter().any(|(call, _)| call.continues()) {
        calls.extend(read_far(read, several_tokens(bounds, far))?);
    }
    calls.extend(read_prompts(read, bounds, far)?);
    calls.extend(read_lines(read, end, window)?);
    if !fits(unpadded(window), &calls) {
        return Err(why_not_causal(&calls));
    }
    only_masks(&calls)?;
    let calls: CallBiases = small.into_iter().chain(calls).collect();
    only_one_factor(&calls)
}

/// Whether padding on the left is masked.
fn find_padding(
    read: ReadBias,
    window: Option<usize>,
    bounds: &BTreeSet<usize>,
    far: &[usize],
) -> Result<bool, MaskRefusal> {
    let mut calls = read_small(read, &PADDED)?;
    calls.extend(read_far(read, far_padded(bounds, far))?);
    let fitting = [true, false].into_iter().find(|padding| {
        fits(
            SupportedMask {
                window,
                padding: *padding,
            },
            &calls,
        )
    });
    let padding = fitting.ok_or_else(|| MaskRefusal::Padding {
        why: Box::new(why_not_causal(&calls)),
    })?;
    if padding {
        only_masks(&calls)?;
    }
    Ok(padding)
}

fn unpadded(window: Option<usize>) -> SupportedMask {
    SupportedMask { window, padding: false }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
