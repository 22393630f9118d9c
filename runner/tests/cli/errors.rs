//! Whatever is wrong is said in one line that tells what to do.

use std::fs;

use crate::support::*;

#[test]
fn prompts_and_contexts_that_do_not_fit_are_refused_before_anything_runs() {
    let model = ledger();
    let model = model.to_str().unwrap();
    let long = "coins ".repeat(3000);
    assert!(error(&["run", model, "-p", &long]).contains("no room in the model's context, 2048"));
    assert!(error(&["run", model, "-p", "facts", "-n", "2048"]).contains("exceed the model's context, 2048"));
    assert!(error(&["run", model, "-p", "facts", "-c", "9999"]).contains("-c 9999"));
    assert!(error(&["run", model, "-p", "facts", "-c", "10", "-n", "10"]).contains("-c"));
    assert!(error(&["run", model, "-p", "facts", "-n", "0"]).contains("-n 0"));
}

#[test]
fn options_out_of_range_are_named() {
    let model = ledger();
    let model = model.to_str().unwrap();
    for (option, value) in [
        ("--temp", "-1"),
        ("--top-p", "0"),
        ("--min-p", "2"),
        ("--repeat-penalty", "0"),
        ("--chunk", "0"),
        ("--threads", "0"),
    ] {
        let line = error(&["run", model, "-p", "facts", "-n", "1", option, value]);
        assert!(line.contains(option) || line.contains("-t 0"), "{line}");
    }
    assert!(error(&["run", model, "-p", "facts", "--window", "2"]).contains("retro-export --window 2"));
    assert!(error(&["run", model, "-p", "facts", "--window", "0"]).contains("--window 0"));
    assert!(error(&["run", model, "-p", "facts", "--rectify", "8"]).contains("retro-export"));
    assert!(error(&["run", model, "-p", "facts", "--budget", "0.5"]).contains("retro-export"));
    assert_eq!(
        run(&["run", model, "-p", "facts", "--budget", "7.5"]).status.code(),
        Some(2)
    );
    assert_eq!(run(&["run", model]).status.code(), Some(2));
}

/// Never the CPU instead of what was asked for.
#[test]
fn a_device_that_is_not_there_is_an_error() {
    let model = ledger();
    let model = model.to_str().unwrap();
    if !on_gpu() {
        let line = error(&["run", model, "-p", "facts", "-n", "1", "--device", "cuda"]);
        assert!(
            line.contains("CUDA execution provider") || line.contains("NVIDIA driver") || line.contains("no GPU 0"),
            "{line}"
        );
        assert!(line.contains("--device cpu"), "{line}");
    }
    assert!(error(&["run", model, "-p", "facts", "-n", "1", "--cuda-graph"]).contains("--device cuda"));
    let output = run(&["run", model, "-p", "facts", "-n", "1", "--no-cuda-graph"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let both = ["run", model, "-p", "facts", "--cuda-graph", "--no-cuda-graph"];
    assert_eq!(run(&both).status.code(), Some(2));
    assert_eq!(
        run(&["run", model, "-p", "facts", "--device", "gpu"]).status.code(),
        Some(2)
    );
}

#[test]
fn missing_and_damaged_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let empty = dir.path().to_str().unwrap().to_owned();
    assert!(error(&["run", &path("none"), "-p", "x"]).contains("no model at"));
    assert!(error(&["run", &empty, "-p", "x"]).contains("no ONNX graph"));
    let model = ledger();
    let good = model.to_str().unwrap();
    assert!(error(&["run", good, "-f", &path("none.txt")]).contains("none.txt"));
    assert!(error(&["run", good, "--document", &path("none.jsonl:0")]).contains("none.jsonl"));
    assert!(error(&["run", good, "--document", "x"]).contains("FILE.jsonl:N"));
    assert!(error(&["run", good, "--document", &document(96)]).contains("no document 96"));

    fs::write(dir.path().join("model.onnx"), "garbage").unwrap();
    assert!(error(&["run", &empty, "-p", "x"]).contains("cannot load"));
    fs::copy(model.join("model.onnx"), dir.path().join("model.onnx")).unwrap();
    assert!(error(&["run", &empty, "-p", "x"]).contains("model.onnx.data"));
    let (weights, whole) = (dir.path().join("model.onnx.data"), model.join("model.onnx.data"));
    fs::copy(&whole, &weights).unwrap();
    let len = fs::metadata(&whole).unwrap().len();
    fs::OpenOptions::new()
        .write(true)
        .open(&weights)
        .unwrap()
        .set_len(len / 2)
        .unwrap();
    let truncated = error(&["run", &empty, "-p", "x"]);
    let says = format!(
        "model.onnx.data has {} bytes, but the model's weights in it need {len} (the last is tensor ",
        len / 2
    );
    assert!(
        truncated.contains(&says) && truncated.ends_with("is the file complete?"),
        "{truncated}"
    );
    fs::copy(&whole, &weights).unwrap();
    fs::copy(model.join("genai_config.json"), dir.path().join("genai_config.json")).unwrap();
    assert!(error(&["run", &empty, "-p", "x"]).contains("tokenizer.json"));
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert!(error(&["run", &empty, "-p", "x"]).contains("tokenizer.json"));
    fs::write(dir.path().join("genai_config.json"), "{").unwrap();
    assert!(error(&["run", &empty, "-p", "x"]).contains("not JSON"));
}

#[test]
fn libraries_that_are_not_what_they_should_be_end_in_a_line_not_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let fake = dir.path().join("libfake.so");
    fs::write(&fake, "not a library").unwrap();
    let fake = fake.to_str().unwrap();
    let model = ledger();
    let model = model.to_str().unwrap();
    assert!(error(&["run", model, "-p", "x", "--ort", fake]).contains("ORT_DYLIB_PATH"));
    assert!(error(&["run", model, "-p", "x", "--ort", "/no/such"]).contains("--ort names no file"));
    let converted = ledger_retro();
    let converted = converted.to_str().unwrap();
    assert!(error(&["run", converted, "-p", "x", "--plugin", fake]).contains("libfake.so does not load"));
    // A model that was not converted has no use for it.
    assert!(!text(&ledger(), &["-p", "x", "-n", "1", "--plugin", fake]).is_empty());
    assert!(error(&["run", model, "-p", "x", "--plugin", "/no/such"]).contains("--plugin names no file"));
}

