//! Which pages a step takes of many, against a sort of their scores.

use retro_contract::{GroupScore, Selector, budget_pages};
use retro_tests::{
    attrs::Attrs,
    golden::Rows,
    host,
    layer::{Binding, KEY, Layer, STEPS, SUMMARY, State, VALUE},
    random::Random,
    tensor::{Dtype, Tens},
};

use crate::drive::{self, selected};

const BUDGET: f32 = 0.03;
const MIN_PAGES: usize = 3;

/// Page bounds in whole multiples of `1 / parts`: the fewer parts, the more scores tie.
fn bounds(random: &mut Random, parts: f32, pages: usize, size: usize) -> Vec<f32> {
    let row = |random: &mut Random| -> Vec<f32> {
        let numbers = random.uniform(size, -1.0, 1.0);
        numbers.iter().map(|x| (x * parts).round() / parts).collect()
    };
    (0..pages)
        .flat_map(|_| {
            let (a, b) = (row(random), row(random));
            let least = a.iter().zip(&b).map(|(a, b)| a.min(*b));
            let most = a.iter().zip(&b).map(|(a, b)| a.max(*b));
            least.chain(most).collect::<Vec<_>>()
        })
        .collect()
}

/// One step over a cache of zeros whose page bounds are chosen; scores of bounds that are multiples of 1/64 are exact in
/// every dtype.
struct Choice {
    dtype: Dtype,
    page: usize,
    /// That the sequence has, and that there is room for.
    pages: usize,
    capacity: usize,
    parts: f32,
    group_score: GroupScore,
    /// Tokens that a query sees; -1: all.
    local_window_size: i64,
    /// Every so many-th page has infinite bounds, and so no score; 0: none.
    broken: usize,
}

impl Choice {
    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;
    const SIZE: usize = 32;

    fn new(dtype: Dtype, page: usize, pages: usize, parts: f32) -> Self {
        Self {
            dtype,
            page,
            pages,
            capacity: pages,
            parts,
            group_score: GroupScore::Max,
            local_window_size: -1,
            broken: 0,
        }
    }

    fn summaries(&self, random: &mut Random) -> Vec<f32> {
        let mut summaries = bounds(random, self.parts, Self::KV_HEADS * self.capacity, Self::SIZE);
        if self.broken > 0 {
            let pages = summaries.chunks_mut(2 * Self::SIZE).enumerate();
            let broken = pages.filter(|(page, _)| page % self.broken == self.broken / 2);
            broken.for_each(|(_, page)| (page[3], page[Self::SIZE + 3]) = (f32::NEG_INFINITY, f32::INFINITY));
        }
        summaries
    }

    /// The pages that the step takes of each KV head, and the group's scores of all pages.
    fn run(&self) -> Vec<(Vec<usize>, Vec<f32>)> {
        let (heads, kv_heads, size) = (Self::HEADS, Self::KV_HEADS, Self::SIZE);
        let attrs = Attrs {
            page: self.page,
            window: 1,
            group_score: self.group_score,
            local_window_size: self.local_window_size,
            ..Attrs::new(heads, kv_heads, size).budget(BUDGET, MIN_PAGES)
        };
        let (length, room) = (self.pages * self.page, self.capacity * self.page);
        let mut random = Random::new(11);
        let mut state = State::new(&attrs, self.dtype, 1, room);
        let summaries = self.summaries(&mut random);
        let filled = |numbers: &[f32], like: &Tens| {
            let mut tensor = Tens::poisoned(like.dtype(), like.shape());
            tensor.write(0, numbers);
            tensor
        };
        for slot in [KEY, VALUE] {
            state.tensors[slot] = filled(&vec![0.0; kv_heads * room * size], &state.tensors[slot]);
        }
        state.tensors[SUMMARY] = filled(&summaries, &state.tensors[SUMMARY]);
        state.tensors[STEPS].ints_mut().fill(-1);
        let rows = drive::rows(&mut random, &attrs, 1);
        let mut feed = drive::feed(&rows, length, 0, None);
        feed.total = Some(room as i32);
        Layer::new(&attrs, self.dtype).run(&mut state, &feed, Binding::InPlace);
        let got = selected(&state.page_steps(0, self.pages), length - 1).into_iter();
        let of_head = |(head, got): (usize, Vec<usize>)| {
            let queries = &rows.query[head * heads / kv_heads * size..][..heads / kv_heads * size];
            let of_head = summaries[head * self.capacity * 2 * size..].chunks(2 * size);
            let pages: Vec<&[f32]> = of_head.take(self.pages).collect();
            (got, self.scores(queries, &pages))
        };
        got.enumerate().map(of_head).collect()
    }

