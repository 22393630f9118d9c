//! A broken model shows, as with dense attention: a NaN or an infinity among what a call reads makes its outputs NaN,
//! wherever it stands, and a page that cannot be scored is read.

use retro_contract::{GroupScore, Mode};
use retro_tests::{
    attrs::Attrs,
    golden::Rows,
    host,
    layer::{Constants, Feed, KEY, Layer, State, VALUE},
    node::Slots,
    random::Random,
    tensor::Dtype,
};

use crate::drive;

const PAGE: usize = 16;

fn attrs() -> Attrs {
    Attrs {
        window: 4,
        ..Attrs::new(4, 2, 32).budget(0.0, 3)
    }
}

/// Runs in place; unlike [`Layer::run`] it does not mind what the output is.
fn run(layer: &Layer, state: &mut State, feed: &Feed) -> Vec<f32> {
    let owned = layer.inputs(feed);
    let inputs: Vec<_> = owned.iter().map(|(name, t)| (*name, t)).collect();
    let mut result = layer.output(feed);
    layer
        .call_in_place(&inputs, &mut result, state)
        .expect("the call succeeds");
    result.read()
}

/// A prompt with some of its tokens' keys or values replaced.
fn prompt(attrs: &Attrs, count: usize, broken: std::ops::Range<usize>, slot: usize, with: f32) -> Rows {
    let mut rows = drive::rows(&mut Random::new(5), attrs, count);
    let width = attrs.kv_heads * attrs.head_size;
    let data = if slot == KEY { &mut rows.key } else { &mut rows.value };
    data[broken.start * width..broken.end * width].fill(with);
    rows
}

/// Overwrites rows of the cache of every head.
fn poke(state: &mut State, slot: usize, rows: std::ops::Range<usize>, with: f32) {
    let &[batch, kv_heads, capacity, size] = state.tensors[slot].shape() else {
        unreachable!()
    };
    for head in 0..batch * kv_heads {
        let broken = vec![with; rows.len() * size];
        state.tensors[slot].write((head * capacity + rows.start) * size, &broken);
    }
}

fn all_nan(what: &str, output: &[f32]) {
    assert!(output.iter().all(|x| x.is_nan()), "{what}: {output:?}");
}

fn finite(what: &str, output: &[f32]) {
    assert!(output.iter().all(|x| x.is_finite()), "{what}: {output:?}");
}

/// Every page by turns, the first and other forced ones too: a step that reads every page gives NaN; so does a prefill
/// from the broken token on, and not before, by our own kernels (a head sink keeps ONNX Runtime's out) and where ONNX
/// Runtime's own were asked first.
#[test]
fn any_page_of_a_prompt() {
    for &dtype in host::dtypes() {
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for page in 0..4 {
                for (with_sink, mode) in [
                    (true, Mode::Retro),
                    (true, Mode::Dense),
                    (true, Mode::Streaming),
                    (true, Mode::Periodic),
                    (false, Mode::Retro),
                ] {
                    let attrs = Attrs {
                        mode,
                        ..attrs().full_budget()
                    };
                    let constants = Constants {
                        head_sink: with_sink.then(|| vec![0.5; attrs.heads]),
                        ..Constants::default()
                    };
                    let layer = Layer::with(&attrs, dtype, Slots::default(), &constants);
                    let mut state = State::new(&attrs, dtype, 1, 80);
                    let rows = prompt(&attrs, 60, page * PAGE..(page * PAGE + PAGE).min(60), KEY, broken);
                    let what = format!("{dtype:?} {broken} page {page} mode {mode} sink {with_sink}");
                    let output = run(&layer, &mut state, &drive::prefill_feed(&rows, 60));
                    let width = attrs.heads * attrs.head_size;
                    if with_sink || !host::on_gpu() {
                        finite(&what, &output[..page * PAGE * width]);
                        all_nan(&what, &output[page * PAGE * width..]);
                    }
                    let mut random = Random::new(6);
                    for t in 60..63 {
                        let r = t - 60;
                        let rows = drive::rows(&mut random, &attrs, r + 1);
                        let output = run(&layer, &mut state, &drive::feed(&rows, t + 1, r as i32, None));
                        all_nan(&format!("{what} t = {t}"), &output);
                    }
                }
            }
        }
    }
}

