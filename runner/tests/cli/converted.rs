//! Converted models, through the plugin.

use serde_json::Value;

use crate::support::*;

#[test]
fn with_a_budget_of_all_pages_every_window_is_dense_attention() {
    let doc = document(3);
    for window in ["1", "2", "8"] {
        let args = ["--document", &doc, "-n", "300", "--budget", "1.0", "--window", window];
        let object = json(&ledger_retro(), &args);
        let words: Vec<&str> = object["text"].as_str().unwrap().split_whitespace().collect();
        assert!(
            words.iter().eq(reference(3).iter().take(300)),
            "window {window}: {object}"
        );
        assert_eq!(object["stats"]["share_of_valid_pages"], 1.0);
        assert_eq!(object["stats"]["effective_exposure"], 1.0);
    }
}

#[test]
fn a_small_budget_reads_few_pages_and_a_window_exposes_more() {
    let doc = document(4);
    let figures = |window: &str, budget: &str| -> Value {
        json(
            &ledger_retro(),
            &["--document", &doc, "-n", "100", "--window", window, "--budget", budget],
        )["stats"]
            .clone()
    };
    let quest = figures("1", "0.15");
    let number = |v: &Value, key: &str| v[key].as_f64().unwrap();
    // 0.15 of 1000 to 1130 tokens in pages of 16, rounded up: 10 or 11.
    let pages = number(&quest, "pages_per_kv_head_and_step");
    assert!((9.9..11.1).contains(&pages), "{quest}");
    assert_eq!(number(&quest, "effective_exposure"), 1.0);
    let (two, eight) = (figures("2", "0.15"), figures("8", "0.15"));
    assert!((pages - number(&two, "pages_per_kv_head_and_step")).abs() < 0.2);
    let (e2, e8) = (number(&two, "effective_exposure"), number(&eight, "effective_exposure"));
    assert!(1.0 < e2 && e2 < e8 && e8 < 4.0, "{e2} {e8}");
    // A budget in tokens: 256 are 16 pages.
    assert_eq!(number(&figures("2", "256"), "pages_per_kv_head_and_step"), 16.0);
}

/// What passes cost is told; with a budget of all pages they change nothing.
#[test]
fn rectifying_passes_are_counted() {
    let (doc, model) = (document(4), ledger_retro());
    let run = |budget: &str, more: &[&str]| {
        let arguments = [
            &["--document", &doc, "-n", "50", "--window", "2", "--budget", budget],
            more,
        ]
        .concat();
        json(&model, &arguments)
    };
    let (plain, passes) = (run("1.0", &[]), run("1.0", &["--rectify", "16"]));
    assert_eq!(plain["tokens"], passes["tokens"]);
    assert!(plain["stats"]["rectify_passes"].is_null(), "{plain}");
    // 49 of 50 tokens take a step, and the 17th step, the 33rd and the 49th come after a pass.
    assert_eq!(passes["stats"]["rectify_passes"], 3);
    assert!(passes["stats"]["rectify_ms"].as_f64().unwrap() > 0.0);
    // What a step reads and exposes is what selection gives, with passes or without: its pages are counted in steps alone.
    let (plain, passes) = (run("0.15", &[]), run("0.15", &["--rectify", "16"]));
    let pages = |v: &Value| v["stats"]["pages_per_kv_head_and_step"].as_f64().unwrap();
    assert!((pages(&plain) - pages(&passes)).abs() < 0.1, "{plain} {passes}");
    let exposure = passes["stats"]["effective_exposure"].as_f64().unwrap();
    assert!((1.0..2.0).contains(&exposure), "{passes}");
    let output = retro_run()
        .arg("run")
        .arg(&model)
        .args(["--document", &doc, "-n", "20", "--rectify", "8"])
        .output()
        .unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("rectified 2 times, "), "{errors}");
}

