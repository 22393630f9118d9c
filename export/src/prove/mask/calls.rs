//! The calls in which a mask is read. Small ones show most masks; a window, or what hides behind one, shows only in calls of
//! more tokens than it is wide.

use super::bias::{CallBiases, ReadBias, ScoreBias, ScorePlaces};
use crate::prove::{
    call_shape::CallShape,
    refusal::{MaskRefusal, Unread},
};
use std::collections::BTreeSet;

/// Calls without padding in which every mask is read.
pub const SMALL: [CallShape; 4] = [
    CallShape::new(1, 4, 0, 0),
    CallShape::new(1, 3, 5, 0),
    CallShape::new(2, 3, 6, 0),
    CallShape::new(1, 1, 9, 0),
];
/// Calls of two sequences, of which one begins with padding.
pub const PADDED: [CallShape; 3] = [
    CallShape::new(2, 5, 0, 3),
    CallShape::new(2, 2, 6, 3),
    CallShape::new(2, 1, 6, 2),
];
/// Up to so many tokens calls are read in every way; of longer ones only what tells most.
pub const LONG: usize = 10_000;
/// Tokens of the prompt whose lines are read.
const LINES: usize = 30_011;

/// Reads small calls. Those that continue a past are left out where their sizes don't fit: some models take several tokens
/// only without a past, and then there is nothing to be true to.
pub fn read_small(read: ReadBias, calls: &[CallShape]) -> Result<CallBiases, MaskRefusal> {
    let of = |call: &CallShape| match read(*call, ScorePlaces::all(*call)) {
        Ok(bias) => Some(Ok((*call, bias))),
        Err(why) if call.continues() && why.is_size_conflict() => None,
        Err(why) => Some(Err(MaskRefusal::Unread { why })),
    };
    calls.iter().filter_map(of).collect()
}

/// Reads calls of many tokens. Those that the model does not take are left out.
pub fn read_far(read: ReadBias, calls: impl Iterator<Item = CallShape>) -> Result<CallBiases, MaskRefusal> {
    let mut found = Vec::new();
    for call in calls {
        if let Some(bias) = if_taken(call, read(call, ScorePlaces::all(call)))? {
            found.push((call, bias));
        }
    }
    Ok(found)
}

/// The same for calls that grow, and the longest one that the model takes, if it does not take all.
pub fn read_to_the_end(read: ReadBias, calls: impl Iterator<Item = CallShape>) -> Result<CallBiases, MaskRefusal> {
    let mut found: CallBiases = Vec::new();
    for call in calls {
        if let Some(bias) = if_taken(call, read(call, ScorePlaces::all(call)))? {
            found.push((call, bias));
            continue;
        }
        let (mut most, mut least) = (longest_past(&found), call.past);
        while least - most > 1 {
            let call = CallShape {
                past: most + (least - most) / 2,
                ..call
            };
            match if_taken(call, read(call, ScorePlaces::all(call)))? {
                Some(bias) => {
                    most = call.past;
                    found.push((call, bias));
                }
                None => least = call.past,
            }
        }
        break;
    }
    Ok(found)
}

/// A bias; none where the model itself can't be called so.
fn if_taken(call: CallShape, bias: Result<ScoreBias, Unread>) -> Result<Option<ScoreBias>, MaskRefusal> {
    match bias {
        Ok(bias) => Ok(Some(bias)),
        Err(Unread::Beyond) => Ok(None),
        Err(why) => Err(MaskRefusal::UnreadAt { call, why }),
    }
}

/// Past tokens of the longest of some calls; 0 for none.
pub fn longest_past(calls: &CallBiases) -> usize {
    calls.iter().map(|(call, _)| call.past).max().unwrap_or(0)
}

/// Past tokens of calls of one token in which a number shows, if it bounds something: right there, well behind, and far behind
/// it.
pub fn around(c: usize) -> Vec<usize> {
    let mut pasts = vec![c + 2, c + c / 2];
    if c <= LONG {
        pasts.extend([c - 1, c, c + 1, 2 * c, 2 * c + 1]);
    }
    pasts
}

