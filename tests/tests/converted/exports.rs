//! Attention of several nodes, as exporters write it (tests/data/zoo-graphs): each graph, with noise for weights,
//! converts and gives the logits of its original for w = 1, 2 and 4, prompts whole, in chunks, in batches and padded,
//! and the original comes back byte for byte; or it is refused with its reason.

use std::{fs, path::Path, process::Command};

use retro_tests::{host, paths, zoo};
use serde_json::Value;

fn export(args: &[&str], from: &Path, to: &Path) -> (Value, String) {
    let mut command = Command::new(paths::command("retro-export"));
    // Comparing needs what the other tests of this file use too.
    command
        .env("ORT_DYLIB_PATH", paths::onnxruntime())
        .env("RETRO_ATTENTION_PLUGIN", paths::plugin());
    let output = command
        .arg(from)
        .arg("-o")
        .arg(to)
        .arg("--json")
        .args(args)
        .output()
        .expect("retro-export starts");
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (report, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// `limit`: the largest difference of a logit that is rounding; above a window of 1 another one, where quantisation
/// depends on what is fed together.
fn converts(case: &str, rule: &str, masks: [&str; 2], limit: f64, together: f64) {
    let folder = tempfile::tempdir().unwrap();
    let [source, target, back] = ["source.onnx", "converted.onnx", "back.onnx"].map(|n| folder.path().join(n));
    zoo::restore(&paths::data("zoo-graphs").join(format!("{case}.onnx.xz")), &source);
    let device = host::device().to_string();
    let (report, error) = export(&["--device", &device], &source, &target);
    assert_eq!(error, "", "{case}");
    assert_eq!(report["converted_layers"], 2, "{case}: {report}");
    for (layer, mask) in report["layers"].as_array().expect("layers").iter().zip(masks) {
        assert_eq!(layer["rule"], rule, "{case}");
        assert_eq!(layer["mask"], format!("causal{mask}, padding on the left"), "{case}");
    }
    let compared = report["verification"]["compared"].as_array().expect("a comparison");
    let mut windows: Vec<u64> = compared.iter().map(|c| c["window"].as_u64().unwrap()).collect();
    windows.dedup();
    assert_eq!(windows, [1, 2, 4], "{case}");
    // Two sequences of different lengths in one batch, padded on the left, are among what is compared.
    for window in [1, 2, 4] {
        let padded = |c: &&Value| c["prefill"] == "padded" && c["batch"] == 2 && c["window"] == window;
        let mut times = compared.iter().filter(padded).count();
        if host::on_gpu() {
            // There a Softmax makes no numbers of rows that are masked whole, which padding is in some originals.
            let skipped = report["verification"]["skipped"].as_array().expect("what was skipped");
            times += skipped.iter().filter(padded).count();
        }
        assert_eq!(times, 1, "{case}: {compared:?}");
    }
    for c in compared {
        let (difference, window) = (c["largest_difference"].as_f64().unwrap(), c["window"].as_u64().unwrap());
        let limit = if window == 1 { limit } else { together };
        assert!(difference <= limit, "{case}: {c} is more than {limit}");
    }
    let (_, error) = export(&["--revert"], &target, &back);
    assert_eq!(error, "", "{case}");
    assert!(
        fs::read(&back).unwrap() == fs::read(&source).unwrap(),
        "{case}: the original does not come back"
    );
}

fn refused(case: &str, says: &[&str]) {
    refused_with(case, &[], says);
}

fn refused_with(case: &str, options: &[&str], says: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let [source, target] = ["source.onnx", "converted.onnx"].map(|n| folder.path().join(n));
    zoo::restore(&paths::data("zoo-graphs").join(format!("{case}.onnx.xz")), &source);
    let (report, error) = export(&[&["--no-verify"], options].concat(), &source, &target);
    assert_eq!(report, Value::Null, "{case}");
    assert!(says.iter().all(|word| error.contains(word)), "{case}: {error}");
    assert!(!target.exists(), "{case}: something was written");
}

/// Refused, because tokens must not be fed again; converted where they are fed once.
fn fed_once(case: &str, says: &[&str], layers: usize) {
    refused(case, says);
    let folder = tempfile::tempdir().unwrap();
    let [source, target] = ["source.onnx", "converted.onnx"].map(|n| folder.path().join(n));
    zoo::restore(&paths::data("zoo-graphs").join(format!("{case}.onnx.xz")), &source);
    let (report, error) = export(&["--no-verify", "--window", "1"], &source, &target);
    assert_eq!(error, "", "{case}");
    assert_eq!(report["converted_layers"], layers, "{case}: {report}");
}

/// What can be compared is equal; of ways of feeding, `skipped` can't be, for the reason that is said.
fn compares(case: &str, options: &[&str], skipped: &[&str], why: &str) {
    let folder = tempfile::tempdir().unwrap();
    let [source, target] = ["source.onnx", "converted.onnx"].map(|n| folder.path().join(n));
    zoo::restore(&paths::data("zoo-graphs").join(format!("{case}.onnx.xz")), &source);
    let device = host::device().to_string();
    let (report, error) = export(&[&["--device", &device], options].concat(), &source, &target);
    assert_eq!(error, "", "{case}: {report}");
    let verification = &report["verification"];
    println!("{case}: {verification:#}");
    assert_eq!(verification["passed"], true, "{case}: {verification}");
    assert!(
        verification["compared"].as_array().is_some_and(|c| c.len() >= 3),
        "{case}"
    );
    for left in verification["skipped"].as_array().expect("a list") {
        assert!(skipped.iter().any(|way| left["prefill"] == *way), "{case}: {left}");
        assert!(left["why"].as_str().expect("a reason").contains(why), "{case}: {left}");
    }
    for way in skipped {
        let mut ways = verification["compared"].as_array().expect("a list").iter();
        assert!(ways.all(|c| c["prefill"] != *way), "{case}: {way} was compared");
    }
}

const FULL: [&str; 2] = ["", ""];
const SLIDING: [&str; 2] = [", sliding window of 8", ""];

macro_rules! cases {
    ($($name:ident: $case:literal $check:ident($($argument:expr),*);)*) => {
        $(#[test] fn $name() { $check($case, $($argument),*) })*

        /// No graph of the folder is forgotten.
        #[test]
        fn every_graph_has_a_test() {
            let mut known = vec![$($case),*];
            known.sort();
            let folder = fs::read_dir(paths::data("zoo-graphs")).expect("tests/data/zoo-graphs").flatten();
            let mut found: Vec<String> = folder.map(|e| e.file_name().to_string_lossy().replace(".onnx.xz", "")).collect();
            found.sort();
            assert_eq!(known, found);
        }
    };
}

cases! {
    dynamo_gpt2: "dynamo-gpt2-sdpa-op18" converts("decomposed", FULL, 1e-4, 1e-4);
    dynamo_llama_eager: "dynamo-llama-eager-op18" converts("decomposed", FULL, 1e-4, 1e-4);
    dynamo_llama_sdpa: "dynamo-llama-sdpa-op18" converts("decomposed", FULL, 1e-4, 1e-4);
    dynamo_llama_opset_23: "dynamo-llama-sdpa-op23" converts("attention", FULL, 1e-4, 1e-4);
    // Queries are scaled by a factor of their position.
    dynamo_ministral3: "dynamo-ministral3" converts("decomposed", FULL, 1e-4, 1e-4);
    f16_conversion: "fp16conv-llama-fp16io" converts("decomposed", FULL, 4e-2, 4e-2);
    // Caches stay float32, as transformers.js has its models: a Cast before and after each.
    f16_conversion_that_keeps_io_types: "fp16conv-llama-fp32io" converts("decomposed", FULL, 4e-2, 4e-2);
    genai_lfm2_has_convolutions: "genai-lfm2" fed_once(&["carries past.0.conv on to present.0.conv", "--window 1"], 2);
    // The bodies of ai.onnx::Attention (opset 24), RotaryEmbedding and Attention (opset 25, with a window of 6 before a
    // token and none behind it), as ONNX's inliner leaves them.
    inlined_attention: "mobius-llama-inlined" converts("decomposed", FULL, 1e-4, 1e-4);
    inlined_window: "onnx-inlined_window" converts("decomposed", [", sliding window of 7"; 2], 1e-4, 1e-4);
    // Shapes that nothing needs are read from what the converter removes.
    dead_nodes: "plain-dead_nodes" converts("attention", FULL, 1e-4, 1e-4);
    // 70 * 70: no constant is the window.
    window_product: "plain-window_product" converts("decomposed", [", sliding window of 4900"; 2], 1e-4, 1e-4);
    // Behind a window of 4096 the first four tokens stay visible.
    sinks_in_the_mask: "plain-sink_window" refused(&["last 4096 tokens", "first 4 (attention sinks in the mask)"]);
    // Activations are rounded to int8, which enlarges float16's rounding: the original is measured with another last
    // bit.
    four_bit_webgpu: "genai-mistral-int4-webgpu" compares(&[], &[], "");
    // Convolution and recurrent state beside attention, with functions for them.
    mobius_qwen35_is_a_hybrid: "mobius-qwen35" fed_once(&["carries past_key_values.0.conv_state on to", "--window 1"], 1);
    onnxscript_fusions: "ofuse-llama-sdpa-op18" converts("mha", FULL, 1e-4, 1e-4);
    optimum_bloom_has_alibi: "optimum-bloom" refused(&["ALiBi"]);
    optimum_codegen: "optimum-codegen" converts("decomposed", FULL, 1e-4, 1e-4);
    optimum_gemma2: "optimum-gemma2-fp32" converts("decomposed", SLIDING, 1e-4, 1e-4);
    optimum_gemma3: "optimum-gemma3_text" converts("decomposed", SLIDING, 1e-4, 1e-4);
    optimum_gpt2: "optimum-gpt2-fp32" converts("decomposed", FULL, 1e-4, 1e-4);
    optimum_gpt_bigcode: "optimum-gpt_bigcode" converts("decomposed", FULL, 1e-4, 1e-4);
    // The second layer's window is in a table of 256 by 256 booleans.
    optimum_gpt_neo: "optimum-gpt_neo" converts("decomposed", ["", ", sliding window of 64"], 1e-4, 1e-4);
    optimum_gpt_neox: "optimum-gpt_neox-fp32" converts("decomposed", FULL, 1e-4, 1e-4);
    optimum_gpt_oss: "optimum-gpt_oss" converts("decomposed", SLIDING, 1e-4, 1e-4);
    optimum_gptj: "optimum-gptj" converts("decomposed", FULL, 1e-4, 1e-4);
    optimum_granite: "optimum-granite" converts("decomposed", FULL, 1e-4, 1e-4);
    optimum_llama: "optimum-llama-fp32" converts("decomposed", FULL, 1e-4, 1e-4);
    keeps_some_logits: "optimum-llama-num_logits_to_keep" converts("decomposed", FULL, 1e-4, 1e-4);
    optimum_mistral: "optimum-mistral" converts("decomposed", [SLIDING[0], SLIDING[0]], 1e-4, 1e-4);
    optimum_mpt_has_alibi: "optimum-mpt" refused(&["ALiBi"]);
    optimum_phi3: "optimum-phi3-fp32" converts("decomposed", FULL, 1e-4, 1e-4);
    optimum_qwen2: "optimum-qwen2-fp32" converts("decomposed", FULL, 1e-4, 1e-4);
    optimum_stablelm: "optimum-stablelm" converts("decomposed", FULL, 1e-4, 1e-4);
    // The encoder's keys and values are made by the branch without a past alone.
    optimum_whisper_merged: "optimum-whisper-merged" refused_with(&["--partial", "--window", "1"],
        &["present.0.encoder.key", "encoder_hidden_states", "decoder_with_past_model.onnx"]);
    optimum_whisper_with_past: "optimum-whisper-with_past" refused(
        &["2 of 4", "cross-attention of an encoder-decoder", "past_key_values.0.encoder.key", "--partial"]);
    optimum_1_20_llama: "optimum120-old_llama-fp32" converts("decomposed", FULL, 1e-4, 1e-4);
    optimum_1_20_merged: "optimum120-old_llama-merged" converts("decomposed", FULL, 1e-4, 1e-4);
    optimum_1_20_opt: "optimum120-old_opt-fp32" converts("decomposed", FULL, 1e-4, 1e-4);
    ort_optimizer_llama: "ortopt-llama-fp32" converts("decomposed", FULL, 1e-4, 1e-4);
    ort_optimizer_phi: "ortopt-old_phi-fp32" converts("decomposed", FULL, 1e-4, 1e-4);
    // Padding is all masked with -inf: the original's softmax has no numbers there.
    infinite_mask: "plain-infinite_mask" compares(&[], &["padded"], "no numbers");
    // A layer that isn't the operator's formula keeps its past.
    one_layer_is_other: "plain-one_layer_is_other" compares(&["--partial", "--window", "1"], &[], "");
    // The original differs from itself by as much when it is fed several tokens together: their ranges are quantised as
    // one.
    dynamic_int8: "quant-llama-dynint8" converts("decomposed", FULL, 2e-2, 2.0);
    four_bit: "quant-llama-q4" converts("decomposed", FULL, 1e-1, 1e-1);
    refused_tokens_before_heads: "refused-bshd" refused(&["past_key_values.0.key [batch, past, 2, 16]", "[B, T, H, D]"]);
    refused_transposed_keys: "refused-keyT" refused(&["past_key_values.0.key [batch, 2, 16, past]", "[B, H, D, T]"]);
    refused_mask_of_four_dimensions: "refused-mask4" refused(
        &["attention_mask [batch, 1, seq, total], float32, 4 dimensions", "by the caller"]);
    refused_all_caches_in_one: "refused-merged" refused(
        &["keys and values of all layers are merged in one cache", "past_key_values [2, 2, batch, 2, past, 16]"]);
    refused_layers_caches_in_one: "refused-merged_layer" refused(
        &["keys and values are merged in one cache", "past_0 [2, batch, 2, past, 16]"]);
    refused_probabilities: "refused-probs" refused(&["attention probabilities (attentions.0)", "output_attentions"]);
    refused_sliding_cache: "refused-slidecache" refused(
        &["past_key_values.0.key [batch, 2, 32, 16] always holds 32 tokens", "sliding"]);
    refused_layer_in_a_function: "refused-fn_layer_dec" refused(&["function LlamaAttention_0", "inline"]);
    refused_mask_in_a_function: "refused-fn_mask" refused(&["its mask is made in the model's function Mask_", "inline"]);
    refused_softmax_in_a_function: "refused-fn_softmax" refused(&["its Softmax is in the model's function Soft_0", "inline"]);
    refused_other_runtime: "refused-llmexport_qwen2" refused(&["LlmExporter::FusedAttention", "another runtime"]);
    refused_fused_with_projections: "refused-ms_attention" refused(
        &["com.microsoft::Attention", "keys and values are merged in one cache, past_0 [2, batch, 4, past, 16]"]);
    // The first layer's cache goes through a Concat of its own.
    torchscript_llama: "torchscript-llama-sdpa-op17" converts("decomposed", FULL, 1e-4, 1e-4);
    transformers_llama: "tfexp-llama-fp32" converts("decomposed", FULL, 1e-4, 1e-4);
    // Each layer hands its window on, as a number of its own.
    transformers_mistral: "tfexp-mistral-fp32" converts("decomposed", [", sliding window of 16"; 2], 1e-4, 1e-4);
    transformers_llama_fused: "tfexp-llama-ortfusions_cuda" converts("mha", FULL, 1e-4, 1e-4);
    transformers_qwen3: "tfexp-qwen3-ortfusions_cpu" converts("decomposed", FULL, 1e-4, 1e-4);
}