/// A page whose score is NaN is among those that a step reads, whatever the selector, and however many fare better.
#[test]
fn a_page_that_cannot_be_scored_is_read() {
    for &dtype in host::dtypes() {
        for selector in host::selectors() {
            for group_score in [GroupScore::Max, GroupScore::Softmax] {
                for (heads, kv_heads) in [(4, 2), (2, 2)] {
                    let attrs = Attrs {
                        selector,
                        group_score,
                        heads,
                        kv_heads,
                        ..attrs()
                    };
                    let layer = Layer::new(&attrs, dtype);
                    // One key of the page, all of them.
                    for broken in [5 * PAGE + 7..5 * PAGE + 8, 5 * PAGE..6 * PAGE] {
                        let mut state = State::new(&attrs, dtype, 1, 400);
                        let rows = prompt(&attrs, 350, broken.clone(), KEY, f32::NAN);
                        run(&layer, &mut state, &drive::prefill_feed(&rows, 350));
                        let rows = drive::rows(&mut Random::new(6), &attrs, 1);
                        let output = run(&layer, &mut state, &drive::feed(&rows, 351, 0, None));
                        let what = format!("{dtype:?} {selector} {group_score} {heads} heads, keys {broken:?}");
                        let steps = state.page_steps(0, 22);
                        assert!(steps.iter().all(|s| s[5] == 350), "{what}: {steps:?}");
                        all_nan(&what, &output);
                    }
                }
            }
        }
    }
}

/// A retrospective token's supplement, made of broken pages alone: the token is NaN, not what it was without them.
#[test]
fn a_supplement_of_broken_pages() {
    for &dtype in host::dtypes() {
        for slot in [KEY, VALUE] {
            for broken in [f32::NAN, f32::INFINITY] {
                let layer = Layer::new(&attrs(), dtype);
                let mut state = State::new(&layer.attrs, dtype, 1, 80);
                let rows = prompt(&layer.attrs, 60, 0..0, KEY, 0.0);
                run(&layer, &mut state, &drive::prefill_feed(&rows, 60));
                let mut random = Random::new(8);
                let rows = drive::rows(&mut random, &layer.attrs, 1);
                // The first page and the newest.
                let output = run(&layer, &mut state, &drive::feed(&rows, 61, 0, Some(2)));
                finite("before", &output);
                // Then all of them, of which token 60 has missed the second and the third.
                poke(&mut state, slot, PAGE..3 * PAGE, broken);
                let rows = drive::rows(&mut random, &layer.attrs, 2);
                let output = run(&layer, &mut state, &drive::feed(&rows, 62, 1, Some(4)));
                if broken.is_nan() || slot == KEY {
                    all_nan(&format!("{dtype:?} {broken} slot {slot}"), &output);
                } else {
                    let broken = output.iter().all(|x| !x.is_finite());
                    assert!(broken, "{dtype:?} slot {slot}: {output:?}");
                }
            }
        }
    }
}

/// A query of NaN, of the newest token or of a retrospective one.
#[test]
fn broken_queries() {
    for &dtype in host::dtypes() {
        for mode in [Mode::Retro, Mode::Dense, Mode::Streaming, Mode::Periodic] {
            for which in 0..2 {
                let attrs = Attrs { mode, ..attrs() };
                let layer = Layer::new(&attrs, dtype);
                let mut state = State::new(&attrs, dtype, 1, 200);
                let rows = prompt(&attrs, 160, 0..0, KEY, 0.0);
                run(&layer, &mut state, &drive::prefill_feed(&rows, 160));
                let mut random = Random::new(9);
                let rows = drive::rows(&mut random, &attrs, 1);
                run(&layer, &mut state, &drive::feed(&rows, 161, 0, Some(2)));
                let mut rows = drive::rows(&mut random, &attrs, 2);
                let width = attrs.heads * attrs.head_size;
                rows.query[which * width..][..width].fill(f32::NAN);
                let output = run(&layer, &mut state, &drive::feed(&rows, 162, 1, Some(6)));
                let what = format!("{dtype:?} mode {mode} token {which}");
                // The newest query takes the last page for both; a page that the retrospective one has missed is among
                // them, as its query chooses six of eleven.
                all_nan(&what, &output[which * width..][..width]);
                finite(&what, &output[(1 - which) * width..][..width]);
            }
        }
    }
}

