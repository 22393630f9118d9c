//! `--host genai` and `--window-in-graph`: what is written, what comes back, what is refused.

use crate::support::{command, copy_of, names, refusal, zoo};
use retro_onnx::{ModelProto, read_model};
use serde_json::Value;
use std::{fs, path::Path};

const PLUGIN: &str = "libretro_attention.so";

/// Converts with any file in the plugin's place: it is brought along, not loaded.
fn convert(source: &Path, target: &Path, plugin: &Path, more: &[&str]) -> Result<Value, String> {
    let mut command = command();
    command
        .env("RETRO_ATTENTION_PLUGIN", plugin)
        .arg(source)
        .arg("-o")
        .arg(target);
    let output = command.args(["--no-verify", "--json"]).args(more).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(error),
    }
}

fn plugin(folder: &Path) -> std::path::PathBuf {
    let plugin = folder.join("the plugin");
    fs::write(&plugin, "a library").unwrap();
    plugin
}

fn model(folder: &Path) -> ModelProto {
    read_model(&folder.join("model.onnx")).unwrap().model
}

/// Shapes of the inputs whose names end so.
fn shapes(model: &ModelProto, end: &str) -> Vec<String> {
    let inputs = model.graph.as_ref().unwrap().input.iter();
    let shape = |value: &retro_onnx::ValueInfoProto| {
        let dims = value.dims().unwrap().iter();
        let dims = dims.map(|d| d.fixed().map_or_else(|| d.dim_param().to_owned(), |n| n.to_string()));
        format!(
            "{} {}",
            value.data_type().unwrap().label(),
            dims.collect::<Vec<_>>().join(" ")
        )
    };
    inputs.filter(|i| i.name().ends_with(end)).map(shape).collect()
}

#[test]
fn a_folder_is_ready_for_genai_and_comes_back_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let plugin = plugin(folder.path());
    let source = copy_of("genai-llama-fp32-cpu", folder.path());
    for window in ["1", "2", "4"] {
        let target = folder.path().join(format!("w{window}"));
        let report = convert(&source, &target, &plugin, &["--host", "genai", "--window", window]).unwrap();
        assert_eq!(report["settings"]["host"], "genai");
        assert_eq!(report["settings"]["context"], 256, "the configuration's max_length");
        assert_eq!(report["settings"]["window_in_graph"], window != "1");
        assert_eq!(fs::read(target.join(PLUGIN)).unwrap(), b"a library");
        let config: Value = serde_json::from_slice(&fs::read(target.join("genai_config.json")).unwrap()).unwrap();
        let options = &config["model"]["decoder"]["session_options"];
        assert_eq!(options["custom_ops_library"], PLUGIN);
        assert_eq!(config["search"]["max_length"], 256);
        let model = model(&target);
        assert_eq!(model.metadata("retro.host"), Some("genai"));
        let conv = shapes(&model, ".conv_state");
        // Page steps of 32 pages; outputs of w - 1 tokens, 4 heads of 32, their log-sum-exps; the window.
        let outputs = |w: usize| format!("float32 batch_size 1 {}", 2 * 32 + (w - 1) * 4 * 33 + 2 + w - 1);
        let expected = match window {
            "1" => "int32 batch_size 2 32".to_owned(),
            w => outputs(w.parse().unwrap()),
        };
        assert_eq!(conv, [expected.as_str(); 2]);
        assert_eq!(shapes(&model, ".recurrent_state"), ["uint8 batch_size 2 2 1408"; 2]);
        assert!(
            model
                .graph
                .unwrap()
                .input
                .iter()
                .all(|i| !i.name().starts_with("past_retro"))
        );

        let back = folder.path().join(format!("back{window}"));
        let mut revert = command();
        let output = revert
            .arg(&target)
            .arg("--revert")
            .arg("-o")
            .arg(&back)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(names(&back), names(&source));
        for name in names(&source) {
            assert!(
                fs::read(back.join(&name)).unwrap() == fs::read(source.join(&name)).unwrap(),
                "{name}"
            );
        }
    }
    let target = folder.path().join("short");
    convert(
        &source,
        &target,
        &plugin,
        &["--host", "genai", "--window", "1", "--context", "100"],
    )
    .unwrap();
    assert_eq!(shapes(&model(&target), ".conv_state"), ["int32 batch_size 2 13"; 2]);
    let config: Value = serde_json::from_slice(&fs::read(target.join("genai_config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["search"]["max_length"], &config["model"]["context_length"]),
        (&100.into(), &100.into())
    );
}

/// Caches of a sliding window stay with a window of 1, and their configuration with them.
#[test]
fn a_configuration_of_sliding_windows_stays_where_their_caches_do() {
    let folder = tempfile::tempdir().unwrap();
    let plugin = plugin(folder.path());
    for (window, kept) in [("1", true), ("2", false)] {
        let target = folder.path().join(window);
        convert(
            &zoo("genai-gpt_oss-fp32-cpu"),
            &target,
            &plugin,
            &["--host", "genai", "--window", window],
        )
        .unwrap();
        let config: Value = serde_json::from_slice(&fs::read(target.join("genai_config.json")).unwrap()).unwrap();
        assert_eq!(
            config["model"]["decoder"].get("sliding_window").is_some(),
            kept,
            "{window}"
        );
    }
}

#[test]
fn what_genai_could_not_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let plugin = plugin(folder.path());
    let source = copy_of("genai-llama-fp32-cpu", folder.path());
    let out = folder.path().join("out");
    let refused = |source: &Path, target: &Path, more: &[&str], says: &str| {
        let error = convert(source, target, &plugin, &[&["--host", "genai"], more].concat()).unwrap_err();
        assert!(error.contains(says) && error.lines().count() == 1, "{error}");
        assert!(!target.exists());
    };
    refused(
        &source.join("model.onnx"),
        &folder.path().join("out.onnx"),
        &[],
        "needs a model's folder with a genai_config.json",
    );
    refused(
        &source,
        &out,
        &["--context", "0"],
        "the context is 0 tokens; it must be 1 to",
    );
    refused(
        &source,
        &out,
        &["--context", "257"],
        "--context 257 exceeds the model's context of 256 tokens",
    );
    let config = source.join("genai_config.json");
    let text = fs::read_to_string(&config).unwrap();
    let longer = text.replace("\"context_length\": 256", "\"context_length\": 99999999");
    assert_ne!(text, longer);
    fs::write(&config, longer).unwrap();
    refused(&source, &out, &["--context", "16777216"], "it must be below 16777216");
    fs::write(&config, text).unwrap();
    let missing = folder.path().join("missing");
    let error = convert(&source, &out, &missing, &["--host", "genai"]).unwrap_err();
    assert!(
        error.contains("brings the plugin along") && error.contains("missing"),
        "{error}"
    );
    fs::write(source.join(PLUGIN), "another").unwrap();
    refused(&source, &out, &[], "the model's has one already");
    fs::remove_file(source.join(PLUGIN)).unwrap();
    let config = source.join("genai_config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"num_beams\": 1", "\"num_beams\": 4")).unwrap();
    refused(&source, &out, &[], "num_beams is above 1");
    fs::write(&config, "{").unwrap();
    let error = convert(&source, &out, &plugin, &["--host", "genai"]).unwrap_err();
    assert!(error.contains("genai_config.json"), "{error}");
    fs::remove_file(&config).unwrap();
    refused(&source, &out, &[], "needs a model's folder with a genai_config.json");
}

