//! The window inside the graph: a host that feeds each token once gets what a host gets that feeds tokens again by itself.

use retro_models::Options;
use retro_tests::{compare, decoder::Decoder, host, paths, zoo};

use crate::{
    convert::convert,
    verify::{export_with, ways},
};

const PROMPT: usize = 90;
const STEPS: usize = 30;

/// So little is read that pages are chosen, and the window shows.
const SPARSE: [&str; 8] = [
    "--page-size",
    "4",
    "--budget",
    "16",
    "--selector",
    "signed_moments",
    "--sink-pages",
    "1",
];

/// A model that is fed one token a step, or those of its window.
struct Fed {
    model: Decoder,
    /// None: the graph keeps it.
    window: Option<usize>,
}

impl Fed {
    fn prompt(&mut self, tokens: &[i64], ends: &[usize]) -> Vec<f32> {
        let mut from = 0;
        let mut logits = Vec::new();
        for &end in ends {
            logits = self.model.feed(&tokens[from..end], end, self.window.map(|_| -1), None);
            from = end;
        }
        logits
    }

    /// Feeds `tokens[from..to]` one by one; their logits.
    fn steps(&mut self, tokens: &[i64], from: usize, to: usize) -> Vec<f32> {
        let mut logits = Vec::new();
        for t in from..to {
            let retro = self.window.map(|window| (window - 1).min(t - from));
            let first = t - retro.unwrap_or(0);
            logits.extend(
                self.model
                    .feed(&tokens[first..=t], t + 1, retro.map(|r| r as i32), None),
            );
        }
        logits
    }
}

fn tokens(seed: usize) -> Vec<i64> {
    let token = |i: usize| ((i * 7919 + seed * 104_729) % 61 + 1) as i64;
    (0..PROMPT + STEPS).map(token).collect()
}

/// Both forms of the tiny Llama, for a window.
struct Forms {
    folder: tempfile::TempDir,
    window: usize,
}

impl Forms {
    fn new(window: usize, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        retro_models::build(&paths::data("golden/model"), &source, &Options::default()).expect("the tiny Llama");
        let w = window.to_string();
        for (name, flag) in [("host", None), ("graph", Some("--window-in-graph"))] {
            let options = [&["--window", &w][..], &SPARSE, more, flag.as_slice()].concat();
            convert(&source, &folder.path().join(name), &options).expect("it converts");
        }
        Self { folder, window }
    }

    /// Host, then graph; their state is poison.
    fn open(&self, all_logits: bool) -> [Fed; 2] {
        ["host", "graph"].map(|name| Fed {
            model: Decoder::open(&self.folder.path().join(name), true, PROMPT + STEPS + 3, 4, all_logits),
            window: (name == "host").then_some(self.window),
        })
    }
}

/// Rows that don't count, and as many as count, are multiplied together: rounding may differ, and no more.
fn tolerance() -> f32 {
    if host::on_gpu() { 1e-4 } else { 2e-5 }
}

#[test]
fn both_forms_give_the_same_logits() {
    let tokens = tokens(1);
    let mut of_windows = Vec::new();
    for window in [2, 3, 4, 8] {
        let forms = Forms::new(window, &[]);
        for (what, ends) in [("whole", &[PROMPT][..]), ("in chunks", &[40, 42, PROMPT])] {
            let [expected, got] = forms.open(false).map(|mut fed| {
                let prompt = fed.prompt(&tokens, ends);
                [prompt, fed.steps(&tokens, PROMPT, PROMPT + STEPS)].concat()
            });
            compare::assert_close(&format!("w = {window}, {what}"), &got, &expected, tolerance());
            of_windows.push(got);
        }
    }
    // The windows are at work: the logits differ by more than rounding.
    let most = compare::max_difference(&of_windows[0], &of_windows[4]);
    assert!(most > 100.0 * tolerance(), "w = 2 and 4 differ by {most}");
}

/// Fewer tokens than the window holds: fewer rows than that.
#[test]
fn texts_shorter_than_the_window() {
    let tokens = tokens(1);
    let forms = Forms::new(8, &[]);
    for prompt in [1, 2, 3, 8] {
        let [expected, got] = forms.open(false).map(|mut fed| {
            let first = fed.prompt(&tokens, &[prompt]);
            [first, fed.steps(&tokens, prompt, prompt + 20)].concat()
        });
        compare::assert_close(&format!("a prompt of {prompt}"), &got, &expected, tolerance());
    }
}

