//! Many requests at a time are answered as each alone is, at temperature 0 and in float32.

mod ledger;

use std::{
    fs,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use ledger::Ledger;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use retro_run::{
    Device, Feed, Model, ModelTokenizer, OpenOptions, Runtime,
    decoder::{
        self,
        cache_rows::CacheRows,
        decode_loop::Policy,
        generate::{ContextPlan, Finish, Generation, generate},
        sampling::Sampling,
        session::Steps,
    },
    interrupt::Interrupt,
    serve::{Choosing, Engine, EngineOptions, Event, Failure, Metrics, Refusal, Request, Usage},
};
use tokio::sync::mpsc::UnboundedReceiver;

const CONTEXT: usize = 1024;
const CHUNK: usize = 96;

/// `ledger` as it is and converted, and the tokens of its documents.
struct Models {
    models: Ledger,
    runtime: Runtime,
    documents: Vec<Vec<u32>>,
}

impl Models {
    /// One for all tests: ONNX Runtime is loaded once a process.
    fn get() -> &'static Self {
        static MADE: OnceLock<Models> = OnceLock::new();
        MADE.get_or_init(Self::make)
    }

    fn make() -> Self {
        let models = Ledger::new();
        let settings = retro_export::Settings {
            window: 4,
            budget: retro_contract::Budget::Ratio(0.15),
            min_pages: Some(4),
            ..Default::default()
        };
        let large_pages = retro_export::Settings {
            page_size: 64,
            min_pages: Some(1),
            ..settings.clone()
        };
        for (name, settings) in [("retro", settings), ("large-pages", large_pages)] {
            models.convert(name, settings);
        }
        let runtime = Runtime::load_for(device(), None).unwrap();
        let model = retro_run::ModelFolder::open(&models.path(Ledger::DENSE), None).unwrap();
        let tokenizer = ModelTokenizer::open(&model).unwrap();
        let documents = fs::read_to_string(ledger::root().join("models/ledger/documents.jsonl")).unwrap();
        let documents = documents.lines().take(12).map(|line| {
            let document: serde_json::Value = serde_json::from_str(line).unwrap();
            tokenizer.encode(document["prompt"].as_str().unwrap()).unwrap()
        });
        let documents = documents.collect();
        Self {
            models,
            runtime,
            documents,
        }
    }

    fn open(&self, name: &str, steps: Steps) -> (Model, ModelTokenizer) {
        let options = OpenOptions {
            device: device(),
            steps,
            threads: Some(2),
            ..OpenOptions::default()
        };
        let model = self.models.open(&self.runtime, name, options);
        let tokenizer = ModelTokenizer::open(&model.folder).unwrap();
        (model, tokenizer)
    }

    fn engine(&self, name: &str, parallel: usize, queue: usize) -> (Engine, Arc<Metrics>) {
        self.engine_of(name, parallel, queue, Steps::Plain)
    }

    fn engine_of(&self, name: &str, parallel: usize, queue: usize, steps: Steps) -> (Engine, Arc<Metrics>) {
        let (model, tokenizer) = self.open(name, steps);
        let metrics = Arc::new(Metrics::default());
        let options = EngineOptions {
            parallel,
            queue,
            context: Some(CONTEXT),
            chunk: CHUNK,
            ..EngineOptions::new(Policy::new(&model, None, None).unwrap())
        };
        let engine = Engine::start(model, Arc::new(tokenizer), &[], options, Arc::clone(&metrics));
        (engine.unwrap(), metrics)
    }

    /// What a run of its own makes of a request.
    fn alone(&self, name: &str, requests: &[Request]) -> Vec<Vec<u32>> {
        let (mut model, tokenizer) = self.open(name, Steps::Plain);
        let mut answer = |request: &Request| {
            let options = Generation {
                plan: ContextPlan {
                    capacity: CONTEXT,
                    max_new: request.max_new,
                },
                policy: request.policy,
                chunk: CHUNK,
                sampling: Sampling::default(),
                stops: request.stops.clone(),
                more_ends: Vec::new(),
                ignore_eos: request.ignore_eos,
                interrupt: Interrupt::default(),
            };
            let done = generate::<decoder::Error>(&mut model, &tokenizer, &request.prompt, &options, &mut |_| Ok(()));
            done.unwrap().tokens
        };
        requests.iter().map(&mut answer).collect()
    }
}