/// Calls of one token around a window of `w` tokens.
pub fn around_window(w: usize) -> impl Iterator<Item = CallShape> {
    let pasts = [w - 1, w, w + w / 2 + 1, 2 * w, 3 * w + 2];
    pasts.into_iter().map(|past| CallShape::new(1, 1, past, 0))
}

/// Calls of three tokens: tokens fed together see what they see one by one.
pub fn several_tokens(bounds: &BTreeSet<usize>, far: &[usize]) -> impl Iterator<Item = CallShape> {
    let pasts = bounds.iter().flat_map(|c| [c.saturating_sub(2), c + c / 2]);
    let far = far.iter().copied().filter(|past| *past <= LONG);
    let pasts: BTreeSet<usize> = pasts.chain(far).collect();
    pasts.into_iter().map(|past| CallShape::new(1, 3, past, 0))
}

/// Calls of two sequences of which one begins with padding: a little, and more than half.
pub fn far_padded(bounds: &BTreeSet<usize>, far: &[usize]) -> impl Iterator<Item = CallShape> {
    let behind = bounds.iter().map(|c| c + c / 2);
    let pasts: BTreeSet<usize> = behind
        .chain(far.iter().copied())
        .filter(|past| *past <= 2 * LONG)
        .collect();
    let each = |past: usize| [3, past / 2 + 1].map(|pad| CallShape::new(2, 1, past, pad));
    pasts.into_iter().flat_map(each)
}

/// Reads whole prompts: the first and last tokens' rows, some between, and those at the numbers that may bound something.
pub fn read_prompts(read: ReadBias, bounds: &BTreeSet<usize>, far: &[usize]) -> Result<CallBiases, MaskRefusal> {
    let mut lengths: BTreeSet<usize> = far.iter().copied().filter(|f| *f <= LONG).collect();
    lengths.extend(bounds.iter().map(|c| if *c <= LONG { c + c / 2 + 2 } else { c + 2 }));
    let mut found = Vec::new();
    for s in lengths.into_iter().filter(|s| *s > 4) {
        let mut rows: BTreeSet<usize> = [s - 1].into_iter().collect();
        if s <= 2 * LONG {
            rows.extend([0, s / 3, s / 2 + 1]);
        }
        let at_bounds = bounds.iter().filter(|c| s <= 2 * LONG && **c + 2 >= s / 2);
        rows.extend(at_bounds.flat_map(|c| [c - 1, *c, c + 1]).filter(|row| *row < s));
        let call = CallShape::new(1, s, 0, 0);
        if let Some(bias) = if_taken(call, read(call, ScorePlaces::Rows(rows.into_iter().collect())))? {
            found.push((call, bias));
        }
    }
    Ok(found)
}

/// Of a long prompt, for every token: the first key and one in the middle, itself and the one after it, and a window's ends.
/// What is different for a few tokens alone shows there. `end`: tokens that the model is known to take.
pub fn read_lines(
    read: ReadBias,
    end: usize,
    window: Option<usize>,
) -> Result<Option<(CallShape, ScoreBias)>, MaskRefusal> {
    let call = CallShape::new(1, LINES.min(end), 0, 0);
    if call.s < 5 {
        return Ok(None);
    }
    let of = |i: usize| {
        let edge = window.and_then(|w| (i + 1).checked_sub(w));
        let keys = [
            Some(0),
            Some(i / 2),
            Some(i),
            Some(i + 1),
            edge,
            edge.and_then(|e| e.checked_sub(1)),
        ];
        keys.into_iter().flatten().filter(|j| *j < call.s).map(move |j| [i, j])
    };
    // All tokens, or as many as can be read where each costs a row.
    for step in [1, 7, 61, 499] {
        let cells = (0..call.s).step_by(step).flat_map(of).collect();
        match read(call, ScorePlaces::Cells(cells)) {
            Err(Unread::Long) => {}
            bias => return Ok(if_taken(call, bias)?.map(|bias| (call, bias))),
        }
    }
    Err(MaskRefusal::UnreadAt {
        call,
        why: Unread::Long,
    })
}