/// Without tokens to feed again both forms are one, and without the flag nothing is another.
#[test]
fn a_window_of_one_is_no_other_form() {
    let folder = tempfile::tempdir().unwrap();
    let source = zoo("genai-qwen3-fp32-cpu");
    let bytes = |name: &str, more: &[&str]| {
        let target = folder.path().join(name);
        convert(&source, &target, Path::new(""), more).unwrap();
        fs::read(target.join("model.onnx")).unwrap()
    };
    assert!(bytes("a", &["--window", "1"]) == bytes("b", &["--window", "1", "--window-in-graph"]));
    let kept = bytes("c", &["--window", "2", "--window-in-graph"]);
    assert!(bytes("d", &["--window", "2"]) != kept);
    let model = model(&folder.path().join("c"));
    assert_eq!(model.metadata("retro.window_in_graph"), Some("1"));
    let graph = model.graph.unwrap();
    assert!(graph.input.iter().all(|i| i.name() != "retro_length"));
    let operators: Vec<_> = graph.node.iter().filter(|n| n.op_type() == "RetroAttention").collect();
    assert!(
        operators
            .iter()
            .all(|n| n.attribute("step_rows").unwrap().i() == 2 && n.input.len() == 17)
    );
}

/// What is left as it is would get rows that don't count.
#[test]
fn layers_that_stay_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = copy_of("genai-llama-fp32-cpu", folder.path());
    let path = source.join("model.onnx");
    let mut model = read_model(&path).unwrap().model;
    let graph = model.graph.as_mut().unwrap();
    let nodes = graph.node.iter_mut().filter(|n| n.op_type() == "GroupQueryAttention");
    let first = nodes.into_iter().next().unwrap();
    first.attribute.push(retro_onnx::AttributeProto::int("qk_output", 1));
    fs::write(&path, prost::Message::encode_to_vec(&model)).unwrap();
    let target = folder.path().join("out");
    let args = [
        source.as_path(),
        Path::new("-o"),
        &target,
        Path::new("--partial"),
        Path::new("--window-in-graph"),
    ];
    let error = refusal(&args.map(Path::as_os_str));
    assert!(
        error.contains("stays a GroupQueryAttention") && error.contains("--window 1"),
        "{error}"
    );
    assert!(!target.exists());
}