/// The CPU, or what `RETRO_TEST_DEVICE` names.
fn device() -> Device {
    std::env::var("RETRO_TEST_DEVICE").map_or(Device::Cpu, |device| device.parse().unwrap())
}

fn request(prompt: &[u32], max_new: usize, window: usize, budget: Option<&str>) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_new,
        policy: Policy {
            window,
            budget: budget.map(|b| b.parse().unwrap()),
            dense_below: 0,
            rectify: None,
        },
        choosing: Choosing::default(),
        constraint: None,
        stops: Vec::new(),
        ends: Vec::new().into(),
        ignore_eos: true,
        logprobs: None,
        live: false,
        deadline: None,
    }
}

/// Everything that comes of a request.
fn collect(mut events: UnboundedReceiver<Event>) -> Result<(Vec<u32>, Finish, Usage), Failure> {
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv().expect("an end") {
            Event::Token(token) => tokens.push(token.id),
            Event::Done(done) => return Ok((tokens, done.finish, done.usage)),
            Event::Failed(failure) => return Err(failure),
        }
    }
}

/// The value of a figure.
fn figure(metrics: &Metrics, name: &str) -> f64 {
    let text = metrics.text();
    let line = text.lines().find(|l| l.split(' ').next() == Some(name));
    line.unwrap_or_else(|| panic!("{name}: {text}"))
        .rsplit(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

/// What requests are answered with: these budgets on the CPU. On a GPU the products of a batch round otherwise than those
/// of a sequence alone, so that another page may be chosen: there everything is read.
fn budgets<'a>(on_cpu: &[Option<&'a str>]) -> Vec<Option<&'a str>> {
    match device() {
        Device::Cpu => on_cpu.to_vec(),
        Device::Cuda(_) => vec![Some("1.0")],
    }
}

/// Whether the unconverted model runs too: ONNX Runtime has no GroupQueryAttention in float32 for CUDA.
fn with_dense() -> bool {
    device() == Device::Cpu
}

/// Prompts of mixed lengths and windows; more requests than slots.
fn mixed(windows: &[usize], budgets: &[Option<&str>]) -> Vec<Request> {
    let models = Models::get();
    let lengths = [300, 40, 7, 180, 1, 97, 260, 33, 500, 2, 150, 64];
    let each = models.documents.iter().zip(lengths).enumerate();
    each.map(|(i, (document, length))| {
        let window = windows[i % windows.len()];
        request(
            &document[..length.min(document.len())],
            9 + 5 * (i % 4),
            window,
            budgets[i % budgets.len()],
        )
    })
    .collect()
}

#[test]
fn a_full_house_answers_as_each_alone() {
    let models = Models::get();
    let mut retro = mixed(&[4, 1, 3, 2], &budgets(&[None, Some("0.3"), Some("64")]));
    // Some with rectifying passes, of more tokens than their window and of fewer.
    for (request, tokens) in retro.iter_mut().step_by(3).zip([5, 2, 7, 1]) {
        request.policy.rectify = Some(tokens);
    }
    let dense = with_dense().then(|| ("dense", mixed(&[1], &[None])));
    for (name, requests) in [("retro", retro)].into_iter().chain(dense) {
        let expected = models.alone(name, &requests);
        let (engine, metrics) = models.engine(name, 5, 64);
        let answers = engine.handle().submit(requests.clone()).unwrap();
        for ((events, expected), request) in answers.into_iter().zip(expected).zip(&requests) {
            let (tokens, finish, usage) = collect(events).unwrap();
            let about = format!("{name}: {} tokens, {:?}", request.prompt.len(), request.policy);
            assert_eq!(tokens, expected, "{about}");
            assert_eq!(finish, Finish::Length);
            assert_eq!((usage.prompt, usage.generated), (request.prompt.len(), request.max_new));
            let counted = name == "retro" && device() == Device::Cpu;
            assert_eq!(usage.reading.pages().is_some(), counted, "{about}");
        }
        engine.stop();
        assert_eq!(figure(&metrics, "retro_requests_total{outcome=\"length\"}"), 12.0);
        assert_eq!(figure(&metrics, "retro_requests_waiting"), 0.0);
        assert_eq!(figure(&metrics, "retro_slots_busy"), 0.0);
    }
}

