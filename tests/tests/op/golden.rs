//! Every golden vector through the real operator, in place and copying, in float32, float16 and, on CUDA, bfloat16.

use retro_tests::{
    compare,
    golden::{self, Case},
    host,
    layer::{self, Binding, Layer, State},
    tensor::Dtype,
};

use crate::drive;

fn check(case: &Case, dtype: Dtype, binding: Binding) {
    let Case { name, attrs, .. } = case;
    let what = format!("{name} {dtype:?} {binding:?}");
    // 16 bits round the outputs (and, when ONNX Runtime's own kernel does the prompt, products inside it).
    let close = |at: &str, got: &[f32], expected: &[f32]| {
        let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let tolerance = match dtype {
            Dtype::F32 => case.output_tolerance,
            _ => dtype.tolerance() * largest,
        };
        compare::assert_close(at, got, expected, tolerance);
    };
    let close_lse = |at: &str, got: &[f32], expected: &[f32]| {
        compare::assert_within(at, got, expected, |l| {
            l.abs().max(1.0) * if dtype == Dtype::F32 { case.lse_tolerance } else { 1e-3 }
        });
    };
    let layer = Layer::new(attrs, dtype);
    let mut state = State::new(attrs, dtype, 1, case.capacity);

    let output = drive::prefill(&layer, &mut state, case, binding);
    let tail = &output[output.len() - case.prompt_output.len()..];
    close(&format!("{what}: prompt"), tail, &case.prompt_output);
    let cached = case.prompt_lse.len() / attrs.heads;
    let lse: Vec<f32> = (case.prompt.count - cached..case.prompt.count)
        .flat_map(|p| state.lse(0, p))
        .collect();
    close_lse(&format!("{what}: lse of the prompt"), &lse, &case.prompt_lse);
    let pages = attrs.pages(case.prompt.count);
    let newest = case.prompt.count as i32 - 1;
    assert_eq!(
        state.page_steps(0, pages),
        vec![vec![newest; pages]; attrs.kv_heads],
        "{what}: page steps of the prompt"
    );

    for step in &case.steps {
        let at = format!("{what}, t = {}, r = {}", step.t, step.retro);
        let output = layer.run(&mut state, &drive::step_feed(step), binding);
        let page_steps = state.page_steps(0, attrs.pages(step.t + 1));
        assert_eq!(drive::selected(&page_steps, step.t), step.selected, "{at}: pages");
        assert_eq!(page_steps, step.page_steps, "{at}: page steps");
        close(&at, &output, &step.output);
        let lse: Vec<f32> = (step.lse_first..=step.t).flat_map(|p| state.lse(0, p)).collect();
        close_lse(&format!("{at}: lse"), &lse, &step.lse);
    }

    let len = case.prompt.count + case.steps.len();
    let pages = attrs.pages(len);
    for (which, bound) in case.final_bounds.iter().flatten().enumerate() {
        let what = format!("{what}: vector {which} of the page bounds");
        compare::assert_close(&what, &state.summary(0, which, pages), bound, 0.0);
    }
    if let Some(keys) = &case.final_key {
        compare::assert_close(&format!("{what}: keys"), &state.rows(layer::KEY, 0, len), keys, 0.0);
    }
}

#[test]
fn harness_knows_the_state_slots() {
    layer::check_state_order();
}

#[test]
fn exact_set_in_f32_in_place() {
    golden::exact()
        .iter()
        .for_each(|case| check(case, Dtype::F32, Binding::InPlace));
}

#[test]
fn exact_set_in_f32_copying() {
    golden::exact()
        .iter()
        .for_each(|case| check(case, Dtype::F32, Binding::Copying));
}

#[test]
fn exact_set_in_f16_in_place() {
    golden::exact()
        .iter()
        .for_each(|case| check(case, Dtype::F16, Binding::InPlace));
}

#[test]
fn exact_set_in_f16_copying() {
    golden::exact()
        .iter()
        .for_each(|case| check(case, Dtype::F16, Binding::Copying));
}

#[test]
fn exact_set_in_bf16_where_there_is_bf16() {
    if !host::dtypes().contains(&Dtype::Bf16) {
        return println!("not tested: the CPU has no bfloat16");
    }
    for case in golden::exact() {
        Binding::BOTH
            .iter()
            .for_each(|&binding| check(&case, Dtype::Bf16, binding));
    }
}

/// In float32 only: its inputs are float32 numbers, and rounding them to float16 may pick other pages than the vectors
/// say.
#[test]
fn offsets_set_in_place_and_copying() {
    for case in golden::offsets() {
        Binding::BOTH
            .iter()
            .for_each(|&binding| check(&case, Dtype::F32, binding));
    }
}

/// Each case in the type that its centres are rounded to.
#[test]
fn sketch_set_in_place_and_copying() {
    for case in golden::sketch() {
        Binding::BOTH
            .iter()
            .for_each(|&binding| check(&case, case.dtype, binding));
    }
}

/// Decoding in place and copying are one computation.
#[test]
fn in_place_and_copying_agree_bit_for_bit() {
    for &dtype in host::dtypes() {
        for case in golden::exact_named(&["b_w4", "prompt3_w8", "w20_three_pages"]) {
            let layer = Layer::new(&case.attrs, dtype);
            let mut states: Vec<State> = (0..2)
                .map(|_| State::new(&case.attrs, dtype, 1, case.capacity))
                .collect();
            for step in case.steps.iter().enumerate() {
                let (number, step) = step;
                let outputs: Vec<Vec<f32>> = (states.iter_mut().zip(Binding::BOTH))
                    .map(|(state, binding)| {
                        if number == 0 {
                            drive::prefill(&layer, state, &case, binding);
                        }
                        layer.run(state, &drive::step_feed(step), binding)
                    })
                    .collect();
                compare::assert_close(&format!("{} t = {}", case.name, step.t), &outputs[0], &outputs[1], 0.0);
            }
            let len = case.prompt.count + case.steps.len();
            for slot in [layer::KEY, layer::VALUE] {
                compare::assert_close(
                    &case.name,
                    &states[0].rows(slot, 0, len),
                    &states[1].rows(slot, 0, len),
                    0.0,
                );
            }
        }
    }
}
