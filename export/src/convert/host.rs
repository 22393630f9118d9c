//! What a host needs beside the model, so that it runs it as it is: the plugin in the model's folder, and settings.

use super::{Error, Options};
use crate::{files::FolderFiles, settings::Settings, source::Source};
use retro_contract::metadata;
use retro_onnx::ModelProto;
use retro_runtime::PLUGIN;
use serde::Serialize;
use serde_json::{Map, Value, ser::PrettyFormatter};
use std::{fs, path::Path};

/// onnxruntime-genai's configuration of a model's folder.
pub const GENAI_CONFIG: &str = "genai_config.json";

/// Why a model can't be made ready for a host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// Its host reads a folder.
    #[error("--host genai needs a model's folder with a {GENAI_CONFIG}, and writes one: name the folders")]
    NoFolder,
    /// The configuration can't be read.
    #[error("cannot read {GENAI_CONFIG}")]
    Read(#[source] std::io::Error),
    /// The configuration is not as the host has it.
    #[error("{GENAI_CONFIG} is not as --host genai needs it: {0}")]
    Config(String),
    /// State is made for so many tokens, and the configuration says none.
    #[error("{GENAI_CONFIG} says neither search.max_length nor model.context_length; give --context")]
    NoContext,
    /// The host refuses more than that, and positions end there.
    #[error("--context {asked} exceeds the model's context of {most} tokens, which {GENAI_CONFIG} names")]
    Context {
        /// Tokens that were asked for.
        asked: usize,
        /// `model.context_length`.
        most: usize,
    },
    /// What the way back leaves out must be the plugin that was brought along.
    #[error("--host genai writes a {PLUGIN} into the folder, and the model's has one already: move it away")]
    PluginThere,
    /// The host looks for the plugin in the model's folder.
    #[error(
        "--host genai brings the plugin along, and {PLUGIN} is not found beside this program; name it in \
         RETRO_ATTENTION_PLUGIN"
    )]
    NoPlugin,
    /// The plugin that is named is not there.
    #[error("--host genai brings the plugin along")]
    Plugin(#[source] retro_runtime::Error),
}

/// What comes with a model for its host.
#[derive(Default)]
pub struct HostFiles {
    pub files: FolderFiles,
    /// The host's configuration, with what it needs whatever the window.
    config: Option<Value>,
    /// The same as it was.
    before: Option<String>,
}

impl HostFiles {
    /// Adds the host's configuration. `keeps_sliding`: some layers keep a cache of their window; else all caches hold the
    /// whole context.
    pub fn add_config(&mut self, keeps_sliding: bool) -> Result<(), HostError> {
        if let Some(mut config) = self.config.take() {
            if !keeps_sliding {
                drop_sliding_window(&mut config);
            }
            self.files.written.push((GENAI_CONFIG.into(), pretty(&config)?));
        }
        Ok(())
    }

    /// Writes into a converted model what the way back needs.
    pub fn record(&self, model: &mut ModelProto) {
        if let Some(before) = &self.before {
            model.set_metadata(metadata::HOST_CONFIG, before.as_str());
        }
    }
}

/// The settings with the context that state is made for, and what comes along. Without a host, as they are.
///
/// # Errors
/// The source is no folder of this host, or the plugin isn't found.
pub fn prepare(options: &Options, source: &Source) -> Result<(Settings, HostFiles), Error> {
    let settings = options.settings.clone();
    if settings.host.is_none() {
        return Ok((settings, HostFiles::default()));
    }
    let folder = source
        .named_folder
        .as_ref()
        .filter(|folder| !source.alone && folder.join(GENAI_CONFIG).is_file());
    let folder = folder.ok_or(HostError::NoFolder)?;
    if folder.join(PLUGIN).exists() {
        return Err(HostError::PluginThere.into());
    }
    let before = fs::read_to_string(folder.join(GENAI_CONFIG)).map_err(HostError::Read)?;
    let mut config: Value = serde_json::from_str(&before).map_err(|e| HostError::Config(e.to_string()))?;
    let context = match settings.context {
        Some(context) => context,
        None => known_context(&config).ok_or(HostError::NoContext)?,
    };
    let settings = Settings {
        context: Some(context),
        ..settings
    };
    settings.check()?;
    let most = config.pointer("/model/context_length").and_then(Value::as_u64);
    configure(&mut config, context)?;
    // What the configuration says without being asked is the host's affair.
    if let Some((asked, most)) = options
        .settings
        .context
        .zip(most.and_then(|most| usize::try_from(most).ok()))
        && asked > most
    {
        return Err(HostError::Context { asked, most }.into());
    }
    let mut files = FolderFiles::default();
    if !options.dry_run {
        let plugin = retro_runtime::find_plugin(None).map_err(HostError::Plugin)?;
        let plugin = plugin.ok_or(HostError::NoPlugin)?;
        files.copied.push((PLUGIN.into(), plugin));
    }
    Ok((
        settings,
        HostFiles {
            files,
            config: Some(config),
            before: Some(before),
        },
    ))
}

