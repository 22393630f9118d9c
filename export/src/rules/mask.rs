//! What a mask lets a token see, found by trying it: causal, a sliding window, padding; or none of these, and then why not.

use super::probe::Setting;

/// A bias at most this is a mask: exporters write -inf, the type's lowest number, -1e9 or -10000.
const MASKED: f64 = -9999.0;

/// What is added to the scores in one call.
pub struct Bias {
    /// `[B, Hq, S, T]`.
    pub data: Vec<f64>,
    pub heads: usize,
    /// The least and the most that scores are multiplied with on the way, where that is known.
    pub gain: Option<[f64; 2]>,
}

/// The least and the most that a score of 1 becomes more than one of 0, where tokens are seen. `data`: of scores that are 0,
/// `ones`: of scores that are 1.
pub fn gain(data: &[f64], ones: &[f64]) -> Option<[f64; 2]> {
    let seen = data.iter().zip(ones).filter(|(x, _)| **x > MASKED);
    let wider = |range: Option<[f64; 2]>, g: f64| Some(range.map_or([g, g], |[a, b]| [a.min(g), b.max(g)]));
    seen.map(|(x, one)| one - x).fold(None, wider)
}

/// All scores must be multiplied with the same number.
fn only_one_factor(calls: &[(Setting, Bias)]) -> Result<(), String> {
    let mut known: Option<f64> = None;
    for (z, gains) in calls.iter().filter_map(|(z, b)| Some((z, b.gain?))) {
        let first = *known.get_or_insert(gains[0]);
        let differs = |g: &&f64| (**g - first).abs() > 1e-5 * first.abs().max(g.abs());
        if let Some(other) = gains.iter().find(differs) {
            return Err(format!(
                "with {z}, its scores are multiplied with {other} where others are with {first}: the operator has one factor \
                 for all heads and positions"
            ));
        }
    }
    Ok(())
}

/// A mask that the operator can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Tokens that a token sees, itself included; none: all before it.
    pub window: Option<usize>,
    /// Whether padding on the left is masked.
    pub padding: bool,
}

impl Mask {
    fn allows(self, z: Setting, b: usize, query: usize, key: usize) -> bool {
        key <= query && self.window.is_none_or(|w| query - key < w) && (!self.padding || key >= z.first(b))
    }
}

/// Finds the mask that `bias` makes. `constants`: integers that the mask's computation mentions: one may be the window. `far`:
/// past tokens of further calls that may show one.
///
/// # Errors
/// It is none that the operator can do; or it can't be computed.
pub fn classify(
    bias: &dyn Fn(Setting) -> Result<Bias, String>,
    constants: &[usize],
    far: &[usize],
) -> Result<Mask, String> {
    let small = [
        Setting::new(1, 4, 0, 0),
        Setting::new(1, 3, 5, 0),
        Setting::new(2, 3, 6, 0),
        Setting::new(1, 1, 9, 0),
    ];
    let padded = [
        Setting::new(2, 5, 0, 3),
        Setting::new(2, 2, 6, 3),
        Setting::new(2, 1, 6, 2),
    ];
    // Some models take several tokens only without a past; then there is nothing to be true to.
    let biases = |settings: &[Setting]| -> Result<Vec<(Setting, Bias)>, String> {
        let call = |z: &Setting| match bias(*z) {
            Ok(bias) => Some(Ok((*z, bias))),
            Err(_) if z.continues() => None,
            Err(why) => Some(Err(format!("its mask is not understood: {why}"))),
        };
        settings.iter().filter_map(call).collect()
    };
    let plain = biases(&small)?;
    for (z, bias) in &plain {
        only_masks(*z, bias)?;
    }
    // Windows that show in the small calls, and those that the computation mentions.
    let mut windows: Vec<Option<usize>> = vec![None];
    windows.extend((1..10).map(Some));
    for c in constants {
        windows.extend(
            [c.checked_sub(1), Some(*c), c.checked_add(1)]
                .into_iter()
                .filter(|w| w.is_some_and(|w| w > 9)),
        );
    }
    let fits = |window: Option<usize>, calls: &[(Setting, Bias)], padding: bool| {
        let mask = Mask { window, padding };
        calls.iter().all(|(z, bias)| first_difference(mask, *z, bias).is_none())
    };
    windows.retain(|w| fits(*w, &plain, false));
    if windows.is_empty() {
        return Err(explain(&plain));
    }
    // Each mentioned number may bound something: look right behind it. One call of one token tells enough.
    let behind = constants.iter().filter(|c| **c > 4).map(|c| c + 2);
    let mut calls = distant(bias, behind, &BEYOND)?;
    calls.extend(distant(bias, far.iter().copied(), &UNSEEN)?);
    windows.extend(calls.iter().filter_map(|(z, bias)| read_window(*z, bias)).map(Some));
    windows.retain(|w| fits(*w, &plain, false) && fits(*w, &calls, false));
    // What looks like a window from afar is one from nearby too.
    if let Some(Some(w)) = windows.first().copied().filter(|w| w.is_some_and(|w| w > 9)) {
        calls.extend(distant(bias, [w - 1, w, w + w / 2 + 1].into_iter(), &UNSEEN)?);
        windows.retain(|w| fits(*w, &calls, false));
    }
    let Some(window) = windows.first().copied() else {
        return Err(explain(&calls));
    };
    for (z, bias) in &calls {
        only_masks(*z, bias)?;
    }
    let calls: Vec<_> = plain.into_iter().chain(calls).collect();
    only_one_factor(&calls)?;
    let padded = biases(&padded)?;
    let choices = [true, false];
    let padding = choices.into_iter().find(|padding| fits(window, &padded, *padding));
    let padding = padding.ok_or_else(|| {
        format!(
            "with padding on the left its mask is neither causal nor causal without the padding: {}",
            explain(&padded)
        )
    })?;
    Ok(Mask { window, padding })
}

