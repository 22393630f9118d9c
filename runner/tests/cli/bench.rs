//! The benchmarks, on something small: what they print, not how fast it is.

use serde_json::Value;

use crate::support::*;

fn output(arguments: &[&str]) -> String {
    let output = run(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_operator_beside_group_query_attention() {
    let shape = ["--heads", "4", "--kv-heads", "2", "--head-size", "32", "--nodes", "2"];
    let common = [
        "bench-op", "-c", "300", "-r", "2", "-t", "2", "--dtype", "f32,f16", "-o",
    ];
    let varied = ["-w", "1,3", "-b", "0.3,1.0", "--mode", "retro,dense,streaming"];
    let text = output(&[&common[..], &["json"], &varied, &shape].concat());
    let table: Value = serde_json::from_str(&text).unwrap();
    let rows = table["rows"].as_array().unwrap();
    // Two element types of GQA, two budgets of two windows for retro and streaming, two windows of dense.
    assert_eq!(rows.len(), 2 * (1 + 4 + 2 + 4), "{text}");
    for row in rows {
        assert!(row["us"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(row["gqa_ratio"].is_null(), row["operator"] == "GQA", "{row}");
    }
    // Keys and values of 300 tokens and those decoded: 2 * 2 * 32 * 4 bytes each.
    let gqa = &rows[0];
    assert!((0.153..0.158).contains(&gqa["mbytes"].as_f64().unwrap()), "{gqa}");
    let exposed = |row: &&Value| row["operator"] == "retro" && row["window"] == 3 && row["budget"] == "0.3";
    let exposure = rows.iter().find(exposed).unwrap()["exposure"].as_f64().unwrap();
    assert!((1.0..3.0).contains(&exposure), "{text}");

    let text = output(&[&common[..], &["csv"], &["-w", "1"], &shape].concat());
    assert!(text.starts_with("dtype,context,threads,operator,"), "{text}");
}

#[test]
fn models_side_by_side() {
    let (dense, retro) = (ledger(), ledger_retro());
    let (dense, retro) = (dense.to_str().unwrap(), retro.to_str().unwrap());
    let (one, eight) = (format!("{retro},window=1,name=Quest"), format!("{retro},window=8"));
    let models = ["bench", "-m", dense, "-m", &one, "-m", &eight];
    let tests = ["-p", "32", "-n", "4", "-d", "0,700", "-r", "2", "-o", "json"];
    let text = output(&[&models[..], &tests].concat());
    let table: Value = serde_json::from_str(&text).unwrap();
    let rows = table["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2 * 2 * 3, "{text}");
    assert_eq!(rows[1]["model"], "Quest");
    for row in rows {
        assert!(row["tokens_per_second"].as_f64().unwrap() > 0.0, "{row}");
    }
    let deep: Vec<&Value> = rows
        .iter()
        .filter(|r| r["depth"] == 700 && r["test"] == "tg4")
        .collect();
    assert!(
        deep[0]["share_of_pages"].is_null(),
        "dense models select no pages: {text}"
    );
    let share = deep[2]["share_of_pages"].as_f64().unwrap();
    assert!((0.14..0.18).contains(&share), "{text}");
    assert!(deep[2]["exposure"].as_f64().unwrap() >= 1.0, "{text}");
}

#[test]
fn what_cannot_be_measured_is_one_line() {
    assert!(error(&["bench-op", "-c", "0"]).contains("-c 0"));
    assert!(error(&["bench-op", "--heads", "3"]).contains("--heads 3"));
    assert!(error(&["bench-op", "-w", "65"]).contains("65"));
    assert!(error(&["bench", "-m", "/no/such/model"]).contains("/no/such/model"));
    let dense = ledger();
    let dense = dense.to_str().unwrap();
    assert!(error(&["bench", "-m", dense, "-p", "0", "-n", "0"]).contains("nothing to measure"));
    assert!(error(&["bench", "-m", dense, "-d", "4000"]).contains("context of 2048"));
    assert!(error(&["bench", "-m", &format!("{dense},window=4")]).contains("not converted"));
}