/// What the way back writes anew and leaves out: the host's configuration as it was, and the plugin. `folder`: the model's.
pub fn undo(model: &ModelProto, folder: Option<&Path>) -> FolderFiles {
    let mut files = FolderFiles::default();
    if let Some(before) = model.metadata(metadata::HOST_CONFIG).filter(|_| folder.is_some()) {
        files.written.push((GENAI_CONFIG.into(), before.as_bytes().to_vec()));
        files.left_out.insert(PLUGIN.into());
    }
    files
}

/// The longest text that a configuration speaks of.
fn known_context(config: &Value) -> Option<usize> {
    let number = |pointer: &str| config.pointer(pointer)?.as_u64().filter(|&n| n > 0);
    let known = number("/search/max_length").or_else(|| number("/model/context_length"))?;
    usize::try_from(known).ok()
}

/// Lets no cache be as long as a sliding window alone.
fn drop_sliding_window(config: &mut Value) {
    let decoder = config.pointer_mut("/model/decoder");
    if let Some(decoder) = decoder.and_then(Value::as_object_mut) {
        decoder.shift_remove("sliding_window");
    }
}

/// Names the plugin, and lets caches be no longer than the state.
fn configure(config: &mut Value, context: usize) -> Result<(), HostError> {
    let object = |value: &mut Value, name: &str| -> Result<(), HostError> {
        if value.get(name).is_none_or(Value::is_null) {
            value[name] = Value::Object(Map::new());
        }
        match value[name].is_object() {
            true => Ok(()),
            false => Err(HostError::Config(format!("{name} is no object"))),
        }
    };
    let wrong = |why: &str| HostError::Config(why.to_owned());
    let decoder = config.pointer_mut("/model/decoder").filter(|d| d.is_object());
    let decoder = decoder.ok_or_else(|| wrong("it has no model.decoder"))?;
    if decoder.get("pipeline").is_some() {
        return Err(wrong("model.decoder is a pipeline of several graphs"));
    }
    object(decoder, "session_options")?;
    let options = &mut decoder["session_options"];
    let other = options.get("custom_ops_library").and_then(Value::as_str);
    if let Some(other) = other.filter(|other| *other != PLUGIN) {
        return Err(wrong(&format!(
            "it loads another plugin already, {other}, and can load one only"
        )));
    }
    options["custom_ops_library"] = PLUGIN.into();
    let least = |value: &Value| value.as_u64().map_or(context as u64, |n| n.min(context as u64));
    object(config, "search")?;
    let search = &mut config["search"];
    if search
        .get("num_beams")
        .and_then(Value::as_u64)
        .is_some_and(|beams| beams > 1)
    {
        return Err(wrong("search.num_beams is above 1, and beams can't share a state"));
    }
    search["max_length"] = least(&search["max_length"]).into();
    search["past_present_share_buffer"] = true.into();
    let model = &mut config["model"];
    model["context_length"] = least(&model["context_length"]).into();
    Ok(())
}

/// As onnxruntime-genai writes it.
fn pretty(config: &Value) -> Result<Vec<u8>, HostError> {
    let mut text = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"    "));
    config
        .serialize(&mut serializer)
        .map_err(|e| HostError::Config(e.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_gets_the_plugin_and_the_context() {
        let text = r#"{
            "model": {"decoder": {"filename": "m.onnx", "sliding_window": {"window_size": 16}}, "context_length": 4096},
            "search": {"max_length": 2048}
        }"#;
        let mut config: Value = serde_json::from_str(text).unwrap();
        assert_eq!(known_context(&config), Some(2048));
        configure(&mut config, 1024).unwrap();
        assert_eq!(config["model"]["decoder"]["sliding_window"]["window_size"], 16);
        assert_eq!(
            config["model"]["decoder"]["session_options"]["custom_ops_library"],
            PLUGIN
        );
        assert_eq!(
            (&config["search"]["max_length"], &config["model"]["context_length"]),
            (&1024.into(), &1024.into())
        );
        assert_eq!(config["search"]["past_present_share_buffer"], true);
        configure(&mut config, 9999).unwrap();
        drop_sliding_window(&mut config);
        assert!(config["model"]["decoder"].get("sliding_window").is_none());
        assert_eq!(config["search"]["max_length"], 1024, "a limit stays");
        let keys: Vec<&String> = config["model"].as_object().unwrap().keys().collect();
        assert_eq!(keys, ["decoder", "context_length"], "in their order");
    }

    #[test]
    fn what_it_cant_be_made_ready_with_is_refused() {
        for (text, why) in [
            ("{}", "no model.decoder"),
            (r#"{"model": {"decoder": {"pipeline": []}}}"#, "pipeline"),
            (
                r#"{"model": {"decoder": {"session_options": {"custom_ops_library": "other.so"}}}}"#,
                "another plugin already, other.so",
            ),
            (r#"{"model": {"decoder": {}}, "search": {"num_beams": 4}}"#, "num_beams"),
            (r#"{"model": {"decoder": {}}, "search": 3}"#, "search is no object"),
        ] {
            let mut config: Value = serde_json::from_str(text).unwrap();
            let error = configure(&mut config, 1024).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
