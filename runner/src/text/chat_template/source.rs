//! Finds chat templates in a model's folder.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::text::chat_template::error::{Error, Result};

/// The name of the template that counts when nothing else is asked for.
pub const DEFAULT: &str = "default";

/// No known template has more than a tenth of that.
const MAX_BYTES: u64 = 512 << 10;

/// The templates of a file, not yet compiled.
pub struct Source {
    /// The file that they come from.
    pub path: PathBuf,
    /// The templates by name.
    pub templates: BTreeMap<String, String>,
}

impl Source {
    /// The templates of a model's folder, if it has any.
    pub fn find(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("chat_template.jinja");
        if path.exists() {
            let mut source = Self::read(&path)?;
            source.add_folder(&folder.join("additional_chat_templates"))?;
            return Ok(Some(source));
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            if let Some(source) = Self::read_json(&folder.join(name))? {
                return Ok(Some(source));
            }
        }
        Ok(None)
    }

    /// The templates of a file, which is Jinja, or JSON by its name.
    pub fn read(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|e| e == "json") {
            if !path.exists() {
                return Err(read_error(path, io::ErrorKind::NotFound.into()));
            }
            return Self::read_json(path)?.ok_or_else(|| Error::NoTemplate(path.to_owned()));
        }
        let templates = BTreeMap::from([(DEFAULT.to_owned(), read_text(path)?)]);
        Ok(Self {
            path: path.to_owned(),
            templates,
        })
    }

    /// The entry `chat_template` of a JSON file: text, or a list of templates with a name.
    fn read_json(path: &Path) -> Result<Option<Self>> {
        let Some(json) = retro_model_io::read_json(path)? else {
            return Ok(None);
        };
        let templates = match json.get("chat_template") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) => Some(BTreeMap::from([(DEFAULT.to_owned(), text.clone())])),
            Some(Value::Array(list)) => list.iter().map(named).collect(),
            Some(_) => None,
        };
        let templates = templates.ok_or_else(|| Error::NotATemplate(path.to_owned()))?;
        for text in templates.values() {
            check_size(path, text.len() as u64)?;
        }
        Ok(Some(Self {
            path: path.to_owned(),
            templates,
        }))
    }

    fn add_folder(&mut self, folder: &Path) -> Result<()> {
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(read_error(folder, e)),
        };
        for entry in entries {
            let path = entry.map_err(|e| read_error(folder, e))?.path();
            if path.extension().is_some_and(|e| e == "jinja")
                && let Some(name) = path.file_stem().and_then(|n| n.to_str())
            {
                self.templates.insert(name.to_owned(), read_text(&path)?);
            }
        }
        Ok(())
    }
}

/// An element of a list of templates.
fn named(element: &Value) -> Option<(String, String)> {
    let text = |key: &str| element.get(key).and_then(Value::as_str).map(str::to_owned);
    Some((text("name")?, text("template")?))
}

fn read_text(path: &Path) -> Result<String> {
    let meta = fs::metadata(path).map_err(|e| read_error(path, e))?;
    if !meta.is_file() {
        // Opening a pipe would wait for whoever writes to it.
        return Err(read_error(path, io::Error::other("it is not a file")));
    }
    check_size(path, meta.len())?;
    fs::read_to_string(path).map_err(|e| read_error(path, e))
}

fn check_size(path: &Path, bytes: u64) -> Result<()> {
    if bytes <= MAX_BYTES {
        return Ok(());
    }
    Err(Error::TooLarge {
        path: path.to_owned(),
        bytes,
        limit: MAX_BYTES,
    })
}

fn read_error(path: &Path, source: io::Error) -> Error {
    Error::Read {
        path: path.to_owned(),
        source,
    }
}
