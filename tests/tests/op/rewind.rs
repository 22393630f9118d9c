//! Rewinding: a host that takes tokens back says nothing but a shorter length, and feeds again from there with r = 0.
//! What the abandoned steps left in the page steps must not keep later tokens from their supplements (docs/method.md,
//! Truncation).

use retro_contract::{GroupScore, Mode, Selector, limits};
use retro_tests::{
    attrs::Attrs,
    compare,
    golden::Rows,
    host,
    layer::{Binding, Feed, KEY, Layer, SUMMARY, State, VALUE},
    oracle::oracle,
    random::Random,
    tensor::Dtype,
};

use crate::drive::{self, selected};

const PROMPT: usize = 70;
const CAPACITY: usize = 150;

fn attrs(window: usize, mode: Mode) -> Attrs {
    Attrs {
        window,
        mode,
        ..Attrs::new(4, 2, 32).budget(0.2, 3)
    }
}

/// How many tokens the step at `t` feeds again where the sequence was begun, or begun again, at `start`.
fn retro(attrs: &Attrs, t: usize, start: usize) -> usize {
    (attrs.window - 1).min(t - start)
}

/// Steps, rewinds to the middle of a page, its edge, the end of the prompt, into it, and far back, more steps after
/// each of them, and at last the next turn of a chat: outputs, pages and page steps are the oracle's.
fn agrees_with_the_oracle(attrs: &Attrs, dtype: Dtype, binding: Binding) {
    let (window, mode) = (attrs.window, attrs.mode);
    let layer = Layer::new(attrs, dtype);
    let mut reference = oracle(attrs, None);
    let mut random = Random::new(19);
    let mut state = State::new(attrs, dtype, 1, CAPACITY);
    let what = format!(
        "{dtype:?} {binding:?} pages of {} window {window} mode {mode}",
        attrs.page
    );
    let close = |at: &str, got: &[f32], expected: &[f32]| {
        let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs())).max(0.5);
        let tolerance = if dtype == Dtype::F32 {
            2e-5
        } else {
            dtype.tolerance() * largest
        };
        compare::assert_close(at, got, expected, tolerance);
    };
    let mut length = PROMPT;
    let prompt = drive::rows(&mut random, attrs, PROMPT);
    layer.run(&mut state, &drive::prefill_feed(&prompt, PROMPT), binding);
    reference.prefill(&prompt);
    for (keep, steps, chunk) in [
        (PROMPT, 40, 0),
        (75, 14, 0),
        (80, 20, 0),
        (96, 3, 0),
        (98, 3, 0),
        (PROMPT, 30, 0),
        (66, 9, 0),
        (33, 50, 0),
        (60, 9, 5),
        (64, 12, 0),
    ] {
        assert!(keep <= length, "a rewind goes back");
        reference.truncate(keep);
        length = keep;
        if chunk > 0 {
            let rows = drive::rows(&mut random, attrs, chunk);
            length += chunk;
            let got = layer.run(&mut state, &drive::prefill_feed(&rows, length), binding);
            close(&format!("{what}: chunk to {length}"), &got, &reference.prefill(&rows));
        }
        let start = length;
        for t in start..start + steps {
            let r = retro(attrs, t, start);
            let rows = drive::rows(&mut random, attrs, r + 1);
            let at = format!("{what}: rewound to {keep}, t = {t}");
            let got = layer.run(&mut state, &drive::feed(&rows, t + 1, r as i32, None), binding);
            let expected = reference.step(&rows, None);
            assert!(expected.margin > 1e-6, "{at}: a tie by chance; choose another seed");
            if mode != Mode::Dense {
                let steps = state.page_steps(0, attrs.pages(t + 1));
                assert_eq!(selected(&steps, t), expected.selected, "{at}: pages");
                assert_eq!(steps, reference.page_steps(), "{at}: page steps");
            }
            close(&at, &got, &expected.output);
        }
        length = start + steps;
    }
}

#[test]
fn rewinding_agrees_with_the_oracle() {
    for &dtype in host::dtypes() {
        for binding in Binding::BOTH {
            for window in [1, 2, 4, 8] {
                for mode in [Mode::Retro, Mode::Streaming, Mode::Periodic, Mode::Dense] {
                    agrees_with_the_oracle(&attrs(window, mode), dtype, binding);
                    let small_pages = Attrs {
                        page: limits::PAGE_SIZE_MIN,
                        ..attrs(window, mode)
                    };
                    agrees_with_the_oracle(&small_pages, dtype, binding);
                }
            }
        }
    }
}

