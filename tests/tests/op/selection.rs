//! Which pages a step takes of many, against a sort of their scores, which are exact in every dtype.

use retro_contract::budget_pages;
use retro_tests::{
    attrs::Attrs,
    host,
    layer::{Binding, KEY, Layer, STEPS, SUMMARY, State, VALUE},
    random::Random,
    tensor::{Dtype, Tens},
};

use crate::drive::{self, selected};

const PAGE: usize = 8;
const BUDGET: f32 = 0.03;

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

/// The largest score of a group's query heads: sum over elements of max(q least, q most).
fn score(queries: &[f32], page: &[f32]) -> f32 {
    let (least, most) = page.split_at(page.len() / 2);
    let of_query = |query: &[f32]| -> f32 {
        let terms = query.iter().zip(least.iter().zip(most));
        terms.map(|(q, (a, b))| (q * a).max(q * b)).sum()
    };
    queries.chunks(least.len()).map(of_query).fold(f32::MIN, f32::max)
}

/// The sink page, the newest and the best of the rest, ties to the lower index; ascending.
fn expected(scores: &[f32], budget: usize) -> Vec<usize> {
    let newest = scores.len() - 1;
    let mut rest: Vec<usize> = (1..newest).collect();
    rest.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let mut taken = [vec![0, newest], rest[..budget - 2].to_vec()].concat();
    taken.sort();
    taken
}

fn takes_the_best(dtype: Dtype, pages: usize, parts: f32) {
    let (heads, kv_heads, size) = (4, 2, 32);
    let mut attrs = Attrs::new(heads, kv_heads, size).budget(BUDGET, 3);
    (attrs.page, attrs.window) = (PAGE, 1);
    let length = pages * PAGE;
    let mut random = Random::new(11);
    let mut state = State::new(&attrs, dtype, 1, length);
    let summaries = bounds(&mut random, parts, kv_heads * pages, size);
    let filled = |numbers: &[f32], like: &Tens| {
        let mut tensor = Tens::poisoned(like.dtype(), like.shape());
        tensor.write(0, numbers);
        tensor
    };
    for slot in [KEY, VALUE] {
        state.tensors[slot] = filled(&vec![0.0; kv_heads * length * size], &state.tensors[slot]);
    }
    state.tensors[SUMMARY] = filled(&summaries, &state.tensors[SUMMARY]);
    state.tensors[STEPS].ints_mut().fill(-1);
    let rows = drive::rows(&mut random, &attrs, 1);
    Layer::new(&attrs, dtype).run(&mut state, &drive::feed(&rows, length, 0, None), Binding::InPlace);
    let budget = budget_pages(f64::from(BUDGET), 3, length, PAGE);
    let got = selected(&state.page_steps(0, pages), length - 1);
    for (head, got) in got.iter().enumerate() {
        let queries = &rows.query[head * heads / kv_heads * size..][..heads / kv_heads * size];
        let of_head = summaries[head * pages * 2 * size..][..pages * 2 * size].chunks(2 * size);
        let scores: Vec<f32> = of_head.map(|page| score(queries, page)).collect();
        assert!(
            *got == expected(&scores, budget),
            "{dtype:?}, {pages} pages, KV head {head}, multiples of 1/{parts}: other pages"
        );
    }
}

#[test]
fn the_best_of_many_pages() {
    for &dtype in host::dtypes() {
        for pages in [129, 2047, 8192] {
            takes_the_best(dtype, pages, 64.0);
        }
    }
}

#[test]
fn ties_go_to_the_lower_index() {
    for &dtype in host::dtypes() {
        for pages in [129, 2047, 8192] {
            takes_the_best(dtype, pages, 1.0);
        }
    }
}

/// More than the shared memory of a multiprocessor holds.
#[test]
fn the_best_of_forty_thousand_pages() {
    for &dtype in host::dtypes() {
        for parts in [1.0, 64.0] {
            takes_the_best(dtype, 40_000, parts);
        }
    }
}
