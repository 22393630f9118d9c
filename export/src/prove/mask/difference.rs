//! Where a bias is not a mask, or not the one that is expected, and what it looks like.

use super::bias::{MASKED, ScoreBias, ScorePlaces};
use crate::prove::{call_shape::CallShape, refusal::MaskRefusal, supported_mask::SupportedMask};

/// Whether all calls have a mask. Rows of padding don't count.
pub fn fits(mask: SupportedMask, calls: &[(CallShape, ScoreBias)]) -> bool {
    calls
        .iter()
        .all(|(call, bias)| first_difference(mask, *call, bias).is_none())
}

/// The first sequence, query and key where a bias differs from a mask. Rows of padding don't count.
fn first_difference(mask: SupportedMask, call: CallShape, bias: &ScoreBias) -> Option<(usize, usize, usize)> {
    let total = call.total();
    let n = bias.places.len(total);
    bias.data.chunks(n.max(1)).enumerate().find_map(|(block, data)| {
        let b = block / bias.heads.max(1);
        let query = |row: usize| Some(call.past + row).filter(|query| *query >= call.first(b));
        let (query, key) = match &bias.places {
            ScorePlaces::Rows(rows) => rows.iter().zip(data.chunks(total.max(1))).find_map(|(row, data)| {
                let query = query(*row)?;
                let keys = mask.keys(call, b, query);
                let key = (0..).zip(data).find(|(key, x)| (**x > MASKED) != keys.contains(key))?.0;
                Some((query, key))
            }),
            ScorePlaces::Cells(cells) => cells.iter().zip(data).find_map(|([row, key], x)| {
                let query = query(*row)?;
                ((*x > MASKED) != mask.keys(call, b, query).contains(key)).then_some((query, *key))
            }),
        }?;
        Some((b, query, key))
    })
}

/// How many tokens the one token of a call sees, if not all.
pub fn seen_window(call: CallShape, bias: &ScoreBias) -> Option<usize> {
    let first = bias.data.iter().take(call.total()).position(|x| *x > MASKED)?;
    (first > 0).then(|| call.total() - first)
}

/// Every bias must be 0 or a mask.
///
/// # Errors
/// Names the first other number.
pub fn only_masks(calls: &[(CallShape, ScoreBias)]) -> Result<(), MaskRefusal> {
    let other = |x: &f64| *x > MASKED && x.abs() > 1e-6 || x.is_nan();
    for (call, bias) in calls {
        if let Some(at) = bias.data.iter().position(other) {
            return Err(bias_at(*call, bias, at));
        }
    }
    Ok(())
}

/// The number at a place of a bias, as a refusal.
fn bias_at(call: CallShape, bias: &ScoreBias, at: usize) -> MaskRefusal {
    let n = bias.places.len(call.total()).max(1);
    let [row, key] = bias.places.each(call.total()).nth(at % n).unwrap_or_default();
    let end = (at / n + 1) * n;
    let row_of_keys = match bias.places {
        ScorePlaces::Rows(_) => bias.data.get(end.saturating_sub(call.total())..end).unwrap_or_default(),
        ScorePlaces::Cells(_) => &[],
    };
    MaskRefusal::Bias {
        value: bias.data[at],
        query: call.past + row,
        key,
        head: at / n % bias.heads.max(1),
        alibi: grows_evenly(row_of_keys),
    }
}

/// ALiBi: equal steps from key to key, another step in each head.
fn grows_evenly(row: &[f64]) -> bool {
    let seen: Vec<f64> = row.iter().copied().filter(|x| *x > MASKED).collect();
    let steps = seen.windows(2).map(|w| w[1] - w[0]).collect::<Vec<_>>();
    let near = |d: &f64| (d - steps[0]).abs() < 1e-4 * steps[0].abs().max(1e-9);
    steps.len() > 1 && steps.iter().all(near)
}

/// All scores must be multiplied with the same number.
///
/// # Errors
/// Names two numbers.
pub fn only_one_factor(calls: &[(CallShape, ScoreBias)]) -> Result<(), MaskRefusal> {
    let mut known: Option<f64> = None;
    for (call, gains) in calls.iter().filter_map(|(call, bias)| Some((call, bias.gain?))) {
        let first = *known.get_or_insert(gains[0]);
        let differs = |g: &&f64| (**g - first).abs() > 1e-5 * first.abs().max(g.abs());
        if let Some(factor) = gains.iter().find(differs) {
            return Err(MaskRefusal::Factors {
                call: *call,
                factor: *factor,
                other: first,
            });
        }
    }
    Ok(())
}

/// How many of the first and of the last tokens one token sees, if it sees none between them.
fn seen_ends(call: CallShape, bias: &ScoreBias) -> Option<[usize; 2]> {
    let row = bias.data.get(..call.total()).filter(|_| call.s == 1)?;
    let seen: Vec<usize> = row
        .chunk_by(|a, b| (*a > MASKED) == (*b > MASKED))
        .map(<[f64]>::len)
        .collect();
    match *seen.as_slice() {
        [first, hidden, last] if hidden > 1 && row.first().is_some_and(|x| *x > MASKED) => Some([first, last]),
        _ => None,
    }
}

/// What is wrong with the mask of the first call that isn't causal.
pub fn why_not_causal(calls: &[(CallShape, ScoreBias)]) -> MaskRefusal {
    let causal = SupportedMask {
        window: None,
        padding: false,
    };
    // Where sinks show, they explain most.
    let sinks = |call: &&(CallShape, ScoreBias)| seen_ends(call.0, &call.1).is_some();
    for (call, bias) in calls.iter().find(sinks).into_iter().chain(calls) {
        if let Some((_, query, key)) = first_difference(causal, *call, bias) {
            let call = *call;
            return match seen_ends(call, bias) {
                _ if key > query => MaskRefusal::NotCausal { call, query, key },
                Some([first, last]) => MaskRefusal::Sinks {
                    call,
                    query,
                    key,
                    first,
                    last,
                },
                None => MaskRefusal::NotAWindow { call, query, key },
            };
        }
    }
    MaskRefusal::Other
}
