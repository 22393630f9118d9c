//! A comparison that allows what quantised activations make of rounding still finds faults. A program of its own, because ONNX Runtime
//! has one environment a process and the comparison makes it here.

use std::{fs, path::Path};

use prost::Message;
use retro_export::{
    Options, Verify, convert,
    verify::{CacheFacts, Comparison, ComparisonRuntime, PaddingCheck, Verification, compare, ulp::perturb},
};
use retro_onnx::{AttributeProto, DataType, ModelProto, read_model};
use retro_tests::{paths, zoo};

const LAYERS: usize = 2;

fn caches() -> Vec<CacheFacts> {
    let both = |layer: usize| ["key", "value"].map(|kind| (layer, kind));
    let cache = |(layer, kind): (usize, &str)| CacheFacts {
        past: format!("past_key_values.{layer}.{kind}"),
        present: format!("present.{layer}.{kind}"),
        heads: 2,
        head_size: 16,
        sliding: false,
        grows: false,
    };
    (0..LAYERS).flat_map(both).map(cache).collect()
}

/// What comes of comparing after a change of one attribute in one of the converted attentions.
fn with_fault(folder: &Path, layer: usize, fault: Option<(&str, AttributeProto)>) -> Verification {
    let [source, converted, broken, perturbed] =
        ["source", "converted", "broken", "perturbed"].map(|name| folder.join(format!("{name}.onnx")));
    let mut model = read_model(&converted).unwrap().model;
    let attention = |model: &mut ModelProto, op: &str| -> Vec<usize> {
        let nodes = model.graph.as_ref().expect("a graph").node.iter().enumerate();
        nodes.filter(|(_, n)| n.op_type() == op).map(|(i, _)| i).collect()
    };
    let nodes = attention(&mut model, "RetroAttention");
    let node = &mut model.graph.as_mut().expect("a graph").node[nodes[layer]];
    if let Some((name, attribute)) = fault {
        node.attribute.retain(|a| a.name() != name);
        node.attribute.push(attribute);
    }
    fs::write(&broken, model.encode_to_vec()).unwrap();
    let mut original = read_model(&source).unwrap().model;
    let nodes = attention(&mut original, "GroupQueryAttention");
    let graph = original.graph.as_ref().expect("a graph");
    let outputs: Vec<_> = nodes
        .iter()
        .map(|i| (graph.node[*i].output[0].clone(), DataType::Float16))
        .collect();
    assert!(perturb(&mut original, &outputs));
    fs::write(&perturbed, original.encode_to_vec()).unwrap();
    let runtime = ComparisonRuntime::find("cpu".parse().expect("a device")).expect("ONNX Runtime");
    let comparison = Comparison {
        original: &source,
        converted: &broken,
        windows: &[1, 2],
        window_in_graph: false,
        lengths_from_mask: false,
        caches: &caches(),
        unused_inputs: &[],
        other_inputs: &[],
        page_size: retro_export::Settings::default().page_size,
        vocabulary: 256,
        padding: PaddingCheck::Alone,
        dynamic_quantization: false,
        perturbed: Some(&perturbed),
        tolerance: 2e-2,
        seed: 1,
    };
    compare(&runtime, &comparison).expect("both run")
}

#[test]
fn rounding_that_is_enlarged_does_not_hide_them() {
    // SAFETY: this program's only test; no other thread is there yet.
    unsafe {
        std::env::set_var("ORT_DYLIB_PATH", paths::onnxruntime());
        std::env::set_var("RETRO_ATTENTION_PLUGIN", paths::plugin());
    }
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source.onnx");
    zoo::restore(&paths::data("zoo-graphs/genai-mistral-int4-webgpu.onnx.xz"), &source);
    convert(&Options {
        source,
        target: Some(folder.path().join("converted.onnx")),
        verify: Verify::Never,
        ..Options::default()
    })
    .unwrap();
    let sound = with_fault(folder.path(), 0, None);
    println!("{sound}");
    assert!(sound.passed, "{sound}");
    // Head size 16: 1/sqrt(16) is 0.25.
    for layer in 0..LAYERS {
        for (name, fault) in [
            ("scale", AttributeProto::float("scale", 0.27)),
            ("do_rotary", AttributeProto::int("do_rotary", 0)),
            ("local_window_size", AttributeProto::int("local_window_size", 3)),
            ("softcap", AttributeProto::float("softcap", 0.1)),
        ] {
            let found = with_fault(folder.path(), layer, Some((name, fault)));
            println!("{name} in layer {layer}\n{found}");
            assert!(!found.passed, "{name} in layer {layer}: {found}");
        }
    }
    // What doesn't load, and what the operator refuses when it runs, has failed: the original runs.
    for (name, value, says) in [
        ("page_size", 24, "does not load"),
        ("kv_num_heads", 1, "the original runs, and the converted model doesn't"),
    ] {
        let found = with_fault(folder.path(), 1, Some((name, AttributeProto::int(name, value))));
        assert!(!found.passed && found.compared.is_empty(), "{name}: {found}");
        let fault = found.fault().expect("a fault");
        assert!(
            fault.contains(says) && fault.contains("does not do what its original does"),
            "{fault}"
        );
    }
}
