//! Real exports (tests/data/zoo.tar.xz): with a budget of all pages a converted model gives the logits of the original,
//! whether one, two or four tokens are fed a step. `cargo test -- --nocapture` prints the table.

use std::{fs::File, path::Path};

use ndarray::{Array1, Array2, ArrayD};
use ndarray_npy::NpzReader;
use retro_tests::{compare, decoder::Decoder, host, paths};

use crate::convert::{convert, default_page};

const WINDOWS: [usize; 3] = [1, 2, 4];

/// What ONNX Runtime gave for the original: logits of every position.
struct Expected {
    ids: Vec<i64>,
    prompt: usize,
    logits: Vec<f32>,
}

fn recorded(folder: &Path) -> Expected {
    let file = File::open(folder.join("io.npz")).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut npz = NpzReader::new(file).expect("an npz file");
    let prompt: Array2<i64> = npz.by_name("prompt_ids").expect("prompt_ids");
    let decoded: Array1<i64> = npz.by_name("decode_ids").expect("decode_ids");
    let mut logits = Vec::new();
    for name in ["logits_prefill", "logits_decode"] {
        let array: ArrayD<f32> = npz
            .by_name(name)
            .unwrap_or_else(|e| panic!("{}: {name}: {e}", folder.display()));
        logits.extend(array.iter().copied());
    }
    Expected {
        prompt: prompt.len(),
        ids: prompt.iter().chain(&decoded).copied().collect(),
        logits,
    }
}

/// The same for what this ONNX Runtime makes of the original here and now, one token a step.
fn observed(folder: &Path, recorded: &Expected) -> Vec<f32> {
    let Expected { ids, prompt, .. } = recorded;
    let mut model = Decoder::open(folder, false, ids.len() + 6, default_page(), true);
    let mut logits = model.feed(&ids[..*prompt], *prompt, None, None);
    for t in *prompt..ids.len() {
        logits.extend(model.feed(&ids[t..=t], t + 1, None, None));
    }
    logits
}

/// The largest difference over the prompt and all steps.
fn difference(folder: &Path, window: usize, all_logits: bool, expected: &Expected) -> f32 {
    let Expected { ids, prompt, logits } = expected;
    let mut model = Decoder::open(folder, true, ids.len() + 6, default_page(), all_logits);
    let vocabulary = model.vocabulary();
    let mut worst = 0.0f32;
    let mut compare = |got: &[f32], newest: usize| {
        let end = (newest + 1) * vocabulary;
        worst = worst.max(compare::max_difference(got, &logits[end - got.len()..end]));
    };
    compare(&model.feed(&ids[..*prompt], *prompt, Some(-1), None), prompt - 1);
    for t in *prompt..ids.len() {
        let retro = (window - 1).min(t);
        compare(&model.feed(&ids[t - retro..=t], t + 1, Some(retro as i32), None), t);
    }
    worst
}

fn check(case: &str, tolerance: f32, against_itself: bool) {
    if against_itself && host::on_gpu() {
        return println!(
            "{case}: not tested: ONNX Runtime's CPU kernels round activations to 8 bits, its CUDA kernels do not"
        );
    }
    let source = paths::zoo(case);
    let mut expected = recorded(&source);
    if against_itself {
        expected.logits = observed(&source, &expected);
    }
    let folder = tempfile::tempdir().unwrap();
    for window in WINDOWS {
        let mut worst = [0.0f32; 2];
        for all_logits in [false, true] {
            let target = folder.path().join(format!("w{window}-{all_logits}"));
            let w = window.to_string();
            let mut options = vec!["--window", &w, "--budget", "1.0"];
            if all_logits {
                options.push("--all-logits");
            }
            convert(&source, &target, &options).unwrap_or_else(|e| panic!("{case} does not convert: {e}"));
            worst[usize::from(all_logits)] = difference(&target, window, all_logits, &expected);
        }
        println!(
            "| {case} | {window} | {:.1e} | {:.1e} | {tolerance:.0e} |",
            worst[0], worst[1]
        );
        assert!(
            worst.iter().all(|&w| w <= tolerance),
            "{case}, w = {window}: off by {worst:?}, more than {tolerance}"
        );
    }
}

