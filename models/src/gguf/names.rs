//! llama.cpp's names of tensors.

/// Names without ".weight" or ".bias" of tensors outside the layers: Hugging Face's, llama.cpp's.
const MODEL: [(&str, &str); 3] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// The same in a layer.
const LAYER: [(&str, &str); 13] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    // Phi-3's packed projection has the name of others' up projection.
    ("mlp.gate_up_proj", "ffn_up"),
];

/// llama.cpp's name of a Hugging Face tensor; a name that it does not know stays.
pub fn gguf_name(name: &str) -> String {
    let Some((prefix, suffix)) = name.rsplit_once('.') else {
        return name.to_owned();
    };
    let find = |table: &[(&str, &'static str)], prefix: &str| {
        let pair = table.iter().find(|(theirs, _)| *theirs == prefix);
        pair.map(|(_, ours)| *ours)
    };
    let layer = prefix
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'));
    let ours = match layer {
        Some((number, rest)) => find(&LAYER, rest).map(|ours| format!("blk.{number}.{ours}.{suffix}")),
        None => find(&MODEL, prefix).map(|ours| format!("{ours}.{suffix}")),
    };
    ours.unwrap_or_else(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_llama_cpp() {
        for (theirs, ours) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.layers.31.self_attn.o_proj.weight", "blk.31.attn_output.weight"),
            ("model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias"),
            (
                "model.layers.7.post_attention_layernorm.weight",
                "blk.7.ffn_norm.weight",
            ),
            ("model.layers.2.mlp.gate_up_proj.weight", "blk.2.ffn_up.weight"),
            ("something.else", "something.else"),
        ] {
            assert_eq!(gguf_name(theirs), ours);
        }
    }
}
