//! Rectifying passes: what a sparse step wrote becomes what dense attention writes. `RETRO_TEST_DEVICE=cuda` runs them on
//! a GPU, `RETRO_TEST_ROOT` names the repository there.

mod ledger;

use ledger::Ledger;
use retro_export::Settings;
use retro_run::{
    DecoderState, Device, Feed, Model, OpenOptions, Runtime,
    decoder::{
        self,
        batch::Prefilled,
        decode_loop::{Decoder, Policy, prefill},
        state_slot::SlotKind,
    },
};

/// `ledger`, converted for Quest's selection and for sketches.
struct Models {
    models: Ledger,
    runtime: Runtime,
    device: Device,
}

const QUEST: &str = "quest";
const SKETCH: &str = "sketch";
const CAPACITY: usize = 512;

impl Models {
    fn make() -> Self {
        let device = std::env::var("RETRO_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
        let device: Device = device.parse().unwrap();
        let models = Ledger::new();
        for (name, settings) in [(QUEST, Settings::paper()), (SKETCH, Settings::default())] {
            models.convert(name, Settings { window: 4, ..settings });
        }
        let runtime = Runtime::load_for(device, None).unwrap();
        Self {
            models,
            runtime,
            device,
        }
    }

    fn open(&self, name: &str) -> Model {
        let options = OpenOptions {
            threads: Some(2),
            device: self.device,
            ..OpenOptions::default()
        };
        let mut model = self.models.open(&self.runtime, name, options);
        model.folder.eos.clear();
        model
    }
}

fn tokens(length: usize, seed: usize) -> Vec<u32> {
    (0..length).map(|i| 3 + ((i * i + seed * i) % 90) as u32).collect()
}

fn policy(model: &Model, window: usize, budget: &str, rectify: Option<usize>) -> Policy {
    let policy = Policy::new(model, Some(window), Some(budget.parse().unwrap())).unwrap();
    policy.rectified(model, rectify).unwrap()
}

/// Keys and values, a buffer a slot, as numbers.
fn caches(model: &Model, state: &DecoderState) -> Vec<Vec<f32>> {
    let slots = model.io.slots.iter().enumerate();
    let caches = slots.filter(|(_, slot)| slot.kind == SlotKind::Cache);
    let numbers = |bytes: Vec<u8>| {
        bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    };
    caches.map(|(i, _)| numbers(state.kv().contents(i).unwrap())).collect()
}

/// The rows `rows` of a sequence in caches `[B, heads, capacity, D]`.
fn rows(model: &Model, caches: &[Vec<f32>], sequence: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
    let slot = model.io.slots.iter().find(|slot| slot.kind == SlotKind::Cache).unwrap();
    let shape = slot.shape(1, CAPACITY, 0);
    let (heads, size) = (shape[1], shape[3]);
    let row = |cache: &'_ [f32], head: usize| {
        let at = (sequence * heads + head) * CAPACITY * size;
        cache[at + rows.start * size..at + rows.end * size].to_vec()
    };
    let heads = |cache: &Vec<f32>| (0..heads).flat_map(|head| row(cache, head)).collect::<Vec<f32>>();
    caches.iter().flat_map(heads).collect()
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert!(!a.is_empty() && a.len() == b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A state that holds the prompts, one a sequence.
fn prefilled(model: &mut Model, prompts: &[&[u32]]) -> DecoderState {
    let mut state = model.new_state(prompts.len(), CAPACITY).unwrap();
    for (row, prompt) in prompts.iter().enumerate() {
        let mut single = model.new_state(1, CAPACITY).unwrap();
        prefill::<decoder::Error>(model, &mut single, prompt, 512, |_| Ok(())).unwrap();
        state.kv_mut().copy_row(row, single.kv(), 0).unwrap();
    }
    state
}

/// Feeds `steps` tokens of each text after its first `prompt`; gives the logits after each step.
fn force(
    model: &mut Model,
    state: &mut DecoderState,
    texts: &[(&[u32], usize)],
    policy: Policy,
    steps: usize,
) -> Vec<Vec<f32>> {
    let prompts: Vec<&[u32]> = texts.iter().map(|(text, prompt)| &text[..*prompt]).collect();
    let mut decoder = Decoder::new(model, state, &prompts, policy).unwrap();
    let step = |step: usize| {
        for (row, (text, prompt)) in texts.iter().enumerate() {
            decoder.push(row, text[prompt + step]);
        }
        decoder.step().unwrap().values.to_vec()
    };
    (0..steps).map(step).collect()
}

#[test]
fn passes_write_what_dense_attention_writes() {
    let models = Models::make();
    for name in [QUEST, SKETCH] {
        let model = &mut models.open(name);
        whole_budget_changes_no_token(model, name);
        for window in [1, 4] {
            one_sequence(model, name, window);
        }
        batch(model, name);
        turns(model, name);
        refusals(model);
    }
}

/// Where every page is read there is nothing to rectify.
fn whole_budget_changes_no_token(model: &mut Model, name: &str) {
    let prompts = vec![tokens(200, 7), tokens(33, 5), tokens(90, 13)];
    for prompts in [vec![prompts[0].clone()], prompts] {
        let mut ready =
            Prefilled::new(model, prompts.clone(), CAPACITY, 128, |_| Ok::<(), decoder::Error>(())).unwrap();
        let mut decode = |window, rectify| {
            let policy = policy(model, window, "1.0", rectify);
            let decoded = ready
                .decode(model, policy, 40, |_| Ok::<(), decoder::Error>(()))
                .unwrap();
            let passes = decoded.stats.passes.map(|passes| passes.count);
            assert_eq!(passes, rectify.map(|n| (39 - 1) / n), "{name}");
            assert_eq!(decoded.readings[0].passes(), passes.unwrap_or(0) as f64);
            decoded.outputs
        };
        for window in [1, 4] {
            let plain = decode(window, None);
            assert!(plain.iter().all(|output| output.len() == 40));
            for rectify in [1, 7, 32, 64] {
                assert_eq!(
                    decode(window, Some(rectify)),
                    plain,
                    "{name}, window {window}, every {rectify}"
                );
            }
        }
    }
}

/// The same numbers: bit for bit on the CPU, where calls of one shape are computed alike whatever came before.
fn assert_same(model: &Model, a: &[f32], b: &[f32], what: &str) {
    let worst = difference(a, b);
    let most = if model.device() == Device::Cpu { 0.0 } else { 1e-3 };
    assert!(worst <= most, "{what}: {worst}");
}

/// The same calls of the operator: a prefill of the prompt and of chunks of N tokens.
fn one_sequence(model: &mut Model, name: &str, window: usize) {
    const N: usize = 32;
    let (text, prompt) = (tokens(500, 11), 300);
    let what = format!("{name}, window {window}");
    let sparse = policy(model, window, "32", None);
    let passes = policy(model, window, "32", Some(N));

    let dense = &mut prefilled(model, &[&text[..prompt]]);
    for end in [prompt + N, prompt + 2 * N] {
        let ids = text[end - N..end].iter().map(|&id| i64::from(id)).collect();
        let feed = Feed {
            ids,
            lengths: vec![end],
            retro_length: -1,
            ..Feed::default()
        };
        model.run(dense, &feed).unwrap();
    }
    let decoded = prompt..prompt + 2 * N;
    let expected = rows(model, &caches(model, dense), 0, decoded.clone());

    let plain = &mut prefilled(model, &[&text[..prompt]]);
    force(model, plain, &[(&text, prompt)], sparse, 2 * N);
    let before = rows(model, &caches(model, plain), 0, decoded.clone());
    assert!(difference(&before, &expected) > 0.01, "{what}: a small budget shows");

    let state = &mut prefilled(model, &[&text[..prompt]]);
    let untouched = rows(model, &caches(model, state), 0, 0..prompt);
    // The second pass comes with the next step.
    let logits = force(model, state, &[(&text, prompt)], passes, 2 * N + 10);
    let after = caches(model, state);
    assert_same(model, &rows(model, &after, 0, decoded), &expected, &what);
    assert_eq!(rows(model, &after, 0, 0..prompt), untouched, "{what}");
    // The window is closed: the steps to come are those after a dense prefill.
    let end = prompt + 2 * N;
    let next = force(model, dense, &[(&text, end)], sparse, 10);
    for (a, b) in next.iter().zip(&logits[2 * N..]) {
        assert_same(model, a, b, &what);
    }
}

/// Sequences of a batch differ in length, and one ends early: passes reach into no prompt.
fn batch(model: &mut Model, name: &str) {
    const N: usize = 16;
    let texts = [tokens(300, 3), tokens(120, 5), tokens(200, 17)];
    let lengths = [250, 9, 120];
    let prompts: Vec<&[u32]> = texts.iter().zip(lengths).map(|(text, n)| &text[..n]).collect();
    let passes = policy(model, 2, "32", Some(N));
    let state = &mut prefilled(model, &prompts);
    let prompt_rows = |model: &Model, state: &DecoderState| {
        let caches = caches(model, state);
        let of = |row: usize| rows(model, &caches, row, 0..lengths[row]);
        (0..3).flat_map(of).collect::<Vec<f32>>()
    };
    let before = prompt_rows(model, state);
    let mut decoder = Decoder::new(model, state, &prompts, passes).unwrap();
    for step in 0..2 * N + 1 {
        for (row, text) in texts.iter().enumerate() {
            decoder.push(row, text[lengths[row] + step]);
        }
        if step == 4 {
            decoder.finish(1);
        }
        decoder.step().unwrap();
    }
    assert_eq!(decoder.output(1), &texts[1][9..14]);
    assert_eq!(decoder.output(0).len(), 2 * N + 1);
    let counted: Vec<f64> = decoder.readings().map(|reading| reading.passes()).collect();
    assert_eq!(counted, [2.0, 0.0, 2.0]);
    assert_eq!(prompt_rows(model, state), before, "{name}");
    let after = caches(model, state);
    for row in [0, 2] {
        let (start, end) = (lengths[row], lengths[row] + 2 * N);
        let dense = prefilled(model, &[&texts[row][..end]]);
        let expected = rows(model, &caches(model, &dense), 0, start..end);
        let worst = difference(&rows(model, &after, row, start..end), &expected);
        assert!(worst < 1e-3, "{name}, sequence {row}: {worst}");
    }
}

/// Going back to before a pass, and a prompt that follows one.
fn turns(model: &mut Model, name: &str) {
    const N: usize = 8;
    let (text, prompt) = (tokens(400, 29), 200);
    let passes = policy(model, 4, "32", Some(N));
    let state = &mut prefilled(model, &[&text[..prompt]]);
    let first = force(model, state, &[(&text, prompt)], passes, 20);
    // The state is as after the prompt, for whoever goes on from there.
    let again = force(model, state, &[(&text, prompt)], passes, 20);
    for (a, b) in first.iter().zip(&again) {
        assert_same(model, a, b, name);
    }
    // A next turn's prompt, of which the cache holds what passes rewrote.
    let (held, turn) = (prompt + 2 * N, 300);
    decoder::decode_loop::prefill_rest::<decoder::Error>(model, state, &text[..turn], held, 512, |_| Ok(())).unwrap();
    let dense = &mut prefilled(model, &[&text[..turn]]);
    let of = |model: &Model, state: &DecoderState| rows(model, &caches(model, state), 0, 0..turn);
    let worst = difference(&of(model, state), &of(model, dense));
    assert!(worst < 1e-3, "{name}: {worst}");
}

fn refusals(model: &Model) {
    let error = |rectify| {
        let policy = Policy::new(model, Some(1), None).unwrap();
        policy.rectified(model, Some(rectify)).unwrap_err().to_string()
    };
    assert!(error(0).contains("--rectify 0"));
    let context = model.context_length().unwrap();
    let line = error(context + 1);
    assert!(
        line.contains(&format!("--rectify {}", context + 1)) && line.contains(&context.to_string()),
        "{line}"
    );
}
