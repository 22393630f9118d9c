//! The shape of a model from a GGUF file's metadata and the sizes of its tensors.

use retro_gguf::Gguf;

use crate::{
    config::{Family, LlamaConfig},
    error::ConfigError,
    gguf::weights::ROPE_FREQS,
    rope::RopeScaling,
};

/// Reads what llama.cpp reads for the architecture. Token ids come with the tokenizer.
pub fn read(file: &Gguf) -> Result<LlamaConfig, ConfigError> {
    let architecture = file.metadata.string("general.architecture")?;
    let architecture = architecture.ok_or_else(|| missing("general.architecture"))?;
    let family = Family::of(architecture)?;
    let keys = Keys { file, architecture };
    refuse(&keys)?;
    let hidden_size = keys.count("embedding_length")?;
    let heads = keys.count("attention.head_count")?;
    let head_dim = match keys.optional("attention.key_length")? {
        Some(n) => n,
        None => hidden_size / heads,
    };
    for (key, what) in [
        ("attention.value_length", "values of another length than keys"),
        ("rope.dimension_count", "RoPE of a part of each head"),
    ] {
        if keys.optional(key)?.is_some_and(|n| n != head_dim) {
            return Err(ConfigError::Unsupported(what));
        }
    }
    let embedding = file.tensors().find(|t| t.name == "token_embd.weight");
    let config = LlamaConfig {
        family,
        vocab_size: embedding.and_then(|t| t.shape.first().copied()).unwrap_or(0),
        hidden_size,
        intermediate_size: keys.count("feed_forward_length")?,
        layers: keys.count("block_count")?,
        heads,
        kv_heads: keys.optional("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        rms_norm_eps: keys
            .number("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| missing("attention.layer_norm_rms_epsilon"))?,
        rope_theta: keys.number("rope.freq_base")?.unwrap_or(10000.0),
        rope_scaling: rope_scaling(&keys, head_dim)?,
        max_positions: keys.count("context_length")?,
        sliding_window: keys.optional("attention.sliding_window")?,
        tie_word_embeddings: !file.has("output.weight"),
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
    };
    config.check()?;
    Ok(config)
}

fn missing(key: &str) -> ConfigError {
    ConfigError::Gguf(retro_gguf::Error::NoKey(key.to_owned()))
}

/// Refuses what makes another graph than those that are built and that no tensor shows.
fn refuse(keys: &Keys<'_>) -> Result<(), ConfigError> {
    if keys.integer("expert_count")?.is_some_and(|n| n > 0) {
        return Err(ConfigError::Unsupported("a mixture of experts (expert_count)"));
    }
    let clamp = keys.number("attention.clamp_kqv")?;
    let scale = keys.number("attention.scale")?;
    let cap = keys.number("attn_logit_softcapping")?;
    match clamp.or(scale).or(cap) {
        Some(x) if x != 0.0 => Err(ConfigError::Unsupported(
            "attention.clamp_kqv, .scale or _logit_softcapping",
        )),
        _ => Ok(()),
    }
}

fn rope_scaling(keys: &Keys<'_>, head_dim: usize) -> Result<RopeScaling, ConfigError> {
    for tensor in ["rope_factors_long.weight", "rope_factors_short.weight"] {
        if keys.file.has(tensor) {
            return Err(ConfigError::Rope {
                key: tensor.to_owned(),
                kind: "longrope".to_owned(),
            });
        }
    }
    let kind_key = keys.key("rope.scaling.type");
    let factor = match keys.number("rope.scaling.factor")? {
        Some(x) => Some(x),
        // Files of 2023.
        None => keys.number("rope.scale_linear")?,
    };
    let kind = keys.file.metadata.string(&kind_key)?;
    let kind = kind.unwrap_or(if factor.is_some() { "linear" } else { "none" });
    let scaling = match (kind, factor) {
        ("none", _) | ("linear", None) => RopeScaling::None,
        ("linear", Some(factor)) if factor > 0.0 && factor.is_finite() => RopeScaling::Linear { factor },
        ("linear", _) => return Err(ConfigError::NoNumber(keys.key("rope.scaling.factor"))),
        (other, _) => {
            return Err(ConfigError::Rope {
                key: kind_key,
                kind: other.to_owned(),
            });
        }
    };
    if !keys.file.has(ROPE_FREQS) {
        return Ok(scaling);
    }
    let tensor = keys.file.tensor(ROPE_FREQS)?;
    if tensor.shape() != [head_dim / 2] {
        return Err(ConfigError::Divisors {
            got: tensor.shape().to_vec(),
            expected: head_dim / 2,
        });
    }
    let mut divisors = vec![0.0; head_dim / 2];
    tensor.read(0, &mut divisors)?;
    match divisors.iter().all(|x| x.is_finite() && *x > 0.0) && scaling == RopeScaling::None {
        true => Ok(RopeScaling::Divided(divisors)),
        false => Err(ConfigError::Unsupported(
            "rope_freqs with numbers that are not positive, or beside another scaling",
        )),
    }
}

/// Keys of one architecture.
struct Keys<'a> {
    file: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn integer(&self, name: &str) -> Result<Option<u64>, ConfigError> {
        Ok(self.file.metadata.integer(&self.key(name))?)
    }

    fn number(&self, name: &str) -> Result<Option<f64>, ConfigError> {
        match self.file.metadata.float(&self.key(name))? {
            Some(x) if !x.is_finite() => Err(ConfigError::NoNumber(self.key(name))),
            other => Ok(other.map(shortest)),
        }
    }

    /// A count, which may be absent.
    fn optional(&self, name: &str) -> Result<Option<usize>, ConfigError> {
        match self.integer(name)? {
            None => Ok(None),
            Some(n @ 1..=0x7fff_ffff) => Ok(Some(n as usize)),
            Some(_) => Err(ConfigError::NoCount(self.key(name))),
        }
    }

    fn count(&self, name: &str) -> Result<usize, ConfigError> {
        self.optional(name)?.ok_or_else(|| missing(&self.key(name)))
    }
}

/// The decimal number that an f32 of the file was made of: 1e-5, not 9.999999747378752e-6.
fn shortest(x: f64) -> f64 {
    let narrow = x as f32;
    let decimal = if f64::from(narrow) == x {
        narrow.to_string().parse().ok()
    } else {
        None
    };
    decimal.unwrap_or(x)
}
