//! Folders with several graphs, graphs in subfolders, and files whose output is a folder.

use crate::support::{command, convert, copy_of, names, refusal};
use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

const CASE: &str = "genai-llama-fp32-cpu";

fn args<'a>(source: &'a Path, target: &'a Path, more: &[&'a str]) -> Vec<&'a OsStr> {
    let mut args = vec![source.as_os_str(), "-o".as_ref(), target.as_os_str()];
    args.extend(more.iter().map(|s| OsStr::new(*s)));
    args
}

fn read(path: PathBuf) -> Vec<u8> {
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The same model with its weights in a file of another name, which must be as long.
fn with_weights_in(name: &str, from: &Path, to: &Path) {
    const USUAL: &[u8] = b"model.onnx.data";
    assert_eq!(name.len(), USUAL.len());
    let mut bytes = fs::read(from).unwrap();
    let at: Vec<usize> = (0..bytes.len()).filter(|&i| bytes[i..].starts_with(USUAL)).collect();
    assert!(!at.is_empty());
    for i in at {
        bytes[i..i + USUAL.len()].copy_from_slice(name.as_bytes());
    }
    fs::write(to, bytes).unwrap();
    fs::copy(from.with_file_name("model.onnx.data"), to.with_file_name(name)).unwrap();
}

/// A repository as transformers.js has it: configuration and tokenizer, and variants of one graph below. Two of them share weights.
fn variants(folder: &Path) -> PathBuf {
    let model = copy_of(CASE, folder);
    fs::remove_file(model.join("genai_config.json")).unwrap();
    for name in ["config.json", "tokenizer.json", "generation_config.json"] {
        fs::write(model.join(name), "{}").unwrap();
    }
    let below = model.join("onnx");
    fs::create_dir(&below).unwrap();
    for name in ["model.onnx", "model.onnx.data"] {
        fs::rename(model.join(name), below.join(name)).unwrap();
    }
    fs::copy(below.join("model.onnx"), below.join("model_q4f16.onnx")).unwrap();
    with_weights_in(
        "model_b4.weight",
        &below.join("model.onnx"),
        &below.join("model_bnb4.onnx"),
    );
    // Another part of the model, whichever variant is chosen.
    with_weights_in(
        "embed__.weights",
        &below.join("model.onnx"),
        &below.join("embed_tokens_q4f16.onnx"),
    );
    model
}

const ABOVE: [&str; 4] = ["config.json", "generation_config.json", "onnx", "tokenizer.json"];

#[test]
fn a_chosen_graph_goes_with_its_configuration_and_weights() {
    let folder = tempfile::tempdir().unwrap();
    let model = variants(folder.path());
    let path = |name: &str| folder.path().join(name);
    for (i, choice) in ["q4f16", "model_q4f16.onnx", "onnx/model_q4f16.onnx"]
        .into_iter()
        .enumerate()
    {
        // By name it isn't clear whose the variant is.
        if i == 0 {
            let error = refusal(&args(&model, &path("none"), &["--graph", "int8"]));
            assert!(
                error.contains("has no such graph; it has onnx/embed_tokens_q4f16.onnx, onnx/model.onnx"),
                "{error}"
            );
        }
        let target = path(&format!("out{i}"));
        let report = convert(&args(&model, &target, &["--graph", choice]));
        assert!(
            report.contains("skipped  onnx/model_bnb4.onnx: of another variant of the graph"),
            "{report}"
        );
        assert_eq!(names(&target), ABOVE);
        assert_eq!(
            names(&target.join("onnx")),
            [
                "embed__.weights",
                "embed_tokens_q4f16.onnx",
                "model.onnx.data",
                "model_q4f16.onnx"
            ]
        );
        let back = path(&format!("back{i}"));
        convert(&args(&target, &back, &["--graph", choice, "--revert"]));
        assert!(read(back.join("onnx/model_q4f16.onnx")) == read(model.join("onnx/model_q4f16.onnx")));
    }
    // One that shares no weights with others leaves theirs behind.
    convert(&args(&model, &path("bnb4"), &["--graph", "bnb4"]));
    assert_eq!(
        names(&path("bnb4").join("onnx")),
        [
            "embed__.weights",
            "embed_tokens_q4f16.onnx",
            "model_b4.weight",
            "model_bnb4.onnx"
        ]
    );
    let several = refusal(&args(&model, &path("none"), &[]));
    assert!(
        several.contains("there are 4 ONNX models") && several.contains("--graph"),
        "{several}"
    );
    let inspected = convert(&[
        "inspect".as_ref(),
        model.as_os_str(),
        "--graph".as_ref(),
        "bnb4".as_ref(),
    ]);
    assert!(inspected.contains("model_bnb4.onnx"), "{inspected}");
    let file = model.join("onnx/model.onnx");
    assert!(refusal(&args(&file, &path("none"), &["--graph", "q4f16"])).contains("is a file: name the folder"));
    assert!(!path("none").exists());
}

#[test]
fn the_folder_of_the_graphs_stands_for_its_models() {
    let folder = tempfile::tempdir().unwrap();
    let model = variants(folder.path());
    let path = |name: &str| folder.path().join(name);
    for (name, options, graph) in [
        ("usual", &[][..], "model.onnx"),
        ("chosen", &["--graph", "q4f16"], "model_q4f16.onnx"),
    ] {
        convert(&args(&model.join("onnx"), &path(name), options));
        assert_eq!(names(&path(name)), ABOVE, "{name}");
        let expected = ["embed__.weights", "embed_tokens_q4f16.onnx", graph, "model.onnx.data"];
        let expected: BTreeSet<&str> = expected.into();
        assert!(names(&path(name).join("onnx")).iter().eq(expected), "{name}");
    }
    // So does one that a genai_config.json above names, and one that is named without its parent.
    let genai = tempfile::tempdir().unwrap();
    let model = copy_of(CASE, genai.path());
    fs::create_dir(model.join("decoder")).unwrap();
    for name in ["model.onnx", "model.onnx.data"] {
        fs::rename(model.join(name), model.join("decoder").join(name)).unwrap();
    }
    let config = r#"{"model": {"decoder": {"filename": "decoder/model.onnx"}}}"#;
    fs::write(model.join("genai_config.json"), config).unwrap();
    let output = command()
        .args([".", "-o", "../../below", "--no-verify"])
        .current_dir(model.join("decoder"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let below = genai.path().join("below");
    assert!(below.join("genai_config.json").is_file() && below.join("decoder/model.onnx").is_file());
}

/// Whoever names the output next must get the converted graph, or be told how.
#[test]
fn a_chosen_graph_is_the_one_that_the_output_stands_for() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of(CASE, folder.path());
    let path = |name: &str| folder.path().join(name);
    fs::copy(model.join("model.onnx"), model.join("model_fp16.onnx")).unwrap();
    // Hosts load what the configuration names, so it has to come along.
    let report = convert(&args(&model, &path("named"), &["--graph", "fp16"]));
    assert!(path("named/model.onnx").is_file(), "{report}");
    assert!(report.contains("run it with --graph model_fp16.onnx"), "{report}");
    fs::remove_file(model.join("genai_config.json")).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    let report = convert(&args(&model, &path("out"), &["--graph", "fp16"]));
    assert!(!path("out/model.onnx").exists(), "{report}");
    assert!(!report.contains("run it with --graph"), "{report}");
    let inspected = convert(&["inspect".as_ref(), path("out").as_os_str()]);
    assert!(inspected.contains("ai.retro 1"), "{inspected}");
}

#[test]
fn a_file_goes_into_a_folder_where_one_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = variants(folder.path());
    let path = |name: &str| folder.path().join(name);
    let source = model.join("onnx/model_q4f16.onnx");
    fs::create_dir(path("there")).unwrap();
    for (i, name) in ["out", "out.d/", "slash.onnx/", "there"].into_iter().enumerate() {
        let target = path(name);
        convert(&args(&source, &target, &[]));
        assert_eq!(names(&target), ABOVE, "{name}");
        let graphs = names(&target.join("onnx"));
        assert_eq!(
            graphs,
            [
                "embed__.weights",
                "embed_tokens_q4f16.onnx",
                "model.onnx.data",
                "model_q4f16.onnx"
            ],
            "{name}"
        );
        let back = path(&format!("back{i}"));
        convert(&args(&target.join("onnx/model_q4f16.onnx"), &back, &["--revert"]));
        assert!(read(back.join("onnx/model_q4f16.onnx")) == read(source.clone()));
    }
    convert(&args(&source, &path("file.onnx"), &[]));
    assert!(path("file.onnx").is_file() && path("model.onnx.data").is_file());
    // A path that doesn't mention the folder above.
    let output = command()
        .args(["model_q4f16.onnx", "-o", "../../bare", "--no-verify"])
        .current_dir(model.join("onnx"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(names(&path("bare")), ABOVE);
    // What is there is replaced only when asked for, and only a model.
    assert!(refusal(&args(&source, &path("out"), &[])).contains("--force"));
    convert(&args(&source, &path("out"), &["--force"]));
    fs::create_dir(path("documents")).unwrap();
    fs::write(path("documents/letter"), "x").unwrap();
    let error = refusal(&args(&source, &path("documents"), &["--force"]));
    assert!(error.contains("is a folder without a onnx/model_q4f16.onnx"), "{error}");
    assert!(refusal(&args(&source, &model, &["--force"])).contains("is the model's own folder"));
}

#[test]
fn of_a_folder_that_is_no_models_nothing_else_comes_along() {
    let folder = tempfile::tempdir().unwrap();
    let downloads = copy_of(CASE, folder.path());
    fs::remove_file(downloads.join("genai_config.json")).unwrap();
    fs::write(downloads.join("letter.txt"), "x").unwrap();
    let out = folder.path().join("out");
    convert(&args(&downloads.join("model.onnx"), &out, &[]));
    assert_eq!(names(&out), ["model.onnx", "model.onnx.data"]);
    let back = folder.path().join("back");
    convert(&args(&out.join("model.onnx"), &back, &["--revert"]));
    for name in ["model.onnx", "model.onnx.data"] {
        assert!(read(back.join(name)) == read(downloads.join(name)));
    }
}

#[test]
fn a_graph_in_a_subfolder_stays_there_and_others_come_along() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of(CASE, folder.path());
    for part in ["decoder", "vision"] {
        fs::create_dir(model.join(part)).unwrap();
    }
    for name in ["model.onnx", "model.onnx.data"] {
        fs::copy(model.join(name), model.join("vision").join(name)).unwrap();
        fs::rename(model.join(name), model.join("decoder").join(name)).unwrap();
    }
    let config = model.join("genai_config.json");
    let names_graph = |name: &str| {
        let text = format!(
            r#"{{"model": {{"decoder": {{"filename": {name:?}}}, "vision": {{"filename": "vision/model.onnx"}}}}}}"#
        );
        fs::write(&config, text).unwrap();
    };
    names_graph("decoder/model.onnx");
    let target = folder.path().join("out");
    let report = convert(&args(&model, &target, &[]));
    assert!(report.contains("decoder/model.onnx"), "{report}");
    assert_eq!(names(&target), ["decoder", "genai_config.json", "vision"]);
    assert_eq!(names(&target.join("decoder")), ["model.onnx", "model.onnx.data"]);
    for same in [
        "genai_config.json",
        "vision/model.onnx",
        "vision/model.onnx.data",
        "decoder/model.onnx.data",
    ] {
        assert!(read(target.join(same)) == read(model.join(same)), "{same}");
    }
    assert!(read(target.join("decoder/model.onnx")) != read(model.join("decoder/model.onnx")));
    let back = folder.path().join("back");
    convert(&args(&target, &back, &["--revert"]));
    assert!(read(back.join("decoder/model.onnx")) == read(model.join("decoder/model.onnx")));
    // The file stands for the same model.
    convert(&args(
        &model.join("decoder/model.onnx"),
        &folder.path().join("by-file"),
        &[],
    ));
    assert_eq!(names(&folder.path().join("by-file")), names(&target));
    for outside in ["../decoder/model.onnx", "/model.onnx", "decoder/../../model.onnx", ""] {
        names_graph(outside);
        let error = refusal(&args(&model, &folder.path().join("none"), &[]));
        assert!(error.contains("is not a file of that folder"), "{outside}: {error}");
    }
}
