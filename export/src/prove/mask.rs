//! What a mask lets a token see, found by trying it: causal, a sliding window, padding; or none of these, and then why not.

use super::sample_calls::CallShape;
use crate::eval::Error;
use std::collections::BTreeSet;

/// A bias at most this is a mask: exporters write -inf, the type's lowest number, -1e9 or -10000.
const MASKED: f64 = -9999.0;

/// What is added to the scores in one call.
pub struct Bias {
    /// `[B, heads, places]`; one head stands for all where they don't differ.
    pub data: Vec<f64>,
    pub heads: usize,
    pub places: Places,
    /// The least and the most that scores are multiplied with on the way, where that is known.
    pub gain: Option<[f64; 2]>,
}

/// What of a call's scores is read.
#[derive(Clone)]
pub enum Places {
    /// All keys of some of the tokens fed.
    Rows(Vec<usize>),
    /// Tokens fed and keys.
    Cells(Vec<[usize; 2]>),
}

impl Places {
    /// Token fed and key of each place, for a call of so many tokens in all.
    fn each(&self, total: usize) -> Box<dyn Iterator<Item = [usize; 2]> + '_> {
        match self {
            Self::Rows(rows) => Box::new(rows.iter().flat_map(move |i| (0..total).map(|j| [*i, j]))),
            Self::Cells(cells) => Box::new(cells.iter().copied()),
        }
    }

    fn len(&self, total: usize) -> usize {
        match self {
            Self::Rows(rows) => rows.len() * total,
            Self::Cells(cells) => cells.len(),
        }
    }
}

/// The least and the most that a score of 1 becomes more than one of 0, where tokens are seen. `data`: of scores that are 0,
/// `ones`: of scores that are 1.
pub fn gain(data: &[f64], ones: &[f64]) -> Option<[f64; 2]> {
    let seen = data.iter().zip(ones).filter(|(x, _)| **x > MASKED);
    let wider = |range: Option<[f64; 2]>, g: f64| Some(range.map_or([g, g], |[a, b]| [a.min(g), b.max(g)]));
    seen.map(|(x, one)| one - x).fold(None, wider)
}

/// All scores must be multiplied with the same number.
fn only_one_factor(calls: &[(CallShape, Bias)]) -> Result<(), String> {
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
    fn allows(self, z: CallShape, b: usize, query: usize, key: usize) -> bool {
        key <= query && self.window.is_none_or(|w| query - key < w) && (!self.padding || key >= z.first(b))
    }
}

/// Reads the bias of some of a call's tokens.
pub type Read<'r> = &'r dyn Fn(CallShape, Places) -> Result<Bias, Unread>;

/// Why a bias was not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unread {
    /// The model itself doesn't take such a call.
    Beyond,
    /// It takes too many steps.
    Long,
    /// It can't be computed.
    Unknown(String),
}

/// What the evaluator says.
impl From<Error> for Unread {
    fn from(why: Error) -> Self {
        if why.is_invalid_call() {
            Self::Beyond
        } else {
            Self::Unknown(why.into())
        }
    }
}

/// What is told in words excuses nothing.
impl From<String> for Unread {
    fn from(why: String) -> Self {
        Self::Unknown(why)
    }
}

impl std::fmt::Display for Unread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Beyond => f.write_str("the model doesn't take so many tokens"),
            Self::Long => f.write_str("it takes more steps than are done"),
            Self::Unknown(why) => f.write_str(why),
        }
    }
}
type Calls = Vec<(CallShape, Bias)>;

