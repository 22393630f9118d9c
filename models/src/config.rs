//! The shape of a model of the Llama family, checked.

use serde_json::{Value, json};

use crate::{error::ConfigError, rope::RopeScaling};

/// Models that differ from Llama in little: which tensors they have, and what they are called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// Llama, and whatever is built like it: SmolLM2, TinyLlama, Yi.
    #[default]
    Llama,
    /// The same graph, perhaps with a sliding window.
    Mistral,
    /// Biases of the query, key and value projections.
    Qwen2,
    /// RMSNorm of each head's query and key before RoPE.
    Qwen3,
    /// Query, key and value in one tensor, and the feed-forward layer's gate and up projections in another.
    Phi3,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Phi3];

    /// `model_type` of a config.json.
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Phi3 => "phi3",
        }
    }

    /// transformers' class.
    pub const fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Phi3 => "Phi3ForCausalLM",
        }
    }

    /// The family of a `model_type`.
    ///
    /// # Errors
    /// There is none.
    pub fn of(model_type: &str) -> Result<Self, ConfigError> {
        let known = Self::ALL.into_iter().find(|f| f.model_type() == model_type);
        known.ok_or_else(|| ConfigError::Architecture(model_type.to_owned()))
    }

    /// The names of all, for messages.
    pub fn list() -> String {
        Self::ALL.map(Self::model_type).join(", ")
    }
}

/// Hyper-parameters of a decoder of the Llama family. All counts are at least 1.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Which model of the family.
    pub family: Family,
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
    /// What is done to RoPE's frequencies.
    pub rope_scaling: RopeScaling,
    /// Rows of the cos and sin tables: the longest context.
    pub max_positions: usize,
    /// Tokens that a query sees, itself included, in every layer; `None`: all.
    pub sliding_window: Option<usize>,
    /// The output projection is the embedding, transposed.
    pub tie_word_embeddings: bool,
    /// The token that begins a text; `None`: none is named.
    pub bos_token_id: Option<u64>,
    /// One or several; the first is the one that `config.json` names first.
    pub eos_token_ids: Vec<u64>,
    /// The token that pads; `None`: none is named.
    pub pad_token_id: Option<u64>,
}

/// Longest context: the cos and sin tables of longer ones would be gigabytes that no weight asks for.
const MAX_POSITIONS: usize = 1 << 22;

impl LlamaConfig {
    /// Checks what the operators demand of the numbers.
    ///
    /// # Errors
    /// When a count is 0, the context is longer than 4194304 tokens, heads are no multiple of KV heads, or the head
    /// size is odd.
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
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ] {
            if !(1..=0x7fff_ffff).contains(&got) {
                return Err(ConfigError::Count { name, got });
            }
        }
        if self.max_positions > MAX_POSITIONS {
            return Err(ConfigError::Positions {
                got: self.max_positions,
                limit: MAX_POSITIONS,
            });
        }
        if heads % kv_heads != 0 {
            return Err(ConfigError::Heads { heads, kv_heads });
        }
        if head_dim % 2 != 0 {
            return Err(ConfigError::OddHeadSize(head_dim));
        }
        Ok(())
    }

    /// The model as a Hugging Face `config.json`, for models whose weights come without one.
    pub fn to_json(&self) -> Value {
        let mut json = without_null_ids(json!({
            "architectures": [self.family.class()],
            "model_type": self.family.model_type(),
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
        }));
        if let Some(entries) = json.as_object_mut() {
            let scaling = self.rope_scaling.to_json();
            if !scaling.is_null() {
                entries.insert("rope_scaling".into(), scaling);
            }
            if let Some(window) = self.sliding_window {
                entries.insert("sliding_window".into(), window.into());
            }
        }
        json
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

/// One id as a number, several as a list, as the configuration files have it.
pub(crate) fn eos_json(ids: &[u64]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}
