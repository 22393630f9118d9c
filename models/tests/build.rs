//! Whole builds: from weights and random, inline and external, told apart by nothing but where the bytes are.

use std::{collections::HashMap, fs, path::Path};

use retro_models::{Dtype, Family, LlamaConfig, Options, RopeScaling, build, build_random};
use retro_onnx::{GraphProto, TensorProto, read_model};

fn config() -> LlamaConfig {
    LlamaConfig {
        family: Family::Llama,
        vocab_size: 96,
        hidden_size: 48,
        intermediate_size: 80,
        layers: 2,
        heads: 6,
        kv_heads: 2,
        head_dim: 32, // not hidden / heads
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        max_positions: 128,
        sliding_window: None,
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        pad_token_id: None,
    }
}

fn options(dtype: Dtype, external_threshold: u64) -> Options {
    Options {
        dtype,
        external_threshold,
        q4: None,
        tokenizer: None,
    }
}

fn graph(folder: &Path) -> GraphProto {
    read_model(&folder.join("model.onnx")).unwrap().model.graph.unwrap()
}

/// Every initializer's bytes, wherever they are.
fn weights(folder: &Path) -> HashMap<String, Vec<u8>> {
    let data = fs::read(folder.join("model.onnx.data")).unwrap_or_default();
    let bytes = |t: &TensorProto| match &t.raw_data {
        Some(raw) => raw.to_vec(),
        None => {
            let number = |key: &str| -> usize {
                let entry = t.external_data.iter().find(|e| e.key() == key).unwrap();
                entry.value().parse().unwrap()
            };
            data[number("offset")..][..number("length")].to_vec()
        }
    };
    graph(folder)
        .initializer
        .iter()
        .map(|t| (t.name().to_owned(), bytes(t)))
        .collect()
}

#[test]
fn inline_and_external_hold_the_same_bytes_and_a_seed_decides_them() {
    let dir = tempfile::tempdir().unwrap();
    let (inline, external, other) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
    let built = build_random(&config(), 7, &inline, &options(Dtype::F32, u64::MAX)).unwrap();
    assert!(!built.external && !inline.join("model.onnx.data").exists());
    let built = build_random(&config(), 7, &external, &options(Dtype::F32, 0)).unwrap();
    assert!(built.external);
    build_random(&config(), 8, &other, &options(Dtype::F32, 0)).unwrap();
    assert_eq!(weights(&inline), weights(&external));
    assert_ne!(weights(&inline), weights(&other));
}

#[test]
fn the_interface_is_that_of_genai() {
    let dir = tempfile::tempdir().unwrap();
    build_random(&config(), 1, dir.path(), &Options::default()).unwrap();
    let graph = graph(dir.path());
    let inputs: Vec<_> = graph.input.iter().map(|v| v.name().to_owned()).collect();
    let expected = [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.1.key",
        "past_key_values.0.value",
        "past_key_values.1.value",
    ];
    assert_eq!(inputs, expected);
    let dims = graph.input[2].dims().unwrap();
    assert_eq!((dims[1].fixed(), dims[3].fixed()), (Some(2), Some(32)));
    let attention: Vec<_> = graph
        .node
        .iter()
        .filter(|n| n.is("com.microsoft", "GroupQueryAttention"))
        .collect();
    assert_eq!(attention.len(), 2);
    assert_eq!(attention[1].input.len(), 12);
    assert_eq!(attention[1].input(3), "past_key_values.1.key");
    // Every input of every node is a graph input, an initializer or an earlier output.
    let mut known: std::collections::HashSet<&str> = graph.input.iter().map(|v| v.name()).collect();
    known.extend(graph.initializer.iter().map(|t| t.name()));
    for node in &graph.node {
        for input in node.input.iter().filter(|s| !s.is_empty()) {
            assert!(known.contains(input.as_str()), "{} reads {input}", node.name());
        }
        known.extend(node.output.iter().map(String::as_str));
    }
    assert!(graph.output.iter().all(|o| known.contains(o.name())));
}