/// Steps that a CUDA graph is captured of, and those that are not: while windows open, or differ. On the CPU they are fed
/// from the same buffers, and captured by nothing.
#[test]
fn captured_steps_answer_as_each_alone() {
    let models = Models::get();
    let steps = match device() {
        Device::Cpu => Steps::FixedBuffers,
        Device::Cuda(_) => Steps::Captured,
    };
    let mut one_window = mixed(&[4], &budgets(&[None, Some("0.3")]));
    one_window[2].policy.rectify = Some(3);
    let mixed_windows = mixed(&[4, 4, 4, 2], &budgets(&[None, Some("64")]));
    let dense = with_dense().then(|| ("dense", mixed(&[1], &[None])));
    for (name, mut requests) in [("retro", one_window), ("retro", mixed_windows)]
        .into_iter()
        .chain(dense)
    {
        requests.truncate(7);
        // Long enough for steps of one shape to come again.
        requests.iter_mut().for_each(|request| request.max_new += 30);
        let expected = models.alone(name, &requests);
        let (engine, metrics) = models.engine_of(name, 5, 64, steps);
        // Twice: the second time there are graphs of all shapes.
        for _ in 0..2 {
            let answers = engine.handle().submit(requests.clone()).unwrap();
            for ((events, expected), request) in answers.into_iter().zip(&expected).zip(&requests) {
                let (tokens, _, _) = collect(events).unwrap();
                let about = format!("{name}: {} tokens, {:?}", request.prompt.len(), request.policy);
                assert_eq!(&tokens, expected, "{about}");
            }
        }
        engine.stop();
        let (all, captured) = (
            figure(&metrics, "retro_steps_total"),
            figure(&metrics, "retro_steps_captured_total"),
        );
        assert!(captured > 20.0 && captured < all, "{name}: {captured} of {all}");
    }
}

/// Rows of pages' steps that lie at no multiple of 16 bytes, which kernels of a GPU read at once.
#[test]
fn rows_give_the_same_at_any_address() {
    let models = Models::get();
    let (model, _) = models.open("large-pages", Steps::Plain);
    let heads = 2;
    let mut rows = CacheRows::new(model, 4, 192).unwrap();
    let pages = rows.model().pages(rows.capacity());
    assert!(!(4 * heads * pages).is_multiple_of(16), "{pages} pages");
    let tokens: Vec<i64> = models.documents[0].iter().map(|&id| i64::from(id)).collect();
    let mut run = |at: std::ops::Range<usize>| {
        let count = at.len();
        let mut seen = Vec::new();
        for row in at.clone() {
            let feed = Feed {
                ids: tokens[..150].to_vec(),
                lengths: vec![150],
                retro_length: -1,
                ..Feed::default()
            };
            seen.extend_from_slice(rows.run(row..row + 1, &feed).unwrap().row(0));
        }
        for step in 0..12 {
            let (length, retrospective) = (151 + step, step.min(3));
            let feed = Feed {
                ids: tokens[length - retrospective - 1..length].repeat(count),
                lengths: vec![length; count],
                retro_length: retrospective as i32,
                ..Feed::default()
            };
            let logits = rows.run(at.clone(), &feed).unwrap();
            (0..count).for_each(|row| seen.extend_from_slice(logits.row(row)));
        }
        seen
    };
    for (aligned, elsewhere) in [(0..1, 1..2), (0..1, 3..4), (0..2, 1..3), (0..3, 1..4)] {
        let (expected, found) = (run(aligned), run(elsewhere.clone()));
        assert_eq!(expected.len(), found.len());
        let off = expected
            .iter()
            .zip(&found)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        let most = if device() == Device::Cpu { 0.0 } else { 1e-3 };
        assert!(off <= most, "rows {elsewhere:?}: off by {off}");
    }
}

