//! `retro-run` on real exports (tests/data/zoo-graphs): greedy text of the converted model is that of the original,
//! whatever wrote the attention and whatever the exporter calls its caches.

use std::{path::Path, process::Command};

use retro_tests::{paths, zoo};

use crate::convert::convert;

fn text(folder: &Path, options: &[&str]) -> String {
    let mut command = Command::new(paths::command("retro-run"));
    command
        .env("ORT_DYLIB_PATH", paths::onnxruntime())
        .env("RETRO_ATTENTION_PLUGIN", paths::plugin());
    let prompt: Vec<String> = (0..21).map(|i| format!("t{}", 3 + i * 37 % 250)).collect();
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
    // One of each rule, one that computes its positions from the length of its cache, and two that take numbers of
    // their own.
    for case in [
        "optimum-llama-fp32",
        "tfexp-llama-ortfusions_cuda",
        "dynamo-llama-sdpa-op23",
        "dynamo-gpt2-sdpa-op18",
        "optimum-llama-num_logits_to_keep",
        "tfexp-mistral-fp32",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (source, target) = (folder.path().join(case), folder.path().join("converted"));
        zoo::runnable(case, &source);
        convert(&source, &target, &["--window", "4"]).expect("it converts");
        let expected = text(&source, &[]);
        for window in ["1", "4"] {
            let got = text(&target, &["--budget", "1.0", "--window", window]);
            assert_eq!(got, expected, "{case}, w = {window}");
        }
    }
}

/// Sketches of a token a page and of eight, in either number of bits: the state's shape and type are what `retro-run`
/// allocates, and what is read does not matter where everything is.
#[test]
fn sketches_generate_the_originals_text() {
    for case in ["optimum-llama-fp32", "dynamo-llama-sdpa-op23"] {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join(case);
        zoo::runnable(case, &source);
        let expected = text(&source, &[]);
        for (bits, page) in [("1", "1"), ("2", "8")] {
            let target = folder.path().join(format!("converted-{bits}"));
            let options = [
                "--window",
                "4",
                "--selector",
                "sketch",
                "--sketch-bits",
                bits,
                "--page-size",
                page,
            ];
            convert(&source, &target, &options).expect("it converts");
            for window in ["1", "4"] {
                let got = text(&target, &["--budget", "1.0", "--window", window]);
                assert_eq!(got, expected, "{case}, {bits} bits, w = {window}");
            }
            text(&target, &["--budget", "12", "--window", "4"]);
        }
    }
}

/// A merged decoder takes use_cache_branch, which no runner of plain decoders gives; the converted one has a default
/// for it.
#[test]
fn a_merged_decoder_generates_once_converted() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("converted"));
    zoo::runnable("optimum120-old_llama-merged", &source);
    convert(&source, &target, &["--window", "4"]).expect("it converts");
    let dense = text(&target, &["--budget", "1.0", "--window", "1"]);
    assert_eq!(text(&target, &["--budget", "1.0", "--window", "4"]), dense);
}