#[test]
fn eval_checks_before_it_works() {
    let data = documents();
    let spec = format!("dense={}", ledger().display());
    assert!(error(&["eval", "--data", "/no/such", "--run", &spec]).contains("/no/such"));
    assert!(error(&["eval", "--data", &data, "--docs", "0", "--run", &spec]).contains("--docs 0"));
    let window = format!("{spec},window=2");
    let (source, converted) = (ledger(), ledger_retro());
    let (source, converted) = (source.to_str().unwrap(), converted.to_str().unwrap());
    assert!(error(&["eval", converted, "--data", &data]).contains("converted already"));
    assert!(error(&["eval", source, "--data", &data, "--windows", "65"]).contains("the window is 65"));
    assert!(error(&["eval", source, "--data", &data, "--windows", "0"]).contains("--windows 0"));
    assert!(error(&["eval", "/no/such", "--data", &data]).contains("no model at"));
    assert!(error(&["eval", source, "--perplexity", "/no/such"]).contains("/no/such"));
    let layers = ["eval", source, "--data", &data, "--policy", "retro,dense-layers=9"];
    assert!(error(&layers).contains("names layer 9"));
    let short = root().join("models/ledger/config.json");
    let short = ["eval", source, "--perplexity", short.to_str().unwrap()];
    assert!(error(&short).contains("--prompt-tokens"));
    assert_eq!(
        run(&["eval", source, "--data", &data, "--policy", "x"]).status.code(),
        Some(2)
    );
    assert_eq!(run(&["eval", source]).status.code(), Some(2));
    assert!(error(&["eval", "--data", &data, "--run", &window]).contains("retro-export --window 2"));
    assert_eq!(
        run(&["eval", "--data", &data, "--run", "nonsense"]).status.code(),
        Some(2)
    );
    assert_eq!(
        run(&["eval", "--data", &data, "--run", &spec, "--score", "x"])
            .status
            .code(),
        Some(2)
    );
}

#[test]
fn eval_says_before_it_starts_where_it_cannot_write() {
    let (model, data) = (ledger(), documents());
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    fs::write(path("file"), "").unwrap();
    for (option, place) in [
        ("--html", path("none/page.html")),
        ("--html", path("")),
        ("--figures", path("file")),
        ("--figures", path("file/figures")),
    ] {
        let output = run(&["eval", model.to_str().unwrap(), "--data", &data, option, &place]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.lines().count() == 1, "{said}");
        assert!(said.contains(option) && said.contains("cannot write"), "{said}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn eval_names_what_has_no_tokens() {
    let model = ledger();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    fs::write(path("none.txt"), "").unwrap();
    let texts = run(&[
        "eval",
        model.to_str().unwrap(),
        "--perplexity",
        &path("none.txt"),
        "--policy",
        "dense",
    ]);
    assert!(String::from_utf8_lossy(&texts.stderr).contains("none.txt: the prompt is empty"));
    let lines = "{\"prompt\": \"facts\", \"answers\": []}\n{\"prompt\": \"\", \"answers\": []}\n";
    fs::write(path("data.jsonl"), lines).unwrap();
    let data = run(&[
        "eval",
        model.to_str().unwrap(),
        "--data",
        &path("data.jsonl"),
        "--policy",
        "dense",
    ]);
    assert!(String::from_utf8_lossy(&data.stderr).contains("document 1: the prompt is empty"));
}