/// A query of NaN in a prompt makes its own row NaN, and no other.
#[test]
fn a_broken_query_of_a_prompt() {
    for &dtype in host::dtypes() {
        for with_sink in [true, false] {
            if !with_sink && host::on_gpu() {
                continue; // Computed by ONNX Runtime's own operator.
            }
            let constants = Constants {
                head_sink: with_sink.then(|| vec![0.5; 4]),
                ..Constants::default()
            };
            let layer = Layer::with(&attrs(), dtype, Slots::default(), &constants);
            let width = layer.attrs.heads * layer.attrs.head_size;
            for which in [0, 17, 59] {
                let mut state = State::new(&layer.attrs, dtype, 1, 80);
                let mut rows = prompt(&layer.attrs, 60, 0..0, KEY, 0.0);
                rows.query[which * width..][..width].fill(f32::NAN);
                let output = run(&layer, &mut state, &drive::prefill_feed(&rows, 60));
                let what = format!("{dtype:?} sink {with_sink} token {which}");
                all_nan(&what, &output[which * width..][..width]);
                finite(&what, &output[..which * width]);
                finite(&what, &output[(which + 1) * width..]);
            }
        }
    }
}

/// Work that is split over pages: broken ones fill the first part, or one of the others.
#[test]
fn parts_of_many_pages() {
    for &dtype in host::dtypes() {
        for at in [0, 800] {
            let attrs = Attrs {
                heads: 2,
                kv_heads: 1,
                ..attrs().full_budget()
            };
            let layer = Layer::new(&attrs, dtype);
            let mut state = State::new(&attrs, dtype, 1, 1700);
            let rows = prompt(&attrs, 1600, 0..0, KEY, 0.0);
            run(&layer, &mut state, &drive::prefill_feed(&rows, 1600));
            poke(&mut state, KEY, at..at + 800, f32::NAN);
            let rows = drive::rows(&mut Random::new(9), &attrs, 1);
            let output = run(&layer, &mut state, &drive::feed(&rows, 1601, 0, None));
            all_nan(&format!("{dtype:?} from {at}"), &output);
        }
    }
}

/// Logits of -inf weigh nothing, as in any softmax: the rest of the tokens decide. Where there is no other, 0 / 0.
#[test]
fn logits_of_minus_infinity() {
    for &dtype in host::dtypes() {
        let attrs = Attrs::new(1, 1, 32).full_budget();
        let layer = Layer::new(&attrs, dtype);
        let mut random = Random::new(4);
        let mut query = drive::rows(&mut random, &attrs, 1);
        query.query.iter_mut().for_each(|q| *q = q.abs() + 0.125);
        for (count, broken) in [(40, 16), (40, 39)] {
            let mut state = State::new(&attrs, dtype, 1, 60);
            let rows = prompt(&attrs, count, 0..0, KEY, 0.0);
            run(&layer, &mut state, &drive::prefill_feed(&rows, count));
            poke(&mut state, KEY, 0..broken, f32::NEG_INFINITY);
            let output = run(&layer, &mut state, &drive::feed(&query, count + 1, 0, None));
            // Tokens `broken`.. and the new one, in f64.
            let size = attrs.head_size;
            let keys = state.rows(KEY, 0, count + 1);
            let values = state.rows(VALUE, 0, count + 1);
            let logit = |row: usize| -> f64 {
                let key = &keys[row * size..][..size];
                let dot: f64 = key
                    .iter()
                    .zip(&query.query)
                    .map(|(k, q)| f64::from(*k) * f64::from(*q))
                    .sum();
                dot / (size as f64).sqrt()
            };
            let weights: Vec<f64> = (broken..=count).map(|row| logit(row).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (d, got) in output.iter().enumerate() {
                let of = weights
                    .iter()
                    .zip(broken..)
                    .map(|(w, row)| w * f64::from(values[row * size + d]));
                let expected = of.sum::<f64>() / sum;
                let tolerance = if dtype == Dtype::F32 {
                    2e-5
                } else {
                    2.0 * f64::from(dtype.tolerance())
                };
                assert!(
                    (f64::from(*got) - expected).abs() <= tolerance,
                    "{dtype:?} {broken}: {got}, {expected}"
                );
            }
        }
        let mut state = State::new(&attrs, dtype, 1, 60);
        let mut rows = prompt(&attrs, 20, 0..20, KEY, f32::NEG_INFINITY);
        rows.query.iter_mut().for_each(|q| *q = q.abs() + 0.125);
        run(&layer, &mut state, &drive::prefill_feed(&rows, 20));
        query.key.fill(f32::NEG_INFINITY);
        let output = run(&layer, &mut state, &drive::feed(&query, 21, 0, None));
        all_nan(&format!("{dtype:?}: nothing but -inf"), &output);
    }
}
