//! Optional inputs and the ways to say the same thing with others.

use retro_tests::{
    compare, golden, host,
    layer::{Binding, Constants, Layer, State},
    node::Slots,
    random::Random,
    tensor::Dtype,
};

use crate::drive;

#[test]
fn packed_query_key_value_equal_separate_ones() {
    for case in golden::exact_named(&["b_w4", "tiny_chunks_w8", "d_w2"]) {
        for &dtype in host::dtypes() {
            let separate = Layer::new(&case.attrs, dtype);
            let slots = Slots {
                packed: true,
                page_budget: true,
                ..Slots::default()
            };
            let packed = Layer::with(&case.attrs, dtype, slots, &Constants::default());
            let runs: Vec<_> = [&separate, &packed]
                .map(|layer| {
                    let mut state = State::new(&case.attrs, dtype, 1, case.capacity);
                    let mut outputs = drive::prefill(layer, &mut state, &case, Binding::InPlace);
                    for step in &case.steps {
                        outputs.extend(layer.run(&mut state, &drive::step_feed(step), Binding::InPlace));
                    }
                    (outputs, state.bytes())
                })
                .into();
            compare::assert_close(&case.name, &runs[1].0, &runs[0].0, 0.0);
            assert!(runs[0].1 == runs[1].1, "{}: the states differ", case.name);
        }
    }
}

/// The budget comes from the attributes when the input is absent or 0, else from the input, one number a sequence.
#[test]
fn page_budget_input_overrides_the_attributes() {
    let case = &golden::exact_named(&["a_w4_p16"])[0];
    let without = Layer::with(&case.attrs, Dtype::F32, Slots::default(), &Constants::default());
    let with = Layer::new(&case.attrs, Dtype::F32);
    let mut other = case.attrs.clone();
    other.budget_min_pages = 7;
    let other = Layer::new(&other, Dtype::F32);
    let mut states: Vec<State> = (0..3)
        .map(|_| State::new(&case.attrs, Dtype::F32, 1, case.capacity))
        .collect();
    for (layer, state) in [&without, &with, &other].into_iter().zip(&mut states) {
        drive::prefill(layer, state, case, Binding::InPlace);
    }
    for step in &case.steps {
        let mut feed = drive::step_feed(step);
        without.run(&mut states[0], &feed, Binding::InPlace);
        feed.budget = Some(vec![0]);
        with.run(&mut states[1], &feed, Binding::InPlace);
        feed.budget = Some(vec![step.selected[0].len() as i32]);
        other.run(&mut states[2], &feed, Binding::InPlace);
        let pages = case.attrs.pages(step.t + 1);
        for state in &states {
            assert_eq!(state.page_steps(0, pages), step.page_steps, "t = {}", step.t);
        }
    }
}

/// total_sequence_length may be an upper bound: the capacity, when a step is captured in a graph.
#[test]
fn total_sequence_length_may_be_the_capacity() {
    for case in golden::exact_named(&["a_w8_p16", "empty_prompt_w2"]) {
        let layer = Layer::new(&case.attrs, Dtype::F32);
        let mut states: Vec<State> = (0..2)
            .map(|_| State::new(&case.attrs, Dtype::F32, 1, case.capacity))
            .collect();
        let mut fed = 0;
        for &chunk in &case.chunks {
            let rows = case.prompt.slice(fed, fed + chunk);
            fed += chunk;
            let mut feed = drive::prefill_feed(&rows, fed);
            let exact = layer.run(&mut states[0], &feed, Binding::InPlace);
            feed.total = Some(case.capacity as i32);
            let bound = layer.run(&mut states[1], &feed, Binding::InPlace);
            compare::assert_close(&format!("{}: prompt to {fed}", case.name), &bound, &exact, 2e-6);
        }
        for step in &case.steps {
            let mut feed = drive::step_feed(step);
            feed.total = Some(case.capacity as i32);
            let output = layer.run(&mut states[1], &feed, Binding::InPlace);
            compare::assert_close(
                &format!("{} t = {}", case.name, step.t),
                &output,
                &step.output,
                case.output_tolerance,
            );
            let pages = case.attrs.pages(step.t + 1);
            assert_eq!(
                states[1].page_steps(0, pages),
                step.page_steps,
                "{} t = {}",
                case.name,
                step.t
            );
        }
    }
}

/// The ratio travels as a float32 attribute. 0.15 of 320 tokens is 3 pages, although the float32 nearest to 0.15 is
/// larger.
#[test]
fn a_budget_ratio_means_its_decimal_number() {
    for (ratio, tokens, pages) in [
        (0.15f32, 320, 3),
        (0.1, 160, 1),
        (0.3, 160, 3),
        (0.2, 400, 5),
        (0.15, 321, 4),
    ] {
        let mut attrs = retro_tests::attrs::Attrs::new(2, 1, 32).budget(ratio, 1);
        (attrs.window, attrs.sink_pages) = (1, 0);
        let layer = Layer::new(&attrs, Dtype::F32);
        let mut random = Random::new(3);
        let mut state = State::new(&attrs, Dtype::F32, 1, tokens);
        let prompt = drive::rows(&mut random, &attrs, tokens - 1);
        layer.run(&mut state, &drive::prefill_feed(&prompt, tokens - 1), Binding::InPlace);
        let rows = drive::rows(&mut random, &attrs, 1);
        layer.run(&mut state, &drive::feed(&rows, tokens, 0, None), Binding::InPlace);
        let steps = state.page_steps(0, attrs.pages(tokens));
        let loaded = drive::selected(&steps, tokens - 1)[0].len();
        assert_eq!(loaded, pages, "ratio {ratio} of {tokens} tokens");
    }
}

/// Nobody who ignores retro_length is surprised: 0 with many tokens, or with an empty cache, is prefill.
#[test]
fn retro_length_zero_is_prefill_where_it_must_be() {
    let case = &golden::exact_named(&["a_w4_p16"])[0];
    let layer = Layer::new(&case.attrs, Dtype::F32);
    let runs = [-1, 0].map(|retro| {
        let mut state = State::new(&case.attrs, Dtype::F32, 1, case.capacity);
        let mut outputs = Vec::new();
        for (from, to) in [(0, 1), (1, 60), (60, 62)] {
            let feed = drive::feed(&case.prompt.slice(from, to), to, retro, None);
            outputs.extend(layer.run(&mut state, &feed, Binding::InPlace));
        }
        (outputs, state.bytes())
    });
    assert!(runs[0] == runs[1], "retro_length 0 differs from -1");
}
