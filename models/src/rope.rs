//! The frequencies of rotary position embeddings (RoPE), plain or scaled to longer contexts.

use std::f64::consts::TAU;

use serde_json::{Value, json};

use crate::error::ConfigError;

/// How the frequencies are changed for contexts longer than those that the base was made for.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// They are not.
    #[default]
    None,
    /// All are divided by one factor: position interpolation.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies are divided, high ones are not, those between are in part.
    Llama3 {
        /// What low frequencies are divided by.
        factor: f64,
        /// Wavelengths above the original length divided by this are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below the original length divided by this are high frequencies.
        high_freq_factor: f64,
        /// The context that the model was trained for at first, in tokens.
        original_length: f64,
    },
    /// Each of the D / 2 frequencies is divided by its own number, as a GGUF file's tensor rope_freqs has them.
    Divided(Vec<f32>),
}

/// The kinds that are built, for messages.
pub const KINDS: &str = "default, linear and llama3";

impl RopeScaling {
    /// Reads `rope_scaling` or `rope_parameters` of a config.json; `key` is which.
    ///
    /// # Errors
    /// It asks for another kind, or a number is missing.
    pub fn from_json(rope: &Value, key: &'static str) -> Result<Self, ConfigError> {
        let kind = rope.get("rope_type").or_else(|| rope.get("type"));
        let kind = kind.and_then(Value::as_str).unwrap_or("default");
        let number = |name: &str| match rope.get(name).and_then(Value::as_f64) {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            _ => Err(ConfigError::NoNumber(format!("{key}.{name}"))),
        };
        match kind {
            "default" => Ok(Self::None),
            "linear" => Ok(Self::Linear {
                factor: number("factor")?,
            }),
            "llama3" => Ok(Self::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_length: number("original_max_position_embeddings")?,
            }),
            other => Err(ConfigError::Rope {
                key: key.to_owned(),
                kind: other.to_owned(),
            }),
        }
    }

    /// As [`Self::from_json`] reads it. What a GGUF file divides the frequencies by has no place there.
    pub fn to_json(&self) -> Value {
        match self {
            Self::None | Self::Divided(_) => Value::Null,
            Self::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_length,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": *original_length as u64,
            }),
        }
    }

    /// The D / 2 frequencies of a head of `head_dim` elements, in radians a token.
    pub fn frequencies(&self, theta: f64, head_dim: usize) -> Vec<f64> {
        let plain = (0..head_dim / 2).map(|j| theta.powf(-((2 * j) as f64) / head_dim as f64));
        plain.enumerate().map(|(j, f)| self.scaled(j, f)).collect()
    }

    fn scaled(&self, index: usize, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Divided(by) => frequency / by.get(index).copied().map_or(1.0, f64::from),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_length,
            } => {
                let waves = original_length * frequency / TAU;
                let kept = (waves - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let kept = if waves < *low_freq_factor {
                    0.0
                } else if waves > *high_freq_factor {
                    1.0
                } else {
                    kept
                };
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 3.1 8B's config.json; the numbers are transformers' (`_compute_llama3_parameters`), in f64.
    #[test]
    fn llama3_divides_low_frequencies_only() {
        let json = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let scaling = RopeScaling::from_json(&json, "rope_scaling").unwrap();
        assert_eq!(scaling.to_json(), json);
        let (plain, scaled) = (RopeScaling::None.frequencies(5e5, 128), scaling.frequencies(5e5, 128));
        assert_eq!((scaled.len(), scaled[0], scaled[20]), (64, 1.0, plain[20]));
        assert!((scaled[63] - plain[63] / 8.0).abs() < 1e-18);
        // 8192 tokens are 2.6 waves of this one.
        let waves = 8192.0 * plain[30] / TAU;
        let kept = (waves - 1.0) / 3.0;
        assert!((1.0..4.0).contains(&waves));
        assert!((scaled[30] / plain[30] - ((1.0 - kept) / 8.0 + kept)).abs() < 1e-12);
    }

    #[test]
    fn what_is_not_built_is_named() {
        for kind in ["yarn", "longrope", "dynamic"] {
            let error = RopeScaling::from_json(&json!({"type": kind, "factor": 2.0}), "rope_scaling").unwrap_err();
            assert!(
                error.to_string().contains(kind) && error.to_string().contains(KINDS),
                "{error}"
            );
        }
    }
}
