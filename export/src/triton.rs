//! A model repository for NVIDIA's Triton Inference Server. Its ONNX Runtime backend loads the plugin by itself, and keeps
//! a sequence's caches and state between requests (implicit state), so that a client sends tokens and gets logits.

use crate::source::{self, find_source};
use retro_contract::{
    SKETCH_BLOCK,
    graph::{PAGE_BUDGET, RETRO_LENGTH},
    metadata,
};
use retro_model_io::{ModelFolder, exporters_present_names};
use retro_onnx::{
    DataType, Dimension, GraphProto, LoadedModel, NewFolder, ValueInfoProto, external_files, folder_of, read_model,
    stay_inside,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs, io,
    path::{Path, PathBuf},
};

/// Inputs with defaults that a client may feed: those of a window that the graph does not keep, and a budget.
const OPTIONAL: [&str; 2] = [RETRO_LENGTH, PAGE_BUDGET];
/// Triton loads the newest of a model's versions.
const VERSION: &str = "1";
/// A client may take its time between two requests of a sequence: a minute.
const IDLE_MICROSECONDS: u64 = 60_000_000;

/// What a repository is to be.
#[derive(Clone, Debug, clap::Args)]
pub struct Repository {
    /// A converted model: a file or a folder
    pub model: PathBuf,

    /// The repository's folder, in which the model becomes a folder
    #[arg(value_name = "REPOSITORY")]
    pub folder: PathBuf,

    /// Which graph of a folder that holds several: its file's name or its variant
    #[arg(long, value_name = "NAME")]
    pub graph: Option<String>,

    /// Tokens of a sequence, prompt and output together: as much cache is kept for each
    #[arg(short, long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub capacity: u32,

    /// The model's name in the repository [default: its folder's]
    #[arg(long)]
    pub name: Option<String>,

    /// Where the server sees the repository's folder, /mnt/models for KServe [default: where it lies]
    #[arg(long, value_name = "PATH")]
    pub mount: Option<PathBuf>,
}

/// Why there is no repository.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no model, or it isn't clear which.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The model can't be read, or is no ONNX model.
    #[error(transparent)]
    Read(#[from] retro_onnx::Error),
    /// The plugin is not where it should be.
    #[error(transparent)]
    Plugin(#[from] retro_runtime::Error),
    /// There is none to be found.
    #[error(
        "the plugin {} is not beside this program: build it with `cargo build --release`, or name it in {}",
        retro_runtime::PLUGIN,
        retro_runtime::PLUGIN_VARIABLE
    )]
    NoPlugin,
    /// It has no RetroAttention.
    #[error("{} was not converted: convert it first", .0.display())]
    NotConverted(PathBuf),
    /// An input or output that Triton can't be told of.
    #[error("{name} {why}")]
    Value {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No name for the model can be had, or not this one.
    #[error("{0:?} is no name for a model: give one with --name")]
    Name(String),
    /// The place is taken.
    #[error("{} is there already: remove it, or give another --name", .0.display())]
    Taken(PathBuf),
    /// State is made for fewer.
    #[error(
        "the model has state for {context} tokens, and --capacity asks for {asked}: convert it with --context {asked}"
    )]
    Context {
        /// Tokens that were asked for.
        asked: usize,
        /// Tokens that the model has state for.
        context: usize,
    },
    /// Positions end there.
    #[error("--capacity {asked} exceeds the model's context of {most} tokens")]
    Capacity {
        /// Tokens that were asked for.
        asked: usize,
        /// Tokens of the model's context.
        most: usize,
    },
    /// The server would look in its working directory.
    #[error("--mount {}: give a path from the root, as the server sees it", .0.display())]
    Mount(PathBuf),
    /// Triton's configuration is text.
    #[error("{} is not a path that Triton's configuration can hold", .0.display())]
    Path(PathBuf),
    /// The repository can't be written.
    #[error("cannot write {}", .path.display())]
    Write {
        /// Where it was to be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// Writes a converted model into a repository: its graph and weights, the plugin, and `config.pbtxt`. Gives the model's
/// folder, which is there whole or not at all.
///
/// # Errors
/// The model is not a converted one, has sizes that a capacity doesn't settle, or the place is taken or can't be written.
pub fn write_repository(repository: &Repository) -> Result<PathBuf, Error> {
    let source = find_source(&repository.model, repository.graph.as_deref(), None)?;
    let LoadedModel { model, .. } = read_model(&source.model)?;
    stay_inside(&model, &source.model, source.folder())?;
    let weights = external_files(&model, source.folder())?;
    let (Some(graph), Some(page_size)) = (
        &model.graph,
        model.metadata(metadata::PAGE_SIZE).and_then(|size| size.parse().ok()),
    ) else {
        return Err(Error::NotConverted(source.model));
    };
    let capacity = repository.capacity as usize;
    let context = model.metadata(metadata::CONTEXT).and_then(|n| n.parse().ok());
    if let Some(context) = context.filter(|&context: &usize| context < capacity) {
        let asked = capacity;
        return Err(Error::Context { asked, context });
    }
    let files = ModelFolder::open(&repository.model, repository.graph.as_deref()).map_err(source::Error::from)?;
    if let Some(most) = files.context_length.filter(|&most| most < capacity) {
        let asked = capacity;
        return Err(Error::Capacity { asked, most });
    }
    let mount = repository.mount.as_deref();
    if let Some(mount) = mount.filter(|mount| !mount.has_root()) {
        return Err(Error::Mount(mount.to_owned()));
    }
    let plugin = retro_runtime::find_plugin(None)?.ok_or(Error::NoPlugin)?;
    let name = name(repository, &source.model)?;

    let write = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Write { path, source }
    };
    let folder = std::path::absolute(&repository.folder).map_err(write(&repository.folder))?;
    let place = folder.join(&name);
    if fs::symlink_metadata(&place).is_ok() {
        return Err(Error::Taken(place));
    }
    let seen = mount.unwrap_or(&folder).join(&name);
    let library = seen.join(retro_runtime::PLUGIN);
    let config = Config {
        name: &name,
        library: library.to_str().ok_or_else(|| Error::Path(library.clone()))?,
        graph,
        capacity,
        page_size,
    }
    .text()?;

    fs::create_dir_all(&folder).map_err(write(&folder))?;
    let temp = NewFolder::inside(&folder).map_err(write(&folder))?;
    let version = temp.path().join(VERSION);
    let fill = || -> io::Result<()> {
        fs::create_dir(&version)?;
        link_or_copy(&source.model, &version.join("model.onnx"))?;
        for file in &weights {
            let target = version.join(&file.location);
            fs::create_dir_all(folder_of(&target))?;
            link_or_copy(&file.source, &target)?;
        }
        fs::copy(&plugin, temp.path().join(retro_runtime::PLUGIN))?;
        fs::write(temp.path().join("config.pbtxt"), config)?;
        fs::rename(temp.path(), &place)
    };
    fill().map_err(write(&place))?;
    let _ = temp.keep();
    Ok(place)
}