/// A state that went on for 40 tokens and was rewound decodes as the one that never went there, to the last bit.
#[test]
fn an_abandoned_future_leaves_no_trace() {
    for &dtype in host::dtypes() {
        for window in [2, 4, 8] {
            for (local_window_size, keep) in [(-1, PROMPT), (-1, 83), (48, 83), (-1, 80)] {
                let attrs = Attrs {
                    local_window_size,
                    ..attrs(window, Mode::Retro)
                };
                let layer = Layer::new(&attrs, dtype);
                let mut random = Random::new(5);
                let mut state = State::new(&attrs, dtype, 1, CAPACITY);
                let prompt = drive::rows(&mut random, &attrs, PROMPT);
                layer.run(&mut state, &drive::prefill_feed(&prompt, PROMPT), Binding::InPlace);
                let go = |state: &mut State, from: usize, to: usize, start: usize, random: &mut Random| {
                    let mut outputs = Vec::new();
                    for t in from..to {
                        let r = retro(&attrs, t, start);
                        let rows = drive::rows(random, &attrs, r + 1);
                        let feed = drive::feed(&rows, t + 1, r as i32, None);
                        outputs.push(layer.run(state, &feed, Binding::InPlace));
                    }
                    outputs
                };
                go(&mut state, PROMPT, keep, PROMPT, &mut random);
                let mut stayed = state.duplicate();
                go(&mut state, keep, keep + 40, keep, &mut random);
                let (mut one, mut other) = (Random::new(11), Random::new(11));
                let expected = go(&mut stayed, keep, keep + 40, keep, &mut one);
                let got = go(&mut state, keep, keep + 40, keep, &mut other);
                for (step, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let at = format!(
                        "{dtype:?} window {window} sliding {local_window_size} t = {}",
                        keep + step
                    );
                    compare::assert_close(&at, got, expected, 0.0);
                }
                for slot in [KEY, VALUE] {
                    assert_eq!(state.rows(slot, 0, keep + 40), stayed.rows(slot, 0, keep + 40));
                }
            }
        }
    }
}

/// One sequence of a batch is rewound, the other goes on: each as it does alone.
#[test]
fn one_sequence_of_a_batch_is_rewound() {
    for &dtype in host::dtypes() {
        let attrs = attrs(4, Mode::Retro);
        let layer = Layer::new(&attrs, dtype);
        let mut random = Random::new(31);
        let mut alone: Vec<State> = (0..2)
            .map(|_| {
                let mut state = State::new(&attrs, dtype, 1, CAPACITY);
                let prompt = drive::rows(&mut random, &attrs, PROMPT);
                layer.run(&mut state, &drive::prefill_feed(&prompt, PROMPT), Binding::InPlace);
                for t in PROMPT..PROMPT + 30 {
                    let r = retro(&attrs, t, PROMPT);
                    let rows = drive::rows(&mut random, &attrs, r + 1);
                    let feed = drive::feed(&rows, t + 1, r as i32, None);
                    layer.run(&mut state, &feed, Binding::InPlace);
                }
                state
            })
            .collect();
        let mut both = State::stack(&alone);
        for step in 0..20 {
            let at = [(75 + step, 75), (PROMPT + 30 + step, PROMPT)];
            let of: Vec<Rows> = at
                .iter()
                .map(|&(t, start)| drive::rows(&mut random, &attrs, retro(&attrs, t, start) + 1))
                .collect();
            let expected: Vec<Vec<f32>> = (0..2)
                .map(|i| {
                    let feed = drive::feed(&of[i], at[i].0 + 1, of[i].count as i32 - 1, None);
                    layer.run(&mut alone[i], &feed, Binding::InPlace)
                })
                .collect();
            let lengths = at.map(|(t, _)| t + 1);
            let output = layer.run(&mut both, &together(&of, &lengths), Binding::InPlace);
            for (i, (got, expected)) in output.chunks(output.len() / 2).zip(&expected).enumerate() {
                let at = format!("{dtype:?} sequence {i}, step {step}");
                let tolerance = if dtype == Dtype::F32 {
                    2e-5
                } else {
                    dtype.tolerance() * 2.0
                };
                compare::assert_close(&at, &got[got.len() - expected.len()..], expected, tolerance);
                let pages = attrs.pages(lengths[i]);
                assert_eq!(both.page_steps(i, pages), alone[i].page_steps(0, pages), "{at}");
            }
        }
    }
}

