//! `retro-run eval` on questions: scorers, questions that are decoded, tasks that it makes itself.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::support::*;

fn lines(path: &Path, lines: &[Value]) -> String {
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    fs::write(path, text.join("\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

fn rows(arguments: &[&str]) -> Vec<Value> {
    let model = ledger();
    let output = run(&[&["eval", model.to_str().unwrap(), "--json"], arguments].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    value["rows"].as_array().unwrap().clone()
}

fn right(row: &Value) -> f64 {
    row["right"]["mean"].as_f64().unwrap()
}

/// A document's prompt.
fn prompt(n: usize) -> String {
    let text = fs::read_to_string(documents()).unwrap();
    let line: Value = serde_json::from_str(text.lines().nth(n).unwrap()).unwrap();
    line["prompt"].as_str().unwrap().to_owned()
}

#[test]
fn each_line_is_scored_as_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let words = reference(0);
    let (first, begin, whole) = (&words[0], words[..3].join(" "), words[..6].join(" "));
    let document = |scorer: &str, answers: &[&str]| json!({"prompt": prompt(0), "scorer": scorer, "answers": answers, "n_predict": 6});
    let all = [
        (document("exact", &["x", &whole]), 100.0),
        (document("exact", &[&begin]), 0.0),
        (document("prefix", &[&begin]), 100.0),
        (document("prefix", &[&words[1]]), 0.0),
        (
            document("contains", &[&first.to_uppercase(), &words[2], "zzz", "yyy"]),
            50.0,
        ),
        (
            document("regex", &[&format!("^{}", regex_safe(first)), "[0-9]{9}"]),
            50.0,
        ),
    ];
    for (document, share) in &all {
        let data = lines(&dir.path().join("d.jsonl"), std::slice::from_ref(document));
        let row = &rows(&["--data", &data, "--policy", "dense"])[0];
        assert_eq!(
            (right(row), &row["generated_tokens"]),
            (*share, &json!(6)),
            "{document}"
        );
    }
    // All in one file, and the command line's scorer for the line that names none.
    let mut all: Vec<Value> = all.into_iter().map(|(d, _)| d).collect();
    all.push(json!({"prompt": prompt(0), "answers": [begin], "n_predict": 6}));
    let data = lines(&dir.path().join("d.jsonl"), &all);
    for option in ["--score", "--scorer"] {
        let row = &rows(&["--data", &data, "--policy", "dense", option, "prefix"])[0];
        assert!((right(row) - 400.0 / 7.0).abs() < 1e-9, "{row}");
    }
    // Columns about the place in the output say nothing of such answers.
    let model = ledger();
    let table = run(&[
        "eval",
        model.to_str().unwrap(),
        "--data",
        &data,
        "--docs",
        "1",
        "--policy",
        "dense",
    ]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("right answers") && !table.contains("by quarter") && !table.contains("first wrong"));
}

fn regex_safe(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_alphanumeric() {
                c.to_string()
            } else {
                format!("\\{c}")
            }
        })
        .collect()
}

#[test]
fn a_question_is_decoded_under_the_policy_and_is_no_part_of_the_output() {
    let dir = tempfile::tempdir().unwrap();
    // The ends of the prompts, cut at a word; two lengths in one batch.
    let split = |n: usize| {
        let prompt = prompt(n);
        let words: Vec<&str> = prompt.split(' ').collect();
        let (a, b) = words.split_at(words.len() - 120 - 40 * n);
        (a.join(" "), format!(" {}", b.join(" ")))
    };
    let answers = |n: usize| reference(n)[..12].iter().map(|w| format!(" {w} ")).collect::<Vec<_>>();
    let document = |n: usize, split: bool, whole: (String, String)| {
        let (a, b) = whole;
        let (prompt, question) = if split { (a, Some(b)) } else { (a + &b, None) };
        json!({"prompt": prompt, "question": question, "answers": answers(n), "scorer": "contains", "n_predict": 12})
    };
    let file = |name: &str, apart: bool| {
        let all: Vec<Value> = (0..2).map(|n| document(n, apart, split(n))).collect();
        lines(&dir.path().join(name), &all)
    };
    let (apart, whole) = (file("a.jsonl", true), file("w.jsonl", false));
    let of = |data: &str, more: &[&str]| {
        rows(
            &[
                &[
                    "--data",
                    data,
                    "--policy",
                    "dense",
                    "--policy",
                    "quest",
                    "--budgets",
                    "0.1",
                ],
                more,
            ]
            .concat(),
        )
    };
    let (asked, plain) = (of(&apart, &[]), of(&whole, &[]));
    // Dense attention reads everything whichever way the tokens come.
    for key in ["right", "generated_tokens"] {
        assert_eq!(asked[0][key], plain[0][key]);
        assert_eq!(of(&apart, &["--dense-questions"])[0][key], plain[0][key]);
    }
    assert!(right(&plain[0]) > 50.0, "{}", plain[0]);
    // Quest reads a tenth of it for the question too: shorter contexts, and other answers than of a dense prompt.
    let pages = |rows: &[Value]| rows[1]["pages_per_step"].as_f64().unwrap();
    assert!(pages(&asked) < pages(&plain), "{} {}", asked[1], plain[1]);
    assert_eq!(pages(&of(&apart, &["--dense-questions"])), pages(&plain));
    assert!(right(&asked[1]) < right(&asked[0]), "{}", asked[1]);
    let alone = of(&apart, &["--batch", "1"]);
    assert_eq!(
        (alone[1]["right"].clone(), pages(&alone)),
        (asked[1]["right"].clone(), pages(&asked))
    );
}

#[test]
fn wrong_lines_are_named_by_their_number() {
    let dir = tempfile::tempdir().unwrap();
    let (model, path) = (ledger(), dir.path().join("d.jsonl"));
    let good = json!({"prompt": "facts", "answers": ["a"]});
    for (bad, says) in [
        (
            json!({"prompt": "facts", "scorer": "guess"}),
            "`guess`, expected one of `ledger`, `exact`",
        ),
        (json!({"prompt": "facts", "scorer": "contains"}), "no answers"),
        (
            json!({"prompt": "facts", "scorer": "regex", "answers": ["("]}),
            "answer 1 is no pattern: unclosed group",
        ),
        (
            json!({"prompt": "facts", "scorer": "prefix", "answers": ["a", ""]}),
            "answer 2 is empty",
        ),
        (json!({"prompt": "facts", "n_predict": 0}), "n_predict is 0"),
        (json!({"question": "facts"}), "missing field `prompt`"),
    ] {
        let data = lines(&path, &[good.clone(), bad]);
        let line = error(&["eval", model.to_str().unwrap(), "--data", &data]);
        assert!(line.contains("d.jsonl line 2") && line.contains(says), "{line}");
    }
}

#[test]
fn tasks_are_made_saved_and_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, text) = (path("cases.jsonl"), path("text.txt"));
    fs::write(&text, "coins of Anna 7 . home of Ben Rome .\n".repeat(60)).unwrap();
    let policies = ["--policy", "dense", "--policy", "quest", "--budgets", "0.3", "-n", "8"];
    let made = [
        "--task",
        "look-up",
        "--text",
        &text,
        "--length",
        "300-500",
        "--cases",
        "3",
        "--save-data",
        &data,
    ];
    let first = rows(&[&made[..], &policies].concat());
    let saved = fs::read_to_string(&data).unwrap();
    assert_eq!((first[0]["documents"].clone(), saved.lines().count()), (json!(3), 3));
    let again = rows(&[&["--data", &data][..], &policies].concat());
    for (a, b) in first.iter().zip(&again) {
        for key in ["right", "generated_tokens", "pages_per_step"] {
            assert_eq!(a[key], b[key]);
        }
    }
    // The seed decides.
    rows(&[&made[..], &policies, &["--seed", "2"]].concat());
    assert_ne!(fs::read_to_string(&data).unwrap(), saved);

    let model = ledger();
    let model = model.to_str().unwrap();
    let line = error(&["eval", model, "--task", "look-up", "--length", "300"]);
    assert!(line.contains("name files with --text"), "{line}");
    let line = error(&["eval", model, "--task", "niah-single", "--length", "9k", "--cases", "1"]);
    assert!(line.contains("leaves no room in the model's context"), "{line}");
    for arguments in [
        &["--task", "niah"][..],
        &["--task", "niah-single", "--data", "x"],
        &["--task", "niah-single", "--length", "0"],
        &["--data", "x", "--seed", "1"],
    ] {
        let all = [&["eval", model], arguments].concat();
        assert_eq!(run(&all).status.code(), Some(2), "{arguments:?}");
    }
}