/// The name that was asked for, else that of the model's folder, or of a file's.
fn name(repository: &Repository, model: &Path) -> Result<String, Error> {
    let name = repository.name.clone().unwrap_or_else(|| {
        let whole = fs::canonicalize(&repository.model).unwrap_or_else(|_| model.to_owned());
        let own = if whole.is_dir() {
            whole.file_name()
        } else {
            whole.file_stem()
        };
        own.unwrap_or_default().to_string_lossy().into_owned()
    });
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(is_plain) {
        return Err(Error::Name(name));
    }
    Ok(name)
}

/// Weights may be gigabytes: a hard link, where the file system has them.
fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    let from = fs::canonicalize(from)?;
    fs::hard_link(&from, to).or_else(|_| fs::copy(&from, to).map(drop))
}

/// What `config.pbtxt` says: Triton's `ModelConfig` (`model_config.proto`) as text.
struct Config<'a> {
    name: &'a str,
    /// The plugin, where the server sees it.
    library: &'a str,
    graph: &'a GraphProto,
    capacity: usize,
    page_size: usize,
}

impl Config<'_> {
    fn text(&self) -> Result<String, Error> {
        let defaults: BTreeSet<&str> = self.graph.initializer.iter().map(|tensor| tensor.name()).collect();
        let outputs: BTreeMap<&str, &ValueInfoProto> =
            self.graph.output.iter().map(|value| (value.name(), value)).collect();
        let (mut inputs, mut states, mut presents) = (String::new(), String::new(), BTreeSet::new());
        for input in &self.graph.input {
            if defaults.contains(input.name()) {
                if OPTIONAL.contains(&input.name()) {
                    value(&mut inputs, "input", input, "optional: true ")?;
                }
                continue;
            }
            let names = exporters_present_names(input.name());
            let present = names.iter().find_map(|name| outputs.get(name.as_str()));
            match present.filter(|present| present.data_type() == input.data_type()) {
                Some(present) => {
                    presents.insert(present.name());
                    self.state(&mut states, input, present)?;
                }
                None => value(&mut inputs, "input", input, "")?,
            }
        }
        let mut results = String::new();
        for output in self
            .graph
            .output
            .iter()
            .filter(|value| !presents.contains(value.name()))
        {
            value(&mut results, "output", output, "")?;
        }
        Ok(format!(
            "name: {}\nbackend: \"onnxruntime\"\n# Sequences are not put together: their lengths differ.\nmax_batch_size: 0\n\
             model_operations {{ op_library_filename: {} }}\n{inputs}{results}sequence_batching {{\n  \
             max_sequence_idle_microseconds: {IDLE_MICROSECONDS}\n  direct {{ }}\n{states}}}\n",
            quoted(self.name),
            quoted(self.library),
        ))
    }

    /// A cache or state, which Triton keeps for a sequence: in one buffer, since of two it would pair inputs with outputs by
    /// the order of their names, which may differ.
    fn state(&self, text: &mut String, input: &ValueInfoProto, present: &ValueInfoProto) -> Result<(), Error> {
        let sizes = self.sizes(input)?;
        let (kind, dims) = (triton_type(input)?, list(&sizes));
        let _ = writeln!(
            text,
            "  state {{\n    input_name: {}\n    output_name: {}\n    data_type: {kind}\n    dims: {dims}\n    \
             use_same_buffer_for_input_output: true\n    initial_state {{ name: \"zeros\" data_type: {kind} dims: {dims} \
             zero_data: true }}\n  }}",
            quoted(input.name()),
            quoted(present.name()),
        );
        Ok(())
    }

    /// The sizes of a cache `[B, Hkv, C, D]`, or of state: what is not declared follows from the capacity, or, for heads
    /// and head sizes that an exporter has only named, from the layer's state.
    fn sizes(&self, input: &ValueInfoProto) -> Result<Vec<i64>, Error> {
        let name = input.name();
        let rows = if input.data_type() == Some(DataType::Uint8) {
            self.capacity.div_ceil(SKETCH_BLOCK)
        } else if name.contains(".page_") {
            self.capacity.div_ceil(self.page_size)
        } else {
            self.capacity
        };
        let layer = name
            .split(|c: char| !c.is_ascii_digit())
            .find(|digits| !digits.is_empty());
        let of_state = |state: &str, axis: usize| {
            let name = format!("past_retro.{}.{state}", layer?);
            let value = self.graph.input.iter().find(|value| value.name() == name)?;
            value.dims()?.get(axis)?.fixed()
        };
        let size = |(axis, dim): (usize, &Dimension)| {
            dim.fixed().or_else(|| match axis {
                0 => Some(1),
                1 => of_state("page_steps", 1),
                2 => i64::try_from(rows).ok(),
                3 => of_state("outputs", 3),
                _ => None,
            })
        };
        let dims = input.dims().unwrap_or_default();
        let sizes: Option<Vec<i64>> = dims.iter().enumerate().map(size).collect();
        let why = match &sizes {
            Some(sizes) if !sizes.is_empty() => return Ok(sizes.clone()),
            Some(_) => "is kept between calls and has no dimensions: Triton keeps no such state",
            None => "is kept between calls, and its sizes are not all declared",
        };
        Err(Error::Value {
            name: name.to_owned(),
            why,
        })
    }
}

