//! Every case of the zoo converts or is refused with its reason, and nothing but attention changes.

use crate::support::{convert, refusal, zoo};
use retro_onnx::{GraphProto, ModelProto, NodeProto, read_model};
use serde_json::Value;
use std::{fs, path::Path};

enum Expect {
    /// Layers and their modes, inputs, and where rotary embedding is.
    Converts {
        modes: [&'static str; 2],
        inputs: &'static str,
        rope: &'static str,
    },
    /// By a rule for attention of several nodes: what those were gives way.
    Spelled(&'static str),
    Refused(&'static [&'static str]),
}
use Expect::{Converts, Refused, Spelled};

const PACKED: Expect = Converts {
    modes: ["retro", "retro"],
    inputs: "packed",
    rope: "in the node, half, 32 elements",
};
const PARTIAL_ROPE: Expect = Converts {
    modes: ["retro", "retro"],
    inputs: "packed",
    rope: "in the node, half, 16 elements",
};
const ROPE_BEFORE: Expect = Converts {
    modes: ["retro", "retro"],
    inputs: "separate",
    rope: "before",
};
const SLIDING: Expect = Converts {
    modes: ["dense", "retro"],
    inputs: "packed",
    rope: "in the node, half, 32 elements",
};

const TABLE: [(&str, Expect); 18] = [
    ("genai-gemma2-fp32-cpu", SLIDING),
    ("genai-gpt_oss-fp32-cpu", SLIDING),
    ("genai-llama-fp16-cuda", PACKED),
    ("genai-llama-fp16-dml", ROPE_BEFORE),
    ("genai-llama-fp32-cpu", PACKED),
    (
        "genai-llama-fp32-cuda",
        Refused(&["is an invalid ONNX model", "RotaryEmbedding", "output present.0.key"]),
    ),
    ("genai-llama-int4-cpu", PACKED),
    ("genai-llama-int4-cuda", PACKED),
    (
        "genai-llama-paged-fp16-cuda",
        Refused(&["PagedAttention is not supported"]),
    ),
    ("genai-llama31-fp32-cpu", PACKED),
    ("genai-phi-fp32-cpu", PARTIAL_ROPE),
    ("genai-phi3-fp32-cpu", PACKED),
    ("genai-qwen2-int4-cpu", PACKED),
    (
        "genai-qwen3-fp32-cpu",
        Converts {
            modes: ["retro", "retro"],
            inputs: "separate",
            rope: "in the node, half, 32 elements",
        },
    ),
    ("genai040-old_llama-fp16-dml", ROPE_BEFORE),
    ("genai040-old_llama-fp32-cpu", PACKED),
    ("genai040-old_llama-fp32-cuda", Spelled("mha")),
    ("genai040-old_phi-fp32-cpu", PARTIAL_ROPE),
];

#[test]
fn every_case_converts_or_is_refused_with_its_reason() {
    let mut cases: Vec<_> = fs::read_dir(zoo("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    cases.sort();
    assert_eq!(cases, TABLE.map(|(case, _)| case), "the table knows every case");
    let folder = tempfile::tempdir().unwrap();
    for (case, expected) in TABLE {
        let target = folder.path().join(case);
        let source = zoo(case);
        let args = [&source, Path::new("-o"), &target, Path::new("--json")].map(Path::as_os_str);
        match expected {
            Refused(reasons) => {
                let error = refusal(&args);
                assert!(reasons.iter().all(|r| error.contains(r)), "{case}: {error}");
                assert!(!target.exists(), "{case}");
            }
            Spelled(rule) => {
                let report: Value = serde_json::from_str(&convert(&args)).unwrap();
                assert_eq!(report["converted_layers"], 2, "{case}: {report}");
                assert_eq!(report["layers"][1]["rule"], rule, "{case}: {report}");
                assert_eq!(
                    report["layers"][1]["mask"], "causal, padding on the left",
                    "{case}: {report}"
                );
            }
            Converts { modes, inputs, rope } => {
                let report: Value = serde_json::from_str(&convert(&args)).unwrap();
                assert_eq!(report["converted_layers"], 2, "{case}: {report}");
                assert_eq!(report["logits"]["rows"], "newest", "{case}: {report}");
                for (layer, mode) in modes.into_iter().enumerate() {
                    let found = &report["layers"][layer];
                    assert_eq!(found["layer"], layer, "{case}");
                    assert_eq!(found["head_size"], 32, "{case}: {found}");
                    let facts = ["rule", "action", "mode", "inputs", "rope"].map(|key| found[key].as_str().unwrap());
                    assert_eq!(facts, ["gqa", "converted", mode, inputs, rope], "{case}");
                }
                unchanged_but_for_attention(case, &source, &target);
            }
        }
    }
}

fn model(folder: &Path) -> ModelProto {
    read_model(&folder.join("model.onnx")).unwrap().model
}

fn rest(graph: &GraphProto) -> Vec<&NodeProto> {
    let ours = |n: &NodeProto| {
        matches!(n.op_type(), "GroupQueryAttention" | "RetroAttention") || n.name().starts_with("retro/")
    };
    graph.node.iter().filter(|n| !ours(n)).collect()
}

/// What makes `seqlens_k` from the attention mask in the zoo's graphs: its sum, less one, as int32.
fn counts_the_mask(graph: &GraphProto, node: &NodeProto) -> bool {
    let attention = graph
        .node
        .iter()
        .find(|n| n.op_type() == "GroupQueryAttention")
        .unwrap();
    let mut open = vec![attention.input(5)];
    while let Some(name) = open.pop() {
        let maker = graph.node.iter().find(|n| n.output.iter().any(|o| o == name));
        let Some(maker) = maker else { continue };
        if maker == node {
            return true;
        }
        open.extend(maker.input.iter().map(String::as_str));
    }
    false
}

/// All that was in the source is in the target, in order, message by message.
fn unchanged_but_for_attention(case: &str, source: &Path, target: &Path) {
    let (old, new) = (model(source), model(target));
    let (a, b) = (old.graph.as_ref().unwrap(), new.graph.as_ref().unwrap());
    assert_eq!(b.initializer[..a.initializer.len()], a.initializer, "{case}");
    // Beside what looks at the mask where its ones are counted.
    let added = b.initializer[a.initializer.len()..].iter().map(|t| t.name());
    let added: Vec<_> = added.filter(|n| !n.starts_with("retro/given/")).collect();
    assert_eq!(
        added,
        ["retro_length", "retro_page_budget", "retro/newest_position"],
        "{case}"
    );
    // And but for the source's own count of them, which is made anew.
    let (before, after) = (rest(a), rest(b));
    let (count, before): (Vec<_>, Vec<_>) = before.into_iter().partition(|n| counts_the_mask(a, n));
    assert!((3..=5).contains(&count.len()), "{case}: {count:?}");
    assert_eq!(before.len(), after.len(), "{case}");
    let (last, others) = before.split_last().unwrap();
    for (old, new) in others.iter().zip(&after) {
        let lm_head = new.input(0) == "retro/newest_hidden_state";
        assert!(
            old == new || (lm_head && old.output == new.output && old.attribute == new.attribute),
            "{case}: {new:?}"
        );
    }
    assert_eq!(last.output, ["logits"], "{case}");
    let sliding = |name: &str| case.contains("gemma2") || case.contains("gpt_oss") && name.contains(".0.");
    for (old, new) in a.input.iter().zip(&b.input) {
        // Heads and their size, where the source leaves them open, are declared.
        let mut old = old.clone();
        if let Some((old, new)) = old.dims_mut().filter(|d| d.len() == 4).zip(new.dims()) {
            for axis in [1, 3].into_iter().filter(|axis| new[*axis].fixed().is_some()) {
                if old[axis].fixed().is_none() {
                    old[axis] = new[axis].clone();
                }
            }
        }
        assert!(old == *new || sliding(old.name()), "{case}: {}", old.name());
    }
    assert_eq!(b.input.len(), a.input.len() + 2 + 8, "{case}");
    assert_eq!(b.output.len(), a.output.len() + 8, "{case}");
    assert_eq!(
        (new.ir_version, &new.producer_name),
        (old.ir_version, &old.producer_name),
        "{case}"
    );
    assert_eq!(new.opset_import[..old.opset_import.len()], old.opset_import, "{case}");
    assert_eq!(new.metadata("retro.layers"), Some("0,1"), "{case}");
    let weights = |folder: &Path| fs::read(folder.join("model.onnx.data")).unwrap();
    assert!(weights(source) == weights(target), "{case}: the weights changed");
}

#[test]
fn sliding_window_caches_stay_only_when_tokens_are_fed_once() {
    let source = zoo("genai-gpt_oss-fp32-cpu");
    let args = |more: &[&'static str]| -> Vec<String> {
        let first = [source.to_str().unwrap(), "--dry-run", "--json"];
        first.iter().chain(more).map(|s| s.to_string()).collect()
    };
    let report: Value = serde_json::from_str(&convert(&args(&["--window", "1"]))).unwrap();
    assert_eq!(report["converted_layers"], 1);
    assert_eq!(report["layers"][0]["why"], "it keeps a sliding-window cache");
    let report: Value = serde_json::from_str(&convert(&args(&["--window", "1", "--sliding-cache", "full"]))).unwrap();
    assert_eq!(report["converted_layers"], 2);
    let error = refusal(&args(&["--window", "2", "--sliding-cache", "keep"]));
    assert!(error.contains("layer 0") && error.contains("--window 1"), "{error}");
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let source = zoo("genai-qwen3-fp32-cpu");
    let bytes = ["a", "b"].map(|name| {
        let target = folder.path().join(name);
        convert(&[&source, Path::new("-o"), &target].map(Path::as_os_str));
        fs::read(target.join("model.onnx")).unwrap()
    });
    assert!(bytes[0] == bytes[1]);
}