/// A model with layers that stay GroupQueryAttention, in float32: ONNX Runtime has no CUDA kernel for those.
fn check_with_layers_left(case: &str, tolerance: f32) {
    if host::on_gpu() {
        return println!(
            "{case}: not tested: ONNX Runtime has no float32 GroupQueryAttention on CUDA, which it leaves in"
        );
    }
    check(case, tolerance, false);
}

/// The control: this ONNX Runtime and this harness reproduce the recording from the original.
#[test]
fn originals_give_what_was_recorded() {
    for case in [
        "genai-llama-fp32-cpu",
        "genai-llama-fp16-cuda",
        "genai-qwen3-fp32-cpu",
        "genai040-old_phi-fp32-cpu",
    ] {
        if host::on_gpu() && !case.contains("fp16") {
            println!("{case}: not tested: ONNX Runtime has no float32 GroupQueryAttention on CUDA");
            continue;
        }
        let source = paths::zoo(case);
        let recorded = recorded(&source);
        let tolerance = if case.contains("fp16") { 1e-2 } else { 1e-4 };
        compare::assert_close(case, &observed(&source, &recorded), &recorded.logits, tolerance);
    }
}

fn refuse(case: &str, says: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let error = convert(&paths::zoo(case), &target, &[]).expect_err("it is refused");
    println!("| {case} | refused: {} |", error.lines().last().unwrap_or_default());
    for word in says {
        assert!(
            error.contains(word),
            "{case}: the reason does not say {word:?}: {error}"
        );
    }
    assert!(!target.join("model.onnx").exists(), "{case}: something was written");
}

macro_rules! cases {
    ($($name:ident: $case:literal $check:ident($($argument:expr),*);)*) => {
        $(#[test] fn $name() { $check($case, $($argument),*) })*

        /// No case of the folder is forgotten.
        #[test]
        fn every_case_has_a_test() {
            let mut known = vec![$($case),*];
            known.sort();
            let folder = std::fs::read_dir(paths::zoo("")).expect("the zoo").flatten();
            let mut found: Vec<String> = folder.filter(|e| e.path().is_dir()).map(|e| e.file_name().into_string().unwrap()).collect();
            found.sort();
            assert_eq!(known, found);
        }
    };
}

cases! {
    gemma2_f32: "genai-gemma2-fp32-cpu" check_with_layers_left(1e-4);
    gpt_oss_f32: "genai-gpt_oss-fp32-cpu" check_with_layers_left(1e-4);
    llama_f16_cuda: "genai-llama-fp16-cuda" check(2e-2, false);
    llama_f16_dml: "genai-llama-fp16-dml" check(2e-2, false);
    llama_f32: "genai-llama-fp32-cpu" check(1e-4, false);
    llama_f32_cuda_is_broken: "genai-llama-fp32-cuda" refuse(&["RotaryEmbedding"]);
    llama_int4: "genai-llama-int4-cpu" check(2e-2, true);
    llama_int4_cuda: "genai-llama-int4-cuda" check(2e-2, true);
    llama_paged: "genai-llama-paged-fp16-cuda" refuse(&["PagedAttention"]);
    llama31_f32: "genai-llama31-fp32-cpu" check(1e-4, false);
    phi_f32: "genai-phi-fp32-cpu" check(1e-4, false);
    phi3_f32: "genai-phi3-fp32-cpu" check(1e-4, false);
    qwen2_int4: "genai-qwen2-int4-cpu" check(2e-2, true);
    qwen3_f32: "genai-qwen3-fp32-cpu" check(1e-4, false);
    old_llama_f16_dml: "genai040-old_llama-fp16-dml" check(2e-2, false);
    old_llama_f32: "genai040-old_llama-fp32-cpu" check(1e-4, false);
    old_llama_f32_cuda_has_mha: "genai040-old_llama-fp32-cuda" check(1e-4, false);
    old_phi_f32: "genai040-old_phi-fp32-cpu" check(1e-4, false);
}