/// A folder of weights whose every tensor counts up, so that a misplaced element shows.
fn counting(folder: &Path, tied: bool) -> LlamaConfig {
    let config = LlamaConfig {
        tie_word_embeddings: tied,
        ..config()
    };
    let (h, f, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, h]),
        ("model.norm.weight".to_owned(), vec![h]),
    ];
    for layer in 0..config.layers {
        for (name, shape) in [
            ("self_attn.q_proj", vec![config.heads * d, h]),
            ("self_attn.k_proj", vec![config.kv_heads * d, h]),
            ("self_attn.v_proj", vec![config.kv_heads * d, h]),
            ("self_attn.o_proj", vec![h, config.heads * d]),
            ("mlp.gate_proj", vec![f, h]),
            ("mlp.up_proj", vec![f, h]),
            ("mlp.down_proj", vec![h, f]),
            ("input_layernorm", vec![h]),
            ("post_attention_layernorm", vec![h]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let n: usize = shape.iter().product();
            (name, shape, (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect())
        })
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    fs::create_dir_all(folder).unwrap();
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    fs::write(folder.join("config.json"), config.to_json().to_string()).unwrap();
    config
}

#[test]
fn linear_layers_are_transposed_and_packed() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("weights"), dir.path().join("out"));
    let config = counting(&from, true);
    build(&from, &to, &Options::default()).unwrap();
    let weights = weights(&to);
    let at = |name: &str, row: usize, column: usize, columns: usize| -> f32 {
        let start = (row * columns + column) * 4;
        f32::from_le_bytes(weights[name][start..start + 4].try_into().unwrap())
    };
    let (h, q, kv, all) = (config.hidden_size, 6 * 32, 2 * 32, config.qkv_width());
    let qkv = "model.layers.1.attn.qkv_proj.MatMul.weight";
    for (row, column) in [(0, 0), (5, 17), (h - 1, q - 1)] {
        assert_eq!(at(qkv, row, column, all), (column * h + row) as f32);
        assert_eq!(
            at(qkv, row, q + kv + column % kv, all),
            ((column % kv) * h + row) as f32
        );
    }
    assert!(!weights.contains_key("lm_head.MatMul.weight"));
    assert_eq!(at("cos_cache", 0, 3, 16), 1.0);
    assert!((at("sin_cache", 5, 0, 16) - 5f32.sin()).abs() < 1e-6);
}

#[test]
fn what_is_missing_or_wrong_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("weights"), dir.path().join("out"));
    counting(&from, true);
    let mut json = counting(&from, true).to_json();
    json["tie_word_embeddings"] = false.into();
    fs::write(from.join("config.json"), json.to_string()).unwrap();
    let error = format!(
        "{:#}",
        anyhow::Error::from(build(&from, &to, &Options::default()).unwrap_err())
    );
    assert!(error.contains("lm_head.weight"), "{error}");
    json["hidden_size"] = 50.into();
    json["tie_word_embeddings"] = true.into();
    fs::write(from.join("config.json"), json.to_string()).unwrap();
    let error = format!(
        "{:#}",
        anyhow::Error::from(build(&from, &to, &Options::default()).unwrap_err())
    );
    assert!(error.contains("has shape"), "{error}");
    fs::write(from.join("model.safetensors"), b"\x08\0\0\0\0\0\0\0garbage").unwrap();
    assert!(build(&from, &to, &Options::default()).is_err());
    assert!(!to.exists());
}

/// `/dev/full` takes nothing, as a full disk does.
#[test]
fn a_stream_that_takes_nothing_ends_no_program_in_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_retro-models"));
        command
            .current_dir(&dir)
            .args(arguments)
            .stderr(full)
            .status()
            .unwrap()
            .code()
    };
    assert_eq!(run(&["ledger", "--docs", "1", "-o", "documents.jsonl"]), Some(0));
    assert!(dir.path().join("documents.jsonl").is_file());
    assert_eq!(run(&["build", "--weights", "nowhere", "-o", "out"]), Some(1));
}

