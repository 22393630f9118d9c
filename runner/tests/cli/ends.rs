//! How the programs end: interrupted, with streams that nobody takes, and beside others that start at once.

use std::{
    fs,
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::Duration,
};

use serde_json::Value;

use crate::support::*;

/// Starts the program and waits for a line on stderr that begins so; gives what stands on stderr afterwards, too.
fn start(arguments: &[&str], line: &str) -> (Child, BufReader<std::process::ChildStderr>) {
    let mut command = retro_run();
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut found = String::new();
    while !found.starts_with(line) {
        found.clear();
        assert_ne!(
            errors.read_line(&mut found).unwrap(),
            0,
            "{arguments:?} ended before {line:?}"
        );
    }
    (child, errors)
}

fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    let status = Command::new("kill").args(["-s", name, &pid]).status().unwrap();
    assert!(status.success());
}

/// Waits for the end; gives exit code, stdout and the rest of stderr.
fn end(mut child: Child, mut errors: impl Read) -> (Option<i32>, String, String) {
    let mut out = String::new();
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    let mut rest = String::new();
    errors.read_to_string(&mut rest).unwrap();
    (child.wait().unwrap().code(), out, rest)
}

#[test]
fn an_interrupted_generation_prints_what_it_has() {
    let (model, doc) = (ledger(), document(0));
    let arguments = ["run", model.to_str().unwrap(), "--document", &doc, "--ignore-eos"];
    for (name, code, word) in [("INT", 130, "interrupted"), ("TERM", 143, "terminated")] {
        // As it comes: the text is there up to the signal.
        let (mut child, errors) = start(&arguments, "dense attention");
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 40]).unwrap();
        signal(&child, name);
        let (got, text, rest) = end(child, errors);
        assert_eq!(got, Some(code), "{rest}");
        assert!(text.ends_with('\n') && !text.contains('\u{fffd}'), "{text:?}");
        assert!(rest.contains("generated ") && rest.contains("KV cache"), "{rest}");
        assert!(rest.ends_with(&format!("{word}\n")), "{rest}");

        // At the end: the text and the figures come all the same.
        for option in ["--json", "--no-stream"] {
            let (child, errors) = start(&[&arguments[..], &[option]].concat(), "dense attention");
            sleep(Duration::from_millis(400));
            signal(&child, name);
            let (got, text, rest) = end(child, errors);
            assert_eq!(got, Some(code), "{option}: {rest}");
            assert!(
                rest.contains("generated ") && rest.ends_with(&format!("{word}\n")),
                "{rest}"
            );
            if option == "--json" {
                let object: Value = serde_json::from_str(&text).unwrap();
                assert_eq!(object["finish"], "interrupted");
                let (tokens, count) = (
                    object["tokens"].as_array().unwrap().len(),
                    &object["stats"]["generated_tokens"],
                );
                assert_eq!(*count, tokens);
            } else {
                assert!(text.ends_with('\n'), "{text:?}");
            }
        }
    }
}

#[test]
fn a_prompt_is_interrupted_between_chunks() {
    let model = ledger();
    let prompt = "coins ".repeat(1900);
    let arguments = ["run", model.to_str().unwrap(), "-p", &prompt, "--chunk", "1", "--json"];
    let (child, errors) = start(&arguments, "dense attention");
    sleep(Duration::from_millis(100));
    signal(&child, "INT");
    let (code, text, rest) = end(child, errors);
    assert_eq!(code, Some(130), "{rest}");
    let object: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&object["finish"], &object["text"]),
        (&"interrupted".into(), &"".into())
    );
    assert!(object["stats"]["prompt_tokens"].as_u64().unwrap() < 1900, "{object}");
    assert_eq!(object["stats"]["time_to_first_token_ms"], Value::Null);
}

#[test]
fn an_interrupted_evaluation_keeps_its_results() {
    let dir = tempfile::tempdir().unwrap();
    let results = dir.path().join("results.jsonl");
    let (model, data) = (ledger(), documents());
    let arguments = [
        "eval",
        model.to_str().unwrap(),
        "--data",
        &data,
        "--docs",
        "1",
        "-n",
        "200",
        "--windows",
        "8",
        "--policy",
        "dense",
        "--policy",
        "retro",
        "--budgets",
        "0.1,0.2,0.3,0.4",
        "--resume",
        results.to_str().unwrap(),
    ];
    let measured = || fs::read_to_string(&results).map_or(0, |text| text.lines().count().saturating_sub(1));
    // Where stderr is no terminal, lines tell how far it is.
    let (child, errors) = start(&arguments, "eval: 0 of 5 documents");
    while measured() == 0 {
        sleep(Duration::from_millis(5));
    }
    signal(&child, "INT");
    let (code, table, rest) = end(child, errors);
    assert_eq!(code, Some(130), "{rest}");
    let kept = measured();
    assert!(
        (1..5).contains(&kept),
        "{kept} of 5 rows were measured when the interruption came"
    );
    assert!(
        table.contains("| dense ") && table.lines().count() == 2 + kept,
        "{table}"
    );
    assert!(rest.contains(&format!("{kept} of 5 rows are complete")), "{rest}");
    assert!(
        rest.contains("results.jsonl") && rest.ends_with("interrupted\n"),
        "{rest}"
    );

    let output = run(&arguments);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    assert!(errors.contains("eval: 5 of 5 documents"), "{errors}");
    assert_eq!(String::from_utf8(output.stdout).unwrap().lines().count(), 2 + 5);
    assert_eq!(measured(), 5);
}

