//! The shape of a Llama: what `config.json` says, checked.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::error::{ConfigError, Result, at};

/// Hyper-parameters of a Llama-shaped decoder. All counts are at least 1.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads Hq, a multiple of `kv_heads`.
    pub heads: usize,
    /// KV heads Hkv.
    pub kv_heads: usize,
    /// Head size D; not necessarily `hidden_size / heads`.
    pub head_dim: usize,
    /// What the norms add to the mean square.
    pub rms_norm_eps: f64,
    /// RoPE's base.
    pub rope_theta: f64,
    /// Rows of the cos and sin tables: the longest context.
    pub max_positions: usize,
    /// The output projection is the embedding, transposed.
    pub tie_word_embeddings: bool,
    /// The token that begins a text; `None`: none is named.
    pub bos_token_id: Option<u64>,
    /// One or several; the first is the one that `config.json` names first.
    pub eos_token_ids: Vec<u64>,
    /// The token that pads; `None`: none is named.
    pub pad_token_id: Option<u64>,
}

impl LlamaConfig {
    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// When the file is unreadable, lacks a field, or describes something that the builder does not build (other
    /// activations, biases, scaled RoPE).
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(at!(Read, path))?;
        let json: Value = serde_json::from_str(&text).map_err(at!(NotJson, path))?;
        Self::from_json(&json).map_err(at!(NoLlama, path))
    }

    /// As [`Self::read`], from parsed JSON.
    ///
    /// # Errors
    /// When a field is missing, or describes something that the builder does not build.
    pub fn from_json(json: &Value) -> Result<Self, ConfigError> {
        let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or("llama");
        expect("model_type", model_type, "llama")?;
        let act = json.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        expect("hidden_act", act, "silu")?;
        for bias in ["attention_bias", "mlp_bias"] {
            if json.get(bias).and_then(Value::as_bool) == Some(true) {
                return Err(ConfigError::Unsupported(bias));
            }
        }
        let count = |key: &str| -> Result<usize, ConfigError> {
            match json.get(key).and_then(Value::as_u64) {
                Some(n @ 1..=0x7fff_ffff) => Ok(n as usize),
                _ => Err(ConfigError::NoCount(key.to_owned())),
            }
        };
        let optional = |key: &str, default: usize| {
            if json.get(key).is_none_or(Value::is_null) {
                Ok(default)
            } else {
                count(key)
            }
        };
        let number = |value: Option<&Value>, key: &str| match value.and_then(Value::as_f64) {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            _ => Err(ConfigError::NoNumber(key.to_owned())),
        };
        let hidden_size = count("hidden_size")?;
        let heads = count("num_attention_heads")?;
        let config = Self {
            vocab_size: count("vocab_size")?,
            hidden_size,
            intermediate_size: count("intermediate_size")?,
            layers: count("num_hidden_layers")?,
            heads,
            kv_heads: optional("num_key_value_heads", heads)?,
            head_dim: optional("head_dim", hidden_size / heads)?,
            rms_norm_eps: number(json.get("rms_norm_eps"), "rms_norm_eps")?,
            rope_theta: rope_theta(json, number)?,
            max_positions: count("max_position_embeddings")?,
            tie_word_embeddings: json
                .get("tie_word_embeddings")
                .and_then(Value::as_bool)
                .unwrap_or(false),
            bos_token_id: json.get("bos_token_id").and_then(Value::as_u64),
            eos_token_ids: ids(json.get("eos_token_id")),
            pad_token_id: json.get("pad_token_id").and_then(Value::as_u64),
        };
        config.check()?;
        Ok(config)
    }

    /// Takes the tokens that end a text from a generation_config.json, if there is one that names any: the ends of
    /// turns are among them.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn read_generation(&mut self, path: &Path) -> Result<()> {
        if !path.is_file() {
            return Ok(());
        }
        let text = fs::read_to_string(path).map_err(at!(Read, path))?;
        let json: Value = serde_json::from_str(&text).map_err(at!(DamagedGeneration, path))?;
        let named = ids(json.get("eos_token_id"));
        if !named.is_empty() {
            self.eos_token_ids = named;
        }
        Ok(())
    }

    /// Checks what the operators demand of the numbers.
    ///
    /// # Errors
    /// When a count is 0, heads are no multiple of KV heads, or the head size is odd.
    pub fn check(&self) -> Result<(), ConfigError> {
        let Self {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *self;
        for (name, got) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("layers", self.layers),
            ("heads", heads),
            ("kv_heads", kv_heads),
            ("head_dim", head_dim),
            ("max_positions", self.max_positions),
        ] {
            if !(1..=0x7fff_ffff).contains(&got) {
                return Err(ConfigError::Count { name, got });
            }
        }
        if heads % kv_heads != 0 {
            return Err(ConfigError::Heads { heads, kv_heads });
        }
        if head_dim % 2 != 0 {
            return Err(ConfigError::OddHeadSize(head_dim));
        }
        Ok(())
    }

    /// The model as a Hugging Face `config.json`, for models that have no weights to come from.
    pub fn to_json(&self) -> Value {
        without_null_ids(json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos_json(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }))
    }

    /// Width of the packed query, key and value projection.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// An object without token ids that are null: what is not known is left out, as onnxruntime-genai takes numbers there