#[test]
fn token_ids_that_are_not_known_are_left_out_not_null() {
    let dir = tempfile::tempdir().unwrap();
    let unknown = LlamaConfig {
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
        ..config()
    };
    build_random(&unknown, 1, dir.path(), &Options::default()).unwrap();
    for name in ["genai_config.json", "config.json"] {
        let text = fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(!text.contains("null") && !text.contains("_token_id"), "{name}: {text}");
    }
    assert_eq!(LlamaConfig::read(&dir.path().join("config.json")).unwrap(), unknown);
}

#[test]
fn the_ends_of_turns_come_along() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("weights"), dir.path().join("out"));
    counting(&from, true);
    let generation = r#"{"eos_token_id": [2, 7]}"#;
    fs::write(from.join("generation_config.json"), generation).unwrap();
    build(&from, &to, &Options::default()).unwrap();
    assert_eq!(
        fs::read_to_string(to.join("generation_config.json")).unwrap(),
        generation
    );
    let genai = fs::read_to_string(to.join("genai_config.json")).unwrap();
    let genai: serde_json::Value = serde_json::from_str(&genai).unwrap();
    assert_eq!(genai["model"]["eos_token_id"], serde_json::json!([2, 7]));
}

#[test]
fn a_sliding_window_is_that_of_every_layer() {
    let dir = tempfile::tempdir().unwrap();
    let mistral = LlamaConfig {
        family: Family::Mistral,
        sliding_window: Some(40),
        ..config()
    };
    build_random(&mistral, 1, dir.path(), &Options::default()).unwrap();
    let graph = graph(dir.path());
    let attention = graph
        .node
        .iter()
        .filter(|n| n.is("com.microsoft", "GroupQueryAttention"));
    let windows: Vec<_> = attention
        .map(|n| {
            n.attribute
                .iter()
                .find(|a| a.name() == "local_window_size")
                .unwrap()
                .i()
        })
        .collect();
    assert_eq!(windows, [40, 40]);
    assert_eq!(LlamaConfig::read(&dir.path().join("config.json")).unwrap(), mistral);
}

/// A number that no file covers costs nothing: neither a graph of as many layers nor tables of as many positions.
#[test]
fn counts_that_the_weights_do_not_cover_are_named_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("weights"), dir.path().join("out"));
    let config = counting(&from, true).to_json();
    for (key, said) in [
        ("num_hidden_layers", "has 2147483647 layers, the weights have"),
        ("max_position_embeddings", "more than 4194304"),
        ("vocab_size", "has shape [96, 48]"),
    ] {
        let mut json = config.clone();
        json[key] = 0x7fff_ffff.into();
        fs::write(from.join("config.json"), json.to_string()).unwrap();
        let error = anyhow::Error::from(build(&from, &to, &Options::default()).unwrap_err());
        let error = format!("{error:#}");
        assert!(error.contains(said) && !error.contains('\n'), "{said}: {error}");
        assert!(!to.exists());
    }
}

#[test]
fn the_command_says_what_it_rounds() {
    let dir = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_retro-models"));
        let weights = Path::new(env!("CARGO_MANIFEST_DIR")).join("ledger");
        let output = command
            .current_dir(&dir)
            .arg("build")
            .arg(weights)
            .args(arguments)
            .output();
        let output = output.unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = run(&["--dtype", "q4", "-o", "q4"]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(
        lines[..2],
        [
            "note: 42 tensors of BF16 rounded to 4 bits",
            "note: 1 tensor of BF16 rounded to 8 bits"
        ]
    );
    let (code, said) = run(&["--accuracy-level", "4", "-o", "f32"]);
    let message = "error: --accuracy-level is for --dtype q4 only\n";
    assert_eq!((code, said.as_str()), (Some(1), message));
    assert!(!dir.path().join("f32").exists());
    let (code, said) = run(&["--dtype", "q4", "--accuracy-level", "2", "-o", "f32"]);
    assert!(
        code == Some(2) && said.contains("the levels are 1 (f32) and 4 (int8)"),
        "{said}"
    );
}
