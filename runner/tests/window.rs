//! When the window opens: not before a step has left pages out, and not in contexts that are read whole.

mod ledger;

use std::sync::OnceLock;

use ledger::Ledger;
use retro_export::Settings;
use retro_run::{
    Model, OpenOptions, Runtime,
    decoder::{
        decode_loop::{CHUNK, Decoder, Policy, prefill},
        page_reads::PageReads,
        session::Steps,
    },
};

const PROMPT: usize = 100;
const STEPS: usize = 60;

/// The converted model.
const RETRO: &str = "retro";

/// ONNX Runtime is loaded once a process.
fn runtime() -> &'static Runtime {
    static LOADED: OnceLock<Runtime> = OnceLock::new();
    LOADED.get_or_init(|| Runtime::load(None).unwrap())
}

fn open(models: &Ledger, steps: Steps) -> Model {
    let options = OpenOptions {
        threads: Some(1),
        steps,
        ..OpenOptions::default()
    };
    models.open(runtime(), RETRO, options)
}

/// The logits of every step behind a prompt, whatever they say is next, and what the steps read.
fn decode(model: &mut Model, policy: Policy) -> (Vec<Vec<f32>>, PageReads) {
    let token = |i: usize| 3 + (i as u32 * 7) % 90;
    let prompt: Vec<u32> = (0..PROMPT).map(token).collect();
    let mut state = model.new_state(1, PROMPT + STEPS).unwrap();
    prefill(model, &mut state, &prompt, CHUNK, |_| {
        Ok::<(), retro_run::decoder::Error>(())
    })
    .unwrap();
    let mut decoder = Decoder::new(model, &mut state, &[&prompt], policy).unwrap();
    let logits = (PROMPT..PROMPT + STEPS).map(|i| {
        decoder.push(0, token(i));
        decoder.step().unwrap().row(0).to_vec()
    });
    (logits.collect(), decoder.reading())
}

fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn steps_behind_those_that_read_everything_correct_the_same() {
    let models = Ledger::new();
    // The floor is 128 tokens: 28 steps read everything, 32 leave pages out.
    models.convert(
        RETRO,
        Settings {
            window: 4,
            min_pages: Some(8),
            ..Settings::paper()
        },
    );
    // Fed from fixed buffers, steps are of one shape from the start.
    let (mut plain, mut at_once) = (open(&models, Steps::Plain), open(&models, Steps::FixedBuffers));
    for window in [2, 4] {
        let policy = Policy::new(&plain, Some(window), None).unwrap();
        let (late, read) = decode(&mut plain, policy);
        let (early, all_read) = decode(&mut at_once, policy);
        let difference = largest_difference(&late, &early);
        assert!(difference < 1e-3, "w = {window}: {difference}");
        assert_eq!((read.pages(), read.exposure()), (all_read.pages(), all_read.exposure()));
    }
    // A window makes a difference here: what was compared has corrections in it.
    let [one, four] = [1, 4].map(|w| decode(&mut plain, Policy::new(&at_once, Some(w), None).unwrap()).0);
    assert!(largest_difference(&one, &four) > 1e-2);
}

#[test]
fn short_contexts_are_read_whole_unless_asked_otherwise() {
    let models = Ledger::new();
    models.convert(
        RETRO,
        Settings {
            window: 2,
            min_pages: Some(1),
            dense_below: Some(PROMPT + 20),
            ..Settings::paper()
        },
    );
    let mut model = open(&models, Steps::Plain);
    let policy = Policy::new(&model, None, None).unwrap();
    assert_eq!(policy.dense_below, PROMPT + 20);
    let (whole, read) = decode(&mut model, policy);
    let everything = Policy::new(&model, Some(1), Some("1.0".parse().unwrap())).unwrap();
    let (dense, all_read) = decode(&mut model, everything);
    assert!(largest_difference(&whole[..20], &dense[..20]) < 1e-3);
    assert!(largest_difference(&whole[21..], &dense[21..]) > 1e-2);
    assert!(read.share() < all_read.share());
    assert_eq!(all_read.share(), Some(1.0));

    // Another length, a budget, and steps of one shape.
    let nothing_whole = policy.dense_below(&model, 0).unwrap();
    let (_, sparse) = decode(&mut model, nothing_whole);
    assert!(sparse.share() < read.share());
    let budget = Policy::new(&model, None, Some("0.15".parse().unwrap())).unwrap();
    let narrow = Policy::new(&model, Some(1), None).unwrap();
    let of_one_shape = Policy::new(&open(&models, Steps::FixedBuffers), None, None).unwrap();
    for policy in [budget, of_one_shape] {
        assert_eq!(policy.dense_below, 0);
    }
    // One token a step gains from short contexts alone.
    assert_eq!(narrow.dense_below, PROMPT + 20);
    let far = policy.dense_below(&model, 5000).unwrap();
    assert_eq!(
        (far.with_window(4).dense_below, far.with_window(1).dense_below),
        (5000, 1024)
    );
    let all_whole = narrow.dense_below(&model, 1000).unwrap();
    let (all, read) = decode(&mut model, all_whole);
    assert!(largest_difference(&all, &dense) < 1e-3);
    assert_eq!(read.share(), Some(1.0));
}
