//! `retro-export --device`: the original and the converted model compared on the device under test, and what is said
//! where they can't be.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use prost::Message;
use retro_onnx::{AttributeProto, Dimension, GraphProto, NodeProto, TensorProto, read_model};
use retro_tests::{host, not_tested, paths, zoo};
use serde_json::Value;

fn export(source: &Path, target: &Path, device: &str) -> (Value, String) {
    export_with(source, target, device, &[])
}

pub fn export_with(source: &Path, target: &Path, device: &str, options: &[&str]) -> (Value, String) {
    let output = Command::new(paths::command("retro-export"))
        .env("ORT_DYLIB_PATH", paths::onnxruntime())
        .env("RETRO_ATTENTION_PLUGIN", paths::plugin())
        .arg(source)
        .arg("-o")
        .arg(target)
        .args(["--json", "--device", device])
        .args(if options.contains(&"--external-data") {
            &[][..]
        } else {
            &["--external-data", "copy"]
        })
        .args(options)
        .output()
        .expect("retro-export starts");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.success(), error.is_empty(), "{error}");
    (serde_json::from_slice(&output.stdout).unwrap_or(Value::Null), error)
}

/// Compares on the device under test; what was compared.
pub fn compared(source: &Path) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let (mut report, error) = export(
        source,
        &folder.path().join("converted.onnx"),
        &host::device().to_string(),
    );
    assert_eq!(error, "", "{}", source.display());
    let verification = report["verification"].take();
    assert_eq!(verification["device"], host::device().to_string());
    assert_eq!(verification["passed"], true, "{verification}");
    println!("{}\n{verification:#}", source.display());
    verification
}

/// Window, sequences, and how the prompt was fed.
pub fn ways(list: &Value) -> Vec<(u64, u64, &str)> {
    let list = list.as_array().expect("a list").iter();
    let way = |c: &'_ Value| Some((c["window"].as_u64()?, c["batch"].as_u64()?));
    list.map(|c| {
        way(c)
            .map(|(window, batch)| (window, batch, c["prefill"].as_str().unwrap_or("?")))
            .expect("a way")
    })
    .collect()
}

/// All comparisons are made or named as skipped, and one sequence is compared with every window.
fn covers(verification: &Value, padding: bool) {
    let (made, skipped) = (ways(&verification["compared"]), ways(&verification["skipped"]));
    for window in [1, 2, 4] {
        for (batch, prefill) in [(1, "chunked"), (1, "whole"), (2, "padded"), (2, "whole")] {
            let way = (window, batch, prefill);
            let wanted = padding || prefill != "padded";
            assert_eq!(
                made.contains(&way) || skipped.contains(&way),
                wanted,
                "{way:?}: {verification}"
            );
        }
        assert!(made.contains(&(window, 1, "whole")), "{verification}");
    }
    if !host::on_gpu() {
        assert!(skipped.is_empty(), "{verification}");
    }
}

#[test]
fn group_query_attention() {
    covers(&compared(&paths::zoo("genai-llama-fp32-cpu/model.onnx")), true);
}

#[test]
fn group_query_attention_in_float16() {
    covers(&compared(&paths::zoo("genai-llama-fp16-cuda/model.onnx")), true);
}

#[test]
fn decomposed_attention() {
    for case in ["optimum-llama-fp32", "fp16conv-llama-fp16io"] {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source.onnx");
        zoo::restore(&paths::data("zoo-graphs").join(format!("{case}.onnx.xz")), &source);
        covers(&compared(&source), true);
    }
}

/// This export's mask subgraph can't be run with several tokens behind a past.
#[test]
fn an_original_that_takes_no_chunks_is_fed_token_by_token() {
    let verification = compared(&paths::zoo("genai040-old_llama-fp32-cuda/model.onnx"));
    covers(&verification, true);
    let notes = verification["notes"].to_string();
    assert!(notes.contains("token by token"), "{notes}");
}

#[test]
fn what_the_original_does_not_run_is_skipped_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source.onnx");
    zoo::restore(&paths::data("zoo-graphs/optimum-llama-fp32.onnx.xz"), &source);
    let mut model = read_model(&source).unwrap().model;
    let inputs = &mut model.graph.as_mut().unwrap().input;
    let ids = inputs.iter_mut().find(|i| i.name() == "input_ids").unwrap();
    ids.dims_mut().expect("a tensor")[0] = Dimension::from(1);
    fs::write(&source, model.encode_to_vec()).unwrap();
    let verification = compared(&source);
    let made = ways(&verification["compared"]);
    assert!(
        made.iter().all(|(_, batch, _)| *batch == 1) && made.len() == 6,
        "{verification}"
    );
    assert_eq!(ways(&verification["skipped"]).len(), 6, "{verification}");
    for skipped in verification["skipped"].as_array().unwrap() {
        assert!(
            skipped["why"].as_str().unwrap().contains("the original doesn't run"),
            "{skipped}"
        );
    }
}

