//! The shape of a model from its Hugging Face `config.json`.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    config::{Family, LlamaConfig},
    error::{ConfigError, Result, at},
    rope::RopeScaling,
};

impl LlamaConfig {
    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// When the file is unreadable, lacks a field, or describes something that the builder does not build (other
    /// architectures, activations, biases and kinds of RoPE).
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
        let family = Family::of(model_type)?;
        refuse(json)?;
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
        let hidden_size = count("hidden_size")?;
        let heads = count("num_attention_heads")?;
        let head_dim = match family {
            // transformers' default for Qwen3, whose config.json files all say it.
            Family::Qwen3 => 128,
            _ => hidden_size / heads,
        };
        let (rope_theta, rope_scaling) = rope(json)?;
        let config = Self {
            family,
            vocab_size: count("vocab_size")?,
            hidden_size,
            intermediate_size: count("intermediate_size")?,
            layers: count("num_hidden_layers")?,
            heads,
            kv_heads: optional("num_key_value_heads", heads)?,
            head_dim: optional("head_dim", head_dim)?,
            rms_norm_eps: number(json.get("rms_norm_eps"), "rms_norm_eps")?,
            rope_theta,
            rope_scaling,
            max_positions: count("max_position_embeddings")?,
            sliding_window: sliding_window(json, family, count)?,
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
}

/// Refuses what makes another graph than those that are built.
fn refuse(json: &Value) -> Result<(), ConfigError> {
    let act = json.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
    if act != "silu" {
        return Err(ConfigError::Kind {
            key: "hidden_act",
            got: act.to_owned(),
            expected: "silu",
        });
    }
    for flag in ["attention_bias", "mlp_bias"] {
        if json.get(flag).and_then(Value::as_bool) == Some(true) {
            return Err(ConfigError::Unsupported(flag));
        }
    }
    // Phi-4-mini turns a part of each head only.
    match json.get("partial_rotary_factor").and_then(Value::as_f64) {
        None | Some(1.0) => Ok(()),
        Some(_) => Err(ConfigError::Unsupported("partial_rotary_factor")),
    }
}

/// The window of all layers, where the family has one. Qwen's is off unless it is said to be used, and then it is one of
/// some layers only.
fn sliding_window(
    json: &Value,
    family: Family,
    count: impl Fn(&str) -> Result<usize, ConfigError>,
) -> Result<Option<usize>, ConfigError> {
    match family {
        Family::Qwen2 | Family::Qwen3 => match json.get("use_sliding_window").and_then(Value::as_bool) {
            Some(true) => Err(ConfigError::Unsupported("use_sliding_window")),
            _ => Ok(None),
        },
        Family::Llama => Ok(None),
        Family::Mistral | Family::Phi3 => match json.get("sliding_window") {
            None | Some(Value::Null) => Ok(None),
            Some(_) => count("sliding_window").map(Some),
        },
    }
}

/// RoPE's base and scaling, from where transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) puts them.
fn rope(json: &Value) -> Result<(f64, RopeScaling), ConfigError> {
    let (mut theta, mut scaling) = (None, RopeScaling::None);
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = json.get(key).filter(|v| !v.is_null()) else {
            continue;
        };
        scaling = RopeScaling::from_json(rope, key)?;
        theta = rope.get("rope_theta").or(theta);
    }
    let theta = match theta.or_else(|| json.get("rope_theta")) {
        None => 10000.0,
        some => number(some, "rope_theta")?,
    };
    Ok((theta, scaling))
}

fn number(value: Option<&Value>, key: &str) -> Result<f64, ConfigError> {
    match value.and_then(Value::as_f64) {
        Some(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err(ConfigError::NoNumber(key.to_owned())),
    }
}

fn ids(value: Option<&Value>) -> Vec<u64> {
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
        Some(one) => one.as_u64().into_iter().collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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

    fn with(changes: &[(&str, Value)]) -> Result<LlamaConfig, ConfigError> {
        let mut j = minimal();
        for (key, value) in changes {
            j[key] = value.clone();
        }
        LlamaConfig::from_json(&j)
    }

    #[test]
    fn families_have_their_own_defaults_and_windows() {
        let family = |name: &str| ("model_type", json!(name));
        let window = ("sliding_window", json!(64));
        let of = |name: &str| with(&[family(name), window.clone()]).unwrap();
        assert_eq!((of("llama").sliding_window, of("qwen2").sliding_window), (None, None));
        assert_eq!(
            (of("mistral").sliding_window, of("phi3").sliding_window),
            (Some(64), Some(64))
        );
        assert_eq!((of("qwen3").head_dim, of("qwen2").head_dim), (128, 16));
        for name in Family::ALL {
            let config = of(name.model_type());
            assert_eq!(LlamaConfig::from_json(&config.to_json()).unwrap(), config);
        }
    }

    #[test]
    fn what_a_family_may_have_and_is_not_built_is_named() {
        for (changes, said) in [
            (
                vec![("model_type", json!("gemma2"))],
                "\"gemma2\"; those that are built are llama, mistral",
            ),
            (
                vec![("model_type", json!("qwen2")), ("use_sliding_window", json!(true))],
                "use_sliding_window",
            ),
            (
                vec![("model_type", json!("phi3")), ("partial_rotary_factor", json!(0.75))],
                "partial_rotary_factor",
            ),
            (
                vec![("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}))],
                "\"yarn\"",
            ),
            (vec![("rope_scaling", json!({"type": "linear"}))], "rope_scaling.factor"),
            (vec![("max_position_embeddings", json!(1 << 30))], "more than 4194304"),
        ] {
            let error = with(&changes).unwrap_err().to_string();
            assert!(error.contains(said), "{said}: {error}");
        }
    }
}
