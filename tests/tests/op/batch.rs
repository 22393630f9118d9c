//! Sequences of different lengths, started at different times, in one batch.

use retro_tests::{
    compare,
    golden::{self, Case},
    host,
    layer::{Binding, Feed, Layer, State},
    tensor::Dtype,
};

use crate::drive;

/// Cases of one shape (4 query heads, 1 KV head, D 64, w 4, pages of 16, one sink) and many lengths; one prompt has a
/// single token, so that its first steps have fewer retrospective tokens than the others'.
const CASES: [&str; 5] = [
    "a_w4_p16",
    "prompt1_w4_chunk",
    "page_full_w4",
    "ties_w4",
    "budget1page_sink1_w4",
];

/// The same step of several sequences: short ones get leading rows of NaN that nobody may read.
fn batch_feed(cases: &[Case], number: usize) -> Feed {
    let steps: Vec<_> = cases.iter().map(|case| &case.steps[number]).collect();
    let tokens = steps.iter().map(|step| step.retro + 1).max().unwrap();
    let pad = |data: &[f32], rows: usize| {
        let width = data.len() / rows;
        let mut padded = vec![f32::NAN; (tokens - rows) * width];
        padded.extend_from_slice(data);
        padded
    };
    Feed {
        tokens,
        query: steps.iter().flat_map(|s| pad(&s.rows.query, s.rows.count)).collect(),
        key: steps.iter().flat_map(|s| pad(&s.rows.key, s.rows.count)).collect(),
        value: steps.iter().flat_map(|s| pad(&s.rows.value, s.rows.count)).collect(),
        lengths: steps.iter().map(|s| s.t + 1).collect(),
        retro: steps.iter().map(|s| s.retro as i32).collect(),
        budget: Some(steps.iter().map(|s| s.selected[0].len() as i32).collect()),
        total: None,
    }
}

fn decode_together(dtype: Dtype, binding: Binding) {
    let cases = golden::exact_named(&CASES);
    let attrs = &cases[0].attrs;
    let capacity = cases.iter().map(|case| case.capacity).max().unwrap();
    let layer = Layer::new(attrs, dtype);
    let alone: Vec<State> = cases
        .iter()
        .map(|case| {
            let mut state = State::new(attrs, dtype, 1, capacity);
            drive::prefill(&layer, &mut state, case, binding);
            state
        })
        .collect();
    let mut state = State::stack(&alone);
    let steps = cases.iter().map(|case| case.steps.len()).min().unwrap();
    let mut ignored = 0;
    for number in 0..steps {
        let feed = batch_feed(&cases, number);
        let output = layer.run(&mut state, &feed, binding);
        let width = attrs.heads * attrs.head_size;
        for (sequence, case) in cases.iter().enumerate() {
            let step = &case.steps[number];
            let at = format!("{} in a batch, {dtype:?} {binding:?}, t = {}", case.name, step.t);
            let rows = &output[sequence * feed.tokens * width..][..feed.tokens * width];
            let (padding, rows) = rows.split_at((feed.tokens - step.rows.count) * width);
            ignored += padding.len();
            assert!(padding.iter().all(|&x| x == 0.0), "{at}: ignored rows are 0");
            let largest = step.output.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let tolerance = match dtype {
                Dtype::F32 => case.output_tolerance,
                _ => dtype.tolerance() * largest,
            };
            compare::assert_close(&at, rows, &step.output, tolerance);
            let page_steps = state.page_steps(sequence, attrs.pages(step.t + 1));
            assert_eq!(page_steps, step.page_steps, "{at}: page steps");
        }
    }
    assert!(ignored > 0, "the cases start at different times");
}

#[test]
fn golden_cases_decode_together() {
    for &dtype in host::dtypes() {
        Binding::BOTH
            .into_iter()
            .for_each(|binding| decode_together(dtype, binding));
    }
}

/// Prompts of different lengths whose last chunks are prefilled together.
#[test]
fn chunks_prefill_together() {
    let cases = golden::exact_named(&["a_w4_p16", "ties_w4", "sink0_w4"]);
    let mut attrs = cases[0].attrs.clone();
    attrs.sink_pages = 1;
    let layer = Layer::new(&attrs, Dtype::F32);
    let (tokens, capacity) = (9, 240);
    for binding in Binding::BOTH {
        let starts = cases.iter().map(|case| {
            let mut state = State::new(&attrs, Dtype::F32, 1, capacity);
            let first = case.prompt.slice(0, case.prompt.count - tokens);
            layer.run(&mut state, &drive::prefill_feed(&first, first.count), binding);
            state
        });
        let mut state = State::stack(&starts.collect::<Vec<_>>());
        let last: Vec<_> = cases
            .iter()
            .map(|case| case.prompt.slice(case.prompt.count - tokens, case.prompt.count))
            .collect();
        let feed = Feed {
            tokens,
            query: last.iter().flat_map(|rows| rows.query.clone()).collect(),
            key: last.iter().flat_map(|rows| rows.key.clone()).collect(),
            value: last.iter().flat_map(|rows| rows.value.clone()).collect(),
            lengths: cases.iter().map(|case| case.prompt.count).collect(),
            retro: vec![-1],
            ..Feed::default()
        };
        let output = layer.run(&mut state, &feed, binding);
        for (sequence, case) in cases.iter().enumerate() {
            let rows = &output[..output.len() * (sequence + 1) / cases.len()];
            let tail = &rows[rows.len() - case.prompt_output.len()..];
            compare::assert_close(&format!("{} {binding:?}", case.name), tail, &case.prompt_output, 2e-5);
            let pages = attrs.pages(case.prompt.count);
            let newest = case.prompt.count as i32 - 1;
            assert_eq!(
                state.page_steps(sequence, pages),
                vec![vec![newest; pages]],
                "{}",
                case.name
            );
        }
    }
}
