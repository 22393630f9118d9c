//! `retro-run eval` on a source model: policies, reports, going on after an interruption.

use std::{fs, path::Path};

use serde_json::Value;

use crate::support::*;

fn eval(arguments: &[&str]) -> String {
    let output = retro_run().arg("eval").arg(ledger()).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn rows(text: &str) -> Vec<Value> {
    let value: Value = serde_json::from_str(text).unwrap();
    value["rows"].as_array().unwrap().clone()
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"))
}

#[test]
fn policies_over_documents_with_reports_and_resumption() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, results, page, figures) = (documents(), path("r.jsonl"), path("r.html"), path("figures"));
    let arguments = [
        "--data",
        &data,
        "--docs",
        "2",
        "-n",
        "60",
        "--batch",
        "2",
        "--budgets",
        "0.1,0.2",
        "--windows",
        "2",
        "--resume",
        &results,
        "--html",
        &page,
        "--figures",
        &figures,
        "--json",
    ];
    let first = rows(&eval(&arguments));
    let names: Vec<&str> = first.iter().map(|r| r["policy"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 9);
    assert_eq!(
        (names[0], names[1], names[3], names[5], names[7]),
        (
            "dense",
            "StreamingLLM",
            "Quest (w = 1)",
            "Retro (w = 2)",
            "recommended (w = 2)"
        )
    );
    // 60 tokens answer the first few of about 40 problems.
    assert!(first[0]["right"]["mean"].as_f64().unwrap() > 5.0, "{}", first[0]);
    // Budgets and what a step reads: dense everything, StreamingLLM no summaries, two budgets twice as many pages.
    assert_eq!(first[0]["share_of_dense_bytes"], 1.0);
    let (streaming, quest) = (&first[1], &first[3]);
    assert_eq!(number(streaming, "pages_per_step"), number(quest, "pages_per_step"));
    assert!(number(streaming, "kib_per_step") < number(quest, "kib_per_step"));
    assert!(
        (0.09..0.13).contains(&number(streaming, "share_of_dense_bytes")),
        "{streaming}"
    );
    // Two vectors a page of 16 keys and 16 values: 1/16 of dense attention's bytes on top.
    let summaries = number(quest, "share_of_dense_bytes") - number(streaming, "share_of_dense_bytes");
    assert!((summaries - 1.0 / 16.0).abs() < 0.004, "{quest}");
    assert_eq!(number(quest, "effective_exposure"), 1.0);
    assert!(number(&first[5], "effective_exposure") > 1.05, "{}", first[5]);
    assert!(first[5]["difference_to_quest"]["mean"].is_number() && quest["difference_to_quest"].is_null());

    let html = fs::read_to_string(&page).unwrap();
    assert_eq!(html.matches("<svg").count(), 4);
    assert!(!html.contains("http-equiv") && !html.contains("<script") && html.contains("recommended (w = 2)"));
    for name in [
        "accuracy-budget",
        "accuracy-position-0.1",
        "accuracy-position-0.2",
        "exposure-window",
    ] {
        assert!(Path::new(&figures).join(format!("{name}.svg")).is_file(), "{name}");
    }

    // Half of the results are lost: the same comes out, and nothing is measured twice.
    let kept = fs::read_to_string(&results).unwrap();
    let lines: Vec<&str> = kept.lines().collect();
    assert_eq!(lines.len(), 1 + 9 * 2);
    fs::write(&results, lines[..10].join("\n")).unwrap();
    let again = rows(&eval(&arguments));
    for (a, b) in first.iter().zip(&again) {
        for key in [
            "policy",
            "right",
            "quarters",
            "pages_per_step",
            "kib_per_step",
            "effective_exposure",
        ] {
            assert_eq!(a[key], b[key], "{key}");
        }
    }
    let whole = fs::read_to_string(&results).unwrap();
    assert!(whole.starts_with(&lines[..10].join("\n")));
    let other = [&arguments[..2], &["--docs", "1", "--resume", &results]].concat();
    let model = ledger();
    let line = error(&[&["eval", model.to_str().unwrap()], other.as_slice()].concat());
    assert!(line.contains("another run"), "{line}");
}

