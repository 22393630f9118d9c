//! Every violated shape or range is an error that names the input, what it got and what was expected; nothing is
//! written.
//!
//! On CUDA the numbers of seqlens_k and page_budget lie on the device, and the host never waits to look at them: a
//! sequence whose numbers are wrong gets an output of NaN, and its state is left alone.

use retro_tests::{
    attrs::Attrs,
    host,
    layer::{Binding, Constants, Feed, Layer, STATE, State},
    node::Slots,
    random::Random,
    tensor::{Dtype, Tens},
};

use crate::{drive, rotary};

const CAPACITY: usize = 96;
const LENGTH: usize = 40;

struct Bench {
    layer: Layer,
    state: State,
    feed: Feed,
}

/// A sequence of 40 tokens and a correct next step of three tokens; every input is there.
fn bench(dtype: Dtype) -> Bench {
    let attrs = Attrs {
        window: 4,
        do_rotary: true,
        ..Attrs::new(4, 2, 32).budget(0.2, 3)
    };
    let constants = Constants {
        rotary: Some(rotary::caches(16, 120)),
        rotary_half: 16,
        head_sink: Some(vec![0.0; 4]),
    };
    let slots = Slots {
        page_budget: true,
        ..Slots::default()
    };
    let layer = Layer::with(&attrs, dtype, slots, &constants);
    let mut random = Random::new(2);
    let mut state = State::new(&attrs, dtype, 1, CAPACITY);
    let prompt = drive::rows(&mut random, &attrs, LENGTH);
    layer.run(&mut state, &drive::prefill_feed(&prompt, LENGTH), Binding::InPlace);
    let feed = drive::feed(&drive::rows(&mut random, &attrs, 3), LENGTH + 1, 2, None);
    Bench { layer, state, feed }
}

impl Bench {
    /// The step with one input replaced: the error it gives, after the check that nothing was written.
    fn refuse(&mut self, name: &str, wrong: Tens) -> String {
        let shape = wrong.shape().to_vec();
        let (result, output) = self.call_wrong(name, wrong);
        let error = result.expect_err(&format!("{name} of shape {shape:?} is refused"));
        assert!(output.is_none(), "{name}: the output was written");
        error
    }

    /// On CUDA: the step with a wrong number that only the device knows.
    fn poison(&mut self, name: &str, number: i32) {
        let (result, output) = self.call_wrong(name, Tens::ints(&[1], &[number]));
        result.unwrap_or_else(|e| panic!("{name} = {number}: the host cannot know this: {e}"));
        let output = output.unwrap_or_else(|| vec![f32::NAN]);
        assert!(
            output.iter().all(|x| x.is_nan()),
            "{name} = {number}: the output is not all NaN"
        );
    }

    /// The step with one input replaced: its result, and the output if that was written (a poisoned one is NaN, too).
    /// The state is not written.
    fn call_wrong(&mut self, name: &str, wrong: Tens) -> (Result<(), String>, Option<Vec<f32>>) {
        let owned = self.layer.inputs(&self.feed);
        let mut inputs: Vec<(&str, &Tens)> = owned.iter().map(|(name, t)| (*name, t)).collect();
        inputs.extend(self.layer.constants());
        inputs.retain(|(other, _)| *other != name);
        inputs.push((name, &wrong));
        let mut result = self.layer.output(&self.feed);
        let untouched = result.bytes().to_vec();
        let mut spare: Vec<Tens> = self
            .state
            .tensors
            .iter()
            .map(|t| Tens::poisoned(t.dtype(), t.shape()))
            .collect();
        let before = (
            self.state.bytes(),
            spare.iter().map(|t| t.bytes().to_vec()).collect::<Vec<_>>(),
        );
        let mut outputs = vec![("output", &mut result)];
        let mut in_place = Vec::new();
        for ((&(past, present), tensor), spare) in STATE.iter().zip(&mut self.state.tensors).zip(&mut spare) {
            // A replaced past cannot be its own present: the present is then a buffer of its own.
            if past == name {
                outputs.push((present, spare));
            } else {
                in_place.push((past, present, tensor));
            }
        }
        let outcome = host::run(&self.layer.session, &inputs, &mut outputs, &mut in_place);
        let output = (untouched != result.bytes()).then(|| result.read());
        let after = (
            self.state.bytes(),
            spare.iter().map(|t| t.bytes().to_vec()).collect::<Vec<_>>(),
        );
        assert!(before == after, "{name}: the state was written");
        (outcome, output)
    }

