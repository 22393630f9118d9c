//! How `retro-run` feeds models: numbers in their declared types, caches of declared size, the state of convolutions
//! and recurrent layers, and graphs that stand among others or in a subfolder.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use retro_onnx::{DataType, Dimension, GraphProto};
use retro_tests::{paths, zoo};
use serde_json::Value;

use crate::convert::convert;

const LLAMA: &str = "optimum-llama-fp32";
/// Attention with caches beside convolutions with state.
const HYBRID: &str = "genai-lfm2";

fn retro_run(arguments: &[&str]) -> Output {
    Command::new(paths::command("retro-run"))
        .env("ORT_DYLIB_PATH", paths::onnxruntime())
        .env("RETRO_ATTENTION_PLUGIN", paths::plugin())
        .args(arguments)
        .output()
        .expect("retro-run starts")
}

fn prompt(words: usize) -> String {
    let words: Vec<String> = (0..words).map(|i| format!("t{}", 3 + i * 37 % 250)).collect();
    words.join(" ")
}

/// What `retro-run run` makes of 21 words.
fn generate(model: &Path, options: &[&str]) -> Value {
    let prompt = prompt(21);
    let model = model.to_str().unwrap();
    let usual = ["run", model, "-t", "1", "--json", "-p", &prompt];
    let output = retro_run(&[&usual[..], options].concat());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{model} {options:?}: {error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn tokens(model: &Path, options: &[&str]) -> Vec<u64> {
    let object = generate(model, &[&["--ignore-eos"], options].concat());
    let list = object["tokens"].as_array().unwrap();
    list.iter().map(|t| t.as_u64().unwrap()).collect()
}

/// The one line with which `retro-run run` refuses a model.
fn refusal(model: &Path, options: &[&str]) -> String {
    let usual = ["run", model.to_str().unwrap(), "-p", "t1 t2"];
    let output = retro_run(&[&usual[..], options].concat());
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    let line = error.lines().find(|l| l.starts_with("error: "));
    line.unwrap_or_else(|| panic!("{error}")).to_owned()
}

/// A folder with a case, which a test may change.
fn case(name: &str, folder: &tempfile::TempDir, change: impl FnOnce(&mut GraphProto)) -> PathBuf {
    let place = folder.path().join(name);
    zoo::runnable(name, &place);
    zoo::change(&place.join("model.onnx"), change);
    place
}

#[test]
fn ids_masks_and_positions_are_given_in_their_declared_types() {
    use DataType::{Bfloat16, Bool, Float, Float16, Int32, Int64, Uint8};
    let folder = tempfile::tempdir().unwrap();
    let expected = tokens(&case(LLAMA, &folder, |_| {}), &["-n", "16"]);
    for (ids, mask, positions) in [
        (Int32, Int64, Int64),
        (Int64, Int32, Int32),
        (Int32, Bool, Int64),
        (Int64, Float, Int32),
        (Int32, Float16, Int64),
        (Int64, Bfloat16, Int64),
        (Int64, Uint8, Int64),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let model = case(LLAMA, &folder, |graph| {
            zoo::retype(graph, "input_ids", ids);
            zoo::retype(graph, "attention_mask", mask);
            zoo::retype(graph, "position_ids", positions);
        });
        let types = format!("{ids:?} {mask:?} {positions:?}");
        assert_eq!(tokens(&model, &["-n", "16"]), expected, "{types}");
        assert_eq!(tokens(&model, &["-n", "16", "--chunk", "4"]), expected, "{types}");
    }
    let folder = tempfile::tempdir().unwrap();
    let model = case(LLAMA, &folder, |graph| zoo::retype(graph, "input_ids", Float));
    assert!(refusal(&model, &["-n", "1"]).contains("\"input_ids\" is"));
}

/// Declares the length of all caches, coming in and going out.
fn declare_capacity(graph: &mut GraphProto, past: i64, present: i64) {
    for (values, prefix, length) in [
        (&mut graph.input, "past", past),
        (&mut graph.output, "present", present),
    ] {
        for value in values.iter_mut().filter(|v| v.name().starts_with(prefix)) {
            if let Some(dim) = value.dims_mut().and_then(|d| d.get_mut(2)) {
                *dim = Dimension::from(length);
            }
        }
    }
}

/// A genai export, with its weights and a tokenizer in one folder.
fn genai(folder: &Path, shared: bool, change: impl FnOnce(&mut GraphProto)) -> PathBuf {
    let place = folder.join("model");
    let words = folder.join("words");
    zoo::runnable(LLAMA, &words);
    fs::create_dir(&place).unwrap();
    fs::copy(words.join("tokenizer.json"), place.join("tokenizer.json")).unwrap();
    for name in ["genai_config.json", "model.onnx", "model.onnx.data"] {
        fs::copy(paths::zoo("genai-llama-fp32-cpu").join(name), place.join(name)).unwrap();
    }
    let config = fs::read_to_string(place.join("genai_config.json")).unwrap();
    let (old, new) = ("share_buffer\": true", format!("share_buffer\": {shared}"));
    assert!(config.contains(old));
    fs::write(place.join("genai_config.json"), config.replace(old, &new)).unwrap();
    zoo::change(&place.join("model.onnx"), change);
    place
}

#[test]
fn a_declared_cache_size_is_the_context() {
    let folder = tempfile::tempdir().unwrap();
    let expected = tokens(&genai(folder.path(), true, |_| {}), &["-n", "12"]);
    for shared in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let model = genai(folder.path(), shared, |graph| declare_capacity(graph, 40, 40));
        let converted = folder.path().join("converted");
        convert(&model, &converted, &["--window", "2"]).expect("it converts");
        for (model, budget) in [(&model, &[][..]), (&converted, &["--budget", "1.0"][..])] {
            let whole = tokens(model, budget);
            let (prompt, first) = (40 - whole.len(), &whole[..12]);
            assert!((21..=22).contains(&prompt), "the context is full: {whole:?}");
            assert_eq!(first, expected, "shared: {shared}");
            assert_eq!(tokens(model, &[&["-n", "12", "-c", "36"], budget].concat()), expected);
            for beyond in [["-n", "60"], ["-c", "41"]] {
                assert!(refusal(model, &beyond).contains("the model's context"), "{beyond:?}");
                assert!(refusal(model, &beyond).contains("40 tokens"), "{beyond:?}");
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    // A cache that grows from a declared size fits no second call.
    let model = case(LLAMA, &folder, |graph| declare_capacity(graph, 40, 41));
    assert!(refusal(&model, &["-n", "3"]).contains("needs both of one shape"));
}

#[test]
fn state_of_convolutions_is_carried_from_call_to_call() {
    let folder = tempfile::tempdir().unwrap();
    let model = case(HYBRID, &folder, |_| {});
    let converted = folder.path().join("converted");
    convert(&model, &converted, &["--window", "1"]).expect("it converts");
    let expected = tokens(&model, &["-n", "24"]);
    // What is forgotten between calls would show where the prompt is cut.
    for chunk in ["1", "3", "20"] {
        assert_eq!(
            tokens(&model, &["-n", "24", "--chunk", chunk]),
            expected,
            "chunks of {chunk}"
        );
        let options = ["-n", "24", "--chunk", chunk, "--budget", "1.0"];
        assert_eq!(tokens(&converted, &options), expected, "converted, chunks of {chunk}");
    }
    assert!(refusal(&converted, &["-n", "1", "-w", "2"]).contains("windows up to 1"));
    let stats = &generate(&model, &["-n", "4"])["stats"];
    assert!(stats["state_mib"].as_f64().unwrap() > 0.0, "{stats}");
}

#[test]
fn models_with_other_state_are_measured_and_compared_too() {
    let folder = tempfile::tempdir().unwrap();
    let model = case(HYBRID, &folder, |_| {});
    let converted = folder.path().join("converted");
    convert(&model, &converted, &["--window", "1"]).expect("it converts");
    let [model, converted] = [model, converted].map(|p| p.to_str().unwrap().to_owned());
    let text = folder.path().join("text.txt");
    fs::write(&text, prompt(90)).unwrap();
    let succeeds = |arguments: &[&str]| {
        let output = retro_run(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    };
    let table = succeeds(&[
        "bench",
        "-m",
        &converted,
        "-m",
        &model,
        "-p",
        "8",
        "-n",
        "4",
        "-d",
        "20",
        "-r",
        "1",
        "--prefill-depth",
    ]);
    assert_eq!(table.lines().filter(|l| l.contains("tg4")).count(), 2, "{table}");
    assert!(succeeds(&["bench", "-m", &converted, "-p", "0", "-n", "4", "-d", "20", "-r", "1"]).contains("tg4"));
    let compared = succeeds(&[
        "eval",
        &model,
        "--json",
        "--perplexity",
        text.to_str().unwrap(),
        "-n",
        "40",
        "--prompt-tokens",
        "40",
        "--policy",
        "dense",
        "--policy",
        "quest",
        "--budgets",
        "1.0",
    ]);
    let compared: Value = serde_json::from_str(&compared).unwrap();
    let rows = compared["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        let divergence = row["divergence"]["mean"].as_f64().or(row["kl"]["mean"].as_f64());
        assert!(divergence.expect("a divergence").abs() < 1e-5, "{row}");
    }
}

/// Two graphs as transformers.js lays them, the second with its weights of another seed.
fn several(folder: &Path) -> PathBuf {
    let place = folder.join("several");
    zoo::runnable(LLAMA, &place);
    let below = place.join("onnx");
    fs::create_dir(&below).unwrap();
    fs::rename(place.join("model.onnx"), below.join("model.onnx")).unwrap();
    let other = folder.join("other");
    zoo::runnable("tfexp-llama-fp32", &other);
    fs::rename(other.join("model.onnx"), below.join("model_q4f16.onnx")).unwrap();
    place
}

#[test]
fn one_of_several_graphs_is_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let model = several(folder.path());
    let [plain, q4f16] = ["onnx/model.onnx", "onnx/model_q4f16.onnx"].map(|g| tokens(&model.join(g), &["-n", "8"]));
    assert_ne!(plain, q4f16);
    assert_eq!(tokens(&model, &["-n", "8", "--graph", "q4f16"]), q4f16);
    assert_eq!(tokens(&model, &["-n", "8", "--graph", "model.onnx"]), plain);
    let error = refusal(&model, &["-n", "1"]);
    assert!(
        error.contains("(onnx/model.onnx, onnx/model_q4f16.onnx)") && error.contains("--graph"),
        "{error}"
    );
    let error = refusal(&model, &["-n", "1", "--graph", "fp16"]);
    assert!(
        error.contains("it has onnx/model.onnx, onnx/model_q4f16.onnx"),
        "{error}"
    );
    let converted = folder.path().join("converted");
    convert(&model, &converted, &["--graph", "q4f16"]).expect("it converts");
    // The other variant stays behind, so that nothing has to be chosen there.
    assert_eq!(tokens(&converted, &["-n", "8", "--budget", "1.0"]), q4f16);
    let name = model.to_str().unwrap();
    for arguments in [
        &["bench", "-m", name, "--graph", "q4f16", "-p", "4", "-n", "0", "-r", "1"][..],
        &[
            "bench",
            "-m",
            &format!("{name},graph=q4f16"),
            "-p",
            "4",
            "-n",
            "0",
            "-r",
            "1",
        ],
    ] {
        let output = retro_run(arguments);
        let table = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && table.contains("several q4f16"), "{table}");
    }
    let text = folder.path().join("text.txt");
    fs::write(&text, prompt(60)).unwrap();
    let text = text.to_str().unwrap();
    let run = format!("as it is={name},graph=q4f16");
    let output = retro_run(&[
        "eval",
        name,
        "--graph",
        "q4f16",
        "--perplexity",
        text,
        "--prompt-tokens",
        "30",
        "-n",
        "20",
        "--policy",
        "dense",
        "--policy",
        "quest",
        "--run",
        &run,
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8(output.stdout).unwrap().contains("as it is"));
}

#[test]
fn a_graph_in_a_subfolder_is_the_one_that_genai_config_names() {
    let folder = tempfile::tempdir().unwrap();
    let model = genai(folder.path(), true, |_| {});
    let expected = tokens(&model, &["-n", "8"]);
    fs::create_dir(model.join("decoder")).unwrap();
    for name in ["model.onnx", "model.onnx.data"] {
        fs::rename(model.join(name), model.join("decoder").join(name)).unwrap();
    }
    let config = fs::read_to_string(model.join("genai_config.json")).unwrap();
    let names = |file: &str| {
        let config = config.replace("\"model.onnx\"", &format!("{file:?}"));
        fs::write(model.join("genai_config.json"), config).unwrap();
    };
    names("decoder/model.onnx");
    assert_eq!(tokens(&model, &["-n", "8"]), expected);
    assert_eq!(tokens(&model.join("decoder/model.onnx"), &["-n", "8"]), expected);
    let converted = folder.path().join("converted");
    convert(&model, &converted, &[]).expect("it converts");
    assert!(converted.join("decoder/model.onnx.data").is_file());
    assert_eq!(tokens(&converted, &["-n", "8", "--budget", "1.0"]), expected);
    for outside in ["../model.onnx", "/tmp/model.onnx"] {
        names(outside);
        let says = "is not a file of that folder";
        assert!(refusal(&model, &["-n", "1"]).contains(says));
        assert!(
            convert(&model, &folder.path().join("none"), &[])
                .unwrap_err()
                .contains(says)
        );
    }
}

#[test]
fn the_end_of_text_may_stand_in_any_configuration_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = case(LLAMA, &folder, |_| {});
    let all = tokens(&model, &["-n", "16"]);
    // The first token that is none of those before it, behind at least two.
    let at = (2..all.len())
        .find(|&i| !all[..i].contains(&all[i]))
        .expect("a token of its own");
    let (end, word) = (all[at], format!("t{}", all[at]));
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    for (name, text, stops) in [
        (
            "generation_config.json",
            format!(r#"{{"eos_token_id": [511, {end}]}}"#),
            true,
        ),
        ("generation_config.json", r#"{"eos_token_id": 511}"#.to_owned(), false),
        (
            "config.json",
            config.replacen('{', &format!(r#"{{"eos_token_id": {end}, "#), 1),
            true,
        ),
        (
            "config.json",
            config.replacen('{', &format!(r#"{{"text_config": {{"eos_token_id": [{end}]}}, "#), 1),
            true,
        ),
        (
            "genai_config.json",
            format!(r#"{{"model": {{"eos_token_id": [null, {end}, {end}]}}}}"#),
            true,
        ),
        ("tokenizer_config.json", format!(r#"{{"eos_token": "{word}"}}"#), true),
        (
            "tokenizer_config.json",
            format!(r#"{{"eos_token": {{"content": "{word}"}}}}"#),
            true,
        ),
        ("tokenizer_config.json", r#"{"eos_token": "</none>"}"#.to_owned(), false),
    ] {
        fs::write(model.join(name), &text).unwrap();
        let object = generate(&model, &["-n", "16"]);
        let expected = if stops { ("eos", at) } else { ("length", 16) };
        let got = object["tokens"].as_array().unwrap().len();
        assert_eq!((object["finish"].as_str().unwrap(), got), expected, "{name}: {text}");
        assert_eq!(tokens(&model, &["-n", "16"]), all, "--ignore-eos, {name}");
        if name == "config.json" {
            fs::write(model.join(name), &config).unwrap();
        } else {
            fs::remove_file(model.join(name)).unwrap();
        }
    }
}