/// Going back, and a second prompt, close the window.
#[test]
fn a_host_that_goes_back_need_not_say_so() {
    let (taken, other) = (tokens(1), {
        let mut other = tokens(1);
        other[PROMPT..].iter_mut().for_each(|token| *token = 62 - *token);
        other
    });
    let forms = Forms::new(4, &[]);
    for back in [1, 2, 5, 20] {
        let from = PROMPT + 20 - back;
        let mut second = taken.clone();
        second[..from].copy_from_slice(&other[..from]);
        let [expected, got] = forms.open(false).map(|mut fed| {
            fed.prompt(&other, &[PROMPT]);
            fed.steps(&other, PROMPT, PROMPT + 20);
            fed.steps(&second, from, PROMPT + STEPS)
        });
        compare::assert_close(&format!("back by {back}"), &got, &expected, tolerance());
    }
    let [expected, got] = forms.open(false).map(|mut fed| {
        fed.prompt(&taken, &[PROMPT - 20]);
        fed.steps(&taken, PROMPT - 20, PROMPT - 10);
        // The second turn: what was decoded, and a prompt behind it.
        let retro = fed.window.map(|_| -1);
        let turn = fed.model.feed(&taken[PROMPT - 10..PROMPT], PROMPT, retro, None);
        [turn, fed.steps(&taken, PROMPT, PROMPT + STEPS)].concat()
    });
    compare::assert_close("a second turn", &got, &expected, tolerance());
}

/// All logits: a row for each token that the host fed.
#[test]
fn all_logits_are_those_of_the_tokens_fed() {
    let tokens = tokens(1);
    let forms = Forms::new(3, &["--all-logits"]);
    let [expected, got] = forms.open(true).map(|mut fed| {
        let mut logits = fed.prompt(&tokens, &[PROMPT]);
        let vocabulary = fed.model.vocabulary();
        assert_eq!(logits.len(), PROMPT * vocabulary);
        for t in PROMPT..PROMPT + 6 {
            let retro = fed.window.map(|window| (window - 1).min(t - PROMPT));
            let rows = 1 + retro.unwrap_or(0);
            let step = fed
                .model
                .feed(&tokens[t + 1 - rows..=t], t + 1, retro.map(|r| r as i32), None);
            assert_eq!(step.len(), rows * vocabulary);
            logits.extend_from_slice(&step[(rows - 1) * vocabulary..]);
        }
        logits
    });
    compare::assert_close("all logits", &got, &expected, tolerance());
}

/// Exports of the zoo that are GroupQueryAttention throughout.
#[test]
fn exports_of_the_zoo() {
    for case in [
        "genai-llama-fp32-cpu",
        "genai-phi-fp32-cpu",
        "genai-qwen3-fp32-cpu",
        "genai-gemma2-fp32-cpu",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let tokens: Vec<i64> = (0..40).map(|i| 5 + (i * 37) % 200).collect();
        let mut all = Vec::new();
        for flag in [None, Some("--window-in-graph")] {
            let target = folder.path().join(flag.unwrap_or("plain"));
            let sparse = ["--window", "4", "--budget", "8", "--page-size", "1"];
            convert(&paths::zoo(case), &target, &[&sparse[..], flag.as_slice()].concat()).expect("it converts");
            let mut fed = Fed {
                model: Decoder::open(&target, true, 64, 1, false),
                window: flag.is_none().then_some(4),
            };
            let prompt = fed.prompt(&tokens, &[20]);
            all.push([prompt, fed.steps(&tokens, 20, 40)].concat());
        }
        compare::assert_close(case, &all[1], &all[0], 1e-4);
    }
}

/// Exports of each kind (tests/data/zoo-graphs): what converts, converts so, and gives the logits of its original.
#[test]
fn attention_of_several_nodes() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("out")).unwrap();
    let graphs = std::fs::read_dir(paths::data("zoo-graphs"))
        .expect("the graphs")
        .flatten();
    let mut graphs: Vec<_> = graphs
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "xz"))
        .collect();
    graphs.sort();
    let convertible = graphs.into_iter().filter(|packed| {
        let source = folder.path().join("source.onnx");
        zoo::restore(packed, &source);
        convert(
            &source,
            &folder.path().join("plain.onnx"),
            &["--window", "2", "--force"],
        )
        .is_ok()
    });
    let mut compared = 0;
    for packed in convertible {
        let source = folder.path().join("source.onnx");
        let target = folder.path().join("out").join("converted.onnx");
        let options = ["--window", "2", "--window-in-graph", "--force"];
        let (report, error) = export_with(&source, &target, &host::device().to_string(), &options);
        assert_eq!(error, "", "{}", packed.display());
        let verification = &report["verification"];
        assert_eq!(verification["passed"], true, "{}: {verification}", packed.display());
        let made = ways(&verification["compared"]);
        assert!(made.iter().all(|(window, ..)| [2, 4].contains(window)), "{made:?}");
        assert!(
            made.iter().any(|(window, ..)| *window == 2) && made.iter().any(|(window, ..)| *window == 4),
            "{made:?}"
        );
        compared += 1;
    }
    assert!(compared > 30, "{compared} graphs");
}
