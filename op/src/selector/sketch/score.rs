//! Log masses of pages: the logarithm of the sum of e^(estimated logit) over the tokens that the newest query sees.

use std::ops::Range;

use super::block::{BlockLayout, GROUPS, PART, ROWS};
use super::query::{Prepared, of_head, prepared_len};
use crate::method::element::Element;
use crate::selector::Scoring;
use crate::simd::{CodeIsa, Codes, GROUP, Isa, MOST_QUERIES, Simd, code_sums, dispatched, exp, exp_of_estimate, ln};

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

/// `$body` with the constant `$size`, a page size from 2 on.
macro_rules! by_page_size {
    ($page_size:expr, $size:ident => $body:expr) => {
        match $page_size {
            2 => by_page_size!(@ $size = 2, $body),
            4 => by_page_size!(@ $size = 4, $body),
            8 => by_page_size!(@ $size = 8, $body),
            16 => by_page_size!(@ $size = 16, $body),
            32 => by_page_size!(@ $size = 32, $body),
            64 => by_page_size!(@ $size = 64, $body),
            _ => by_page_size!(@ $size = 128, $body),
        }
    };
    (@ $size:ident = $value:literal, $body:expr) => {{
        const $size: usize = $value;
        $body
    }};
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
    // Up to MOST_QUERIES from head `first` on, then the last one again.
    let of_heads = |first: usize| -> [Prepared; MOST_QUERIES] {
        std::array::from_fn(|i| of_head(prepared, (first + i).min(heads - 1), d, bits))
    };
    if heads == 0 {
        return;
    }
    let mut queries = of_heads(0);
    let mut sums = [0; MOST_QUERIES * ROWS];
    let mut sums_of_pages = [PageSums {
        tops: [0.0; ROWS],
        sums: [0.0; ROWS],
    }; MOST_QUERIES];
    for block in first_row / ROWS..end_row.div_ceil(ROWS) {
        let bytes = &state[block * layout.bytes..][..layout.bytes];
        let start = block * ROWS;
        for line in (0..layout.bytes).step_by(64) {
            // SAFETY: a hint, for any address.
            unsafe { S::prefetch(bytes.as_ptr().wrapping_add(layout.bytes + line)) };
        }
        let (from, to) = (first_row.max(start) - start, end_row.min(start + ROWS) - start);
        let of_pages = pages.start.max(start / scoring.page_size)..pages.end.min((start + ROWS) / scoring.page_size);
        let skipped = of_pages.start - start / scoring.page_size;
        let mut factors = [0.0; ROWS];
        layout.factors_of_slots(bytes, &mut factors);
        for first in (0..heads).step_by(MOST_QUERIES) {
            let most = MOST_QUERIES.min(heads - first);
            if heads > MOST_QUERIES {
                queries = of_heads(first);
            }
            code_sums(
                codes,
                Codes {
                    bytes: &bytes[..ROWS * layout.width],
                    width: layout.width,
                    bits,
                },
                &queries.map(|q| q.quantised)[..most],
                &mut sums,
                ROWS,
            );
            let centres = match block {
                0 => [0.0; MOST_QUERIES],
                // SAFETY: passed on.
                _ => unsafe { centre_products::<S, E>(layout, bytes, &queries) },
            };
            for (i, (query, centre)) in queries.iter().zip(centres).take(most).enumerate() {
                let (by, odd) = (scoring.scale * query.step, ((1 << bits) - 1) as f32 * query.total);
                // SAFETY: passed on; sums have 128 rows a head.
                unsafe {
                    let mut logits = logits::<S>(&sums[i * ROWS..][..ROWS], &factors, by, odd, scoring.scale * centre);
                    if scoring.softcap > 0.0 {
                        cap::<S>(&mut logits, scoring.softcap);
                    }
                    if from > 0 || to < ROWS {
                        for (slot, logit) in logits.iter_mut().enumerate() {
                            if !(from..to).contains(&row(slot)) {
                                *logit = f32::NEG_INFINITY;
                            }
                        }
                    }
                    if scoring.page_size == 1 {
                        let at = (first + i) * count + of_pages.start - pages.start;
                        let mut all = [0.0; ROWS];
                        interleave::<GROUPS>(&logits, &mut all);
                        copy_pages::<ROWS>(&all, skipped, &mut scores[at..][..of_pages.len()]);
                    } else {
                        by_page_size!(scoring.page_size, P => page_sums::<S, P>(&logits, &mut sums_of_pages[i]));
                    }
                }
            }
            if scoring.page_size == 1 {
                continue;
            }
            // All heads' logarithms side by side: each alone is a long chain of operations.
            for (i, sums) in sums_of_pages[..most].iter().enumerate() {
                let at = (first + i) * count + of_pages.start - pages.start;
                let out = &mut scores[at..][..of_pages.len()];
                // SAFETY: passed on.
                unsafe { by_page_size!(scoring.page_size, P => page_masses::<S, P>(sums, skipped, out)) };
            }
        }
    }
}

