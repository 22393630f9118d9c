//! Page selection: scores from page summaries, and the best pages within a budget.

use std::ops::Range;

use retro_contract::{GroupScore, Selector};

use super::element::Element;
use super::math::{Isa, dispatched, dot, fma};

/// How a step scores its pages.
#[derive(Clone, Copy, Debug)]
pub struct Scoring {
    pub selector: Selector,
    pub group_score: GroupScore,
    /// Softmax scale of the attention.
    pub scale: f32,
    /// Weight of the standard deviation (selectors `moments` and `signed_moments`).
    pub lambda: f32,
    /// Share of the spread along the query that the signed deviations add up to (selector `signed_moments`).
    pub correlation: f32,
    pub page_size: usize,
    /// D.
    pub head_size: usize,
}

/// Scratch of one selection, kept between steps to save allocations.
#[derive(Default)]
pub struct SelectScratch {
    prepared: Vec<f32>,
    widened: Vec<f32>,
    heads: Vec<f32>,
    scores: Vec<f32>,
    order: Vec<u32>,
}

dispatched! {
    /// Scores of every head for the pages `pages`, head-major, into `out` (`g * pages.len()`).
    fn score_heads<E: Element>(scoring: &Scoring, prepared: &[f32], summary: &[E], pages: Range<usize>, widened: &mut [f32], out: &mut [f32]) = score_heads_body
}

#[inline(always)]
fn score_heads_body<const FMA: bool, E: Element>(
    scoring: &Scoring,
    prepared: &[f32],
    summary: &[E],
    pages: Range<usize>,
    widened: &mut [f32],
    out: &mut [f32],
) {
    let d = scoring.head_size;
    let count = pages.len();
    for (p, page) in pages.enumerate() {
        let stored = E::widen(&summary[page * 2 * d..][..2 * d], widened);
        let (first, second) = stored.split_at(d);
        for (h, query) in prepared.chunks_exact(2 * d).enumerate() {
            let (a, b) = query.split_at(d);
            out[h * count + p] = match scoring.selector {
                Selector::Bounds => dot::<FMA>(a, first) + dot::<FMA>(b, second),
                Selector::Moments => {
                    let mut variance = 0.0;
                    for (&q2, &sd) in b.iter().zip(second) {
                        variance = fma::<FMA>(q2 * sd, sd, variance);
                    }
                    dot::<FMA>(a, first) + scoring.lambda * variance.sqrt()
                }
                Selector::SignedMoments => {
                    let mut variance = 0.0;
                    for (&q2, &sd) in b.iter().zip(second) {
                        variance = fma::<FMA>(q2 * sd, sd, variance);
                    }
                    let along = dot::<FMA>(a, second);
                    let rho = scoring.correlation;
                    dot::<FMA>(a, first) + scoring.lambda * (rho * along * along + (1.0 - rho) * variance).sqrt()
                }
            };
        }
    }
}

/// Scores the candidate pages of one KV head for one query group into `scratch.scores`.
///
/// `query`: `g * D` after RoPE, not scaled; `summary`: `[P, 2, D]`; `len`: valid tokens.
/// With `GroupScore::Softmax` the score is the logarithm of the sum over heads of each head's softmax: the same order,
/// without pages far below the best all rounding to 0.
fn score_pages<E: Element>(
    isa: Isa,
    scoring: &Scoring,
    query: &[f32],
    summary: &[E],
    candidates: Range<usize>,
    len: usize,
    scratch: &mut SelectScratch,
) {
    let d = scoring.head_size;
    let group = query.len() / d;
    let count = candidates.len();
    // Two vectors a head that turn its score into products with the page's two stored vectors:
    // bounds: sum_d max(q kmin, q kmax) = min(q, 0) . kmin + max(q, 0) . kmax; moments: q . mean and q^2 . sd^2.
    scratch.prepared.clear();
    for head in query.chunks_exact(d) {
        match scoring.selector {
            Selector::Bounds => {
                scratch.prepared.extend(head.iter().map(|q| q.min(0.0)));
                scratch.prepared.extend(head.iter().map(|q| q.max(0.0)));
            }
            Selector::Moments | Selector::SignedMoments => {
                scratch.prepared.extend_from_slice(head);
                scratch.prepared.extend(head.iter().map(|q| q * q));
            }
        }
    }
    scratch.widened.resize(2 * d, 0.0);
    scratch.heads.clear();
    scratch.heads.resize(group * count, 0.0);
    score_heads(
        isa,
        scoring,
        &scratch.prepared,
        summary,
        candidates.clone(),
        &mut scratch.widened,
        &mut scratch.heads,
    );
    if scoring.selector != Selector::Bounds {
        // The page's log mass: its scaled logit plus the logarithm of how many tokens it holds.
        for head in scratch.heads.chunks_exact_mut(count) {
            for (s, page) in head.iter_mut().zip(candidates.clone()) {
                let tokens = (len - page * scoring.page_size).min(scoring.page_size);
                *s = scoring.scale * *s + (tokens as f32).ln();
            }
        }
    } else if scoring.group_score == GroupScore::Softmax {
        for s in &mut scratch.heads {
            *s *= scoring.scale;
        }
    }
    if scoring.group_score == GroupScore::Softmax {
        for head in scratch.heads.chunks_exact_mut(count) {
            let m = head.iter().fold(f32::NEG_INFINITY, |m, &s| m.max(s));
            let sum: f32 = head.iter().map(|s| (s - m).exp()).sum();
            let lse = m + sum.ln();
            for s in head {
                *s -= lse;
            }
        }
    }
    scratch.scores.clear();
    scratch.scores.extend((0..count).map(|p| {
        let of_heads = || scratch.heads.iter().skip(p).step_by(count).copied();
        let best = of_heads().fold(f32::NEG_INFINITY, f32::max);
        let score = match scoring.group_score {
            GroupScore::Max => best,
            GroupScore::Softmax if best == f32::NEG_INFINITY => best,
            GroupScore::Softmax => best + of_heads().map(|s| (s - best).exp()).sum::<f32>().ln(),
        };
        // A NaN (a broken model) ranks last; adding 0 turns -0 into 0, so that the two tie.
        if score.is_nan() { f32::NEG_INFINITY } else { score + 0.0 }
    }));
}

