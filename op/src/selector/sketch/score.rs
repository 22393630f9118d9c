//! Log masses of pages: the logarithm of the sum of e^(estimated logit) over the tokens that the newest query sees.

use std::ops::Range;

use super::block::{BlockLayout, PART, ROWS};
use super::query::{Prepared, of_head, prepared_len};
use crate::method::element::Element;
use crate::selector::Scoring;
use crate::simd::{CodeIsa, Codes, GROUP, Isa, MOST_QUERIES, Simd, code_sums, dispatched, exp, ln};

type BlockRows = [f32; ROWS];

/// Log masses of some pages for every prepared head, head-major.
#[expect(
    clippy::too_many_arguments,
    reason = "one call site; a struct would only rename the list"
)]
pub(super) fn log_masses<E: Element>(
    isa: Isa,
    codes: CodeIsa,
    layout: BlockLayout,
    scoring: &Scoring,
    prepared: &[f32],
    state: &[u8],
    pages: Range<usize>,
    scores: &mut [f32],
) {
    masses_kernel::<E>(isa, codes, layout, scoring, prepared, state, pages, scores);
}

dispatched! {
    fn masses_kernel<E: Element>(
        codes: CodeIsa, layout: BlockLayout, scoring: &Scoring, prepared: &[f32], state: &[u8], pages: Range<usize>,
        scores: &mut [f32],
    ) = masses_body
}

/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn masses_body<S: Simd, E: Element>(
    codes: CodeIsa,
    layout: BlockLayout,
    scoring: &Scoring,
    prepared: &[f32],
    state: &[u8],
    pages: Range<usize>,
    scores: &mut [f32],
) {
    let (d, bits, count) = (layout.head_size, layout.bits, pages.len());
    let heads = prepared.len() / prepared_len(d, bits);
    let oldest = scoring.local_window.map_or(0, |w| scoring.len.saturating_sub(w));
    let (first_row, end_row) = (
        (pages.start * scoring.page_size).max(oldest),
        (pages.end * scoring.page_size).min(scoring.len),
    );
    let mut sums = [0; MOST_QUERIES * ROWS];
    for block in first_row / ROWS..end_row.div_ceil(ROWS) {
        let bytes = &state[block * layout.bytes..][..layout.bytes];
        let start = block * ROWS;
        for line in (0..layout.bytes).step_by(64) {
            // SAFETY: a hint, for any address.
            unsafe { S::prefetch(bytes.as_ptr().wrapping_add(layout.bytes + line)) };
        }
        let (from, to) = (first_row.max(start) - start, end_row.min(start + ROWS) - start);
        let groups = from / GROUP..to.div_ceil(GROUP);
        let of_pages = pages.start.max(start / scoring.page_size)..pages.end.min((start + ROWS) / scoring.page_size);
        let mut factors = [0.0; ROWS];
        factors
            .iter_mut()
            .zip(layout.factors(bytes))
            .for_each(|(to, factor)| *to = factor);
        for first in (0..heads).step_by(MOST_QUERIES) {
            let most = MOST_QUERIES.min(heads - first);
            let queries: [Prepared; MOST_QUERIES] =
                std::array::from_fn(|i| of_head(prepared, first + i.min(most - 1), d, bits));
            let bytes_of = groups.start * GROUP * layout.width..groups.end * GROUP * layout.width;
            code_sums(
                codes,
                Codes {
                    bytes: &bytes[bytes_of],
                    width: layout.width,
                    bits,
                },
                &queries.map(|q| q.quantised)[..most],
                &mut sums[groups.start * GROUP..],
                ROWS,
            );
            let centres = if block > 0 {
                centre_products::<E>(layout, bytes, &queries)
            } else {
                [0.0; MOST_QUERIES]
            };
            for (i, (query, centre)) in queries.iter().zip(centres).take(most).enumerate() {
                let mut logits = [0.0; ROWS];
                let (by, odd) = (scoring.scale * query.step, ((1 << bits) - 1) as f32 * query.total);
                let base = scoring.scale * centre;
                for ((logit, &sum), factor) in logits.iter_mut().zip(&sums[i * ROWS..]).zip(&factors) {
                    *logit = base + by * factor * (2.0 * sum as f32 - odd);
                }
                // SAFETY: passed on.
                unsafe {
                    if scoring.softcap > 0.0 {
                        cap::<S>(&mut logits, scoring.softcap);
                    }
                    logits[..from].fill(f32::NEG_INFINITY);
                    logits[to..].fill(f32::NEG_INFINITY);
                    let at = (first + i) * count + of_pages.start - pages.start;
                    let skipped = of_pages.start - start / scoring.page_size;
                    let out = &mut scores[at..][..of_pages.len()];
                    match scoring.page_size {
                        1 => out.copy_from_slice(&logits[skipped..][..of_pages.len()]),
                        2 => page_masses::<S, 2>(&logits, skipped, out),
                        4 => page_masses::<S, 4>(&logits, skipped, out),
                        8 => page_masses::<S, 8>(&logits, skipped, out),
                        16 => page_masses::<S, 16>(&logits, skipped, out),
                        32 => page_masses::<S, 32>(&logits, skipped, out),
                        64 => page_masses::<S, 64>(&logits, skipped, out),
                        _ => page_masses::<S, 128>(&logits, skipped, out),
                    }
                }
            }
        }
    }
}