/// An export with something changed.
fn changed(folder: &Path, case: &str, change: impl FnOnce(&mut GraphProto)) -> PathBuf {
    let source = folder.join("source.onnx");
    zoo::restore(&paths::data("zoo-graphs").join(format!("{case}.onnx.xz")), &source);
    let mut model = read_model(&source).unwrap().model;
    change(model.graph.as_mut().expect("a graph"));
    fs::write(&source, model.encode_to_vec()).unwrap();
    source
}

#[test]
fn logits_of_the_newest_token_alone() {
    let folder = tempfile::tempdir().unwrap();
    let source = changed(folder.path(), "optimum-llama-fp32", |graph| {
        let all = graph.node.iter_mut().flat_map(|n| &mut n.output);
        *all.into_iter().find(|o| *o == "logits").expect("logits") = "all_logits".to_owned();
        graph.initializer.push(TensorProto::int64s("newest", &[], &[-1]));
        let gather = NodeProto::new("", "Gather", "gather_newest", &["all_logits", "newest"], &["logits"]);
        graph.node.push(gather.with(AttributeProto::int("axis", 1)));
        let logits = graph.output.iter_mut().find(|o| o.name() == "logits").expect("logits");
        logits.dims_mut().expect("a tensor").remove(1);
    });
    covers(&compared(&source), true);
}

/// A model of one token a call takes no window, and its prompts token by token.
#[test]
fn a_model_of_one_token_a_call() {
    let folder = tempfile::tempdir().unwrap();
    let source = changed(folder.path(), "optimum-llama-fp32", |graph| {
        let inputs = graph.input.iter_mut();
        for input in inputs.filter(|i| ["input_ids", "position_ids"].contains(&i.name())) {
            input.dims_mut().expect("a tensor")[1] = Dimension::from(1);
        }
    });
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("converted.onnx");
    let device = host::device().to_string();
    let (_, error) = export_with(&source, &target, &device, &[]);
    assert!(
        error.contains("input_ids takes 1 tokens a call") && error.contains("--window 1"),
        "{error}"
    );
    assert!(!target.exists());
    let (report, error) = export_with(&source, &target, &device, &["--window", "1"]);
    assert_eq!(error, "");
    let verification = &report["verification"];
    assert_eq!(verification["passed"], true, "{verification}");
    let made = ways(&verification["compared"]);
    assert!(
        made == [(1, 1, "whole"), (1, 1, "chunked"), (1, 2, "whole")],
        "{verification}"
    );
}

/// Dynamic quantisation takes padding into its ranges: what that does to the original is measured.
#[test]
fn padding_is_among_what_is_quantised_together() {
    let folder = tempfile::tempdir().unwrap();
    let source = changed(folder.path(), "quant-llama-dynint8", |graph| {
        // Tokens with one large number each: a range that holds them is wide.
        let name = "model.embed_tokens.weight_quantized";
        let table = graph.initializer.iter_mut().find(|t| t.name() == name).expect(name);
        let (rows, width) = (table.dims[0] as usize, table.dims[1] as usize);
        let mut numbers = table.raw_data.as_ref().expect("weights").to_vec();
        for row in (0..rows).filter(|row| row % 3 == 0) {
            let row_of = &mut numbers[row * width..(row + 1) * width];
            row_of.iter_mut().for_each(|x| *x = 120 + *x / 16);
            row_of[row % width] = 255;
        }
        table.raw_data = Some(numbers.into());
    });
    let verification = compared(&source);
    let compared = verification["compared"].as_array().expect("a list").iter();
    let padded: Vec<&Value> = compared
        .filter(|c| c["prefill"] == "padded" && c["window"] == 1)
        .collect();
    let [padded] = padded.as_slice() else {
        panic!("{verification}")
    };
    assert_eq!(padded["own_difference_by"], "with other tokens in its padding");
    let number = |c: &Value, name: &str| c[name].as_f64().expect("a number");
    assert!(
        number(padded, "own_difference") > number(&verification, "tolerance"),
        "{padded}"
    );
}