/// An input or output of a request. One without dimensions has one number, which Triton hands on without any.
fn value(text: &mut String, what: &str, value: &ValueInfoProto, more: &str) -> Result<(), Error> {
    let dims = value.dims().ok_or(Error::Value {
        name: value.name().to_owned(),
        why: "is declared without its number of dimensions, which Triton needs",
    })?;
    let size = |(axis, dim): (usize, &Dimension)| dim.fixed().unwrap_or(if axis == 0 { 1 } else { -1 });
    let mut sizes: Vec<i64> = dims.iter().enumerate().map(size).collect();
    if sizes.is_empty() {
        sizes.push(1);
    }
    let _ = writeln!(
        text,
        "{what} {{ name: {} data_type: {} dims: {} {more}}}",
        quoted(value.name()),
        triton_type(value)?,
        list(&sizes),
    );
    Ok(())
}

fn triton_type(value: &ValueInfoProto) -> Result<&'static str, Error> {
    match value.data_type() {
        Some(DataType::Float) => Ok("TYPE_FP32"),
        Some(DataType::Float16) => Ok("TYPE_FP16"),
        Some(DataType::Bfloat16) => Ok("TYPE_BF16"),
        Some(DataType::Double) => Ok("TYPE_FP64"),
        Some(DataType::Int64) => Ok("TYPE_INT64"),
        Some(DataType::Int32) => Ok("TYPE_INT32"),
        Some(DataType::Uint8) => Ok("TYPE_UINT8"),
        Some(DataType::Bool) => Ok("TYPE_BOOL"),
        _ => Err(Error::Value {
            name: value.name().to_owned(),
            why: "is of a type that is not handed to Triton",
        }),
    }
}

fn list(sizes: &[i64]) -> String {
    let numbers: Vec<String> = sizes.iter().map(i64::to_string).collect();
    format!("[ {} ]", numbers.join(", "))
}

/// A string of protobuf's text format.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => quoted.extend(['\\', byte.into()]),
            b' '..=b'~' => quoted.push(byte.into()),
            _ => {
                let _ = write!(quoted, "\\{byte:03o}");
            }
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_quoted_as_protobuf_has_it() {
        assert_eq!(quoted(r#"a"b\c"#), r#""a\"b\\c""#);
        assert_eq!(quoted("é\n"), "\"\\303\\251\\012\"");
    }
}