    /// The group's score of each page, the largest where there is none.
    fn scores(&self, queries: &[f32], pages: &[&[f32]]) -> Vec<f32> {
        let of_query = |query: &[f32], page: &[f32]| -> f32 {
            let (least, most) = page.split_at(Self::SIZE);
            let terms = query.iter().zip(least.iter().zip(most));
            terms
                .map(|(q, (a, b))| if a.is_infinite() { f32::NAN } else { (q * a).max(q * b) })
                .sum()
        };
        let or_first = |score: f32| if score.is_nan() { f32::INFINITY } else { score };
        let heads: Vec<&[f32]> = queries.chunks(Self::SIZE).collect();
        if self.group_score == GroupScore::Max {
            let largest = |page: &&[f32]| heads.iter().map(|q| of_query(q, page)).fold(f32::MIN, max_or_nan);
            return pages.iter().map(largest).map(or_first).collect();
        }
        let scale = 1.0 / (Self::SIZE as f64).sqrt();
        let mut shares = vec![0.0f64; pages.len()];
        for query in heads {
            let of_head: Vec<f64> = pages
                .iter()
                .map(|page| scale * f64::from(of_query(query, page)))
                .collect();
            let numbers = of_head.iter().filter(|s| !s.is_nan());
            let most = numbers.clone().copied().fold(f64::MIN, f64::max);
            let sum: f64 = numbers.map(|s| (s - most).exp()).sum();
            shares
                .iter_mut()
                .zip(&of_head)
                .for_each(|(share, s)| *share += (s - most).exp() / sum);
        }
        shares.iter().map(|share| or_first(share.ln() as f32)).collect()
    }

    fn budget(&self) -> usize {
        budget_pages(f64::from(BUDGET), MIN_PAGES, self.pages * self.page, self.page)
    }

    /// The first page that is a candidate.
    fn first(&self) -> usize {
        let seen = usize::try_from(self.local_window_size).unwrap_or(self.pages * self.page);
        (self.pages * self.page).saturating_sub(seen) / self.page
    }

    /// Takes the sink page, the newest and the best of the rest, ties to the lower index.
    fn takes_the_best(&self) {
        let (first, newest) = (self.first(), self.pages - 1);
        for (head, (got, scores)) in self.run().into_iter().enumerate() {
            let mut rest: Vec<usize> = (first.max(1)..newest).collect();
            rest.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
            let mut expected = if first == 0 { vec![0, newest] } else { vec![newest] };
            let free = (self.budget() - expected.len()).min(rest.len());
            expected.extend(&rest[..free]);
            expected.sort();
            assert!(
                got == expected,
                "{:?}, {} pages of {}, KV head {head}, multiples of 1/{}: other pages",
                self.dtype,
                self.pages,
                self.page,
                self.parts
            );
        }
    }

    /// The same but for scores that differ by rounding.
    fn takes_nearly_the_best(&self) {
        const ROUNDING: f32 = 2e-5;
        let newest = self.pages - 1;
        for (got, scores) in self.run() {
            assert_eq!(got.len(), self.budget());
            assert!(got.is_sorted_by(|a, b| a < b) && got[0] == 0 && got.last() == Some(&newest));
            let taken = |page: usize| got.binary_search(&page).is_ok();
            let free = 1..newest;
            let least = free
                .clone()
                .filter(|&p| taken(p))
                .map(|p| scores[p])
                .fold(f32::MAX, f32::min);
            let left = free.filter(|&p| !taken(p)).map(|p| scores[p]).fold(f32::MIN, f32::max);
            assert!(
                least >= left - ROUNDING * left.abs(),
                "{:?}, {} pages: {least} was taken, {left} was not",
                self.dtype,
                self.pages
            );
        }
    }
}

fn max_or_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) }
}

