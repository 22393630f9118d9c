//! The same weights as a GGUF file and as a Hugging Face folder give the same graph with the same weights.

use std::{fs, path::Path};

use retro_gguf::{Bytes, Gguf};
use retro_models::{Options, build};
use retro_onnx::{GraphProto, read_model};
use retro_tests::gguf::{HEADS, KV_HEADS, TINY_GGUFS, TinyGguf};
use safetensors::{Dtype, tensor::TensorView};

use crate::build_file;

/// Hugging Face's name of a tensor of llama.cpp's.
fn hugging_face_name(name: &str, packed: bool) -> String {
    let pairs = [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("attn_qkv", "self_attn.qkv_proj"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", if packed { "mlp.gate_up_proj" } else { "mlp.up_proj" }),
        ("ffn_down", "mlp.down_proj"),
        ("output", "lm_head"),
    ];
    let parts = name.split('.').map(|part| {
        let known = pairs.iter().find(|(ours, _)| *ours == part);
        known.map_or(part, |(_, theirs)| theirs)
    });
    let name = parts.collect::<Vec<_>>().join(".");
    name.replacen("blk.", "model.layers.", 1)
}

/// Rows `[heads, D/2, 2]` to `[heads, 2, D/2]`: the opposite of `permute` in llama.cpp's convert_hf_to_gguf.py.
fn unpermute(values: &[f32], heads: usize, columns: usize) -> Vec<f32> {
    let half = values.len() / columns / heads / 2;
    let mut out = Vec::new();
    for head in 0..heads {
        for second in 0..2 {
            for pair in 0..half {
                let row = (head * half + pair) * 2 + second;
                out.extend(&values[row * columns..][..columns]);
            }
        }
    }
    out
}

/// Writes the file's weights as a folder in f32, in two shards.
fn write_folder(tiny: &TinyGguf, bytes: Vec<u8>, config: &Path, folder: &Path) {
    let file = Gguf::parse(Bytes::from(bytes)).unwrap();
    let mut names: Vec<&str> = file.tensors().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = names
        .into_iter()
        .map(|name| {
            let tensor = file.tensor(name).unwrap();
            let mut values = vec![0.0; tensor.elements()];
            tensor.read(0, &mut values).unwrap();
            let heads = match name.rsplit('.').nth(1) {
                Some("attn_q") => HEADS,
                Some("attn_k") => KV_HEADS,
                _ => 0,
            };
            if tiny.architecture == "llama" && heads > 0 {
                values = unpermute(&values, heads, tensor.shape()[1]);
            }
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let name = hugging_face_name(name, tiny.architecture == "phi3");
            (name, tensor.shape().to_vec(), bytes)
        })
        .collect();
    fs::create_dir_all(folder).unwrap();
    let mut map = serde_json::Map::new();
    for (shard, some) in ["a.safetensors", "b.safetensors"]
        .iter()
        .zip(tensors.chunks(tensors.len() / 2 + 1))
    {
        let views = some.iter().map(|(name, shape, bytes)| {
            map.insert(name.clone(), (*shard).into());
            (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &folder.join(shard)).unwrap();
    }
    let index = serde_json::json!({ "weight_map": map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::copy(config, folder.join("config.json")).unwrap();
}

fn graph(folder: &Path) -> GraphProto {
    read_model(&folder.join("model.onnx")).unwrap().model.graph.unwrap()
}

#[test]
fn a_folder_and_a_file_of_the_same_weights_give_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    // What divides the frequencies has no place in a config.json.
    for tiny in TINY_GGUFS.iter().filter(|tiny| !tiny.divisors) {
        let at = |what: &str| folder.path().join(format!("{}-{what}", tiny.name));
        let options = Options {
            external_threshold: u64::MAX,
            ..Options::default()
        };
        build_file(&tiny.bytes(), &at("gguf"), &options).unwrap();
        write_folder(tiny, tiny.bytes(), &at("gguf").join("config.json"), &at("folder"));
        build(&at("folder"), &at("built"), &options).unwrap();
        assert!(graph(&at("gguf")) == graph(&at("built")), "{}", tiny.name);
    }
}

#[test]
fn a_tensor_that_the_graph_would_leave_out_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |what: &str| folder.path().join(what);
    let qwen = TINY_GGUFS.iter().find(|tiny| tiny.architecture == "qwen2").unwrap();
    build_file(&qwen.bytes(), &at("gguf"), &Options::default()).unwrap();
    write_folder(qwen, qwen.bytes(), &at("gguf").join("config.json"), &at("folder"));
    // The same weights called a Llama, whose biases nobody would miss.
    let config = fs::read_to_string(at("folder").join("config.json")).unwrap();
    fs::write(
        at("folder").join("config.json"),
        config.replace("\"qwen2\"", "\"llama\""),
    )
    .unwrap();
    let error = build(&at("folder"), &at("out"), &Options::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("model.layers.0.self_attn.k_proj.bias"), "{error}");
    assert!(!at("out").exists());
}
