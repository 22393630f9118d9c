//! Products of packed weights in models converted for a device: `ai.retro::MatMulNBits` in their place, where its kernel
//! takes them; on CUDA if a window is above 1. On the CPU they give the same text.

use std::{fs, path::Path, process::Command};

use prost::Message;
use retro_contract::{DOMAIN, matmul_nbits};
use retro_onnx::{ModelProto, NodeProto, read_model};
use retro_run::{
    Device,
    eval::{converted_models::ConvertedModelCache, policy::ModelSource},
};
use retro_tests::{compare, decoder::Decoder, host, paths, zoo};
use serde_json::{Value, json};

use crate::convert::{convert, default_page};

/// 4 bits, float16, and the same in float32.
const HALF: &str = "genai-llama-int4-cuda";
const SINGLE: &str = "genai-llama-int4-cpu";
const FOR_CUDA: [&str; 2] = ["--device", "cuda"];

fn model(folder: &Path) -> ModelProto {
    read_model(&folder.join("model.onnx")).expect("a model").model
}

fn products(model: &ModelProto, domain: &str) -> Vec<NodeProto> {
    let nodes = &model.graph.as_ref().expect("a graph").node;
    let of = |n: &&NodeProto| n.is(domain, matmul_nbits::OP_TYPE);
    nodes.iter().filter(of).cloned().collect()
}

/// A case converted; the folder that it is in, and the model.
fn converted(case: &str, options: &[&str]) -> (tempfile::TempDir, ModelProto) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    convert(&paths::zoo(case), &target, options).unwrap_or_else(|e| panic!("{case} {options:?}: {e}"));
    let model = model(&target);
    (folder, model)
}

