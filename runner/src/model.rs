//! A model folder: which graph, which tokenizer, which tokens end a text, how long a context.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// What a folder's configuration files say. Whatever they leave open the graph has to answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelFolder {
    /// The ONNX file.
    pub graph: PathBuf,
    /// tokenizer.json, when there is one.
    pub tokenizer: Option<PathBuf>,
    pub context_length: Option<usize>,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub kv_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub sliding_window: Option<usize>,
    /// One buffer of fixed capacity serves as past and present; `None`: not said.
    pub share_buffer: Option<bool>,
    pub names: Names,
}

/// Names of the graph's inputs and outputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Names {
    pub input_ids: String,
    pub attention_mask: String,
    pub position_ids: String,
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

/// Whether `path` is a folder of Llama weights without a graph, which has to be built first.
pub fn is_weights_folder(path: &Path) -> bool {
    let weights = ["model.safetensors", "model.safetensors.index.json"];
    path.is_dir()
        && graphs(path).is_empty()
        && path.join("config.json").is_file()
        && weights.iter().any(|w| path.join(w).is_file())
}

/// Where repositories of transformers.js keep their graphs, below the configuration and the tokenizer.
const BELOW: &str = "onnx";

/// The graphs of a folder, or, if it holds none, of its folder `onnx`.
fn graphs(folder: &Path) -> Vec<PathBuf> {
    let here = onnx_files(folder);
    if here.is_empty() {
        onnx_files(&folder.join(BELOW))
    } else {
        here
    }
}

/// The folder with the configuration of a graph: its own, or the one above if that is the place for graphs only.
fn configuration_of(graph: &Path) -> PathBuf {
    let own = match graph.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let configured = |folder: &Path| {
        ["genai_config.json", "config.json", "tokenizer.json"]
            .iter()
            .any(|name| folder.join(name).is_file())
    };
    // A bare "onnx" has its parent in the file system only.
    let resolved = fs::canonicalize(own).unwrap_or_else(|_| own.to_owned());
    match resolved.parent() {
        Some(above) if resolved.ends_with(BELOW) && !configured(own) && configured(above) => above.to_owned(),
        _ => own.to_owned(),
    }
}

fn onnx_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "onnx") && p.is_file())
        .collect();
    files.sort();
    files
}

impl ModelFolder {
    /// Reads the configuration of a model folder, or of the folder of an ONNX file.
    ///
    /// # Errors
    /// When there is no graph, several and none is preferred, or a configuration file is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        ensure!(path.exists(), "there is no model at {}", path.display());
        // Opening a pipe would wait for whoever writes to it.
        ensure!(
            path.is_dir() || path.is_file(),
            "{} is not a file: name a model's file, or a folder that holds one",
            path.display()
        );
        let folder = &if path.is_dir() {
            path.to_owned()
        } else {
            configuration_of(path)
        };
        let mut model = Self::default();
        let mut filename = None;
        if let Some(json) = read_json(&folder.join("config.json"))? {
            model.apply_config(&json);
        }
        if let Some(json) = read_json(&folder.join("genai_config.json"))? {
            filename = model.apply_genai(&json);
        }
        model.graph = if path.is_dir() {
            choose_graph(folder, filename)?
        } else {
            path.to_owned()
        };
        model.tokenizer = Some(folder.join("tokenizer.json")).filter(|p| p.is_file());
        Ok(model)
    }

    fn apply_config(&mut self, json: &Value) {
        self.context_length = count(json, &["max_position_embeddings", "n_positions", "n_ctx"]);
        self.bos = id(json.get("bos_token_id"));
        self.eos = ids(json.get("eos_token_id"));
        let heads = count(json, &["num_attention_heads", "n_head"]);
        self.kv_heads = count(json, &["num_key_value_heads"]).or(heads);
        self.sliding_window = count(json, &["sliding_window"]);
        let hidden = count(json, &["hidden_size", "n_embd"]);
        self.head_dim = count(json, &["head_dim"]).or_else(|| hidden?.checked_div(heads?));
    }

    /// Takes over what genai_config.json says; returns the graph's file name.
    fn apply_genai(&mut self, json: &Value) -> Option<String> {
        let model = json.get("model")?;
        self.context_length = count(model, &["context_length"]).or(self.context_length);
        self.bos = id(model.get("bos_token_id")).or(self.bos);
        let eos = ids(model.get("eos_token_id"));
        if !eos.is_empty() {
            self.eos = eos;
        }
        self.share_buffer = json
            .pointer("/search/past_present_share_buffer")
            .and_then(Value::as_bool);
        let decoder = model.get("decoder")?;
        self.kv_heads = count(decoder, &["num_key_value_heads"]).or(self.kv_heads);
        self.head_dim = count(decoder, &["head_size"]).or(self.head_dim);
        let text = |at: &str| decoder.pointer(at).and_then(Value::as_str).map(str::to_owned);
        let set = |slot: &mut String, at: &str| {
            if let Some(name) = text(at) {
                *slot = name;
            }
        };
        set(&mut self.names.input_ids, "/inputs/input_ids");
        set(&mut self.names.attention_mask, "/inputs/attention_mask");
        set(&mut self.names.position_ids, "/inputs/position_ids");
        set(&mut self.names.logits, "/outputs/logits");
        for kind in ["key", "value"] {
            let past = text(&format!("/inputs/past_{kind}_names"));
            self.names
                .caches
                .extend(past.zip(text(&format!("/outputs/present_{kind}_names"))));
        }
        text("/filename")
    }
}

