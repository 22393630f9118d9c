//! What a folder's configuration files say.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{
    GENAI_CONFIG,
    config_files::{Config, Genai, GenaiDecoder, GenerationConfig, SamplingDefaults, TextConfig, TokenizerConfig},
    error::Error,
    json,
    locate::locate,
};

/// A model's graph, its tokenizer, and what the configuration says. Whatever it leaves open the graph has to answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelFolder {
    /// The ONNX file.
    pub graph: PathBuf,
    /// tokenizer.json, when there is one.
    pub tokenizer: Option<PathBuf>,
    /// The longest context, in tokens.
    pub context_length: Option<usize>,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end a text, from the first of generation_config.json, config.json, its configuration of the text
    /// model, and genai_config.json that names any.
    pub eos: Vec<u32>,
    /// The tokenizer's end-of-text token, for models whose configuration names none.
    pub eos_token: Option<String>,
    /// How tokens are chosen where nobody asks otherwise.
    pub sampling: SamplingDefaults,
    /// KV heads Hkv of a layer.
    pub kv_heads: Option<usize>,
    /// Head size D.
    pub head_dim: Option<usize>,
    /// Tokens that a query of a sliding-window layer sees.
    pub sliding_window: Option<usize>,
    /// One buffer of fixed capacity serves as past and present; `None`: not said.
    pub share_buffer: Option<bool>,
    /// Names of the graph's inputs and outputs.
    pub names: Names,
}

/// Names of the graph's inputs and outputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Names {
    /// Token ids, `[B, S]`.
    pub input_ids: String,
    /// Ones for valid tokens, `[B, T]`.
    pub attention_mask: String,
    /// Positions of the tokens fed, `[B, S]`.
    pub position_ids: String,
    /// Scores of the next token, `[B, S, vocabulary]`.
    pub logits: String,
    /// Pairs of (past, present) with `%d` for the layer, from genai_config.json.
    pub caches: Vec<(String, String)>,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            input_ids: "input_ids".into(),
            attention_mask: "attention_mask".into(),
            position_ids: "position_ids".into(),
            logits: "logits".into(),
            caches: Vec::new(),
        }
    }
}