/// Products of queries with a block's centre.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn centre_products<S: Simd, E: Element>(
    layout: BlockLayout,
    block: &[u8],
    queries: &[Prepared<'_>; MOST_QUERIES],
) -> [f32; MOST_QUERIES] {
    let d = layout.head_size;
    if d.is_multiple_of(S::LANES) {
        let centre = layout.centre_bytes::<E>(block).as_ptr().cast::<E>();
        // SAFETY: passed on.
        let mut sums = [unsafe { S::splat(0.0) }; MOST_QUERIES];
        for at in (0..d).step_by(S::LANES) {
            // SAFETY: the centre and every query have `d` elements; vectors are loaded from any address.
            unsafe {
                let centre = E::load::<S>(centre.add(at));
                for (sum, query) in sums.iter_mut().zip(queries) {
                    *sum = S::fma(S::load(query.plain[at..].as_ptr()), centre, *sum);
                }
            }
        }
        // SAFETY: passed on.
        return unsafe { S::sums(sums) };
    }
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

/// A head's pages of a block: the largest logit of each, and the sum of e^(logit - largest) over its tokens; the first
/// number of a page's lanes, in parts as [`interleave`] takes them.
#[derive(Clone, Copy)]
struct PageSums {
    tops: BlockRows,
    sums: BlockRows,
}

/// The sums of the block's pages of P tokens.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn page_sums<S: Simd, const P: usize>(logits: &BlockRows, pages: &mut PageSums) {
    // A page's rows lie in one lane of so many groups, or in all groups of so many lanes.
    let (groups, lanes) = (P.min(GROUPS), P.div_ceil(GROUPS));
    for part in 0..GROUPS / groups {
        let at = part * groups * GROUP;
        let tops = &mut pages.tops[part * GROUP..][..GROUP];
        let sums = &mut pages.sums[part * GROUP..][..GROUP];
        // SAFETY: vectors have 4, 8 or 16 lanes, which divide 16; the instruction set is the caller's promise.
        unsafe {
            for lane in (0..GROUP).step_by(S::LANES) {
                let p = logits.as_ptr().add(at + lane);
                let mut most = S::load(p);
                for group in 1..groups {
                    most = S::max(S::load(p.add(group * GROUP)), most);
                }
                S::store(tops.as_mut_ptr().add(lane), most);
            }
            if lanes > 1 {
                for page in tops.chunks_exact_mut(lanes) {
                    let most = page.iter().fold(page[0], |most, &x| if x > most { x } else { most });
                    page.fill(most);
                }
            }
            for lane in (0..GROUP).step_by(S::LANES) {
                let (p, most) = (logits.as_ptr().add(at + lane), S::load(tops.as_ptr().add(lane)));
                let mut total = exp_of_estimate::<S>(S::sub(S::load(p), most));
                for group in 1..groups {
                    total = S::add(total, exp_of_estimate::<S>(S::sub(S::load(p.add(group * GROUP)), most)));
                }
                S::store(sums.as_mut_ptr().add(lane), total);
            }
            if lanes > 1 {
                for page in sums.chunks_exact_mut(lanes) {
                    page[0] = page.iter().sum();
                }
            }
        }
    }
}