/// Rows that are read again leave the sketches of one reading, to the last bit, whatever was decoded into their places
/// before; and what comes after them reads the same pages, alone and in a batch.
fn reads_again(attrs: &Attrs, dtype: Dtype) {
    const KEPT: usize = 400;
    const READ: usize = 455;
    let what = format!(
        "{dtype:?} heads of {}, {} bits, window {}",
        attrs.head_size, attrs.sketch_bits, attrs.window
    );
    let layer = Layer::new(attrs, dtype);
    let prompt = drive::rows(&mut Random::new(3), attrs, READ);
    let read = |state: &mut State, ends: &[usize], from: usize| {
        ends.iter().fold(from, |from, &end| {
            let chunk = drive::prefill_feed(&prompt.slice(from, end), end);
            layer.run(state, &chunk, Binding::InPlace);
            end
        });
    };
    let mut once = State::new(attrs, dtype, 1, 640);
    let mut again = once.duplicate();
    read(&mut once, &[384, READ], 0);
    read(&mut again, &[96, 192, 288, 384, KEPT], 0);
    let mut random = Random::new(8);
    for t in KEPT..KEPT + 30 {
        let fed = drive::rows(&mut random, attrs, retro(attrs, t, KEPT) + 1);
        let feed = drive::feed(&fed, t + 1, fed.count as i32 - 1, None);
        layer.run(&mut again, &feed, Binding::InPlace);
        // As a rectifying pass does it: the newest two tokens are read densely.
        if t % 7 == 0 {
            let fed = drive::rows(&mut random, attrs, 2);
            layer.run(&mut again, &drive::prefill_feed(&fed, t + 1), Binding::InPlace);
        }
    }
    read(&mut again, &[READ], KEPT);
    for slot in [KEY, VALUE, SUMMARY] {
        assert!(once.bytes()[slot] == again.bytes()[slot], "{what}: slot {slot}");
    }
    let mut both = State::stack(&[again.duplicate(), once.duplicate()]);
    for t in READ..READ + 40 {
        let fed = drive::rows(&mut random, attrs, retro(attrs, t, READ) + 1);
        let feed = drive::feed(&fed, t + 1, fed.count as i32 - 1, None);
        let expected = layer.run(&mut once, &feed, Binding::InPlace);
        let got = layer.run(&mut again, &feed, Binding::InPlace);
        let at = format!("{what}: t = {t}");
        let tolerance = if dtype == Dtype::F32 { 2e-5 } else { dtype.tolerance() };
        compare::assert_close(&at, &got, &expected, tolerance);
        let together = together(&[fed.slice(0, fed.count), fed], &[t + 1; 2]);
        let outputs = layer.run(&mut both, &together, Binding::InPlace);
        let pages = attrs.pages(t + 1);
        for (i, got) in outputs.chunks(outputs.len() / 2).enumerate() {
            compare::assert_close(&at, got, &expected, tolerance);
            assert_eq!(
                both.page_steps(i, pages),
                once.page_steps(0, pages),
                "{at}: sequence {i}"
            );
        }
        assert_eq!(again.page_steps(0, pages), once.page_steps(0, pages), "{at}");
    }
}

#[test]
fn reading_again_leaves_the_sketches_of_one_reading() {
    for &dtype in host::dtypes() {
        for (heads, head_size, sketch_bits, window) in [(8, 64, 2, 1), (8, 64, 2, 4), (4, 32, 1, 2), (2, 48, 2, 2)] {
            let attrs = Attrs {
                window,
                selector: Selector::Sketch,
                group_score: GroupScore::Softmax,
                sketch_bits,
                page: 8,
                ..Attrs::new(heads, 2, head_size).budget(0.05, 4)
            };
            reads_again(&attrs, dtype);
        }
    }
}

/// Steps of several sequences as one call; those that feed fewer tokens get leading rows of NaN, which nobody may read.
fn together(rows: &[Rows], lengths: &[usize]) -> Feed {
    let tokens = rows.iter().map(|r| r.count).max().unwrap();
    let padded = |of: fn(&Rows) -> &Vec<f32>| -> Vec<f32> {
        let one = |r: &Rows| {
            let width = of(r).len() / r.count;
            let mut all = vec![f32::NAN; (tokens - r.count) * width];
            all.extend(of(r));
            all
        };
        rows.iter().flat_map(one).collect()
    };
    Feed {
        tokens,
        query: padded(|r| &r.query),
        key: padded(|r| &r.key),
        value: padded(|r| &r.value),
        lengths: lengths.to_vec(),
        retro: rows.iter().map(|r| r.count as i32 - 1).collect(),
        budget: None,
        total: None,
    }
}