impl ModelFolder {
    /// Finds the graph that a folder or file stands for ([`locate`]) and reads the configuration that belongs to it.
    ///
    /// # Errors
    /// There is no graph, it isn't clear which, or a configuration file is damaged.
    pub fn open(path: &Path, choice: Option<&str>) -> Result<Self, Error> {
        let located = locate(path, choice)?;
        let folder = located.folder.as_path();
        let config: Config = json::read(&folder.join("config.json"))?.unwrap_or_default();
        let generation: GenerationConfig = json::read(&folder.join("generation_config.json"))?.unwrap_or_default();
        let genai: Genai = json::read(&folder.join(GENAI_CONFIG))?.unwrap_or_default();
        let tokenizer: TokenizerConfig = json::read(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        let eos = end_of_text(&generation, &config, &genai);
        let eos_token = match tokenizer.eos_token {
            Some(token) => Some(token),
            None if eos.is_empty() => {
                let map: TokenizerConfig = json::read(&folder.join("special_tokens_map.json"))?.unwrap_or_default();
                map.eos_token
            }
            None => None,
        };
        let (model, decoder) = (&genai.model, &genai.model.decoder);
        Ok(Self {
            tokenizer: Some(folder.join("tokenizer.json")).filter(|p| p.is_file()),
            context_length: model
                .context_length
                .or_else(|| config.first(TextConfig::context_length)),
            bos: model.bos_token_id.or_else(|| config.first(|c| c.bos_token_id)),
            eos,
            eos_token,
            sampling: generation.sampling,
            kv_heads: decoder
                .num_key_value_heads
                .or_else(|| config.first(|c| c.num_key_value_heads.or(c.heads()))),
            head_dim: decoder.head_size.or_else(|| config.first(TextConfig::head_dim)),
            sliding_window: config.first(|c| c.sliding_window),
            share_buffer: genai.search.past_present_share_buffer,
            names: Names::of(decoder),
            graph: located.graph,
        })
    }
}

impl Names {
    fn of(decoder: &GenaiDecoder) -> Self {
        let text = |map: &Map<String, Value>, key: &str| map.get(key).and_then(Value::as_str).map(str::to_owned);
        let input = |key: &str, usual: String| text(&decoder.inputs, key).unwrap_or(usual);
        let usual = Self::default();
        let caches = ["key", "value"].into_iter().filter_map(|kind| {
            let past = text(&decoder.inputs, &format!("past_{kind}_names"))?;
            Some((past, text(&decoder.outputs, &format!("present_{kind}_names"))?))
        });
        Self {
            caches: caches.collect(),
            input_ids: input("input_ids", usual.input_ids),
            attention_mask: input("attention_mask", usual.attention_mask),
            position_ids: input("position_ids", usual.position_ids),
            logits: text(&decoder.outputs, "logits").unwrap_or(usual.logits),
        }
    }
}

/// The tokens that end a text: those of the first file that names one, as transformers generates by
/// generation_config.json and, without it, by config.json and its text model's part.
fn end_of_text(generation: &GenerationConfig, config: &Config, genai: &Genai) -> Vec<u32> {
    let vocabulary = genai.model.vocab_size.or_else(|| config.first(|c| c.vocab_size));
    // Ids that no token has end nothing: where a file has no other, the next one is asked.
    let real = |ids: &&Vec<u32>| ids.iter().any(|id| vocabulary.is_none_or(|n| (*id as usize) < n));
    if real(&&generation.eos_token_id) {
        return generation.eos_token_id.clone();
    }
    let from_genai = &genai.model.eos_token_id;
    let from_config = config.parts().map(|part| &part.eos_token_id).into_iter().find(real);
    match from_config {
        // onnxruntime-genai's builder writes the end-of-turn tokens beside the model's own, where
        // generation_config.json, which had them, was not brought along.
        Some(ids) if !ids.iter().all(|id| from_genai.contains(id)) => ids.clone(),
        _ => from_genai.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn open(dir: &tempfile::TempDir) -> ModelFolder {
        ModelFolder::open(dir.path(), None).unwrap()
    }

    const GENAI: &str = r#"{"model": {"context_length": 256, "bos_token_id": 1, "eos_token_id": [2, 5],
        "decoder": {"filename": "m.onnx", "head_size": 32, "num_key_value_heads": 2,
        "inputs": {"input_ids": "ids", "past_key_names": "past.%d.k", "past_value_names": "past.%d.v"},
        "outputs": {"logits": "lg", "present_key_names": "now.%d.k", "present_value_names": "now.%d.v"}}},
        "search": {"past_present_share_buffer": true}}"#;

    #[test]
    fn genai_config_wins_over_config() {
        let dir = folder(&[
            ("genai_config.json", GENAI),
            (
                "config.json",
                r#"{"max_position_embeddings": 9, "bos_token_id": 7, "hidden_size": 64, "num_attention_heads": 4}"#,
            ),
            ("m.onnx", ""),
            ("other.onnx", ""),
        ]);
        let m = open(&dir);
        assert_eq!(
            (m.context_length, m.bos, m.eos.as_slice()),
            (Some(256), Some(1), [2, 5].as_slice())
        );
        assert_eq!(
            (m.head_dim, m.kv_heads, m.share_buffer),
            (Some(32), Some(2), Some(true))
        );
        assert_eq!(m.graph.file_name().unwrap(), "m.onnx");
        assert_eq!(m.names.caches[1], ("past.%d.v".into(), "now.%d.v".into()));
        assert_eq!(
            (m.names.input_ids.as_str(), m.names.attention_mask.as_str()),
            ("ids", "attention_mask")
        );
        assert_eq!(m.tokenizer, None);
    }