/// Requests come and go at random, and some are cancelled: those that stay are answered as alone, in slots that held
/// other texts before.
#[test]
fn who_comes_and_goes_changes_nothing_for_others() {
    let models = Models::get();
    let requests = mixed(&[4, 2], &[None]);
    let expected = models.alone("retro", &requests);
    let (engine, metrics) = models.engine("retro", 4, 64);
    for seed in 0..3 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut kept = Vec::new();
        let mut cancelled = 0;
        for _ in 0..20 {
            let i = random.random_range(0..requests.len());
            let mut events = engine.handle().submit(vec![requests[i].clone()]).unwrap().remove(0);
            if random.random_range(0..3) == 0 {
                // Some while they wait, some while they are read, some within their answers.
                for _ in 0..random.random_range(0..6) {
                    let _: Option<Event> = events.blocking_recv();
                }
                cancelled += 1;
                drop(events);
            } else {
                kept.push((i, events));
            }
        }
        for (i, events) in kept {
            assert_eq!(collect(events).unwrap().0, expected[i], "seed {seed}, request {i}");
        }
        assert!(cancelled > 0);
    }
    engine.stop();
    assert_eq!(figure(&metrics, "retro_slots_busy"), 0.0);
    assert_eq!(figure(&metrics, "retro_requests_waiting"), 0.0);
    assert!(figure(&metrics, "retro_requests_total{outcome=\"cancelled\"}") > 0.0);
}

/// A second turn reads what is new, and is answered as a run that reads everything.
#[test]
fn a_slot_is_taken_up_again_where_the_text_goes_on() {
    let models = Models::get();
    for (window, budget) in [4, 1, 4]
        .into_iter()
        .zip(budgets(&[None, Some("0.05"), Some("1.0")]).into_iter().cycle())
    {
        let (engine, _) = models.engine("retro", 3, 8);
        let document = &models.documents[0][..400];
        let first = request(document, 30, window, budget);
        let (answer, _, usage) = collect(engine.handle().submit(vec![first]).unwrap().remove(0)).unwrap();
        assert_eq!(usage.cached, 0);
        let text = [document, &answer, &models.documents[1][..25]].concat();
        let second = request(&text, 30, window, budget);
        let expected = models.alone("retro", std::slice::from_ref(&second)).remove(0);
        let (tokens, _, usage) = collect(engine.handle().submit(vec![second.clone()]).unwrap().remove(0)).unwrap();
        assert_eq!(tokens, expected, "window {window}, budget {budget:?}");
        // What was decoded with everything read is as good as read; the last token of the answer was not fed.
        let dense = if budget == Some("1.0") { 429 } else { 400 };
        assert_eq!((usage.prompt, usage.cached), (text.len(), dense));
        // Another text that begins alike: the slot goes back.
        let fork = [&document[..200], &models.documents[2][..50]].concat();
        let fork = request(&fork, 20, window, budget);
        let expected = models.alone("retro", std::slice::from_ref(&fork)).remove(0);
        let (tokens, _, usage) = collect(engine.handle().submit(vec![fork]).unwrap().remove(0)).unwrap();
        assert_eq!((tokens, usage.cached), (expected, 200));
        // The same once more: the last token is read again, for the logits behind it.
        let (tokens, _, usage) = collect(engine.handle().submit(vec![second.clone()]).unwrap().remove(0)).unwrap();
        let again = models.alone("retro", &[second]).remove(0);
        assert_eq!(tokens, again);
        assert!(usage.cached < text.len());
        engine.stop();
    }
}