/// The head size is in the weights alone.
#[test]
fn caches_of_undeclared_size() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model.onnx");
    let from = paths::zoo("genai-llama-fp32-cpu");
    for entry in fs::read_dir(&from).unwrap().flatten() {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let mut model = read_model(&source).unwrap().model;
    let graph = model.graph.as_mut().expect("a graph");
    graph.value_info.clear();
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        if let Some(size) = value.dims_mut().filter(|d| d.len() == 4).and_then(|d| d.last_mut()) {
            *size = Dimension::from("size");
        }
    }
    fs::write(&source, model.encode_to_vec()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let (report, error) = export(&source, &out.path().join("converted.onnx"), &host::device().to_string());
    assert_eq!(error, "");
    covers(&report["verification"], true);
}

/// Where there is no GPU that is said at once, in one line.
#[test]
fn without_a_gpu_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("converted.onnx");
    let (report, error) = export(&paths::zoo("genai-llama-fp32-cpu/model.onnx"), &target, "cuda:0");
    if error.is_empty() {
        assert_eq!(report["verification"]["device"], "cuda:0");
        return;
    }
    assert!(!host::on_gpu(), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    let expected = [
        "no CUDA execution provider",
        "no NVIDIA driver",
        "the NVIDIA driver gives no GPU",
    ];
    assert!(expected.iter().any(|why| error.contains(why)), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something was written");
}

/// What a run without options says and how it ends, with this plugin.
fn ends(source: &Path, plugin: &Path, options: &[&str]) -> (Option<i32>, String, bool) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("converted.onnx");
    let output = Command::new(paths::command("retro-export"))
        .env("ORT_DYLIB_PATH", paths::onnxruntime())
        .env("RETRO_ATTENTION_PLUGIN", plugin)
        .arg(source)
        .arg("-o")
        .arg(&target)
        .args(options)
        .output()
        .expect("retro-export starts");
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
        target.exists(),
    )
}

/// Without a plugin that loads nothing is known of the result: that is said, and is an error where a comparison was
/// asked for, before anything is written.
#[test]
fn without_a_plugin_nothing_is_compared() {
    let source = paths::zoo("genai-llama-fp32-cpu/model.onnx");
    let folder = tempfile::tempdir().unwrap();
    let damaged = folder.path().join("libretro_attention.so");
    fs::write(&damaged, b"no library").unwrap();
    for plugin in [damaged, folder.path().join("none.so")] {
        let (code, text, written) = ends(&source, &plugin, &[]);
        assert!(code == Some(0) && written, "{text}");
        assert!(
            text.contains("NOT VERIFIED: ") && text.to_lowercase().contains("plugin"),
            "{text}"
        );
        let (code, text, written) = ends(&source, &plugin, &["--verify"]);
        assert!(
            code == Some(1) && !written && text.to_lowercase().contains("plugin"),
            "{text}"
        );
    }
}

/// A result that doesn't load where the original runs is an error, asked for or not. The plugin here has no operator.
#[test]
fn a_result_that_does_not_run_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let [code, plugin] = ["plugin.rs", "libretro_attention.so"].map(|name| folder.path().join(name));
    let text = "#[unsafe(no_mangle)] pub extern \"C\" fn RegisterCustomOps(_: usize, _: usize) -> usize { 0 }\n";
    fs::write(&code, text).unwrap();
    let mut compiler = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    compiler
        .args(["--edition", "2024", "--crate-type", "cdylib", "-o"])
        .arg(&plugin)
        .arg(&code);
    match compiler.status() {
        Ok(status) => assert!(status.success()),
        Err(e) => return not_tested(&format!("a plugin of another kind: there is no compiler here: {e}")),
    }
    for options in [&[][..], &["--verify"]] {
        let (code, text, written) = ends(&paths::zoo("genai-llama-fp32-cpu/model.onnx"), &plugin, options);
        assert!(code == Some(1) && written, "{text}");
        assert!(
            text.contains("BROKEN") && text.contains("RetroAttention") && text.contains("do not use it"),
            "{text}"
        );
    }
}

/// What the original itself can't do tells nothing of the result.
#[test]
fn an_original_that_does_not_run_is_not_held_against_the_result() {
    let folder = tempfile::tempdir().unwrap();
    let source = changed(folder.path(), "optimum-llama-fp32", |graph| {
        let all = graph.node.iter_mut().flat_map(|n| &mut n.output);
        *all.into_iter().find(|o| *o == "logits").expect("logits") = "before".to_owned();
        let node = NodeProto::new("nobody.knows", "This", "unknown", &["before"], &["logits"]);
        graph.node.push(node);
    });
    let (code, text, written) = ends(&source, &paths::plugin(), &[]);
    assert!(code == Some(0) && written, "{text}");
    assert!(
        text.contains("NOT VERIFIED: the original") && text.contains("nobody.knows"),
        "{text}"
    );
    let (code, text, _) = ends(&source, &paths::plugin(), &["--verify"]);
    assert!(code == Some(1) && text.contains("the original"), "{text}");
}