#[test]
fn the_best_of_many_pages() {
    for &dtype in host::dtypes() {
        for pages in [129, 2047, 8192, 16_000] {
            Choice::new(dtype, 8, pages, 64.0).takes_the_best();
        }
    }
}

#[test]
fn ties_go_to_the_lower_index() {
    for &dtype in host::dtypes() {
        for pages in [129, 2047, 8192, 16_000] {
            Choice::new(dtype, 8, pages, 1.0).takes_the_best();
        }
    }
}

/// More than the shared memory of a multiprocessor holds.
#[test]
fn the_best_of_forty_thousand_pages() {
    for &dtype in host::dtypes() {
        for parts in [1.0, 64.0] {
            Choice::new(dtype, 8, 40_000, parts).takes_the_best();
        }
    }
}

/// A context of 128k tokens in small pages; scores of multiples of 1/0.4 are all 0.
#[test]
fn the_best_of_small_pages() {
    for &dtype in host::dtypes() {
        for parts in [64.0, 1.0, 0.4] {
            Choice::new(dtype, 4, 32_768, parts).takes_the_best();
        }
        for broken in [7, 97] {
            Choice {
                broken,
                ..Choice::new(dtype, 4, 32_768, 64.0)
            }
            .takes_the_best();
        }
    }
}

#[test]
fn the_best_of_small_pages_by_softmax() {
    for &dtype in host::dtypes() {
        for (pages, broken) in [(1_000, 0), (5_000, 0), (32_768, 0), (1_000, 97), (32_768, 97)] {
            Choice {
                group_score: GroupScore::Softmax,
                broken,
                ..Choice::new(dtype, 4, pages, 64.0)
            }
            .takes_nearly_the_best();
        }
    }
}

/// A step is launched for the capacity, of which a sequence, or what it sees of it, may fill little.
#[test]
fn the_best_of_few_pages_where_there_is_room_for_many() {
    for &dtype in host::dtypes() {
        for pages in [5, 12, 70, 300] {
            Choice {
                capacity: 32_768,
                ..Choice::new(dtype, 4, pages, 64.0)
            }
            .takes_the_best();
        }
        for local_window_size in [20, 1001, 40_002] {
            Choice {
                local_window_size,
                ..Choice::new(dtype, 4, 32_768, 64.0)
            }
            .takes_the_best();
        }
    }
}

/// Heads that look up a page each, all of them sure of it: each page has 1 of a head, but for less than f32 tells from
/// nothing beside it. The heads that are surest are heard, and no head is deaf for its page's index.
#[test]
fn of_sure_heads_the_surest_are_heard() {
    const SURE: [(usize, f32); 4] = [(7, 24.0), (15, 27.0), (23, 30.0), (31, 33.0)];
    let (heads, size, page, pages) = (4, 32, 16, 40);
    for &dtype in host::dtypes() {
        for selector in [Selector::Sketch, Selector::Bounds, Selector::SignedMoments] {
            let attrs = Attrs {
                page,
                window: 1,
                selector,
                group_score: GroupScore::Softmax,
                lambda: 1.0,
                scale: 1.0,
                ..Attrs::new(heads, 1, size).budget(BUDGET, 4)
            };
            let rows = |count: usize| Rows {
                count,
                query: vec![0.0; count * heads * size],
                key: vec![0.0; count * size],
                value: vec![0.0; count * size],
            };
            let mut prompt = rows(pages * page - 1);
            for (head, (of_head, logit)) in SURE.into_iter().enumerate() {
                // All tokens of the page, so that every selector knows its scores exactly.
                for key in prompt.key[of_head * page * size..][..page * size].chunks_mut(size) {
                    key[head] = logit;
                }
            }
            let mut newest = rows(1);
            for (head, query) in newest.query.chunks_mut(size).enumerate() {
                query[head] = 1.0;
            }
            let (layer, length) = (Layer::new(&attrs, dtype), pages * page);
            let mut state = State::new(&attrs, dtype, 1, length);
            layer.run(&mut state, &drive::prefill_feed(&prompt, length - 1), Binding::InPlace);
            layer.run(&mut state, &drive::feed(&newest, length, 0, None), Binding::InPlace);
            let got = selected(&state.page_steps(0, pages), length - 1);
            assert_eq!(got, [[0, 23, 31, 39]], "{dtype:?} {selector}");
        }
    }
}