/// What a command of `retro-export` prints.
fn printed(arguments: &[&str]) -> String {
    let output = Command::new(paths::command("retro-export"))
        .args(arguments)
        .output()
        .expect("retro-export starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn for_cuda_every_product_of_the_window_is_the_operators() {
    let source = products(&model(&paths::zoo(HALF)), matmul_nbits::SOURCE_DOMAIN);
    assert_eq!(source.len(), 11);
    let (folder, model) = converted(HALF, &FOR_CUDA);
    assert!(products(&model, matmul_nbits::SOURCE_DOMAIN).is_empty());
    let replaced = products(&model, DOMAIN);
    for (before, after) in source.iter().zip(&replaced) {
        assert_eq!(before.attribute, after.attribute);
        assert_eq!((&before.name, &before.output), (&after.name, &after.output));
        // The lm_head reads the newest token's row.
        let rest = |node: &NodeProto| node.input[1..].to_vec();
        assert_eq!(rest(before), rest(after));
    }
    assert_eq!(replaced.len(), source.len());

    let [out, back] = ["out", "back"].map(|name| folder.path().join(name));
    convert(&out, &back, &["--revert"]).expect("the original");
    let bytes = |folder: &Path| fs::read(folder.join("model.onnx")).unwrap();
    assert!(
        bytes(&back) == bytes(&paths::zoo(HALF)),
        "the original does not come back"
    );
}

/// The bytes of a converted model, but for nothing.
fn converted_bytes(case: &str, options: &[&str]) -> Vec<u8> {
    converted(case, options).1.encode_to_vec()
}

#[test]
fn products_stay_unless_there_is_a_window_on_cuda() {
    const TWO: [&str; 2] = ["--window", "2"];
    let usual = converted_bytes(HALF, &TWO);
    for options in [&["--no-matmul"][..], &["--no-matmul", "--device", "cuda"]] {
        assert!(converted_bytes(HALF, &[&TWO, options].concat()) == usual, "{options:?}");
    }
    let (_folder, usual) = converted(HALF, &TWO);
    assert_eq!(products(&usual, matmul_nbits::SOURCE_DOMAIN).len(), 11);
    let one = converted_bytes(HALF, &["--window", "1"]);
    assert!(converted_bytes(HALF, &["--window", "1", "--device", "cuda"]) == one);
    // The kernel has no float32.
    assert!(converted_bytes(SINGLE, &[&TWO[..], &FOR_CUDA].concat()) == converted_bytes(SINGLE, &TWO));
}

/// Logits of a prompt and of steps that feed up to `window` tokens, each the likeliest, and the tokens.
fn greedy(folder: &Path, window: usize) -> (Vec<f32>, Vec<i64>) {
    const PROMPT: usize = 21;
    let mut tokens: Vec<i64> = (0..PROMPT).map(|i| (3 + i * 37 % 500) as i64).collect();
    let mut decoder = Decoder::open(folder, true, 64, default_page(), false);
    let mut logits = decoder.feed(&tokens, PROMPT, Some(-1), None);
    let mut all = logits.clone();
    for step in 0..24 {
        let likeliest = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        tokens.push(likeliest.expect("logits").0 as i64);
        let retro = (window - 1).min(step);
        let fed = &tokens[tokens.len() - 1 - retro..];
        logits = decoder.feed(fed, tokens.len(), Some(retro as i32), None);
        all.extend(&logits);
    }
    (all, tokens)
}

#[test]
fn greedy_text_is_the_same() {
    let options = |more: &[&'static str]| [&["--window", "4", "--budget", "1.0"], more].concat();
    let (with, model) = converted(HALF, &options(&FOR_CUDA));
    assert_eq!(products(&model, DOMAIN).len(), 11);
    let (without, _) = converted(HALF, &options(&["--no-matmul"]));
    for window in [1, 2, 4] {
        let [(got, text), (expected, same)] = [&with, &without].map(|f| greedy(&f.path().join("out"), window));
        assert_eq!(text, same, "w = {window}");
        let largest = expected.iter().fold(1f32, |most, x| most.max(x.abs()));
        // On a GPU the host's own products are rounded as they are summed.
        let tolerance = if host::on_gpu() { 1e-2 } else { 4e-3 };
        compare::assert_close(&format!("w = {window}"), &got, &expected, tolerance * largest);
    }
}

/// A copy of a case whose products multiply float32.
fn without_levels(case: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(paths::zoo(case)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let mut model = model(folder.path());
    for node in &mut model.graph.as_mut().unwrap().node {
        node.attribute
            .retain(|a| a.name() != matmul_nbits::attribute::ACCURACY_LEVEL);
    }
    fs::write(folder.path().join("model.onnx"), model.encode_to_vec()).unwrap();
    folder
}

/// The CPU has the operator for any window, but not where 8-bit activations are asked for.
#[test]
fn for_the_cpu_products_of_floats_are_the_operators() {
    const FOR_CPU: [&str; 2] = ["--device", "cpu"];
    if host::on_gpu() {
        println!("not tested: a model for the CPU");
        return;
    }
    for (case, tolerance) in [(SINGLE, 1e-4), (HALF, 4e-3)] {
        let source = without_levels(case);
        for window in ["1", "4"] {
            let converted = |more: &[&str]| {
                let folder = tempfile::tempdir().unwrap();
                let options = [&["--window", window, "--budget", "1.0"], more].concat();
                convert(source.path(), &folder.path().join("out"), &options).expect("a conversion");
                folder
            };
            let (with, without) = (converted(&FOR_CPU), converted(&["--no-matmul"]));
            let [ours, originals] = [&with, &without].map(|f| model(&f.path().join("out")));
            assert_eq!(products(&ours, DOMAIN).len(), 11);
            assert_eq!(products(&originals, matmul_nbits::SOURCE_DOMAIN).len(), 11);
            let window = window.parse().unwrap();
            let [(got, text), (expected, same)] = [&with, &without].map(|f| greedy(&f.path().join("out"), window));
            assert_eq!(text, same, "{case}, w = {window}");
            let largest = expected.iter().fold(1f32, |most, x| most.max(x.abs()));
            let what = format!("{case}, w = {window}");
            compare::assert_close(&what, &got, &expected, tolerance * largest);
        }
    }
    assert!(converted_bytes(SINGLE, &FOR_CPU) == converted_bytes(SINGLE, &["--window", "2"]));
}

/// Without `--window` it is 1 where most products stay ONNX Runtime's and are slow for two rows; the report says why.
#[test]
fn the_default_window_follows_the_products() {
    let [half, single] = [HALF, SINGLE].map(|case| paths::zoo(case).display().to_string());
    let floats = without_levels(SINGLE);
    let floats = floats.path().display().to_string();
    let plain = paths::zoo("genai-llama-fp16-cuda").display().to_string();
    let text = |model: &str, options: &[&str]| printed(&[&[model, "--dry-run"], options].concat());
    for (model, options, window, why) in [
        (&half, &[][..], 1, "; 2 is cheap with --device cuda"),
        (&half, &FOR_CUDA, 2, ""),
        (
            &half,
            &["--device", "cuda", "--no-matmul"],
            1,
            "; 2 is cheap without --no-matmul",
        ),
        (&half, &["--window", "2"], 2, ""),
        (&half, &["--window-in-graph"], 1, "; 2 is cheap with --device cuda"),
        (&half, &["--host", "genai"], 1, "; 2 is cheap with --device cuda"),
        (&half, &["--host", "genai", "--device", "cuda"], 2, ""),
        (&single, &[], 2, ""),
        (&single, &FOR_CUDA, 1, "take far longer for two rows"),
        (&floats, &[], 1, "; 2 is cheap with --device cpu"),
        (&floats, &["--device", "cpu"], 2, ""),
        (
            &floats,
            &["--device", "cpu", "--no-matmul"],
            1,
            "; 2 is cheap without --no-matmul",
        ),
        (&plain, &[], 2, ""),
    ] {
        let case = format!("{model} {options:?}");
        let report: Value = serde_json::from_str(&text(model, &[&["--json"], options].concat())).expect("JSON");
        assert_eq!(report["settings"]["window"], window, "{case}");
        let in_graph = window > 1 && options.contains(&"--host");
        assert_eq!(report["settings"]["window_in_graph"], in_graph, "{case}");
        let said = report["window_why"].as_str();
        assert_eq!(said.is_some(), !why.is_empty(), "{case}: {said:?}");
        if let Some(said) = said {
            assert!(said.contains("MatMulNBits") && said.ends_with(why), "{case}: {said}");
            let line = format!("\nwindow   1: {said}\n");
            assert!(text(model, options).contains(&line), "{case}");
        }
    }
}

/// What is written has the window that was chosen, in its nodes and in its metadata; a named one gives the same bytes.
#[test]
fn the_chosen_window_is_the_models() {
    for (options, window) in [(&[][..], "1"), (&FOR_CUDA, "2"), (&["--window-in-graph"], "1")] {
        let (_folder, model) = converted(HALF, options);
        assert_eq!(model.metadata("retro.window"), Some(window), "{options:?}");
        assert_eq!(model.metadata("retro.window_in_graph"), None, "{options:?}");
        let named = converted_bytes(HALF, &[options, &["--window", window]].concat());
        assert!(model.encode_to_vec() == named, "{options:?}");
    }
}

/// `retro-run eval` converts for the device that it runs on.
#[test]
fn conversions_of_a_comparison_are_for_its_device() {
    let floats = without_levels(SINGLE);
    for (source, device, domain) in [
        (floats.path(), Device::Cpu, DOMAIN),
        (floats.path(), Device::Cuda(0), matmul_nbits::SOURCE_DOMAIN),
        (&paths::zoo(HALF), Device::Cuda(0), DOMAIN),
        (&paths::zoo(HALF), Device::Cpu, DOMAIN),
        (&paths::zoo(SINGLE), Device::Cpu, matmul_nbits::SOURCE_DOMAIN),
    ] {
        let mut cache = ConvertedModelCache::new(source, None, device).expect("a model");
        let settings = Box::new(retro_export::Settings::default());
        let folder = cache.open(&ModelSource::Converted(settings)).expect("a conversion");
        assert_eq!(products(&model(&folder), domain).len(), 11, "{source:?} {device}");
    }
}

#[test]
fn reports_count_them() {
    let case = paths::zoo(HALF).display().to_string();
    let dry = |options: &[&str]| printed(&[&[case.as_str(), "--dry-run"], options].concat());
    let report = |options: &[&str]| -> Value {
        let text = dry(&[&["--json"], options].concat());
        serde_json::from_str::<Value>(&text).expect("JSON")["packed_products"].clone()
    };
    assert_eq!(report(&FOR_CUDA), json!({"replaced": 11, "kept": []}));
    assert!(dry(&FOR_CUDA).contains("\nproducts 11 MatMulNBits become ai.retro::MatMulNBits\n"));
    for (options, why) in [
        (&[][..], "they are replaced with --device cuda or --device cpu"),
        (&["--device", "cuda", "--no-matmul"], "as asked"),
        (
            &["--device", "cuda", "--window", "1"],
            "with a window of 1 a step has one row",
        ),
    ] {
        assert_eq!(
            report(options),
            json!({"replaced": 0, "kept": [{"count": 11, "why": why}]})
        );
        let line = format!("\nproducts 11 MatMulNBits stay: {why}\n");
        assert!(dry(options).contains(&line), "{}", dry(options));
    }
    let single = paths::zoo(SINGLE).display().to_string();
    let text = printed(&[single.as_str(), "--dry-run", "--device", "cuda"]);
    assert!(
        text.contains("products 11 MatMulNBits stay: activations of float32\n"),
        "{text}"
    );
    let none = paths::zoo("genai-llama-fp16-cuda").display().to_string();
    assert!(!printed(&[none.as_str(), "--dry-run"]).contains("products"));
}

#[test]
fn inspect_counts_them() {
    let inspect =
        |folder: &Path, options: &[&str]| printed(&[&["inspect", &folder.display().to_string()], options].concat());
    let counts = |folder: &Path| -> Value {
        serde_json::from_str::<Value>(&inspect(folder, &["--json"])).expect("JSON")["packed_products"].clone()
    };
    let (folder, _) = converted(HALF, &FOR_CUDA);
    let out = folder.path().join("out");
    assert_eq!(counts(&out), json!({"microsoft": 0, "retro": 11}));
    assert!(inspect(&out, &[]).contains("\nproducts 11 ai.retro::MatMulNBits\n"));
    let source = paths::zoo(HALF);
    assert_eq!(counts(&source), json!({"microsoft": 11, "retro": 0}));
    assert!(inspect(&source, &[]).contains("\nproducts 11 MatMulNBits\n"));
}

/// A converted model, with or without its attention in the operator, is no source.
#[test]
fn a_converted_model_is_not_converted_again() {
    let (folder, _) = converted(HALF, &FOR_CUDA);
    let again = folder.path().join("again");
    let why = convert(&folder.path().join("out"), &again, &FOR_CUDA).expect_err("it is refused");
    assert!(why.contains("converted already") && !again.exists(), "{why}");
}

/// Weights that are the model's own, of an exporter that quantises a finished graph.
#[test]
fn other_exporters_products() {
    for case in ["quant-llama-q4", "genai-mistral-int4-webgpu"] {
        let folder = tempfile::tempdir().unwrap();
        let [source, target, back] = ["source.onnx", "converted.onnx", "back.onnx"].map(|n| folder.path().join(n));
        zoo::restore(&paths::data("zoo-graphs").join(format!("{case}.onnx.xz")), &source);
        convert(&source, &target, &FOR_CUDA).unwrap_or_else(|e| panic!("{case}: {e}"));
        convert(&target, &back, &["--revert"]).expect("the original");
        assert!(fs::read(&back).unwrap() == fs::read(&source).unwrap(), "{case}");
        let [before, after] = [&source, &target].map(|path| read_model(path).expect("a model").model);
        let count = |model: &ModelProto, domain: &str| products(model, domain).len();
        let all = count(&before, matmul_nbits::SOURCE_DOMAIN);
        let stay = count(&after, matmul_nbits::SOURCE_DOMAIN);
        assert_eq!(count(&after, DOMAIN) + stay, all, "{case}");
        println!("{case}: {stay} of {all} stay");
    }
}