#[test]
fn fidelity_over_texts() {
    let dir = tempfile::tempdir().unwrap();
    // Two documents as texts: prompt and right output.
    let texts: Vec<String> = (0..2)
        .map(|i| {
            let text = fs::read_to_string(documents()).unwrap();
            let line: Value = serde_json::from_str(text.lines().nth(i).unwrap()).unwrap();
            let path = dir.path().join(format!("{i}.txt"));
            let text = format!(
                "{} {}",
                line["prompt"].as_str().unwrap(),
                line["reference"].as_str().unwrap()
            );
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .collect();
    let arguments = [
        "--perplexity",
        &texts[0],
        &texts[1],
        "--prompt-tokens",
        "1040",
        "-n",
        "80",
        "--budgets",
        "0.1,1.0",
        "--windows",
        "2",
        "--json",
    ];
    let rows = rows(&eval(&arguments));
    let find = |policy: &str, budget: &str| {
        let row = rows.iter().find(|r| r["policy"] == policy && r["budget"] == budget);
        row.unwrap_or_else(|| panic!("{policy} {budget}")).clone()
    };
    let dense = &rows[0];
    assert!(dense["divergence"]["mean"].as_f64().unwrap().abs() < 1e-9, "{dense}");
    assert_eq!(number(dense, "agreement"), 1.0);
    assert_eq!(number(dense, "tokens"), 160.0);
    // Parts of ten tokens a text each: the perplexity is their geometric mean.
    let parts: Vec<f64> = serde_json::from_value(dense["perplexity_by_position"].clone()).unwrap();
    assert_eq!(parts.len(), 8);
    let mean = parts.iter().map(|p| p.ln()).sum::<f64>() / 8.0;
    assert!((mean.exp() / number(dense, "perplexity") - 1.0).abs() < 1e-6, "{dense}");
    // With every page within the budget a policy is dense attention.
    for policy in ["StreamingLLM", "Quest (w = 1)", "Retro (w = 2)", "recommended (w = 2)"] {
        let whole = find(policy, "1.0");
        assert!(whole["divergence"]["mean"].as_f64().unwrap().abs() < 1e-6, "{whole}");
        assert!((number(&whole, "perplexity") / number(dense, "perplexity") - 1.0).abs() < 1e-4);
    }
    let (streaming, quest, own) = (
        find("StreamingLLM", "0.1"),
        find("Quest (w = 1)", "0.1"),
        find("recommended (w = 2)", "0.1"),
    );
    let divergence = |row: &Value| row["divergence"]["mean"].as_f64().unwrap();
    assert!(
        divergence(&own) < divergence(&quest) && divergence(&quest) < divergence(&streaming),
        "{own} {quest} {streaming}"
    );
    assert!(own["share_of_quest"]["mean"].as_f64().unwrap() < 1.0);
}

/// What rectifying passes read and take is counted, and they bring a small budget nearer to dense attention.
#[test]
fn passes_are_rows_of_their_own() {
    let data = documents();
    let arguments = [
        "--data",
        &data,
        "--docs",
        "2",
        "-n",
        "60",
        "--batch",
        "2",
        "--budgets",
        "0.1",
        "--policy",
        "quest",
        "--policy",
        "quest,rectify=10",
        "--json",
    ];
    let rows = rows(&eval(&arguments));
    let (quest, passes) = (&rows[0], &rows[1]);
    assert_eq!(passes["policy"], "Quest (w = 1), rectify 10");
    assert!(
        quest["rectify_passes"].is_null() && quest["rectify_share_of_time"].is_null(),
        "{quest}"
    );
    // 59 steps of each document: five passes.
    assert_eq!(number(passes, "rectify_passes"), 10.0);
    assert!(
        (0.01..0.99).contains(&number(passes, "rectify_share_of_time")),
        "{passes}"
    );
    assert_eq!(number(passes, "effective_exposure"), 1.0);
    assert!((number(passes, "pages_per_step") - number(quest, "pages_per_step")).abs() < 0.2);
    // Five of 59 steps with the whole cache on top.
    let more = number(passes, "share_of_dense_bytes") - number(quest, "share_of_dense_bytes");
    assert!((more - 5.0 / 59.0).abs() < 0.004, "{more}");
}
