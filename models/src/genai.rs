//! `genai_config.json`, as onnxruntime-genai and `retro-run` read it.

use serde_json::{Value, json};

use crate::config::{LlamaConfig, eos_json, without_null_ids};

/// The configuration of a model built from `config`, greedy by default.
pub fn config(c: &LlamaConfig) -> Value {
    json!({
        "model": without_null_ids(json!({
            "bos_token_id": c.bos_token_id,
            "context_length": c.max_positions,
            "decoder": {
                "session_options": { "log_id": "onnxruntime-genai", "provider_options": [] },
                "filename": "model.onnx",
                "head_size": c.head_dim,
                "hidden_size": c.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": c.heads,
                "num_hidden_layers": c.layers,
                "num_key_value_heads": c.kv_heads,
            },
            "eos_token_id": eos_json(&c.eos_token_ids),
            "pad_token_id": c.pad_token_id,
            "type": c.family.model_type(),
            "vocab_size": c.vocab_size,
        })),
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": false,
            "early_stopping": true,
            "length_penalty": 1.0,
            "max_length": c.max_positions,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": true,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        }
    })
}