/// Which pages a step must load whatever their score: the newest and the first `sink`, among the candidates.
fn is_forced(page: usize, newest: usize, sink: usize) -> bool {
    page == newest || page < sink
}

/// The pages that the newest query reads (method.md, step 2), ascending, into `selected`.
///
/// `candidates` are the valid pages that the query's sliding window touches; the last one holds the newest token.
/// `budget` pages in all; forced pages are loaded even if it is smaller. Ties go to the lower page index.
#[expect(
    clippy::too_many_arguments,
    reason = "one call site; a struct would only rename the list"
)]
pub fn select_pages<E: Element>(
    isa: Isa,
    scoring: &Scoring,
    query: &[f32],
    summary: &[E],
    candidates: Range<usize>,
    len: usize,
    sink: usize,
    budget: usize,
    scratch: &mut SelectScratch,
    selected: &mut Vec<u32>,
) {
    selected.clear();
    if budget >= candidates.len() {
        selected.extend(candidates.map(|p| p as u32));
        return;
    }
    let newest = candidates.end - 1;
    let first = candidates.start;
    score_pages(isa, scoring, query, summary, candidates.clone(), len, scratch);
    selected.extend(
        candidates
            .clone()
            .filter(|&p| is_forced(p, newest, sink))
            .map(|p| p as u32),
    );
    let free = budget.saturating_sub(selected.len());
    if free > 0 {
        scratch.order.clear();
        scratch
            .order
            .extend(candidates.filter(|&p| !is_forced(p, newest, sink)).map(|p| p as u32));
        let scores = &scratch.scores;
        let score = |p: u32| scores[p as usize - first];
        if free < scratch.order.len() {
            scratch
                .order
                .select_nth_unstable_by(free - 1, |&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
            scratch.order.truncate(free);
        }
        selected.extend_from_slice(&scratch.order);
    }
    selected.sort_unstable();
}

/// StreamingLLM's pages: the first `sink` and the most recent ones, `budget` in all.
pub fn streaming_pages(candidates: Range<usize>, sink: usize, budget: usize, selected: &mut Vec<u32>) {
    selected.clear();
    let newest = candidates.end - 1;
    let forced = candidates.clone().filter(|&p| is_forced(p, newest, sink)).count();
    // The newest page is one of the recent ones.
    let sinks = forced - usize::from(newest >= sink);
    let recent = budget.saturating_sub(sinks).max(1);
    let recent_from = candidates.end.saturating_sub(recent);
    selected.extend(candidates.filter(|&p| p >= recent_from || p < sink).map(|p| p as u32));
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: usize = 2;

    fn scoring(selector: Selector, group_score: GroupScore) -> Scoring {
        Scoring {
            selector,
            group_score,
            scale: 0.5,
            lambda: 2.0,
            correlation: 0.5,
            page_size: 8,
            head_size: D,
        }
    }

    fn pick(s: &Scoring, query: &[f32], summary: &[f32], sink: usize, budget: usize) -> Vec<u32> {
        let mut out = Vec::new();
        let pages = summary.len() / (2 * D);
        let mut scratch = SelectScratch::default();
        let args = (0..pages, pages * s.page_size, sink, budget);
        select_pages(
            Isa::detect(),
            s,
            query,
            summary,
            args.0,
            args.1,
            args.2,
            args.3,
            &mut scratch,
            &mut out,
        );
        out
    }

    /// kmin = kmax = the given key.
    fn flat(keys: &[[f32; 2]]) -> Vec<f32> {
        keys.iter().flat_map(|k| [k[0], k[1], k[0], k[1]]).collect()
    }

    #[test]
    fn best_pages_with_forced_ones_and_ties_to_the_lower_index() {
        let s = scoring(Selector::Bounds, GroupScore::Max);
        let summary = flat(&[[0., 0.], [1., 0.], [3., 0.], [3., 0.], [2., 0.], [0., 0.]]);
        assert_eq!(pick(&s, &[1.0, 0.0], &summary, 1, 3), [0, 2, 5]);
        assert_eq!(pick(&s, &[1.0, 0.0], &summary, 1, 4), [0, 2, 3, 5]);
        assert_eq!(pick(&s, &[1.0, 0.0], &summary, 0, 2), [2, 5]);
        assert_eq!(
            pick(&s, &[1.0, 0.0], &summary, 2, 1),
            [0, 1, 5],
            "forced pages pass a smaller budget"
        );
        assert_eq!(pick(&s, &[1.0, 0.0], &summary, 1, 9), [0, 1, 2, 3, 4, 5]);
        // Every score is 0, some of them -0.
        let zero = flat(&[[0., 0.], [-0., 0.], [0., -0.], [0., 0.]]);
        assert_eq!(pick(&s, &[-1.0, 1.0], &zero, 0, 3), [0, 1, 3]);
        // A NaN ranks last instead of winning.
        let nan = flat(&[[0., 0.], [f32::NAN, 0.], [-9., 0.], [0., 0.]]);
        assert_eq!(pick(&s, &[1.0, 0.0], &nan, 1, 3), [0, 2, 3]);
    }

    #[test]
    fn group_scores_differ_where_one_head_is_loud() {
        // Head 0 is loud and prefers page 1 to 2 by a little; head 1 is quiet and wants page 2 for certain.
        let summary = flat(&[[0., 0.], [20., 0.], [19.9, 3.], [0., 0.]]);
        let query = [4.0, 0.0, 0.0, 6.0];
        assert_eq!(
            pick(&scoring(Selector::Bounds, GroupScore::Max), &query, &summary, 1, 3),
            [0, 1, 3]
        );
        assert_eq!(
            pick(&scoring(Selector::Bounds, GroupScore::Softmax), &query, &summary, 1, 3),
            [0, 2, 3]
        );
    }

    #[test]
    fn moments_count_spread() {
        let summary = [0., 0., 0., 0., 1., 0., 0., 0., 0.9, 0., 0.5, 0., 0., 0., 0., 0.];
        for g in [GroupScore::Max, GroupScore::Softmax] {
            assert_eq!(
                pick(&scoring(Selector::Moments, g), &[1.0, 0.0], &summary, 1, 3),
                [0, 2, 3]
            );
        }
    }

    #[test]
    fn signed_deviations_add_up_or_cancel_along_the_query() {
        // Two pages of equal means and deviations; in page 1 the elements move together, in page 2 against each other.
        let summary = [0., 0., 0., 0., 1., 1., 0.5, 0.5, 1., 1., 0.5, -0.5, 0., 0., 0., 0.];
        let s = scoring(Selector::SignedMoments, GroupScore::Max);
        assert_eq!(pick(&s, &[1.0, 1.0], &summary, 1, 3), [0, 1, 3]);
        assert_eq!(pick(&s, &[1.0, -1.0], &summary, 1, 3), [0, 2, 3]);
        // Without correlation they tie, and the lower index wins.
        let s = Scoring { correlation: 0.0, ..s };
        assert_eq!(pick(&s, &[1.0, -1.0], &summary, 1, 3), [0, 1, 3]);
        // The whole formula, by hand: mean 1, deviation 0.5, correlation 0.5, lambda 2, scale 0.5, 8 tokens.
        let s = scoring(Selector::SignedMoments, GroupScore::Max);
        let mut scratch = SelectScratch::default();
        score_pages(Isa::detect(), &s, &[1.0, 1.0], &summary, 1..3, 32, &mut scratch);
        let score = |along: f32| 0.5 * (2.0 + 2.0 * (0.5 * along * along + 0.5 * 0.5f32).sqrt()) + 8f32.ln();
        for (got, along) in scratch.scores.iter().zip([1.0, 0.0]) {
            assert!((got - score(along)).abs() < 1e-6, "{got}");
        }
    }

    #[test]
    fn streaming_takes_sinks_and_the_newest() {
        let mut out = Vec::new();
        streaming_pages(0..10, 1, 4, &mut out);
        assert_eq!(out, [0, 7, 8, 9]);
        streaming_pages(0..10, 2, 1, &mut out);
        assert_eq!(out, [0, 1, 9]);
        streaming_pages(4..10, 1, 3, &mut out);
        assert_eq!(out, [7, 8, 9]);
        streaming_pages(0..1, 1, 3, &mut out);
        assert_eq!(out, [0]);
    }
}