    fn refuse_saying(&mut self, name: &str, wrong: Tens, says: &[&str]) {
        let what = format!("{name} {:?}", wrong.shape());
        let error = self.refuse(name, wrong);
        for word in [name].iter().chain(says) {
            assert!(error.contains(word), "{what}: the error does not say {word:?}: {error}");
        }
    }
}

fn zeros(dtype: Dtype, shape: &[usize]) -> Tens {
    Tens::floats(dtype, shape, &vec![0.0; shape.iter().product()])
}

#[test]
fn wrong_shapes() {
    for &dtype in host::dtypes() {
        let mut bench = bench(dtype);
        let wrong: &[(&str, &[usize], &[&str])] = &[
            ("query", &[1, 3, 129], &["129", "128"]),
            ("query", &[3, 128], &["3", "128"]),
            ("key", &[1, 3, 63], &["63", "64"]),
            ("key", &[1, 2, 64], &["2", "3"]),
            ("key", &[2, 3, 64], &["2", "1"]),
            ("value", &[1, 3, 65], &["65", "64"]),
            ("value", &[1, 3, 2, 32], &["64"]),
            ("past_key", &[1, 3, CAPACITY, 32], &["3", "2"]),
            ("past_key", &[2, CAPACITY, 32], &["96", "32"]),
            ("past_value", &[1, 2, CAPACITY - 1, 32], &["95", "96"]),
            ("past_value", &[1, 2, CAPACITY, 31], &["31", "32"]),
            ("cos_cache", &[120, 17], &["17"]),
            ("cos_cache", &[40, 16], &["40"]),
            ("sin_cache", &[120, 15], &["15", "16"]),
            ("sin_cache", &[119, 16], &["119", "120"]),
            ("past_page_summary", &[1, 2, 5, 2, 32], &["5", "6"]),
            ("past_page_summary", &[1, 2, 6, 3, 32], &["3", "2"]),
            ("past_page_summary", &[1, 2, 6, 2, 33], &["33", "32"]),
            ("head_sink", &[3], &["3", "4"]),
            ("head_sink", &[1, 4], &["4"]),
        ];
        for (name, shape, says) in wrong {
            bench.refuse_saying(name, zeros(dtype, shape), says);
        }
        let wrong: &[(&str, &[usize], &[&str])] = &[
            ("past_outputs", &[1, 2, 4, 32], &["2", "3"]),
            ("past_outputs", &[1, 3, 5, 32], &["5", "4"]),
            ("past_outputs", &[1, 3, 4, 31], &["31", "32"]),
            ("past_lse", &[1, 4, 4], &["4", "3"]),
            ("past_lse", &[1, 3, 5], &["5", "4"]),
        ];
        for (name, shape, says) in wrong {
            bench.refuse_saying(name, zeros(Dtype::F32, shape), says);
        }
        bench.refuse_saying("past_page_steps", Tens::ints(&[1, 2, 5], &[0; 10]), &["5", "6"]);
        bench.refuse_saying("past_page_steps", Tens::ints(&[1, 1, 6], &[0; 6]), &["1", "2"]);
        bench.refuse_saying("seqlens_k", Tens::ints(&[2], &[40; 2]), &["2", "1"]);
        bench.refuse_saying("total_sequence_length", Tens::ints(&[2], &[41; 2]), &["2"]);
        bench.refuse_saying("retro_length", Tens::ints(&[3], &[2; 3]), &["3", "1"]);
        bench.refuse_saying("page_budget", Tens::ints(&[3], &[2; 3]), &["3", "1"]);
    }
}