fn choose_graph(folder: &Path, filename: Option<String>) -> Result<PathBuf> {
    if let Some(name) = filename {
        let path = folder.join(&name);
        ensure!(
            path.is_file(),
            "genai_config.json names the graph {name:?}, which is not in {}",
            folder.display()
        );
        return Ok(path);
    }
    let mut files = graphs(folder);
    let usual = folder.join("model.onnx");
    if files.contains(&usual) {
        return Ok(usual);
    }
    match files.len() {
        1 => Ok(files.swap_remove(0)),
        0 => bail!(
            "{} holds no ONNX graph; build one from Llama weights with: retro-models build --weights DIR -o OUT",
            folder.display()
        ),
        _ => {
            let names = files
                .iter()
                .map(|f| f.strip_prefix(folder).unwrap_or(f).display().to_string());
            let names = names.collect::<Vec<_>>().join(", ");
            bail!(
                "{} holds several ONNX graphs ({names}); name one of them instead of the folder",
                folder.display()
            )
        }
    }
}

/// A file of JSON; none if it is not there.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let json = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    Ok(Some(json))
}

/// The first of `keys` that holds a positive number.
fn count(json: &Value, keys: &[&str]) -> Option<usize> {
    let number = |key: &&str| json.get(key)?.as_u64().filter(|&n| n > 0 && n <= u64::from(u32::MAX));
    keys.iter().find_map(number).map(|n| n as usize)
}

fn id(value: Option<&Value>) -> Option<u32> {
    value.and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok())
}

fn ids(value: Option<&Value>) -> Vec<u32> {
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(|v| id(Some(v))).collect(),
        one => id(one).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
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
                r#"{"max_position_embeddings": 9, "eos_token_id": 7, "hidden_size": 64, "num_attention_heads": 4}"#,
            ),
            ("m.onnx", ""),
            ("other.onnx", ""),
        ]);
        let m = ModelFolder::open(dir.path()).unwrap();
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
        let m = ModelFolder::open(dir.path()).unwrap();
        assert_eq!(
            (m.context_length, m.eos.as_slice(), m.head_dim, m.kv_heads),
            (Some(64), [3].as_slice(), Some(16), Some(4))
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        let error = |dir: &tempfile::TempDir| format!("{:#}", ModelFolder::open(dir.path()).unwrap_err());
        assert!(error(&folder(&[])).contains("no ONNX graph"));
        assert!(error(&folder(&[("a.onnx", ""), ("b.onnx", "")])).contains("several"));
        assert!(error(&folder(&[("genai_config.json", GENAI)])).contains("m.onnx"));
        assert!(error(&folder(&[("config.json", "{")])).contains("not JSON"));
        assert!(ModelFolder::open(Path::new("/no/such/folder")).is_err());
    }

    #[test]
    fn graphs_below_the_configuration_are_found() {
        let dir = folder(&[("config.json", r#"{"n_positions": 64}"#), ("tokenizer.json", "{}")]);
        let below = dir.path().join("onnx");
        fs::create_dir(&below).unwrap();
        fs::write(below.join("model_q4.onnx"), "").unwrap();
        let m = ModelFolder::open(dir.path()).unwrap();
        assert!(m.graph.ends_with("onnx/model_q4.onnx"));
        assert_eq!((m.context_length, m.tokenizer.is_some()), (Some(64), true));
        fs::write(below.join("model.onnx"), "").unwrap();
        let error = format!("{:#}", ModelFolder::open(dir.path()).unwrap_err());
        assert!(error.contains("(onnx/model.onnx, onnx/model_q4.onnx)"), "{error}");
        let m = ModelFolder::open(&below.join("model.onnx")).unwrap();
        assert_eq!((m.context_length, m.tokenizer.is_some()), (Some(64), true));
        // A folder of that name with a configuration of its own is a model folder like others.
        fs::write(below.join("config.json"), r#"{"n_positions": 32}"#).unwrap();
        let m = ModelFolder::open(&below.join("model.onnx")).unwrap();
        assert_eq!((m.context_length, m.tokenizer), (Some(32), None));
    }

    #[cfg(unix)]
    #[test]
    fn a_socket_is_no_model() {
        let dir = folder(&[]);
        let socket = dir.path().join("model.onnx");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let error = format!("{:#}", ModelFolder::open(&socket).unwrap_err());
        assert!(error.contains("is not a file"), "{error}");
    }

    #[test]
    fn weights_without_a_graph_are_recognised() {
        let dir = folder(&[("config.json", "{}"), ("model.safetensors", "")]);
        assert!(is_weights_folder(dir.path()));
        fs::write(dir.path().join("model.onnx"), "").unwrap();
        assert!(!is_weights_folder(dir.path()));
    }
}