    #[test]
    fn config_alone_will_do() {
        let dir = folder(&[
            (
                "config.json",
                r#"{"n_positions": 64, "eos_token_id": 3, "n_embd": 64, "n_head": 4}"#,
            ),
            ("decoder.onnx", ""),
        ]);
        let m = open(&dir);
        assert_eq!(
            (m.context_length, m.eos.as_slice(), m.head_dim, m.kv_heads),
            (Some(64), [3].as_slice(), Some(16), Some(4))
        );
    }

    #[test]
    fn numbers_of_the_text_model_stand_in_its_part() {
        let text = r#"{"max_position_embeddings": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
            "sliding_window": 16, "bos_token_id": 1}"#;
        for part in ["text_config", "llm_config"] {
            let dir = folder(&[("config.json", &format!(r#"{{"{part}": {text}}}"#)), ("m.onnx", "")]);
            let m = open(&dir);
            assert_eq!(
                (m.context_length, m.kv_heads, m.head_dim, m.sliding_window, m.bos),
                (Some(64), Some(2), Some(16), Some(16), Some(1)),
                "{part}"
            );
        }
    }

    /// The ids that end a text, from files given by their contents.
    fn eos(generation: &str, config: &str, genai: &str) -> Vec<u32> {
        let names = ["generation_config.json", "config.json", "genai_config.json"];
        let files = names.into_iter().zip([generation, config, genai]);
        let mut files: Vec<(&str, &str)> = files.filter(|(_, text)| !text.is_empty()).collect();
        files.push(("m.onnx", ""));
        open(&folder(&files)).eos
    }

    #[test]
    fn the_end_of_text_is_read_in_transformers_order() {
        let list = r#"{"eos_token_id": [2, 3]}"#;
        let genai = r#"{"model": {"eos_token_id": [8, 9]}}"#;
        assert_eq!(eos(list, r#"{"eos_token_id": 2}"#, genai), [2, 3]);
        assert_eq!(
            eos("", r#"{"eos_token_id": 7, "text_config": {"eos_token_id": 6}}"#, genai),
            [7]
        );
        assert_eq!(eos("", r#"{"text_config": {"eos_token_id": [6, 5]}}"#, genai), [6, 5]);
        assert_eq!(eos("", r#"{"llm_config": {"eos_token_id": 6}}"#, ""), [6]);
        assert_eq!(eos("{}", "{}", genai), [8, 9]);
        assert_eq!(eos("", "", r#"{"model": {"eos_token_id": 4}}"#), [4]);
        assert!(eos("", "", "").is_empty());
        // The model's own token and the end of a turn.
        assert_eq!(eos("", r#"{"eos_token_id": 8}"#, genai), [8, 9]);
    }

    #[test]
    fn ids_that_no_token_has_are_not_given() {
        let config = r#"{"eos_token_id": 7, "vocab_size": 100}"#;
        for none in [
            "null",
            "-1",
            "[]",
            "[null]",
            "100",
            "[100, 5000000000]",
            "\"2\"",
            "true",
            "{}",
            "[[2]]",
        ] {
            let generation = format!(r#"{{"eos_token_id": {none}}}"#);
            assert_eq!(eos(&generation, config, ""), [7], "{none}");
        }
        assert_eq!(eos(r#"{"eos_token_id": [3, null, -1, 3, 2]}"#, config, ""), [3, 2]);
        assert_eq!(eos("", r#"{"eos_token_id": null, "text_config": null}"#, ""), [0u32; 0]);
    }

    #[test]
    fn sampling_is_what_the_generation_config_says() {
        let sampling = |generation: &str| {
            let files = [("generation_config.json", generation), ("m.onnx", "")];
            open(&folder(&files)).sampling
        };
        let text = r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": null,
            "repetition_penalty": "1.1", "eos_token_id": 3}"#;
        let said = SamplingDefaults {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(20.0),
            top_p: Some(0.95),
            ..Default::default()
        };
        assert_eq!(sampling(text), said);
        assert_eq!(sampling("{}"), SamplingDefaults::default());
        assert_eq!(sampling("[]"), SamplingDefaults::default());
    }

    #[test]
    fn the_tokenizers_end_of_text_is_its_text() {
        for token in [r#""</s>""#, r#"{"content": "</s>", "lstrip": false}"#] {
            for name in ["tokenizer_config.json", "special_tokens_map.json"] {
                let json = format!(r#"{{"eos_token": {token}}}"#);
                let m = open(&folder(&[(name, &json), ("m.onnx", "")]));
                assert_eq!((m.eos_token.as_deref(), m.eos.len()), (Some("</s>"), 0), "{name}");
            }
        }
        for none in ["null", "3", "\"\""] {
            let json = format!(r#"{{"eos_token": {none}}}"#);
            let m = open(&folder(&[("tokenizer_config.json", &json), ("m.onnx", "")]));
            assert_eq!(m.eos_token, None, "{none}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let error = |dir: &tempfile::TempDir| ModelFolder::open(dir.path(), None).unwrap_err().to_string();
        assert!(error(&folder(&[])).contains("no ONNX graph"));
        assert!(error(&folder(&[("a.onnx", ""), ("b.onnx", "")])).contains("there are 2 ONNX models"));
        assert!(error(&folder(&[("genai_config.json", GENAI)])).contains("m.onnx"));
        for name in ["config.json", "generation_config.json", "tokenizer_config.json"] {
            assert!(
                error(&folder(&[(name, "{"), ("m.onnx", "")])).contains("not JSON"),
                "{name}"
            );
            assert_eq!(open(&folder(&[(name, "[]"), ("m.onnx", "")])).eos, [0u32; 0], "{name}");
        }
        assert!(ModelFolder::open(Path::new("/no/such/folder"), None).is_err());
    }

    #[test]
    fn graphs_below_the_configuration_are_found() {
        let dir = folder(&[("config.json", r#"{"n_positions": 64}"#), ("tokenizer.json", "{}")]);
        let below = dir.path().join("onnx");
        fs::create_dir(&below).unwrap();
        fs::write(below.join("model_q4.onnx"), "").unwrap();
        let m = open(&dir);
        assert!(m.graph.ends_with("onnx/model_q4.onnx"));
        assert_eq!((m.context_length, m.tokenizer.is_some()), (Some(64), true));
        fs::write(below.join("model.onnx"), "").unwrap();
        let error = ModelFolder::open(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains("(onnx/model.onnx, onnx/model_q4.onnx)"), "{error}");
        let m = ModelFolder::open(&below.join("model.onnx"), None).unwrap();
        assert_eq!((m.context_length, m.tokenizer.is_some()), (Some(64), true));
        // A folder of that name with a configuration of its own is a model folder like others.
        fs::write(below.join("config.json"), r#"{"n_positions": 32}"#).unwrap();
        let m = ModelFolder::open(&below.join("model.onnx"), None).unwrap();
        assert_eq!((m.context_length, m.tokenizer), (Some(32), None));
    }

    #[test]
    fn numbers_as_python_writes_them_do_no_harm() {
        let config =
            r#"{"time_step_limit": [0.0, Infinity, -Infinity], "x": NaN, "name": "NaN \"Infinity", "eos_token_id": 4}"#;
        assert_eq!(open(&folder(&[("config.json", config), ("m.onnx", "")])).eos, [4]);
        let error = ModelFolder::open(folder(&[("config.json", "Infinity}"), ("m.onnx", "")]).path(), None);
        assert!(error.unwrap_err().to_string().contains("not JSON"));
    }

    #[cfg(unix)]
    #[test]
    fn a_socket_is_no_model() {
        let dir = folder(&[]);
        let socket = dir.path().join("model.onnx");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let error = ModelFolder::open(&socket, None).unwrap_err().to_string();
        assert!(error.contains("is not a file"), "{error}");
    }
}
