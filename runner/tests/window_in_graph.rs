//! A model whose graph keeps its window makes the text of one whose window the runner feeds.

mod ledger;

use ledger::Ledger;
use retro_run::{
    Model, OpenOptions, Runtime,
    decoder::{
        self,
        batch::Prefilled,
        cache_rows::CacheRows,
        decode_loop::{CHUNK, Decoder, Policy, prefill, prefill_rest},
        sampling::argmax,
        session::Steps,
    },
};

const WINDOW: usize = 4;
const CAPACITY: usize = 960;

struct Bed {
    models: Ledger,
    runtime: Runtime,
}

impl Bed {
    /// `models/ledger` in both forms. Quest's selection: a small budget shows in the text.
    fn new() -> Self {
        let models = Ledger::new();
        for window_in_graph in [false, true] {
            let settings = retro_export::Settings {
                window: WINDOW,
                window_in_graph,
                ..retro_export::Settings::paper()
            };
            models.convert(&window_in_graph.to_string(), settings);
        }
        let runtime = Runtime::load(None).unwrap();
        Self { models, runtime }
    }

    fn open(&self, in_graph: bool, steps: Steps) -> Model {
        let options = OpenOptions {
            threads: Some(2),
            steps,
            ..OpenOptions::default()
        };
        let mut model = self.models.open(&self.runtime, &in_graph.to_string(), options);
        model.folder.eos.clear();
        assert_eq!(model.keeps_window(), in_graph);
        model
    }
}

fn tokens(length: u32, seed: u32) -> Vec<u32> {
    (0..length).map(|i| 3 + (i * seed) % 90).collect()
}

/// Greedy decoding of prompts together.
fn decode(model: &mut Model, prompts: &[Vec<u32>], chunk: usize, rectify: Option<usize>) -> Vec<Vec<u32>> {
    let read = |_| Ok::<(), decoder::Error>(());
    let mut ready = Prefilled::new(model, prompts.to_vec(), CAPACITY, chunk, read).unwrap();
    let policy = Policy::new(model, None, None)
        .unwrap()
        .rectified(model, rectify)
        .unwrap();
    let first = ready.decode(model, policy, 40, read).unwrap().outputs;
    // Again from the same prompts: the state goes back with the caches.
    assert!(first == ready.decode(model, policy, 40, read).unwrap().outputs);
    first
}

fn same_text(bed: &Bed) {
    let alone = [tokens(900, 7)];
    let together = [tokens(70, 11), tokens(33, 5), tokens(120, 13)];
    // 900 is one more than a multiple of 29: a chunk of one token would be a step to the graph.
    for (prompts, chunk) in [(&alone[..], 128), (&alone, 29), (&together, 128)] {
        for rectify in [None, Some(16)] {
            let expected = decode(&mut bed.open(false, Steps::Plain), prompts, chunk, rectify);
            for steps in [Steps::Plain, Steps::FixedBuffers] {
                let got = decode(&mut bed.open(true, steps), prompts, chunk, rectify);
                assert!(got == expected, "chunks of {chunk}, rectify {rectify:?}");
            }
        }
    }
}

/// A turn of one token behind others, and the steps behind it: read again with the token before it.
fn a_turn_of_one_token(bed: &Bed) {
    let prompt = tokens(300, 7);
    let mut texts = Vec::new();
    for in_graph in [false, true] {
        let mut model = bed.open(in_graph, Steps::Plain);
        let mut state = model.new_state(1, CAPACITY).unwrap();
        let mut read = Vec::new();
        prefill(&mut model, &mut state, &prompt[..299], CHUNK, |_| {
            Ok::<(), decoder::Error>(())
        })
        .unwrap();
        let logits = prefill_rest(&mut model, &mut state, &prompt, 299, CHUNK, |n| {
            read.push(n);
            Ok::<(), decoder::Error>(())
        });
        assert_eq!(read, [1]);
        let mut token = argmax(logits.unwrap().row(0)).unwrap();
        let policy = Policy::new(&model, None, None).unwrap();
        let mut decoder = Decoder::new(&mut model, &mut state, &[&prompt], policy).unwrap();
        for _ in 0..20 {
            decoder.push(0, token);
            token = argmax(decoder.step().unwrap().row(0)).unwrap();
        }
        texts.push(decoder.output(0).to_vec());
    }
    assert_eq!(texts[0], texts[1]);
}

fn what_the_form_does_not_do_is_refused(bed: &Bed) {
    let mut model = bed.open(true, Steps::Plain);
    let why = |result: Result<(), decoder::Error>| result.unwrap_err().to_string();
    let window = why(Policy::new(&model, Some(2), None).map(drop));
    assert!(
        window.contains("--window 2") && window.contains("a window of 4 by itself"),
        "{window}"
    );
    assert!(Policy::new(&model, Some(WINDOW), None).is_ok());
    let mut state = model.new_state(1, CAPACITY).unwrap();
    let chunk = why(prefill(&mut model, &mut state, &tokens(9, 7), 1, |_| Ok(())).map(drop));
    assert!(chunk.contains("--chunk 1"), "{chunk}");
    let rows = why(CacheRows::new(model, 2, CAPACITY).map(drop));
    assert!(rows.contains("serves it converted without --window-in-graph"), "{rows}");
}

/// One test: ONNX Runtime is loaded once a process.
#[test]
fn both_forms() {
    let bed = Bed::new();
    same_text(&bed);
    a_turn_of_one_token(&bed);
    what_the_form_does_not_do_is_refused(&bed);
}