/// What says that the model itself can't be called with so many tokens.
const BEYOND: [&str; 2] = ["do not go together", "out of range"];
/// The same, or that a call is too large to be looked at.
const UNSEEN: [&str; 4] = [BEYOND[0], BEYOND[1], "looked at", "depends on more than"];

/// Calls of one token after so many others. Those that fail with one of the `excused` reasons are left out.
fn distant(
    bias: &dyn Fn(Setting) -> Result<Bias, String>,
    pasts: impl Iterator<Item = usize>,
    excused: &[&str],
) -> Result<Vec<(Setting, Bias)>, String> {
    let mut found = Vec::new();
    for z in pasts.map(|past| Setting::new(1, 1, past, 0)) {
        match bias(z) {
            Ok(bias) => found.push((z, bias)),
            Err(why) if excused.iter().any(|e| why.contains(e)) => {}
            Err(why) => return Err(format!("its mask is not understood at {z}: {why}")),
        }
    }
    Ok(found)
}

/// How many tokens the one token of a call sees, if not all.
fn read_window(z: Setting, bias: &Bias) -> Option<usize> {
    let first = bias.data.iter().take(z.total()).position(|x| *x > MASKED)?;
    (first > 0).then(|| z.total() - first)
}

/// The first query and key where a bias differs from a mask. Rows of padding don't count.
fn first_difference(mask: Mask, z: Setting, bias: &Bias) -> Option<(usize, usize, usize)> {
    let (s, t) = (z.s, z.total());
    let seen = |at: usize| bias.data.get(at).is_some_and(|x| *x > MASKED);
    for b in 0..z.b {
        for i in (0..s).filter(|i| z.past + i >= z.first(b)) {
            for h in 0..bias.heads {
                let row = ((b * bias.heads + h) * s + i) * t;
                let wrong = (0..t).find(|j| seen(row + j) != mask.allows(z, b, z.past + i, *j));
                if let Some(j) = wrong {
                    return Some((b, z.past + i, j));
                }
            }
        }
    }
    None
}

/// Every bias must be 0 or a mask.
fn only_masks(z: Setting, bias: &Bias) -> Result<(), String> {
    let (s, t) = (z.s, z.total());
    let numbers = |x: &f64| *x > MASKED && x.abs() > 1e-6 || x.is_nan();
    let Some(at) = bias.data.iter().position(numbers) else {
        return Ok(());
    };
    let (value, key, query, head) = (
        bias.data[at],
        at % t,
        z.past + at / t % s,
        at / (t * s) % bias.heads.max(1),
    );
    // ALiBi: equal steps from key to key, another step in each head.
    let last = (at / (t * s) * s + s - 1) * t;
    let row = bias.data.get(last..last + t).unwrap_or_default();
    let seen: Vec<f64> = row.iter().copied().filter(|x| *x > MASKED).collect();
    let step = seen.windows(2).map(|w| w[1] - w[0]).collect::<Vec<_>>();
    let even = step.len() > 1
        && step
            .iter()
            .all(|d| (d - step[0]).abs() < 1e-4 * step[0].abs().max(1e-9));
    let what = if even {
        ", which grows evenly with the distance (ALiBi)"
    } else {
        ""
    };
    Err(format!(
        "its scores get a bias of {value} for query {query} and key {key} in head {head}{what}; only masks are understood"
    ))
}

