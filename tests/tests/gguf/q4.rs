//! Weights of 4 and 8 bits: what a file has as codes stays what it is, and all else is rounded and named.

use std::path::Path;

use retro_gguf::TensorType;
use retro_models::{Activations, Dtype, Family, LlamaConfig, Options, RopeScaling, build, build_random};
use retro_onnx::{DataType, read_model};
use retro_tests::{compare, decoder::Decoder, gguf::TINY_GGUFS, paths};

use crate::build_file;

const IDS: [i64; 12] = [1, 22, 47, 3, 9, 61, 30, 2, 55, 14, 33, 5];

fn q4(activations: Activations) -> Options {
    Options {
        q4: Some(activations),
        ..Options::default()
    }
}

/// Logits of a prompt, and then of a token at a time.
fn logits(folder: &Path) -> Vec<f32> {
    let mut model = Decoder::open(folder, false, IDS.len(), 16, true);
    let mut logits = model.feed(&IDS[..8], 8, None, None);
    for at in 8..IDS.len() {
        logits.extend(model.feed(&IDS[at..=at], at + 1, None, None));
    }
    logits
}

/// Every architecture, every type with codes, and embeddings in one table, in two, and with
/// minimums; of their own and the head's.
#[test]
fn codes_compute_what_their_dequantised_values_compute() {
    let folder = tempfile::tempdir().unwrap();
    for tiny in TINY_GGUFS {
        for embedding in [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q5_1] {
            let name = format!("{}-{embedding}", tiny.name);
            let file = tiny.coded(embedding).bytes();
            let folder_of = |kind: &str| folder.path().join(format!("{name}-{kind}"));
            build_file(&file, &folder_of("f32"), &Options::default()).unwrap();
            let expected = logits(&folder_of("f32"));
            // Weights in a file beside the graph, where tied ones are once, and inside it.
            for external_threshold in [0, u64::MAX] {
                let options = Options {
                    external_threshold,
                    ..q4(Activations::F32)
                };
                build_file(&file, &folder_of("q4"), &options).unwrap();
                compare::assert_close(&name, &logits(&folder_of("q4")), &expected, 2e-5);
            }
            build_file(&file, &folder_of("int8"), &q4(Activations::Int8)).unwrap();
            // Activations of 7 bits and a sign, in groups of 32; logits are up to 5.
            let int8 = logits(&folder_of("int8"));
            compare::assert_close(&name, &int8, &expected, 0.25);
            let largest = int8
                .iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(largest > 1e-4, "{name}: activations were not rounded: {largest}");
        }
    }
}

#[test]
fn what_has_no_codes_is_rounded_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("tiny.gguf"), folder.path().join("tiny"));
    std::fs::write(&file, TINY_GGUFS[0].bytes()).unwrap();
    let built = build(&file, &out, &q4(Activations::F32)).unwrap();
    let notes = |rounded: &[retro_models::Rounded]| -> Vec<(String, i64, usize)> {
        rounded.iter().map(|r| (r.from.clone(), r.bits, r.tensors)).collect()
    };
    assert_eq!(
        notes(&built.rounded),
        [("BF16".to_owned(), 4, 3), ("F16".to_owned(), 4, 3)]
    );
    // A Hugging Face folder: 6 layers of 7 matrices, and the embedding, which is the head too.
    let weights = paths::root().join("models/ledger");
    let (dense, out) = (folder.path().join("dense"), folder.path().join("ledger"));
    let full = build(&weights, &dense, &Options::default()).unwrap();
    let built = build(&weights, &out, &q4(Activations::F32)).unwrap();
    assert_eq!(
        notes(&built.rounded),
        [("BF16".to_owned(), 4, 42), ("BF16".to_owned(), 8, 1)]
    );
    assert_eq!(built.parameters, full.parameters);
    assert!(built.weight_bytes * 4 < full.weight_bytes);
    let (got, expected) = (logits(&out), logits(&dense));
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(&expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied());
    assert!((1e-4..0.15).contains(&error), "{error}");
}

#[test]
fn quantised_models_convert() {
    let folder = tempfile::tempdir().unwrap();
    for (tiny, embedding) in TINY_GGUFS.into_iter().zip(
        [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q5_1]
            .into_iter()
            .cycle(),
    ) {
        for activations in [Activations::F32, Activations::Int8] {
            let name = format!("{}-{activations:?}", tiny.name);
            let out = folder.path().join(&name);
            let options = Options {
                external_threshold: 0,
                ..q4(activations)
            };
            build_file(&tiny.coded(embedding).bytes(), &out, &options).unwrap();
            let report = retro_export::convert(&retro_export::Options {
                source: out,
                target: Some(folder.path().join(format!("{name}-retro"))),
                ..Default::default()
            });
            assert!(report.is_ok(), "{name}");
        }
    }
}

#[test]
fn rows_that_are_no_whole_groups_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = LlamaConfig {
        family: Family::Llama,
        vocab_size: 8,
        hidden_size: 48,
        intermediate_size: 64,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        max_positions: 64,
        sliding_window: None,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
    };
    let out = folder.path().join("out");
    let error = build_random(&config, 1, &out, &q4(Activations::F32)).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(
        cause,
        "its rows have 48 elements, 4-bit weights come in groups of 32: build with --dtype f32 or f16"
    );
    assert!(!out.exists());
    let config = LlamaConfig {
        hidden_size: 64,
        ..config
    };
    build_random(&config, 1, &out, &q4(Activations::F32)).unwrap();
    assert!(logits_are_finite(&out));
}

/// As int4 exports for CUDA: codes of 4 bits in groups of 32 without zero points, scales and all else in float16.
#[test]
fn int4_weights_with_float16_give_what_float16_gives() {
    let folder = tempfile::tempdir().unwrap();
    let [f16, int4] = ["f16", "int4"].map(|name| folder.path().join(name));
    let weights = paths::root().join("models/ledger");
    let of = |q4| Options {
        dtype: Dtype::F16,
        q4,
        ..Options::default()
    };
    build(&weights, &f16, &of(None)).unwrap();
    build(&weights, &int4, &of(Some(Activations::F16))).unwrap();
    let graph = read_model(&int4.join("model.onnx")).unwrap().model.graph.unwrap();
    let products: Vec<_> = graph
        .node
        .iter()
        .filter(|n| n.is("com.microsoft", "MatMulNBits"))
        .collect();
    assert!(!graph.node.iter().any(|n| n.is("", "MatMul")));
    for node in &products {
        let int = |name: &str| node.attribute(name).map(|a| a.i());
        assert_eq!(
            (int("bits"), int("block_size"), node.input.len()),
            (Some(4), Some(32), 3)
        );
        let scales = graph.initializer.iter().find(|t| t.name() == node.input(2)).unwrap();
        assert_eq!(scales.data_type(), i32::from(DataType::Float16));
    }
    // Rounding to 4 bits moves logits; another layout of codes or scales would leave nothing of them.
    let [expected, got] = [&f16, &int4].map(|folder| logits(folder));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let cosine = dot(&expected, &got) / (dot(&expected, &expected) * dot(&got, &got)).sqrt();
    assert!(cosine > 0.98, "{cosine}");
}

fn logits_are_finite(folder: &Path) -> bool {
    let mut model = Decoder::open(folder, false, 4, 16, true);
    model.feed(&[1, 2, 3, 4], 4, None, None).iter().all(|x| x.is_finite())
}
