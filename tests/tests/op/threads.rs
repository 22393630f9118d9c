//! Many threads on one session, each with a sequence of its own.

use std::thread;

use retro_tests::{
    golden::{self, Case},
    host,
    layer::{Binding, Layer, State},
};

use crate::drive;

const THREADS: usize = 8;

/// A whole case; thread `seed` decodes a prompt of its own length.
fn decode(layer: &Layer, case: &Case, seed: usize) -> (Vec<f32>, Vec<Vec<u8>>) {
    let mut state = State::new(&case.attrs, layer.dtype, 1, case.capacity);
    let mut outputs = Vec::new();
    let length = case.prompt.count - 7 * seed;
    let binding = Binding::BOTH[seed % 2];
    outputs.extend(layer.run(
        &mut state,
        &drive::prefill_feed(&case.prompt.slice(0, length), length),
        binding,
    ));
    for step in &case.steps {
        let mut feed = drive::step_feed(step);
        feed.lengths = vec![step.t + 1 - 7 * seed];
        outputs.extend(layer.run(&mut state, &feed, binding));
    }
    // Of what is not valid, a copying call need not copy anything: compare the valid page steps only.
    let steps = state.page_steps(0, case.attrs.pages(length + case.steps.len()));
    (
        outputs,
        steps
            .iter()
            .map(|s| s.iter().flat_map(|x| x.to_le_bytes()).collect())
            .collect(),
    )
}

#[test]
fn many_threads_give_what_one_gives() {
    for &dtype in host::dtypes() {
        let case = &golden::exact_named(&["b_w4"])[0];
        let layer = &Layer::new(&case.attrs, dtype);
        let alone: Vec<_> = (0..THREADS).map(|seed| decode(layer, case, seed)).collect();
        for round in 0..3 {
            let together: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = (0..THREADS)
                    .map(|seed| scope.spawn(move || decode(layer, case, seed)))
                    .collect();
                threads
                    .into_iter()
                    .map(|t| t.join().expect("no thread fails"))
                    .collect()
            });
            for (seed, (got, expected)) in together.iter().zip(&alone).enumerate() {
                assert!(
                    got == expected,
                    "round {round}, thread {seed}, {dtype:?}: differs from the same run alone"
                );
            }
        }
    }
}