/// What is wrong with the mask of the first call that isn't causal.
fn explain(calls: &[(Setting, Bias)]) -> String {
    let causal = Mask {
        window: None,
        padding: false,
    };
    for (z, bias) in calls {
        if let Some((_, query, key)) = first_difference(causal, *z, bias) {
            return if key > query {
                format!(
                    "with {z}, token {query} sees token {key}, which comes after it: its mask is not causal (bidirectional, \
                     prefix or cross-attention)"
                )
            } else {
                format!(
                    "with {z}, token {query} does not see token {key}: its mask is neither causal nor a sliding window"
                )
            };
        }
    }
    "its mask is none that is understood (causal, sliding window, padding on the left)".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(allowed: impl Fn(Setting, usize, usize, usize) -> f64) -> impl Fn(Setting) -> Result<Bias, String> {
        move |z| {
            let mut data = Vec::new();
            for b in 0..z.b {
                for _ in 0..2 {
                    for i in 0..z.s {
                        data.extend((0..z.total()).map(|j| allowed(z, b, z.past + i, j)));
                    }
                }
            }
            Ok(Bias {
                data,
                heads: 2,
                gain: None,
            })
        }
    }

    fn hide(seen: bool) -> f64 {
        if seen { 0.0 } else { f64::NEG_INFINITY }
    }

    #[test]
    fn causal_sliding_and_padded_masks_are_told_apart() {
        let causal = made(|_, _, i, j| hide(j <= i));
        assert_eq!(
            classify(&causal, &[], &[]),
            Ok(Mask {
                window: None,
                padding: false
            })
        );
        let padded = made(|z, b, i, j| hide(j <= i && j >= z.first(b)));
        assert_eq!(
            classify(&padded, &[128], &[]),
            Ok(Mask {
                window: None,
                padding: true
            })
        );
        for w in [3usize, 128, 4096] {
            let sliding = made(move |z, b, i, j| hide(j <= i && i - j < w && j >= z.first(b)));
            let found = classify(&sliding, &[w], &[]);
            assert_eq!(
                found,
                Ok(Mask {
                    window: Some(w),
                    padding: true
                }),
                "{w}"
            );
            // Written as j > i - w or as i - j <= w - 1.
            assert_eq!(classify(&sliding, &[w - 1], &[]), found);
        }
    }

    #[test]
    fn other_masks_are_named_with_what_failed() {
        let why = |bias: &dyn Fn(Setting) -> Result<Bias, String>, c: &[usize]| classify(bias, c, &[]).unwrap_err();
        let both_ways = made(|_, _, _, _| 0.0);
        assert!(why(&both_ways, &[]).contains("token 0 sees token 1"));
        let prefix = made(|_, _, i, j| hide(j <= i || j < 2));
        assert!(why(&prefix, &[]).contains("not causal"));
        let alibi = made(|_, _, i, j| {
            if j <= i {
                -0.5 * (i - j) as f64
            } else {
                f64::NEG_INFINITY
            }
        });
        assert!(why(&alibi, &[]).contains("ALiBi"));
        let chunked = made(|_, _, i, j| hide(j <= i && i / 64 == j / 64));
        assert!(why(&chunked, &[64]).contains("neither causal nor a sliding window"));
        let dilated = made(|_, _, i, j| hide(j <= i && (i - j) % 2 == 0));
        assert!(why(&dilated, &[]).contains("does not see token"));
    }

    #[test]
    fn a_window_that_nothing_mentions_is_read_from_a_far_row() {
        let sliding = made(|_, _, i, j| hide(j <= i && i - j < 100));
        for (constants, far) in [(&[200][..], &[][..]), (&[], &[64, 256])] {
            assert_eq!(
                classify(&sliding, constants, far),
                Ok(Mask {
                    window: Some(100),
                    padding: false
                })
            );
        }
    }

    #[test]
    fn what_looks_like_a_window_from_one_place_only_is_refused() {
        let why = |bias: &dyn Fn(Setting) -> Result<Bias, String>| classify(bias, &[], &[64, 256]).unwrap_err();
        let chunked = made(|_, _, i, j| hide(j <= i && i / 100 == j / 100));
        assert!(why(&chunked).contains("neither causal nor a sliding window"));
        // Wider from 200 tokens on.
        let changing = made(|_, _, i, j| hide(j <= i && i - j < if i < 200 { 60 } else { 90 }));
        assert!(why(&changing).contains("neither causal nor a sliding window"));
    }

    #[test]
    fn far_calls_that_the_model_does_not_take_are_left_out() {
        let causal = made(|_, _, i, j| hide(j <= i));
        let limited = |z: Setting| match z.total() {
            0..=128 => causal(z),
            _ => Err("shapes [1, 1] and [1, 2] do not go together".to_owned()),
        };
        assert!(classify(&limited, &[], &[64, 256]).is_ok_and(|m| m.window.is_none()));
        let broken = |z: Setting| match z.total() {
            0..=128 => causal(z),
            _ => Err("masked has shape [1, 8]".to_owned()),
        };
        assert!(
            classify(&broken, &[], &[64, 256])
                .unwrap_err()
                .contains("at 1 token(s) after 256")
        );
    }

    #[test]
    fn factors_that_depend_on_positions_are_refused() {
        let causal = made(|_, _, i, j| hide(j <= i));
        let hotter = |z: Setting| {
            let gain = if z.past < 100 { 0.25 } else { 0.5 };
            let gain = Some([gain, gain]);
            causal(z).map(|b| Bias { gain, ..b })
        };
        assert!(classify(&hotter, &[], &[64]).is_ok());
        let why = classify(&hotter, &[], &[64, 256]).unwrap_err();
        assert!(why.contains("with 0.5 where others are with 0.25"), "{why}");
        let hidden = f64::NEG_INFINITY;
        assert_eq!(gain(&[0.0, 0.0, hidden], &[2.0, 3.0, 7.0]), Some([2.0, 3.0]));
        assert_eq!(gain(&[hidden], &[1.0]), None);
    }
}