#[test]
fn passes_make_an_answer_worth_keeping() {
    let models = Models::get();
    let (engine, _) = models.engine("retro", 2, 8);
    let document = &models.documents[0][..300];
    let mut first = request(document, 21, 4, None);
    first.policy.rectify = Some(8);
    let (answer, _, _) = collect(engine.handle().submit(vec![first]).unwrap().remove(0)).unwrap();
    let text = [document, &answer, &models.documents[1][..9]].concat();
    let second = request(&text, 20, 4, None);
    let expected = models.alone("retro", std::slice::from_ref(&second)).remove(0);
    let (tokens, _, usage) = collect(engine.handle().submit(vec![second]).unwrap().remove(0)).unwrap();
    // Two passes of 8 tokens read what was decoded sparsely.
    assert_eq!((tokens, usage.cached), (expected, 316));
    engine.stop();
}

/// Several answers to one prompt, and prompts that begin alike.
#[test]
fn what_prompts_begin_with_alike_is_read_once() {
    let models = Models::get();
    let dense = with_dense().then_some(("dense", [1; 4]));
    for (name, windows) in [("retro", [4, 1, 2, 3])].into_iter().chain(dense) {
        let [document, other] = [0, 1].map(|i| models.documents[i].as_slice());
        let prompt = &document[..300];
        let mut requests: Vec<Request> = windows.iter().map(|&w| request(prompt, 20 + w, w, None)).collect();
        let fork = [&document[..250], &other[3..40]].concat();
        let shared = fork.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        requests.push(request(&fork, 20, windows[0], None));
        let expected = models.alone(name, &requests);
        let (engine, metrics) = models.engine(name, 5, 8);
        let answers = engine.handle().submit(requests.clone()).unwrap();
        let cached = [0, 299, 299, 299, shared];
        for (((events, expected), request), cached) in answers.into_iter().zip(expected).zip(&requests).zip(cached) {
            let (tokens, _, usage) = collect(events).unwrap();
            assert_eq!(tokens, expected, "{name}: {:?}", request.policy);
            assert_eq!(usage.cached, cached, "{name}");
        }
        engine.stop();
        let read = 300 + 3 + fork.len() - shared;
        assert_eq!(figure(&metrics, "retro_prompt_tokens_total"), read as f64);
        let cached: usize = cached.iter().sum();
        assert_eq!(figure(&metrics, "retro_prompt_tokens_cached_total"), cached as f64);
    }
}

/// The one that reads the prompt is cancelled while others wait for it, sooner or later.
#[test]
fn who_waits_for_anothers_prompt_goes_on_without_it() {
    let models = Models::get();
    for chunks in 0..4 {
        let prompt = &models.documents[2 + chunks][..600];
        let asked = request(prompt, 12, 4, None);
        let expected = models.alone("retro", std::slice::from_ref(&asked)).remove(0);
        let (engine, metrics) = models.engine("retro", 3, 8);
        let mut answers = engine.handle().submit(vec![asked; 3]).unwrap();
        let leader = answers.remove(0);
        while figure(&metrics, "retro_prompt_tokens_total") < (chunks * CHUNK) as f64 {
            std::thread::sleep(Duration::from_micros(200));
        }
        drop(leader);
        for events in answers {
            assert_eq!(collect(events).unwrap().0, expected, "{chunks} chunks");
        }
        engine.stop();
        // The next one goes on where it ended, and the last follows that one.
        let read = figure(&metrics, "retro_prompt_tokens_total");
        assert!((601.0..=602.0).contains(&read), "{chunks} chunks: {read} tokens");
    }
}