/// The log masses of the block's pages of P tokens, from page `first` of the block on. NaN where a logit is, or where
/// the largest is infinite.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn page_masses<S: Simd, const P: usize>(pages: &PageSums, first: usize, out: &mut [f32]) {
    let (parts, lanes) = (GROUPS / P.min(GROUPS), P.div_ceil(GROUPS));
    let mut masses = [0.0; ROWS];
    for at in (0..parts * GROUP).step_by(S::LANES) {
        // SAFETY: vectors have 4, 8 or 16 lanes, which divide 16; the instruction set is the caller's promise.
        unsafe {
            let (most, total) = (
                S::load(pages.tops.as_ptr().add(at)),
                S::load(pages.sums.as_ptr().add(at)),
            );
            S::store(masses.as_mut_ptr().add(at), S::add(most, ln::<S>(total)));
        }
    }
    match (parts, lanes) {
        (1, 1) => copy_pages::<GROUP>(&masses, first, out),
        (1, _) => {
            let mut pages = [0.0; ROWS];
            let firsts = masses[..GROUP].iter().step_by(lanes);
            pages.iter_mut().zip(firsts).for_each(|(to, &mass)| *to = mass);
            out.copy_from_slice(&pages[first..][..out.len()]);
        }
        (2, _) => {
            let mut pages = [0.0; ROWS];
            interleave::<2>(&masses, &mut pages);
            copy_pages::<{ 2 * GROUP }>(&pages, first, out);
        }
        _ => {
            let mut pages = [0.0; ROWS];
            interleave::<4>(&masses, &mut pages);
            copy_pages::<{ 4 * GROUP }>(&pages, first, out);
        }
    }
}

/// Pages of a block of N pages from `first` on, as many as there is room for.
#[inline(always)]
fn copy_pages<const N: usize>(pages: &BlockRows, first: usize, out: &mut [f32]) {
    // A length that the compiler knows is a few vectors, any other a call.
    match (first, <&mut [f32; N]>::try_from(&mut *out)) {
        (0, Ok(out)) => out.copy_from_slice(&pages[..N]),
        _ => out.copy_from_slice(&pages[first..][..out.len()]),
    }
}

/// Lanes of N groups, one lane's numbers side by side.
#[inline(always)]
fn interleave<const N: usize>(groups: &BlockRows, out: &mut BlockRows) {
    for (lane, out) in out.as_chunks_mut::<N>().0.iter_mut().take(GROUP).enumerate() {
        *out = std::array::from_fn(|n| groups[n * GROUP + lane]);
    }
}

/// The row of a block that lies in a slot of its codes.
const fn row(slot: usize) -> usize {
    slot % GROUP * GROUPS + slot / GROUP
}

/// Estimated logits of a block's rows, in the order of their codes: `base + by f (2 sum - odd)`.
///
/// # Safety
/// There are 128 sums, and the machine has the instruction set.
#[inline(always)]
unsafe fn logits<S: Simd>(sums: &[i32], factors: &BlockRows, by: f32, odd: f32, base: f32) -> BlockRows {
    let mut logits = [0.0; ROWS];
    // SAFETY: vectors have 4, 8 or 16 lanes, which divide 128; the rest is the caller's promise.
    unsafe {
        let (by, odd, base, two) = (S::splat(by), S::splat(-odd), S::splat(base), S::splat(2.0));
        for at in (0..ROWS).step_by(S::LANES) {
            let product = S::fma(two, S::load_int(sums.as_ptr().add(at)), odd);
            let factor = S::mul(by, S::load(factors.as_ptr().add(at)));
            S::store(logits.as_mut_ptr().add(at), S::fma(factor, product, base));
        }
    }
    logits
}