/// only.
pub(crate) fn without_null_ids(mut json: Value) -> Value {
    if let Some(entries) = json.as_object_mut() {
        entries.retain(|key, value| !(key.ends_with("_token_id") && value.is_null()));
    }
    json
}

/// Checks a word of the configuration.
fn expect(key: &'static str, got: &str, expected: &'static str) -> Result<(), ConfigError> {
    if got == expected {
        return Ok(());
    }
    let got = got.to_owned();
    Err(ConfigError::Kind { key, got, expected })
}

/// One id as a number, several as a list, as the configuration files have it.
pub(crate) fn eos_json(ids: &[u64]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}

fn ids(value: Option<&Value>) -> Vec<u64> {
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
        Some(one) => one.as_u64().into_iter().collect(),
        None => Vec::new(),
    }
}

/// RoPE's base, from where transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) puts it.
fn rope_theta(
    json: &Value,
    number: impl Fn(Option<&Value>, &str) -> Result<f64, ConfigError>,
) -> Result<f64, ConfigError> {
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = json.get(key).filter(|v| !v.is_null()) else {
            continue;
        };
        let kind = rope
            .get("rope_type")
            .or_else(|| rope.get("type"))
            .and_then(Value::as_str)
            .unwrap_or("default");
        if kind != "default" {
            let kind = kind.to_owned();
            return Err(ConfigError::Rope { key, kind });
        }
        if let Some(theta) = rope.get("rope_theta") {
            return number(Some(theta), "rope_theta");
        }
    }
    match json.get("rope_theta") {
        None => Ok(10000.0),
        some => number(some, "rope_theta"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minimal() -> Value {
        json!({"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 256})
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let c = LlamaConfig::from_json(&minimal()).unwrap();
        assert_eq!((c.head_dim, c.rope_theta, c.tie_word_embeddings), (16, 10000.0, false));
        assert!(c.eos_token_ids.is_empty());
    }

    #[test]
    fn head_dim_may_differ_from_hidden_over_heads_and_survives_a_round_trip() {
        let mut j = minimal();
        j["head_dim"] = json!(32);
        j["eos_token_id"] = json!([2, 7]);
        j["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
        let c = LlamaConfig::from_json(&j).unwrap();
        assert_eq!((c.head_dim, c.qkv_width(), c.rope_theta), (32, 256, 5e5));
        assert_eq!(c.eos_token_ids, [2, 7]);
        assert_eq!(LlamaConfig::from_json(&c.to_json()).unwrap(), c);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (key, value) in [
            ("hidden_act", json!("gelu")),
            ("attention_bias", json!(true)),
            ("model_type", json!("gpt2")),
            ("num_key_value_heads", json!(3)),
            ("head_dim", json!(15)),
            ("vocab_size", json!(0)),
            ("rope_scaling", json!({"rope_type": "llama3"})),
            ("rms_norm_eps", json!("x")),
        ] {
            let mut j = minimal();
            j[key] = value;
            assert!(LlamaConfig::from_json(&j).is_err(), "{key}");
        }
    }
}