/// With each token comes what the answer took so far.
#[test]
fn figures_come_while_an_answer_goes_on() {
    let models = Models::get();
    let (engine, _) = models.engine("retro", 2, 8);
    let mut asked = request(&models.documents[0][..300], 20, 4, None);
    asked.live = true;
    let mut events = engine.handle().submit(vec![asked]).unwrap().remove(0);
    let mut told = Vec::new();
    let done = loop {
        match events.blocking_recv().unwrap() {
            Event::Token(token) => told.push(token.usage.unwrap()),
            Event::Done(done) => break done.usage,
            Event::Failed(failure) => panic!("{failure}"),
        }
    };
    engine.stop();
    let generated: Vec<usize> = told.iter().map(|usage| usage.generated).collect();
    assert_eq!(generated, (1..=20).collect::<Vec<_>>());
    assert!(told.iter().is_sorted_by_key(|usage| usage.decoding));
    let last = told.last().unwrap();
    assert_eq!((last.generated, last.reading), (done.generated, done.reading));
    // The first token comes of the prompt, without a decoding step.
    assert_eq!(told[0].reading.pages(), None);
    assert_eq!(told[1].reading.pages().is_some(), device() == Device::Cpu);
}

#[test]
fn what_was_cancelled_frees_its_slot() {
    let models = Models::get();
    let (engine, metrics) = models.engine("retro", 1, 8);
    let document = &models.documents[0];
    let long = request(&document[..500], 500, 1, None);
    let events = engine.handle().submit(vec![long.clone()]).unwrap().remove(0);
    let short = engine
        .handle()
        .submit(vec![request(&document[..9], 3, 1, None)])
        .unwrap()
        .remove(0);
    drop(events);
    let started = Instant::now();
    assert_eq!(collect(short).unwrap().2.generated, 3);
    let waited = started.elapsed();
    // The short one did not wait for what the long one would have taken.
    let whole = collect(engine.handle().submit(vec![long]).unwrap().remove(0)).unwrap();
    assert!(waited < whole.2.decoding / 2, "{waited:?} of {:?}", whole.2.decoding);
    engine.stop();
    assert_eq!(figure(&metrics, "retro_requests_total{outcome=\"cancelled\"}"), 1.0);
}

#[test]
fn the_queue_has_an_end_and_time_too() {
    let models = Models::get();
    let (engine, metrics) = models.engine("retro", 1, 2);
    let document = &models.documents[0];
    let long = || request(&document[..300], 600, 1, None);
    let mut running = engine.handle().submit(vec![long()]).unwrap().remove(0);
    // It runs, so that it does not wait.
    assert!(matches!(running.blocking_recv(), Some(Event::Token(_))));
    let late = Request {
        deadline: Some(Instant::now() + Duration::from_millis(50)),
        ..long()
    };
    let waiting = engine.handle().submit(vec![late, long()]).unwrap();
    let refused = engine.handle().submit(vec![long()]).unwrap_err();
    assert_eq!(refused, Refusal::Full { waiting: 2 });
    let [late, other] = <[_; 2]>::try_from(waiting).ok().unwrap();
    assert_eq!(collect(late).unwrap_err(), Failure::Deadline);
    drop((running, other));
    engine.stop();
    assert_eq!(figure(&metrics, "retro_requests_total{outcome=\"failed\"}"), 1.0);
    assert_eq!(figure(&metrics, "retro_requests_total{outcome=\"cancelled\"}"), 2.0);
}

/// Stopping waits for what was handed in.
#[test]
fn stopping_loses_nothing() {
    let models = Models::get();
    let (engine, _) = models.engine("retro", 2, 8);
    let requests = mixed(&[2], &[None])[..5].to_vec();
    let answers = engine.handle().submit(requests.clone()).unwrap();
    engine.stop();
    for (events, request) in answers.into_iter().zip(&requests) {
        assert_eq!(collect(events).unwrap().2.generated, request.max_new);
    }
}
