//! The configuration files of Hugging Face and onnxruntime-genai, as far as anything here asks for them.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::json::{count, id, ids, number, object, text, token, truth};

/// generation_config.json.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct GenerationConfig {
    #[serde(deserialize_with = "ids")]
    pub(crate) eos_token_id: Vec<u32>,
    #[serde(flatten)]
    pub(crate) sampling: SamplingDefaults,
}

/// How generation_config.json has tokens chosen. Values that are no numbers count as not given.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
pub struct SamplingDefaults {
    /// Tokens are drawn; `None` or false: the likeliest is taken.
    #[serde(deserialize_with = "truth")]
    pub do_sample: Option<bool>,
    /// Divides logits.
    #[serde(deserialize_with = "number")]
    pub temperature: Option<f64>,
    /// Tokens that are kept, the likeliest; 0 keeps all.
    #[serde(deserialize_with = "number")]
    pub top_k: Option<f64>,
    /// Probability up to which the likeliest tokens are kept.
    #[serde(deserialize_with = "number")]
    pub top_p: Option<f64>,
    /// Probability of a token that is kept, as a share of the likeliest one's.
    #[serde(deserialize_with = "number")]
    pub min_p: Option<f64>,
    /// Divides the logits of tokens that have come; 1 is off.
    #[serde(deserialize_with = "number")]
    pub repetition_penalty: Option<f64>,
}

/// config.json.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct Config {
    #[serde(flatten)]
    pub(crate) model: TextConfig,
    // What models of several kinds of input call the part that writes text.
    #[serde(deserialize_with = "object")]
    pub(crate) text_config: TextConfig,
    #[serde(deserialize_with = "object")]
    pub(crate) llm_config: TextConfig,
    #[serde(deserialize_with = "object")]
    pub(crate) language_config: TextConfig,
    #[serde(deserialize_with = "object")]
    pub(crate) decoder: TextConfig,
    #[serde(deserialize_with = "object")]
    pub(crate) generator: TextConfig,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct TextConfig {
    #[serde(deserialize_with = "id")]
    pub(crate) bos_token_id: Option<u32>,
    #[serde(deserialize_with = "ids")]
    pub(crate) eos_token_id: Vec<u32>,
    #[serde(deserialize_with = "count")]
    pub(crate) vocab_size: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) max_position_embeddings: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) n_positions: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) n_ctx: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) num_attention_heads: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) n_head: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) num_key_value_heads: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) head_dim: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) hidden_size: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) n_embd: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) sliding_window: Option<usize>,
}

impl TextConfig {
    pub(crate) fn context_length(&self) -> Option<usize> {
        self.max_position_embeddings.or(self.n_positions).or(self.n_ctx)
    }

    pub(crate) fn heads(&self) -> Option<usize> {
        self.num_attention_heads.or(self.n_head)
    }

    pub(crate) fn head_dim(&self) -> Option<usize> {
        let hidden = self.hidden_size.or(self.n_embd);
        self.head_dim.or_else(|| hidden?.checked_div(self.heads()?))
    }
}

impl Config {
    /// The whole first, then its parts, as transformers asks them.
    pub(crate) fn parts(&self) -> [&TextConfig; 6] {
        [
            &self.model,
            &self.text_config,
            &self.llm_config,
            &self.language_config,
            &self.decoder,
            &self.generator,
        ]
    }

    pub(crate) fn first<T>(&self, get: impl Fn(&TextConfig) -> Option<T>) -> Option<T> {
        self.parts().into_iter().find_map(get)
    }
}

/// genai_config.json.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct Genai {
    #[serde(deserialize_with = "object")]
    pub(crate) model: GenaiModel,
    #[serde(deserialize_with = "object")]
    pub(crate) search: GenaiSearch,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct GenaiModel {
    #[serde(deserialize_with = "count")]
    pub(crate) context_length: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) vocab_size: Option<usize>,
    #[serde(deserialize_with = "id")]
    pub(crate) bos_token_id: Option<u32>,
    #[serde(deserialize_with = "ids")]
    pub(crate) eos_token_id: Vec<u32>,
    #[serde(deserialize_with = "object")]
    pub(crate) decoder: GenaiDecoder,
    /// Other graphs among them: vision, embedding, speech.
    #[serde(flatten)]
    pub(crate) others: Map<String, Value>,
}

impl GenaiModel {
    /// The files of all graphs.
    pub(crate) fn graphs(self) -> impl Iterator<Item = String> {
        let name = |part: Value| part.get("filename")?.as_str().map(str::to_owned);
        let others = self.others.into_iter().filter_map(move |(_, part)| name(part));
        self.decoder.filename.into_iter().chain(others)
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct GenaiDecoder {
    #[serde(deserialize_with = "text")]
    pub(crate) filename: Option<String>,
    #[serde(deserialize_with = "count")]
    pub(crate) num_key_value_heads: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub(crate) head_size: Option<usize>,
    #[serde(deserialize_with = "object")]
    pub(crate) inputs: Map<String, Value>,
    #[serde(deserialize_with = "object")]
    pub(crate) outputs: Map<String, Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct GenaiSearch {
    #[serde(deserialize_with = "truth")]
    pub(crate) past_present_share_buffer: Option<bool>,
}

/// tokenizer_config.json, or special_tokens_map.json.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct TokenizerConfig {
    #[serde(deserialize_with = "token")]
    pub(crate) eos_token: Option<String>,
}
