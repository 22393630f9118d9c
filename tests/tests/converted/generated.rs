//! `retro-run` on real exports (tests/data/zoo-graphs): greedy text of the converted model is that of the original, whatever wrote the
//! attention and whatever the exporter calls its caches.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use retro_run::{Model, OpenOptions, Runtime};
use retro_tests::{paths, zoo};
use serde_json::json;

use crate::convert::convert;

/// A folder with the case's graph and what a runner needs beside it: a tokenizer whose words are t0, t1, ...
fn restored(case: &str, folder: &Path) {
    fs::create_dir(folder).unwrap();
    zoo::restore(
        &paths::data("zoo-graphs").join(format!("{case}.onnx.xz")),
        &folder.join("model.onnx"),
    );
    let vocabulary: BTreeMap<String, usize> = (0..512).map(|i| (format!("t{i}"), i)).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = if case.contains("gpt2") {
        json!({"n_positions": 256, "n_head": 2, "n_embd": 64})
    } else {
        json!({"max_position_embeddings": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128})
    };
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

fn text(folder: &Path, options: &[&str]) -> String {
    let mut command = Command::new(paths::command("retro-run"));
    command
        .env("ORT_DYLIB_PATH", paths::onnxruntime())
        .env("RETRO_ATTENTION_PLUGIN", paths::plugin());
    let prompt: Vec<String> = (0..21).map(|i| format!("t{}", 3 + i * 37 % 500)).collect();
    let output = command
        .arg("run")
        .arg(folder)
        .args(["-n", "16", "-t", "1", "--ignore-eos", "-p", &prompt.join(" ")])
        .args(options)
        .output()
        .expect("retro-run starts");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {error}", folder.display());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.split_whitespace().count(), 16, "{text}");
    text
}

#[test]
fn greedy_text_is_the_originals() {
    // One of each rule, and one that computes its positions from the length of its cache.
    for case in [
        "optimum-llama-fp32",
        "tfexp-llama-ortfusions_cuda",
        "dynamo-llama-sdpa-op23",
        "dynamo-gpt2-sdpa-op18",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (source, target) = (folder.path().join(case), folder.path().join("converted"));
        restored(case, &source);
        convert(&source, &target, &["--window", "4"]).expect("it converts");
        let expected = text(&source, &[]);
        for window in ["1", "4"] {
            let got = text(&target, &["--budget", "1.0", "--window", window]);
            assert_eq!(got, expected, "{case}, w = {window}");
        }
    }
}

/// A merged decoder takes use_cache_branch, which no runner of plain decoders gives; the converted one has a default for it.
#[test]
fn a_merged_decoder_generates_once_converted() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("converted"));
    restored("optimum120-old_llama-merged", &source);
    convert(&source, &target, &["--window", "4"]).expect("it converts");
    let dense = text(&target, &["--budget", "1.0", "--window", "1"]);
    assert_eq!(text(&target, &["--budget", "1.0", "--window", "4"]), dense);
}

/// Such a model takes its length from its mask's width, and a CUDA graph replays one shape.
#[test]
fn one_that_reads_its_masks_width_refuses_fixed_shapes() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("converted"));
    restored("optimum-llama-fp32", &source);
    convert(&source, &target, &["--window", "4"]).expect("it converts");
    let runtime = Runtime::load(None).unwrap();
    let open = |fixed_buffers| {
        let options = OpenOptions {
            plugin: Some(paths::plugin()),
            fixed_buffers,
            ..OpenOptions::default()
        };
        Model::open(&runtime, &target, &options)
    };
    assert!(open(false).unwrap().retro.unwrap().lengths_from_width);
    let error = format!("{:#}", open(true).err().expect("a refusal"));
    assert!(
        error.contains("width") && error.contains("without --cuda-graph"),
        "{error}"
    );
}