#[test]
fn wrong_numbers() {
    let mut bench = bench(Dtype::F32);
    let on_device = ["seqlens_k", "page_budget"];
    let wrong: &[(&str, i32, &[&str])] = &[
        ("seqlens_k", 96, &["96"]), // one past the capacity
        ("seqlens_k", -1, &["-1"]), // nothing valid
        ("seqlens_k", i32::MAX, &["2147483647"]),
        ("seqlens_k", i32::MIN, &["-2147483648"]),
        ("total_sequence_length", -1, &["-1"]),
        ("retro_length", -2, &["-2"]),
        ("retro_length", 4, &["4", "3"]), // the window is 4
        ("retro_length", 1, &["1", "3"]), // three tokens were fed
        ("retro_length", 3, &["3"]),
        ("page_budget", -1, &["-1"]),
    ];
    for (name, number, says) in wrong {
        if host::on_gpu() && on_device.contains(name) {
            bench.poison(name, *number);
        } else {
            bench.refuse_saying(name, Tens::ints(&[1], &[*number]), says);
        }
    }
    if host::on_gpu() {
        // Fewer than the tokens that seqlens_k says: what sizes the launch is too small, and only the device sees it.
        bench.poison("total_sequence_length", 10);
        // Two retrospective tokens, and one token before the new one.
        bench.poison("seqlens_k", 1);
    } else {
        bench.refuse_saying("total_sequence_length", Tens::ints(&[1], &[10]), &["10", "41"]);
        // Which of the two numbers is wrong, nobody knows.
        let error = bench.refuse("seqlens_k", Tens::ints(&[1], &[1]));
        let named = error.contains("seqlens_k") || error.contains("retro_length");
        assert!(named && error.contains('2') && error.contains('1'), "{error}");
    }
    // After all these refusals the step itself still runs.
    let Bench { layer, mut state, feed } = bench;
    layer.run(&mut state, &feed, Binding::InPlace);
}

#[test]
fn a_prompt_longer_than_the_cache() {
    let Bench { layer, mut state, .. } = bench(Dtype::F32);
    let rows = drive::rows(&mut Random::new(1), &layer.attrs, 60);
    let feed = drive::prefill_feed(&rows, LENGTH + 60);
    let owned = layer.inputs(&feed);
    let mut inputs: Vec<(&str, &Tens)> = owned.iter().map(|(name, t)| (*name, t)).collect();
    inputs.extend(layer.constants());
    let before = state.bytes();
    let mut result = layer.output(&feed);
    let mut in_place: Vec<_> = STATE
        .iter()
        .zip(&mut state.tensors)
        .map(|(names, t)| (names.0, names.1, t))
        .collect();
    let outcome = host::run(&layer.session, &inputs, &mut [("output", &mut result)], &mut in_place);
    if host::on_gpu() && outcome.is_ok() {
        assert!(
            result.read().iter().all(|x| x.is_nan()),
            "an output of a prompt that is too long"
        );
    } else {
        let error = outcome.expect_err("too long");
        assert!(error.contains("99") && error.contains("96"), "{error}");
        assert!(host::on_gpu() || error.contains("seqlens_k"), "{error}");
    }
    assert!(before == state.bytes());
}

/// On CUDA: one sequence of a batch with a length that cannot be gets NaN, and the others get what they would beside a
/// right one.
#[test]
fn a_wrong_sequence_leaves_the_rest_of_its_batch_alone() {
    if !host::on_gpu() {
        return println!("not tested: on the CPU a wrong number is an error for the whole batch");
    }
    for &dtype in host::dtypes() {
        let Bench { layer, state, feed } = bench(dtype);
        let twice = |data: &[f32]| [data, data].concat();
        let pair_of = |first: usize| Feed {
            tokens: feed.tokens,
            query: twice(&feed.query),
            key: twice(&feed.key),
            value: twice(&feed.value),
            lengths: vec![first, LENGTH + 1],
            retro: vec![2, 2],
            budget: None,
            total: Some(CAPACITY as i32),
        };
        // Equal shapes, so that the same sums are split the same way.
        let run = |feed: &Feed| {
            let mut pair = State::stack(&[state.duplicate(), state.duplicate()]);
            let owned = layer.inputs(feed);
            let inputs: Vec<(&str, &Tens)> = owned.iter().map(|(name, t)| (*name, t)).collect();
            let mut result = layer.output(feed);
            layer
                .call_in_place(&inputs, &mut result, &mut pair)
                .expect("the call succeeds");
            (result.read(), pair.bytes())
        };
        let (expected, right) = run(&pair_of(LENGTH + 1));
        let (output, wrong) = run(&pair_of(CAPACITY + 5));
        let half = output.len() / 2;
        assert!(
            output[..half].iter().all(|x| x.is_nan()),
            "{dtype:?}: the wrong sequence's output"
        );
        retro_tests::compare::assert_close("the other sequence", &output[half..], &expected[half..], 0.0);
        for (slot, (whole, (before, right))) in wrong.iter().zip(state.bytes().iter().zip(&right)).enumerate() {
            let (first, second) = whole.split_at(whole.len() / 2);
            assert!(
                first == before,
                "{dtype:?}: {} of the wrong sequence was written",
                STATE[slot].0
            );
            assert!(
                second == &right[right.len() / 2..],
                "{dtype:?}: {} of the other sequence differs",
                STATE[slot].0
            );
        }
    }
}
