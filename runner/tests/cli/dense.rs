//! Models that were not converted.

use std::{fs, io::Read, process::Stdio};

use serde_json::Value;

use crate::support::*;

#[test]
fn dense_decoding_of_a_document_is_the_reference() {
    let output = retro_run()
        .arg("run")
        .arg(ledger())
        .args(["--document", &document(1)])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.split_whitespace().collect::<Vec<_>>(), reference(1));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("dense attention on all 6 layers"), "{errors}");
    assert!(errors.contains("tokens/s") && errors.contains("KV cache"), "{errors}");
    assert!(
        !errors.contains('\u{1b}'),
        "a progress bar without a terminal: {errors:?}"
    );
}

#[test]
fn a_growing_cache_chunks_and_half_precision_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (growing, half) = (dir.path().join("growing"), dir.path().join("half"));
    let whole = text(&ledger(), &["--document", &document(2), "-n", "60"]);
    assert_eq!(
        text(&ledger(), &["--document", &document(2), "-n", "60", "--chunk", "100"]),
        whole
    );
    // Without genai_config.json nobody promises a shared buffer: the outputs become the next inputs.
    fs::create_dir(&growing).unwrap();
    for file in ["model.onnx", "model.onnx.data", "config.json", "tokenizer.json"] {
        fs::copy(ledger().join(file), growing.join(file)).unwrap();
    }
    assert_eq!(text(&growing, &["--document", &document(2), "-n", "60"]), whole);
    let options = retro_models::Options {
        dtype: retro_models::Dtype::F16,
        ..Default::default()
    };
    retro_models::build(&root().join("models/ledger"), &half, &options).unwrap();
    assert_eq!(text(&half, &["--document", &document(2), "-n", "60"]), whole);
    assert!(whole.split_whitespace().eq(reference(2).iter().take(60)), "{whole}");
}

#[test]
fn text_stops_where_it_is_told_to() {
    let doc = document(0);
    let args = ["--document", &doc, "-n", "80", "--stop", "value of #2"];
    let streamed = text(&ledger(), &args);
    assert!(streamed.trim_end().ends_with(". so"), "{streamed}");
    assert_eq!(text(&ledger(), &[&args[..], &["--no-stream"]].concat()), streamed);
    let object = json(&ledger(), &args);
    assert_eq!(object["finish"], "stop");
    assert_eq!(object["text"].as_str().unwrap(), streamed.strip_suffix('\n').unwrap());
    let object = json(&ledger(), &["--document", &doc, "-n", "7"]);
    assert_eq!(
        (object["finish"].as_str(), object["tokens"].as_array().unwrap().len()),
        (Some("length"), 7)
    );
    assert_eq!(object["stats"]["generated_tokens"], 7);
    assert_eq!(object["stats"]["effective_exposure"], Value::Null);
}

#[test]
fn eos_ends_a_text_unless_it_is_ignored() {
    let doc = document(0);
    let most = reference(0).len() + 20;
    let n = most.to_string();
    let object = json(&ledger(), &["--document", &doc, "-n", &n]);
    assert_eq!(object["finish"], "eos");
    let object = json(&ledger(), &["--document", &doc, "-n", &n, "--ignore-eos"]);
    assert_eq!(
        (object["finish"].as_str(), object["tokens"].as_array().unwrap().len()),
        (Some("length"), most)
    );
}

#[test]
fn a_seed_decides_what_is_drawn() {
    let draw = |seed: &str| {
        text(
            &ledger(),
            &["-p", "facts :", "-n", "30", "--temp", "1.5", "--seed", seed],
        )
    };
    assert_eq!(draw("1"), draw("1"));
    assert_ne!(draw("1"), draw("2"));
    let cold = text(&ledger(), &["-p", "facts :", "-n", "30", "--temp", "2", "--top-k", "1"]);
    assert_eq!(cold, text(&ledger(), &["-p", "facts :", "-n", "30"]));
}

#[test]
fn prompts_come_from_files_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompt.txt");
    fs::write(&path, "facts : problem #1").unwrap();
    let from_file = text(&ledger(), &["-f", path.to_str().unwrap(), "-n", "10"]);
    assert_eq!(from_file, text(&ledger(), &["-p", "facts : problem #1", "-n", "10"]));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut command = retro_run();
    command
        .arg("run")
        .arg(ledger())
        .args(["--document", &document(0), "--ignore-eos"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 5];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(!String::from_utf8(output.stderr).unwrap().contains("error"));
}

#[test]
fn a_batch_answers_as_single_documents_do() {
    let spec = format!("dense={}", ledger().display());
    let data = documents();
    let eval = |batch: &str| -> Value {
        let args = [
            "eval", "--json", "--data", &data, "--docs", "3", "-n", "90", "--batch", batch, "--run", &spec,
        ];
        let output = run(&args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (together, alone) = (eval("3"), eval("1"));
    for key in ["right", "quarters", "documents"] {
        assert_eq!(together["rows"][0][key], alone["rows"][0][key], "{key}");
    }
    // 90 tokens answer the first few problems, and dense attention has them right.
    assert!(
        together["rows"][0]["right"]["mean"].as_f64().unwrap() > 5.0,
        "{together}"
    );
    assert_eq!(together["rows"][0]["generated_tokens"], 270);
}