/// Finds the mask that `bias` makes. `constants`: integers that the mask's computation mentions or computes: one may be the window, or
/// the place from which on the mask is another. `far`: past tokens of further calls that may show either.
///
/// # Errors
/// It is none that the operator can do; or it can't be computed.
pub fn classify(bias: Read, constants: &[usize], far: &[usize]) -> Result<Mask, String> {
    let small = [
        CallShape::new(1, 4, 0, 0),
        CallShape::new(1, 3, 5, 0),
        CallShape::new(2, 3, 6, 0),
        CallShape::new(1, 1, 9, 0),
    ];
    let padded = [
        CallShape::new(2, 5, 0, 3),
        CallShape::new(2, 2, 6, 3),
        CallShape::new(2, 1, 6, 2),
    ];
    // Some models take several tokens only without a past; then there is nothing to be true to.
    let biases = |settings: &[CallShape]| -> Result<Calls, String> {
        let call = |z: &CallShape| match bias(*z, all_rows(*z)) {
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
    let fits = |window: Option<usize>, calls: &[(CallShape, Bias)], padding: bool| {
        let mask = Mask { window, padding };
        calls.iter().all(|(z, bias)| first_difference(mask, *z, bias).is_none())
    };
    // Windows that show in the small calls, and those that the computation mentions.
    let mut windows: Vec<Option<usize>> = vec![None];
    windows.extend((1..10).map(Some));
    let near = |c: &usize| [c.checked_sub(1), Some(*c), c.checked_add(1)];
    windows.extend(constants.iter().flat_map(near).filter(|w| w.is_some_and(|w| w > 9)));
    windows.retain(|w| fits(*w, &plain, false));
    if windows.is_empty() {
        return Err(explain(&plain));
    }
    // Calls of one token tell most: it sees all that there is.
    let bounds: Vec<usize> = constants.iter().copied().filter(|c| *c > 4).collect();
    let single: BTreeSet<usize> = bounds
        .iter()
        .flat_map(|c| around(*c))
        .chain(far.iter().copied())
        .collect();
    let mut calls = until_the_end(bias, single.into_iter().map(|past| CallShape::new(1, 1, past, 0)))?;
    let end = calls.iter().map(|(z, _)| z.past).max().unwrap_or(0);
    windows.extend(calls.iter().filter_map(|(z, bias)| read_window(*z, bias)).map(Some));
    windows.retain(|w| fits(*w, &plain, false) && fits(*w, &calls, false));
    // What looks like a window from afar is one from nearby too.
    if let Some(Some(w)) = windows.first().copied().filter(|w| w.is_some_and(|w| w > 9)) {
        let pasts = [w - 1, w, w + w / 2 + 1, 2 * w, 3 * w + 2];
        calls.extend(distant(
            bias,
            pasts.into_iter().map(|past| CallShape::new(1, 1, past, 0)),
        )?);
        windows.retain(|w| fits(*w, &calls, false));
    }
    let Some(window) = windows.first().copied() else {
        return Err(explain(&calls));
    };
    // Tokens fed together see what they see one by one.
    let bounds: BTreeSet<usize> = bounds.into_iter().chain(window).collect();
    if plain.iter().any(|(z, _)| z.continues()) {
        let pasts = bounds.iter().flat_map(|c| [c.saturating_sub(2), c + c / 2]);
        let far = far.iter().copied().filter(|past| *past <= LONG);
        let pasts: BTreeSet<usize> = pasts.chain(far).collect();
        calls.extend(distant(
            bias,
            pasts.into_iter().map(|past| CallShape::new(1, 3, past, 0)),
        )?);
    }
    calls.extend(prompts(bias, &bounds, far)?);
    calls.extend(lines(bias, end, window)?);
    if !fits(window, &calls, false) {
        return Err(explain(&calls));
    }
    for (z, bias) in &calls {
        only_masks(*z, bias)?;
    }
    let calls: Calls = plain.into_iter().chain(calls).collect();
    only_one_factor(&calls)?;
    let mut padded = biases(&padded)?;
    padded.extend(distant(bias, far_padded(&bounds, far).into_iter())?);
    let choices = [true, false];
    let padding = choices.into_iter().find(|padding| fits(window, &padded, *padding));
    let padding = padding.ok_or_else(|| {
        format!(
            "with padding on the left its mask is neither causal nor causal without the padding: {}",
            explain(&padded)
        )
    })?;
    for (z, bias) in padded.iter().filter(|_| padding) {
        only_masks(*z, bias)?;
    }
    Ok(Mask { window, padding })
}

fn all_rows(z: CallShape) -> Places {
    Places::Rows((0..z.s).collect())
}

/// Past tokens of calls in which a number shows, if it bounds something: right there, well behind, and far behind it.
fn around(c: usize) -> Vec<usize> {
    let mut pasts = vec![c + 2, c + c / 2];
    if c <= LONG {
        pasts.extend([c - 1, c, c + 1, 2 * c, 2 * c + 1]);
    }
    pasts
}

/// Up to so many tokens calls are read in every way; of longer ones only what tells most.
const LONG: usize = 10_000;

/// Whole prompts: the first and last tokens' rows, some between, and those at the numbers that may bound something.
fn prompts(bias: Read, bounds: &BTreeSet<usize>, far: &[usize]) -> Result<Calls, String> {
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
        let z = CallShape::new(1, s, 0, 0);
        if let Some(bias) = callable(z, bias(z, Places::Rows(rows.into_iter().collect())))? {
            found.push((z, bias));
        }
    }
    Ok(found)
}

/// Tokens of the prompt whose lines are read.
const LINES: usize = 30_011;

/// Of a long prompt, for every token: the first key and one in the middle, itself and the one after it, and a window's ends. What is
/// different for a few tokens alone shows there.
fn lines(bias: Read, end: usize, window: Option<usize>) -> Result<Option<(CallShape, Bias)>, String> {
    let z = CallShape::new(1, LINES.min(end), 0, 0);
    if z.s < 5 {
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
        keys.into_iter().flatten().filter(|j| *j < z.s).map(move |j| [i, j])
    };
    // All tokens, or as many as can be read where each costs a row.
    for step in [1, 7, 61, 499] {
        let cells = (0..z.s).step_by(step).flat_map(of).collect();
        match bias(z, Places::Cells(cells)) {
            Err(Unread::Long) => {}
            read => return Ok(callable(z, read)?.map(|bias| (z, bias))),
        }
    }
    Err(format!("its mask is not understood at {z}: {}", Unread::Long))
}

/// Calls of two sequences of which one begins with padding: a little, and more than half.
fn far_padded(bounds: &BTreeSet<usize>, far: &[usize]) -> Vec<CallShape> {
    let behind = bounds.iter().map(|c| c + c / 2);
    let pasts: BTreeSet<usize> = behind
        .chain(far.iter().copied())
        .filter(|past| *past <= 2 * LONG)
        .collect();
    let each = |past: usize| [3, past / 2 + 1].map(|pad| CallShape::new(2, 1, past, pad));
    pasts.into_iter().flat_map(each).collect()
}

/// A bias; none where the model itself can't be called so.
fn callable(z: CallShape, bias: Result<Bias, Unread>) -> Result<Option<Bias>, String> {
    match bias {
        Ok(bias) => Ok(Some(bias)),
        Err(Unread::Beyond) => Ok(None),
        Err(why) => Err(format!("its mask is not understood at {z}: {why}")),
    }
}

/// Calls with many tokens before. Those that the model does not take are left out.
fn distant(bias: Read, calls: impl Iterator<Item = CallShape>) -> Result<Calls, String> {
    let mut found = Vec::new();
    for z in calls {
        if let Some(bias) = callable(z, bias(z, all_rows(z)))? {
            found.push((z, bias));
        }
    }
    Ok(found)
}

/// The same for calls that grow, and the longest one that the model takes, if it does not take all.
fn until_the_end(bias: Read, calls: impl Iterator<Item = CallShape>) -> Result<Calls, String> {
    let mut found: Calls = Vec::new();
    for z in calls {
        if let Some(bias) = callable(z, bias(z, all_rows(z)))? {
            found.push((z, bias));
            continue;
        }
        let (mut most, mut least) = (found.iter().map(|(z, _)| z.past).max().unwrap_or(0), z.past);
        while least - most > 1 {
            let z = CallShape {
                past: most + (least - most) / 2,
                ..z
            };
            match callable(z, bias(z, all_rows(z)))? {
                Some(bias) => {
                    most = z.past;
                    found.push((z, bias));
                }
                None => least = z.past,
            }
        }
        break;
    }
    Ok(found)
}

/// How many tokens the one token of a call sees, if not all.
fn read_window(z: CallShape, bias: &Bias) -> Option<usize> {
    let first = bias.data.iter().take(z.total()).position(|x| *x > MASKED)?;
    (first > 0).then(|| z.total() - first)
}

/// The first query and key where a bias differs from a mask. Rows of padding don't count.
fn first_difference(mask: Mask, z: CallShape, bias: &Bias) -> Option<(usize, usize, usize)> {
    let n = bias.places.len(z.total());
    for (block, data) in bias.data.chunks(n.max(1)).enumerate() {
        let b = block / bias.heads.max(1);
        let places = bias.places.each(z.total()).map(|[i, j]| (z.past + i, j));
        let mut read = places.zip(data).filter(|((i, _), _)| *i >= z.first(b));
        if let Some(((i, j), _)) = read.find(|((i, j), x)| (**x > MASKED) != mask.allows(z, b, *i, *j)) {
            return Some((b, i, j));
        }
    }
    None
}

/// Every bias must be 0 or a mask.
fn only_masks(z: CallShape, bias: &Bias) -> Result<(), String> {
    let n = bias.places.len(z.total()).max(1);
    let numbers = |x: &f64| *x > MASKED && x.abs() > 1e-6 || x.is_nan();
    let Some(at) = bias.data.iter().position(numbers) else {
        return Ok(());
    };
    let place = bias.places.each(z.total()).nth(at % n).unwrap_or_default();
    let (value, key, query, head) = (bias.data[at], place[1], z.past + place[0], at / n % bias.heads.max(1));
    // ALiBi: equal steps from key to key, another step in each head.
    let end = (at / n + 1) * n;
    let row = match bias.places {
        Places::Rows(_) => bias.data.get(end.saturating_sub(z.total())..end).unwrap_or_default(),
        Places::Cells(_) => &[],
    };
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

/// How many of the first and of the last tokens one token sees, if it sees none between them.
fn always_seen(z: CallShape, bias: &Bias) -> Option<[usize; 2]> {
    let row = bias.data.get(..z.total()).filter(|_| z.s == 1)?;
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
fn explain(calls: &[(CallShape, Bias)]) -> String {
    let causal = Mask {
        window: None,
        padding: false,
    };
    // Where sinks show, they explain most.
    let sinks = |call: &&(CallShape, Bias)| always_seen(call.0, &call.1).is_some();
    for (z, bias) in calls.iter().find(sinks).into_iter().chain(calls) {
        if let Some((_, query, key)) = first_difference(causal, *z, bias) {
            return if key > query {
                format!(
                    "with {z}, token {query} sees token {key}, which comes after it: its mask is not causal (bidirectional, \
                     prefix or cross-attention)"
                )
            } else {
                let what = match always_seen(*z, bias) {
                    Some([first, last]) => format!(
                        ": besides the last {last} tokens it sees the first {first} (attention sinks in the mask), which the \
                         operator doesn't do; its mask"
                    ),
                    None => ": its mask".to_owned(),
                };
                format!("with {z}, token {query} does not see token {key}{what} is neither causal nor a sliding window")
            };
        }
    }
    "its mask is none that is understood (causal, sliding window, padding on the left)".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(
        allowed: impl Fn(CallShape, usize, usize, usize) -> f64,
    ) -> impl Fn(CallShape, Places) -> Result<Bias, Unread> {
        move |z, places| {
            let mut data = Vec::new();
            for b in 0..z.b {
                for _ in 0..2 {
                    data.extend(places.each(z.total()).map(|[i, j]| allowed(z, b, z.past + i, j)));
                }
            }
            Ok(Bias {
                data,
                heads: 2,
                places,
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
        let why = |bias: Read, c: &[usize]| classify(bias, c, &[]).unwrap_err();
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
        let why = |bias: Read| classify(bias, &[], &[64, 256]).unwrap_err();
        let chunked = made(|_, _, i, j| hide(j <= i && i / 100 == j / 100));
        assert!(why(&chunked).contains("neither causal nor a sliding window"));
        // Wider from 200 tokens on.
        let changing = made(|_, _, i, j| hide(j <= i && i - j < if i < 200 { 60 } else { 90 }));
        assert!(why(&changing).contains("neither causal nor a sliding window"));
    }

    /// What is not a window is refused although nothing mentions where it begins.
    #[test]
    fn masks_are_told_by_their_far_rows() {
        let far = [64, 256, 1024, 4096, 9001];
        let refused = |allowed: fn(usize, usize) -> bool, says: &str| {
            let bias = made(move |_, _, i, j| hide(allowed(i, j)));
            let why = classify(&bias, &[], &far).expect_err(says);
            assert!(why.contains(says), "{why}");
        };
        refused(
            |i, j| j <= i && (i - j < 4096 || j < 4),
            "the last 4096 tokens it sees the first 4",
        );
        refused(
            |i, j| j <= i && (i - j < 5000 || j == 0),
            "the first 1 (attention sinks in the mask)",
        );
        refused(
            |i, j| j <= i && i / 4900 == j / 4900,
            "neither causal nor a sliding window",
        );
        refused(
            |i, j| j <= i && (i - j < 3000 || j % 2 == 0),
            "neither causal nor a sliding window",
        );
        refused(|i, j| j <= i && j != 4097, "does not see token 4097");
        refused(
            |i, j| j <= i && (i < 7000 || i - j < 3000),
            "neither causal nor a sliding window",
        );
        // Tokens that see each other both ways, and one token alone that sees less: no single token's row shows them.
        refused(
            |i, j| j <= i || i / 100 == 60 && j / 100 == 60,
            "token 6000 sees token 6001",
        );
        refused(
            |i, j| j <= i && (i != 5003 || i - j < 10),
            "token 5003 does not see token 0",
        );
        let window = made(|_, _, i, j| hide(j <= i && i - j < 4900));
        let found = classify(&window, &[], &far).map(|m| m.window);
        assert_eq!(found, Ok(Some(4900)));
    }

    #[test]
    fn what_shows_only_in_the_last_rows_that_a_model_takes_is_found() {
        let sinks = made(|_, _, i, j| hide(j <= i && (i - j < 3900 || j < 4)));
        let limited = |z: CallShape, places: Places| match z.total() {
            0..=4000 => sinks(z, places),
            _ => Err(Unread::Beyond),
        };
        let why = classify(&limited, &[], &[64, 256, 1024, 4096]).expect_err("sinks");
        assert!(why.contains("the first 4 (attention sinks in the mask)"), "{why}");
    }

    #[test]
    fn numbers_are_looked_at_well_behind_them() {
        let sinks = made(|_, _, i, j| hide(j <= i && (i - j < 700 || j < 4)));
        let why = classify(&sinks, &[700], &[]).expect_err("sinks");
        assert!(why.contains("the last 700 tokens it sees the first 4"), "{why}");
        // One row of the many.
        let once = made(|_, _, i, j| hide(j <= i && (i != 1400 || i - j < 30)));
        assert!(classify(&once, &[700], &[]).is_err(), "twice the number");
    }

    #[test]
    fn padding_is_read_from_afar_too() {
        // Of a padded sequence the first valid tokens are sinks.
        let sinks = made(|z, b, i, j| {
            let first = z.first(b);
            hide(j <= i && j >= first && (first == 0 || i - j < 2000 || j < first + 4))
        });
        let why = classify(&sinks, &[], &[64, 4096]).expect_err("sinks of padded sequences");
        assert!(why.contains("with padding on the left"), "{why}");
    }

    #[test]
    fn far_calls_that_the_model_does_not_take_are_left_out() {
        let causal = made(|_, _, i, j| hide(j <= i));
        let limited = |z: CallShape, places: Places| match z.total() {
            0..=128 => causal(z, places),
            _ => Err(Unread::Beyond),
        };
        assert!(classify(&limited, &[], &[64, 256]).is_ok_and(|m| m.window.is_none()));
        let broken = |z: CallShape, places: Places| match z.total() {
            0..=128 => causal(z, places),
            _ => Err(Unread::Unknown("masked has shape [1, 8]".to_owned())),
        };
        assert!(
            classify(&broken, &[], &[64, 256])
                .unwrap_err()
                .contains("at 1 token(s) after 256")
        );
    }

    /// A failure of a node whose name says what excuses a failure.
    fn at_node(source: Error) -> Error {
        Error::Node {
            label: "shapes do not go together, out of range".to_owned(),
            op_type: "Gather".to_owned(),
            source: Box::new(source),
        }
    }

    #[test]
    fn a_failure_is_excused_by_its_variant_alone() {
        let shapes = Error::Broadcast {
            left: vec![2],
            right: vec![3],
        };
        let index = Error::IndexOutOfRange { index: 128, len: 128 };
        for excused in [shapes, index] {
            let masked = Error::Mask(Box::new(excused.clone()));
            for error in [excused.clone(), at_node(excused), at_node(masked)] {
                assert_eq!(Unread::from(error), Unread::Beyond);
            }
        }
        let words = "shapes do not go together, out of range";
        for error in [
            Error::Axis { axis: 2, rank: 2 },
            Error::NegativeSize(-1),
            Error::TooManyElements(vec![1 << 50]),
            Error::TooManyNumbers(1 << 30),
            Error::TooManyDimensions(65),
            Error::TooMuchWork,
            Error::TooDeep(16),
            Error::Reshape {
                from: vec![2],
                into: vec![3],
            },
            Error::Split { sizes: vec![1], len: 2 },
            Error::Concat {
                first: vec![1],
                other: vec![2],
                axis: 0,
            },
            Error::MatMul {
                left: vec![1, 2],
                right: vec![3, 1],
            },
            Error::NotComputed(words.to_owned()),
            Error::Shape {
                what: words,
                actual: vec![],
            },
            Error::Sizes(words.to_owned()),
            Error::Attribute {
                name: words.to_owned(),
                value: words.to_owned(),
            },
            Error::InputAbsent(0),
            Error::InputUnknown(words.to_owned()),
            Error::ValueUnknown(words.to_owned()),
            Error::OutputUnknown(words.to_owned()),
            Error::NumbersUnknown,
            Error::NotSupported {
                domain: "out of range".to_owned(),
                op_type: "do not go together".to_owned(),
            },
            Error::Invalid(words),
        ] {
            for error in [error.clone(), at_node(error)] {
                let said = error.to_string();
                assert_eq!(Unread::from(error), Unread::Unknown(said));
            }
        }
        assert!(matches!(Unread::from(words.to_owned()), Unread::Unknown(_)));
    }

    #[test]
    fn factors_that_depend_on_positions_are_refused() {
        let causal = made(|_, _, i, j| hide(j <= i));
        let hotter = |z: CallShape, places: Places| {
            let gain = if z.past < 100 { 0.25 } else { 0.5 };
            let gain = Some([gain, gain]);
            causal(z, places).map(|b| Bias { gain, ..b })
        };
        assert!(classify(&hotter, &[], &[64]).is_ok());
        let why = classify(&hotter, &[], &[64, 256]).unwrap_err();
        assert!(why.contains("with 0.5 where others are with 0.25"), "{why}");
        let hidden = f64::NEG_INFINITY;
        assert_eq!(gain(&[0.0, 0.0, hidden], &[2.0, 3.0, 7.0]), Some([2.0, 3.0]));
        assert_eq!(gain(&[hidden], &[1.0]), None);
    }
}