/// Products of queries with a block's centre.
#[inline(always)]
fn centre_products<E: Element>(
    layout: BlockLayout,
    block: &[u8],
    queries: &[Prepared<'_>; MOST_QUERIES],
) -> [f32; MOST_QUERIES] {
    // In eight lanes, whatever the instruction set.
    let (mut lanes, mut part) = ([[0.0f32; 8]; MOST_QUERIES], [0.0; PART]);
    for at in (0..layout.head_size).step_by(PART) {
        let count = layout.centre::<E>(block, at, &mut part);
        let (centres, left) = part[..count].as_chunks::<8>();
        for (lanes, query) in lanes.iter_mut().zip(queries) {
            let (eights, rest) = query.plain[at..][..count].as_chunks::<8>();
            for (query, centre) in eights.iter().zip(centres) {
                for i in 0..8 {
                    lanes[i] += query[i] * centre[i];
                }
            }
            for (lane, (query, centre)) in lanes.iter_mut().zip(rest.iter().zip(left)) {
                *lane += query * centre;
            }
        }
    }
    lanes.map(|l| ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7])))
}

/// `cap tanh(x / cap)` of every logit.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn cap<S: Simd>(logits: &mut BlockRows, cap: f32) {
    let mut powers = *logits;
    powers.iter_mut().for_each(|x| *x = -2.0 * (*x / cap).abs());
    // SAFETY: passed on.
    unsafe { exp_all::<S>(&mut powers) };
    for (logit, power) in logits.iter_mut().zip(&powers) {
        // tanh |x| = (1 - e^(-2|x|)) / (1 + e^(-2|x|)); near 0, where that cancels, tanh x is x (1 - x^2 / 3).
        let x = *logit / cap;
        let near = x * (1.0 - x * x * (1.0 / 3.0));
        let far = ((1.0 - power) / (1.0 + power)).copysign(x);
        *logit = cap * if x.abs() < 0.02 { near } else { far };
    }
}

/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn exp_all<S: Simd>(values: &mut BlockRows) {
    for at in (0..ROWS).step_by(S::LANES) {
        // SAFETY: vectors have 4, 8 or 16 lanes, which divide 128; the instruction set is the caller's promise.
        unsafe {
            let p = values.as_mut_ptr().add(at);
            S::store(p, exp::<S>(S::load(p)));
        }
    }
}

/// The log masses of the block's pages of P tokens, from page `first` of the block on. NaN where a logit is, or where
/// the largest is infinite.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn page_masses<S: Simd, const P: usize>(logits: &BlockRows, first: usize, out: &mut [f32]) {
    let (mut top, mut sums, mut weights) = ([0.0; ROWS], [0.0; ROWS], [0.0; ROWS]);
    fold::<P>(logits, &mut top, |a, b| if a > b { a } else { b });
    // SAFETY: vectors have 4, 8 or 16 lanes, which divide 128; the instruction set is the caller's promise.
    unsafe {
        if P >= S::LANES {
            for at in (0..ROWS).step_by(S::LANES) {
                let weight = exp::<S>(S::sub(S::load(logits.as_ptr().add(at)), S::splat(top[at / P])));
                S::store(weights.as_mut_ptr().add(at), weight);
            }
        } else {
            weights = *logits;
            for (page, &top) in weights.as_chunks_mut::<P>().0.iter_mut().zip(&top) {
                page.iter_mut().for_each(|x| *x -= top);
            }
            exp_all::<S>(&mut weights);
        }
    }
    fold::<P>(&weights, &mut sums, |a, b| a + b);
    for (top, &sum) in top[..ROWS / P].iter_mut().zip(&sums) {
        *top += ln(sum);
    }
    out.copy_from_slice(&top[first..][..out.len()]);
}

/// Each page's numbers folded into one, by halves that lie side by side; the first `128 / P` are the pages'.
#[inline(always)]
fn fold<const P: usize>(values: &BlockRows, out: &mut BlockRows, both: impl Fn(f32, f32) -> f32 + Copy) {
    let (mut from, mut to) = (*values, [0.0; ROWS]);
    let mut left = ROWS;
    while left > ROWS / P {
        for (to, pair) in to[..left / 2].iter_mut().zip(from[..left].as_chunks::<2>().0) {
            *to = both(pair[0], pair[1]);
        }
        std::mem::swap(&mut from, &mut to);
        left /= 2;
    }
    out[..left].copy_from_slice(&from[..left]);
}