#[test]
fn the_plugin_says_that_it_works_and_too_large_a_window_is_refused() {
    let output = retro_run()
        .arg("run")
        .arg(ledger_retro())
        .args(["-p", "facts", "-n", "3"])
        .output()
        .unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(
        errors.contains("plugin active on 6 of 6 layers (window 8, budget 0.15, page size 16"),
        "{errors}"
    );
    let model = ledger_retro();
    let line = error(&["run", model.to_str().unwrap(), "-p", "facts", "--window", "9"]);
    assert!(line.contains("retro-export --window 9"), "{line}");
}

#[test]
fn a_batch_of_different_lengths_decodes_as_each_alone() {
    let data = documents();
    let spec = format!("retro={},window=4,budget=0.3", ledger_retro().display());
    let eval = |batch: &str| -> Value {
        let args = [
            "eval", "--json", "--data", &data, "--docs", "3", "-n", "120", "--batch", batch, "--run", &spec,
        ];
        let output = run(&args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (together, alone) = (eval("3"), eval("1"));
    for key in ["right", "window", "documents"] {
        assert_eq!(together["rows"][0][key], alone["rows"][0][key], "{key}");
    }
    let exposure = |v: &Value| v["rows"][0]["effective_exposure"].as_f64().unwrap();
    assert!(
        (exposure(&together) - exposure(&alone)).abs() < 1e-3,
        "{together} {alone}"
    );
}

#[test]
fn weights_are_built_and_converted_on_the_fly_once() {
    let weights = root().join("models/code");
    let run = || {
        retro_run()
            .arg("run")
            .arg(&weights)
            .args(["-p", "def ", "-n", "20"])
            .output()
            .unwrap()
    };
    let first = run();
    let errors = String::from_utf8_lossy(&first.stderr).into_owned();
    assert!(
        first.status.success() && errors.contains("building a graph"),
        "{errors}"
    );
    assert!(errors.contains("plugin active on 6 of 6 layers"), "{errors}");
    let second = run();
    assert!(String::from_utf8_lossy(&second.stderr).contains("using the graph"));
    assert_eq!(first.stdout, second.stdout);
    assert!(!first.stdout.is_empty());
}

/// What `retro-export` made before its default was sketch: two vectors a page of 16, and a floor of 4 pages.
#[test]
fn models_with_page_summaries_still_run() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let settings = retro_export::Settings {
        selector: retro_contract::Selector::SignedMoments,
        ..retro_export::Settings::paper()
    };
    let report = retro_export::convert(&retro_export::Options {
        source: ledger(),
        target: Some(model.clone()),
        settings,
        ..Default::default()
    })
    .unwrap();
    assert_eq!(report.state_share.unwrap().selector, 1.0 / 16.0);
    let figures = json(&model, &["--document", &document(4), "-n", "100"]);
    let pages = figures["stats"]["pages_per_kv_head_and_step"].as_f64().unwrap();
    assert!((9.9..11.1).contains(&pages), "{figures}");
}

/// A share of the context that a run asks for is rounded up to as many pages as the model was converted with.
#[test]
fn another_budget_keeps_the_least_pages() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let settings = retro_export::Settings {
        budget: retro_contract::Budget::Ratio(0.02),
        min_pages: Some(12),
        page_size: 16,
        ..Default::default()
    };
    retro_export::convert(&retro_export::Options {
        source: ledger(),
        target: Some(model.clone()),
        settings,
        ..Default::default()
    })
    .unwrap();
    let doc = document(0);
    let pages = |budget: &[&str]| {
        let arguments = [&["--document", &doc, "-n", "20"], budget].concat();
        json(&model, &arguments)["stats"]["pages_per_kv_head_and_step"]
            .as_f64()
            .unwrap()
    };
    assert_eq!(pages(&[]), 12.0);
    // A fiftieth and a tenth of about 1050 tokens are 2 and 7 pages of 16.
    assert_eq!(pages(&["-b", "0.02"]), 12.0);
    assert_eq!(pages(&["-b", "0.1"]), 12.0);
    assert!(pages(&["-b", "0.25"]) > 16.0);
    // A number of tokens is one: 64 are 4 pages.
    assert_eq!(pages(&["-b", "64"]), 4.0);
}
