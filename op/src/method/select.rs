//! Page selection: the best pages within a budget, by the scores that a selector gives them.

use std::ops::Range;

use super::element::Element;
use super::group_score::group_scores;
use crate::selector::{PageSelector, Scoring};
use crate::simd::Isa;

/// Scratch of one selection, kept between steps to save allocations.
#[derive(Default)]
pub struct SelectScratch {
    prepared: Vec<f32>,
    heads: Vec<f32>,
    pub scores: Vec<f32>,
    pub order: Vec<u64>,
}

/// Scores the candidate pages of one KV head for one query group into `scratch.scores`.
///
/// `query`: `[g, D]` after RoPE, not scaled; `state`: the KV head's, as the selector lays it out.
fn score_pages<E: Element, P: PageSelector>(
    isa: Isa,
    scoring: &Scoring,
    query: &[f32],
    state: &[P::State<E>],
    candidates: Range<usize>,
    scratch: &mut SelectScratch,
) {
    let count = candidates.len();
    P::prepare(scoring, query, &mut scratch.prepared);
    scratch.heads.resize(query.len() / scoring.head_size * count, 0.0);
    P::score_heads::<E>(
        isa,
        scoring,
        &scratch.prepared,
        state,
        candidates.clone(),
        &mut scratch.heads,
    );
    scratch.scores.resize(count, 0.0);
    group_scores::<P>(isa, scoring, &mut scratch.heads, candidates, &mut scratch.scores);
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
pub fn select_pages<E: Element, P: PageSelector>(
    isa: Isa,
    scoring: &Scoring,
    query: &[f32],
    state: &[P::State<E>],
    candidates: Range<usize>,
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
    score_pages::<E, P>(isa, scoring, query, state, candidates.clone(), scratch);
    choose_pages(&scratch.scores, candidates, sink, budget, &mut scratch.order, selected);
}

/// [`select_pages`] from the candidates' scores; `order` is scratch.
pub fn choose_pages(
    scores: &[f32],
    candidates: Range<usize>,
    sink: usize,
    budget: usize,
    order: &mut Vec<u64>,
    selected: &mut Vec<u32>,
) {
    let newest = candidates.end - 1;
    selected.clear();
    order.clear();
    for (page, &score) in candidates.zip(scores) {
        if is_forced(page, newest, sink) {
            selected.push(page as u32);
        } else {
            order.push(rank(score, page));
        }
    }
    let free = budget.saturating_sub(selected.len());
    if free < order.len() && free > 0 {
        order.select_nth_unstable(free - 1);
    }
    selected.extend(order.iter().take(free).map(|&rank| rank as u32));
    selected.sort_unstable();
}

/// A number that sorts pages: higher scores first, of equal ones the lower page.
fn rank(score: f32, page: usize) -> u64 {
    // The bits of a float as an integer of the same order (as in `f32::total_cmp`), then turned around.
    let bits = score.to_bits() as i32;
    let ordered = bits ^ (((bits >> 31) as u32) >> 1) as i32;
    let descending = !(ordered as u32 ^ 0x8000_0000);
    u64::from(descending) << 32 | page as u64
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

/// pi-Attention's pattern (arXiv 2511.10696) in pages: the first `sink`, the most recent ones, and between them those
/// whose number is a multiple of pi, `budget` in all at most.
///
/// What the sinks leave of the budget goes to the most recent pages by half, rounded up. pi is the least number whose
/// multiples fit the other half.
pub fn periodic_pages(candidates: Range<usize>, sink: usize, budget: usize, selected: &mut Vec<u32>) {
    selected.clear();
    let newest = candidates.end - 1;
    let sinks = candidates.clone().filter(|&p| p < sink && p != newest).count();
    let left = budget.saturating_sub(sinks).max(1);
    let recent = left.div_ceil(2);
    let behind_sinks = candidates.start.max(sink).min(candidates.end);
    let recent_from = candidates.end.saturating_sub(recent).max(behind_sinks);
    let period = period(behind_sinks..recent_from, left - recent);
    let between = |p: usize| period.is_some_and(|period| p.is_multiple_of(period));
    selected.extend(
        candidates
            .filter(|&p| p < sink || p >= recent_from || between(p))
            .map(|p| p as u32),
    );
}

/// The least number of which `pages` has `most` multiples at most; none where it may have none.
fn period(pages: Range<usize>, most: usize) -> Option<usize> {
    let multiples = |period: usize| pages.end.div_ceil(period) - pages.start.div_ceil(period);
    // Any number of pages in a row has at least as many multiples as it holds whole periods.
    let least = pages.len() / (most + 1) + 1;
    (least..)
        .take_while(|_| most > 0)
        .find(|&period| multiples(period) <= most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selector::{Bounds, GroupScore, Moments, Selector, SignedMoments, StateElement};

    const D: usize = 2;

    /// `for_selector!` for those with two vectors a page, whose state these tests write by hand.
    macro_rules! for_page_vectors {
        ($id:expr, $selector:ident => $body:expr) => {
            match $id {
                Selector::Bounds => {
                    type $selector = Bounds;
                    $body
                }
                Selector::Moments => {
                    type $selector = Moments;
                    $body
                }
                Selector::SignedMoments => {
                    type $selector = SignedMoments;
                    $body
                }
                other => unreachable!("{other} has no page summaries"),
            }
        };
    }

    fn with_page_vectors() -> impl Iterator<Item = Selector> {
        let all = Selector::ALL.iter().copied();
        all.filter(|s| s.state_element() == StateElement::Cache)
    }

    fn scoring(group_score: GroupScore) -> Scoring {
        Scoring {
            group_score,
            scale: 0.5,
            lambda: 2.0,
            correlation: 0.5,
            page_size: 8,
            head_size: D,
            len: 0,
            softcap: 0.0,
            local_window: None,
            sketch_bits: 2,
        }
    }

    fn pick(selector: Selector, s: &Scoring, query: &[f32], summary: &[f32], sink: usize, budget: usize) -> Vec<u32> {
        let mut out = Vec::new();
        let pages = summary.len() / (2 * D);
        let mut scratch = SelectScratch::default();
        let s = &Scoring {
            len: pages * s.page_size,
            ..*s
        };
        for_page_vectors!(selector, P => select_pages::<f32, P>(
            Isa::detect(), s, query, summary, 0..pages, sink, budget, &mut scratch, &mut out,
        ));
        out
    }

    /// kmin = kmax = the given key.
    fn flat(keys: &[[f32; 2]]) -> Vec<f32> {
        keys.iter().flat_map(|k| [k[0], k[1], k[0], k[1]]).collect()
    }

    #[test]
    fn best_pages_with_forced_ones_and_ties_to_the_lower_index() {
        let s = scoring(GroupScore::Max);
        let pick = |s, query, summary, sink, budget| pick(Selector::Bounds, s, query, summary, sink, budget);
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
    }

    /// A page whose score is NaN is read before any other, whatever the selector and the number of heads, and the
    /// others keep their order.
    #[test]
    fn pages_that_cannot_be_scored_come_first() {
        for selector in with_page_vectors() {
            for group_score in [GroupScore::Max, GroupScore::Softmax] {
                let s = scoring(group_score);
                for broken in [f32::NAN, f32::INFINITY] {
                    // Infinite times 0 is NaN too.
                    let mut summary = flat(&[[0., 0.], [5., 0.], [-9., broken], [1., 0.], [4., 0.], [0., 0.]]);
                    // No spread.
                    if selector != Selector::Bounds {
                        summary.chunks_exact_mut(4).for_each(|page| page[2..].fill(0.0));
                    }
                    let what = format!("{selector} {group_score} {broken}");
                    for query in [&[1.0, 0.0][..], &[1.0, 0.0, 0.5, 0.0]] {
                        assert_eq!(pick(selector, &s, query, &summary, 1, 3), [0, 2, 5], "{what}");
                        assert_eq!(pick(selector, &s, query, &summary, 1, 4), [0, 1, 2, 5], "{what}");
                        assert_eq!(pick(selector, &s, query, &summary, 1, 5), [0, 1, 2, 4, 5], "{what}");
                    }
                }
            }
        }
    }

    #[test]
    fn ranks_sort_by_score_then_page() {
        let scores = [f32::INFINITY, 3.0, 1e-40, 0.0, -1e-40, -2.5, f32::NEG_INFINITY];
        let ranks: Vec<u64> = scores.iter().flat_map(|&s| [rank(s, 3), rank(s, 70_000)]).collect();
        assert!(ranks.is_sorted() && ranks.windows(2).all(|w| w[0] != w[1]), "{ranks:?}");
    }

    /// Vectors of every length, tiles that are not full, and equal pages anywhere among them.
    #[test]
    fn every_instruction_set_scores_alike_and_equal_pages_equally() {
        for d in [2, 8, 24, 40, 64, 128] {
            for (heads, pages) in [(1, 1), (2, 7), (4, 33), (7, 18)] {
                let number = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 500.0 - 1.0;
                let mut summary: Vec<f32> = (0..pages * 2 * d).map(number).collect();
                let first: Vec<f32> = summary[..2 * d].to_vec();
                summary[(pages - 1) * 2 * d..].copy_from_slice(&first);
                let query: Vec<f32> = (0..heads * d).map(|i| number(i + 5)).collect();
                for selector in with_page_vectors() {
                    for group_score in [GroupScore::Max, GroupScore::Softmax] {
                        let s = Scoring {
                            head_size: d,
                            len: pages * 8,
                            ..scoring(group_score)
                        };
                        let of = |isa: Isa| {
                            let (mut prepared, mut of_heads) = (Vec::new(), vec![f32::NAN; heads * pages]);
                            let mut scores = vec![f32::NAN; pages];
                            for_page_vectors!(selector, P => {
                                P::prepare(&s, &query, &mut prepared);
                                P::score_heads::<f32>(isa, &s, &prepared, &summary, 0..pages, &mut of_heads);
                                group_scores::<P>(isa, &s, &mut of_heads, 0..pages, &mut scores);
                            });
                            scores
                        };
                        let want = of(Isa::Portable);
                        for &isa in Isa::all() {
                            let got = of(isa);
                            assert_eq!(got[0], got[pages - 1], "{isa:?} {selector} {group_score} {d}");
                            for (g, w) in got.iter().zip(&want) {
                                assert!(
                                    (g - w).abs() <= 1e-4 * w.abs().max(1.0),
                                    "{isa:?} {selector} {group_score} {d}: {g} {w}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn group_scores_differ_where_one_head_is_loud() {
        // Head 0 is loud and prefers page 1 to 2 by a little; head 1 is quiet and wants page 2 for certain.
        let summary = flat(&[[0., 0.], [20., 0.], [19.9, 3.], [0., 0.]]);
        let query = [4.0, 0.0, 0.0, 6.0];
        assert_eq!(
            pick(Selector::Bounds, &scoring(GroupScore::Max), &query, &summary, 1, 3),
            [0, 1, 3]
        );
        assert_eq!(
            pick(Selector::Bounds, &scoring(GroupScore::Softmax), &query, &summary, 1, 3),
            [0, 2, 3]
        );
    }

    #[test]
    fn moments_count_spread() {
        let summary = [0., 0., 0., 0., 1., 0., 0., 0., 0.9, 0., 0.5, 0., 0., 0., 0., 0.];
        for g in [GroupScore::Max, GroupScore::Softmax] {
            assert_eq!(
                pick(Selector::Moments, &scoring(g), &[1.0, 0.0], &summary, 1, 3),
                [0, 2, 3]
            );
        }
    }

    #[test]
    fn signed_deviations_add_up_or_cancel_along_the_query() {
        // Two pages of equal means and deviations; in page 1 the elements move together, in page 2 against each other.
        let summary = [0., 0., 0., 0., 1., 1., 0.5, 0.5, 1., 1., 0.5, -0.5, 0., 0., 0., 0.];
        let s = scoring(GroupScore::Max);
        let pick = |s, query, summary, sink, budget| pick(Selector::SignedMoments, s, query, summary, sink, budget);
        assert_eq!(pick(&s, &[1.0, 1.0], &summary, 1, 3), [0, 1, 3]);
        assert_eq!(pick(&s, &[1.0, -1.0], &summary, 1, 3), [0, 2, 3]);
        // Without correlation they tie, and the lower index wins.
        let s = Scoring { correlation: 0.0, ..s };
        assert_eq!(pick(&s, &[1.0, -1.0], &summary, 1, 3), [0, 1, 3]);
        // The whole formula, by hand: mean 1, deviation 0.5, correlation 0.5, lambda 2, scale 0.5, 8 tokens.
        let s = Scoring {
            len: 32,
            ..scoring(GroupScore::Max)
        };
        let mut scratch = SelectScratch::default();
        score_pages::<f32, SignedMoments>(Isa::detect(), &s, &[1.0, 1.0], &summary, 1..3, &mut scratch);
        let score = |along: f32| 0.5 * (2.0 + 2.0 * (0.5 * along * along + 0.5 * 0.5f32).sqrt()) + 8f32.ln();
        for (got, along) in scratch.scores.iter().zip([1.0, 0.0]) {
            assert!((got - score(along)).abs() < 1e-6, "{got}");
        }
    }

    #[test]
    fn periodic_takes_sinks_the_newest_and_multiples_between() {
        let mut out = Vec::new();
        let mut pages = |candidates, sink, budget| {
            periodic_pages(candidates, sink, budget, &mut out);
            out.clone()
        };
        // Half of four beside the sink: two recent ones; of 1..18 two multiples at most: those of 6 are 6 and 12.
        assert_eq!(pages(0..20, 1, 5), [0, 6, 12, 18, 19]);
        // An odd rest is the recent ones': two of three. One multiple: that of 9 (and 18 is recent).
        assert_eq!(pages(0..20, 1, 4), [0, 9, 18, 19]);
        assert_eq!(pages(0..20, 1, 2), [0, 19]);
        assert_eq!(pages(0..20, 1, 1), [0, 19]);
        assert_eq!(pages(0..20, 0, 1), [19]);
        assert_eq!(pages(0..20, 1, 20), (0..20).collect::<Vec<u32>>());
        // Multiples are of page numbers, not counted from the window's first page.
        assert_eq!(pages(10..30, 1, 6), [12, 18, 24, 27, 28, 29]);
        assert_eq!(pages(0..2, 4, 1), [0, 1]);
        assert_eq!(pages(0..1, 1, 3), [0]);
    }

    /// Never more than the budget, never a smaller period that would fit.
    #[test]
    fn periods_are_the_least_that_fit() {
        for start in [0, 1, 7, 100, 1000] {
            for len in [0, 1, 2, 13, 64, 999] {
                for most in 0..20 {
                    let pages = start..start + len;
                    let count = |period: usize| pages.clone().filter(|p| p % period == 0).count();
                    let want = (1..).take_while(|_| most > 0).find(|&period| count(period) <= most);
                    assert_eq!(period(pages.clone(), most), want, "{pages:?} {most}");
                }
            }
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