#[test]
fn an_interrupted_measurement_prints_its_rows() {
    let model = ledger();
    let arguments = [
        "bench",
        "-m",
        model.to_str().unwrap(),
        "-p",
        "1024",
        "-n",
        "0",
        "-r",
        "1000",
    ];
    let (child, errors) = start(&arguments, model.to_str().unwrap());
    sleep(Duration::from_millis(500));
    signal(&child, "TERM");
    let (code, table, rest) = end(child, errors);
    assert_eq!(code, Some(143), "{rest}");
    assert!(table.contains("tokens/s") && !table.contains("pp1024"), "{table}");
}

/// Before there is anything to print, a signal ends the program with the same code.
#[test]
fn a_program_that_has_nothing_yet_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("prompt");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut command = retro_run();
    command.arg("run").arg(ledger()).arg("-f").arg(&pipe);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    sleep(Duration::from_millis(300));
    signal(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// `/dev/full` takes nothing, as a full disk does.
fn full() -> Stdio {
    Stdio::from(File::options().write(true).open("/dev/full").unwrap())
}

/// A pipe whose reader has gone.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    Stdio::from(writer)
}

fn with_streams(arguments: &[&str], stdout: Stdio, stderr: Stdio) -> Output {
    let mut command = retro_run();
    command
        .args(arguments)
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap()
}

#[test]
fn streams_that_take_nothing_end_no_program_in_a_panic() {
    let (model, data) = (ledger(), documents());
    let model = model.to_str().unwrap();
    let generate = ["run", model, "-p", "facts :", "-n", "3"];
    let evaluate = [
        "eval", model, "--data", &data, "--docs", "1", "-n", "4", "--policy", "dense",
    ];
    let bench = ["bench", "-m", model, "-p", "4", "-n", "0", "-r", "1"];
    for arguments in [&generate[..], &evaluate, &bench] {
        for nobody in [full as fn() -> Stdio, closed] {
            let output = with_streams(arguments, Stdio::piped(), nobody());
            assert!(output.status.success() && !output.stdout.is_empty(), "{arguments:?}");
        }
        let output = with_streams(arguments, full(), Stdio::piped());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains("error: cannot write to stdout"), "{errors}");
        // As other tools, without a word.
        let output = with_streams(arguments, closed(), Stdio::piped());
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && !errors.contains("error"), "{errors}");
        assert!(with_streams(arguments, closed(), closed()).status.success());
    }
    for nobody in [full as fn() -> Stdio, closed] {
        let failing = ["run", "/no/such/model", "-p", "x"];
        assert_eq!(with_streams(&failing, Stdio::null(), nobody()).status.code(), Some(1));
    }
}

fn first_run(cache: &Path) -> Child {
    let mut command = retro_run();
    command
        .env("XDG_CACHE_HOME", cache)
        .arg("run")
        .arg(root().join("models/ledger"));
    command.args(["-p", "<bos> facts :", "-n", "3"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn first_runs_of_one_folder_of_weights_at_once_all_succeed() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("retro-attention");
    let names = || -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&cache)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let all = |count: usize| -> Vec<String> {
        let children: Vec<Child> = (0..count).map(|_| first_run(dir.path())).collect();
        let outputs = children.into_iter().map(|child| {
            let output = child.wait_with_output().unwrap();
            let errors = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.success(), "{errors}");
            assert!(!output.stdout.is_empty());
            errors
        });
        outputs.collect()
    };
    let errors = all(6);
    let made = |errors: &[String]| errors.iter().filter(|e| e.contains("building a graph")).count();
    assert_eq!(made(&errors), 1, "{errors:?}");
    let found = names();
    assert_eq!(found.len(), 2, "a lock and a model: {found:?}");
    let (lock, model) = (found[0].clone(), found[1].clone());
    assert_eq!(lock, format!(".{model}.lock"));

    // What killed programs left goes: of this model, and of another that nobody makes. What somebody makes stays.
    fs::remove_file(cache.join(&model).join("model.onnx")).unwrap();
    for part in [&format!(".{model}.abc.part"), ".other-w2.abc.part", ".mine-w2.abc.part"] {
        fs::create_dir_all(cache.join(part).join("dense")).unwrap();
    }
    fs::write(cache.join(".other-w2.lock"), "").unwrap();
    let mine = File::create(cache.join(".mine-w2.lock")).unwrap();
    mine.lock().unwrap();
    assert_eq!(made(&all(2)), 1);
    let found = names();
    assert!(
        found.contains(&model) && found.contains(&".mine-w2.abc.part".to_owned()),
        "{found:?}"
    );
    assert_eq!(found.iter().filter(|n| n.ends_with(".part")).count(), 1, "{found:?}");
    assert!(cache.join(&model).join("model.onnx").is_file());
}
