//! A prompt in one piece, in chunks and token by token leaves the same state.

use retro_tests::{
    attrs::Attrs,
    compare, host,
    layer::{Binding, Constants, KEY, Layer, State, VALUE},
    node::Slots,
    oracle::oracle,
    random::Random,
    tensor::Dtype,
};

use crate::drive;

/// Of outputs. In 16 bits ONNX Runtime's own kernel, which does the prompt, rounds on its way.
fn tolerance(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => 2e-5,
        _ => 2.0 * dtype.tolerance(),
    }
}

fn chunked(attrs: &Attrs, dtype: Dtype, head_sink: Option<Vec<f32>>) {
    let len = 133;
    let rows = drive::rows(&mut Random::new(4), attrs, len);
    let constants = Constants {
        head_sink: head_sink.clone(),
        ..Constants::default()
    };
    let layer = Layer::with(attrs, dtype, Slots::default(), &constants);
    let mut reference = oracle(attrs, head_sink.as_deref());
    let expected = reference.prefill(&rows);
    let whole = vec![len];
    let plans = [
        whole,
        vec![100, 33],
        vec![1, 15, 1, 16, 64, 36],
        vec![1; len],
        vec![7; 19],
    ];
    let mut states = Vec::new();
    for plan in &plans {
        assert_eq!(plan.iter().sum::<usize>(), len);
        let mut state = State::new(attrs, dtype, 1, len + 4);
        let mut outputs = Vec::new();
        let mut fed = 0;
        for &count in plan {
            let chunk = rows.slice(fed, fed + count);
            fed += count;
            outputs.extend(layer.run(&mut state, &drive::prefill_feed(&chunk, fed), Binding::InPlace));
        }
        let what = format!("{dtype:?}, {} chunks", plan.len());
        let tolerance = tolerance(dtype);
        compare::assert_close(&what, &outputs, &expected, tolerance);
        for position in reference.cached() {
            let lse_tolerance = if dtype == Dtype::F32 { 5e-5 } else { 4e-3 };
            compare::assert_close(
                &format!("{what}: lse of {position}"),
                &state.lse(0, position),
                &reference.lse(position),
                lse_tolerance,
            );
        }
        states.push(state);
    }
    for state in &states[1..] {
        let pages = attrs.pages(len);
        for slot in [KEY, VALUE] {
            compare::assert_close("rows", &state.rows(slot, 0, len), &states[0].rows(slot, 0, len), 0.0);
        }
        for which in 0..2 {
            let tolerance = if dtype == Dtype::F32 { 2e-6 } else { dtype.tolerance() };
            compare::assert_close(
                "summary",
                &state.summary(0, which, pages),
                &states[0].summary(0, which, pages),
                tolerance,
            );
        }
        assert_eq!(state.page_steps(0, pages), states[0].page_steps(0, pages));
    }
}

#[test]
fn chunks_leave_what_one_prefill_leaves() {
    let attrs = Attrs {
        window: 8,
        ..Attrs::new(6, 2, 64)
    };
    for &dtype in host::dtypes() {
        chunked(&attrs, dtype, None);
        chunked(
            &Attrs {
                softcap: 2.5,
                ..attrs.clone()
            },
            dtype,
            None,
        );
        chunked(
            &Attrs {
                local_window_size: 30,
                ..attrs.clone()
            },
            dtype,
            None,
        );
        chunked(&attrs, dtype, Some(vec![1.0, -2.0, 0.0, 4.0, 2.0, 0.5]));
        chunked(
            &Attrs {
                selector: retro_contract::Selector::Moments,
                page: 8,
                ..attrs.clone()
            },
            dtype,
            None,
        );
        chunked(
            &Attrs {
                window: 1,
                ..attrs.clone()
            },
            dtype,
            None,
        );
    }
}

/// The next turn of a chat: prefill after decoding closes the window, and decoding goes on after it.
#[test]
fn prefill_after_decoding_closes_the_window() {
    for &dtype in host::dtypes() {
        let attrs = Attrs {
            window: 4,
            ..Attrs::new(4, 2, 32).budget(0.2, 3)
        };
        let layer = Layer::with(&attrs, dtype, Slots::default(), &Constants::default());
        let mut reference = oracle(&attrs, None);
        let mut random = Random::new(21);
        let mut state = State::new(&attrs, dtype, 1, 220);
        let mut length = 0;
        let turns = [(70, 10), (25, 12), (1, 9), (2, 8)];
        for (prompt, steps) in turns {
            let rows = drive::rows(&mut random, &attrs, prompt);
            length += prompt;
            let tolerance = tolerance(dtype);
            let got = layer.run(&mut state, &drive::prefill_feed(&rows, length), Binding::InPlace);
            compare::assert_close("prompt", &got, &reference.prefill(&rows), tolerance);
            for step in 0..steps {
                let retro = step.min(attrs.window - 1);
                let rows = drive::rows(&mut random, &attrs, retro + 1);
                length += 1;
                let got = layer.run(
                    &mut state,
                    &drive::feed(&rows, length, retro as i32, None),
                    Binding::InPlace,
                );
                let expected = reference.step(&rows, None);
                let at = format!("{dtype:?} t = {}", length - 1);
                assert_eq!(state.page_steps(0, attrs.pages(length)), reference.page_steps(), "{at}");
                compare::assert_close(&at, &got, &expected.output, tolerance);
            }
        }
    }
}
