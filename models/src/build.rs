//! From a shape and a source of weights to a folder that ONNX Runtime, onnxruntime-genai and `retro-run` can open.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use bytes::Bytes;
use retro_onnx::{folder_of, new_file_beside, persist, remove_abandoned, write_all_at, write_model};
use tempfile::NamedTempFile;

use crate::{
    config::LlamaConfig,
    dtype::Dtype,
    error::{Error, Result, at},
    genai,
    gguf::GgufModel,
    graph::{self, Llama},
    initializer::{self, Initializer},
    proto,
    quantised::Activations,
    random::RandomWeights,
    rounded::{Rounded, rounded},
    safetensors::Weights,
    source::Source,
};

/// Initializers of more than this many bytes in total go to `model.onnx.data`.
pub const EXTERNAL_THRESHOLD: u64 = 1 << 20;
/// Bytes made and written at a time by a thread.
const CHUNK: usize = 8 << 20;
/// Elements of a block of GGUF's types.
const LARGEST_BLOCK: usize = 256;
const SMALLEST_BLOCK: usize = 32;
/// Start of every tensor in the data file: a page, so that it can be mapped.
const ALIGNMENT: u64 = 4096;

/// What to build besides the shape.
#[derive(Clone, Debug)]
pub struct Options {
    /// Element type of weights, activations, keys and values.
    pub dtype: Dtype,
    /// Linear layers, the embedding and the head have weights of 4 and 8 bits, which are multiplied with this. All else
    /// is of [`Activations::dtype`], whatever `dtype` says, and so is the embedding where that is f16.
    pub q4: Option<Activations>,
    /// Weights beyond this many bytes are written to `model.onnx.data`; protobuf itself ends at 2 GiB.
    pub external_threshold: u64,
    /// A tokenizer.json in the place of the model's own.
    pub tokenizer: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dtype: Dtype::F32,
            q4: None,
            external_threshold: EXTERNAL_THRESHOLD,
            tokenizer: None,
        }
    }
}

/// What was built.
#[derive(Clone, Debug)]
pub struct Built {
    /// The graph's file.
    pub model: PathBuf,
    /// Elements of all weights.
    pub parameters: u64,
    /// Bytes of all initializers.
    pub weight_bytes: u64,
    /// Whether the weights are in `model.onnx.data` beside it.
    pub external: bool,
    /// With [`Options::q4`]: tensors that the graph does not have as the file has them.
    pub rounded: Vec<Rounded>,
}

/// Builds the model `weights` into the folder `out`, which is made if need be. `weights` is a GGUF file, or a folder
/// with Hugging Face's names: config.json, model.safetensors or its shards, tokenizer files.
///
/// # Errors
/// When the file or folder is incomplete or damaged, is no model of the Llama family that is built (see [`LlamaConfig`]),
/// or `out` cannot be written.
pub fn build(weights: &Path, out: &Path, options: &Options) -> Result<Built> {
    let metadata = fs::metadata(weights).map_err(at!(Read, weights))?;
    let (config, source, files) = if metadata.is_file() {
        let model = GgufModel::open(weights, options.tokenizer.is_none())?;
        let files = model.files.into_iter().map(|(name, text)| (name, text.into_bytes()));
        (model.config, Source::Gguf(model.weights), files.collect())
    } else {
        let mut config = LlamaConfig::read(&weights.join("config.json"))?;
        config.read_generation(&weights.join("generation_config.json"))?;
        (
            config,
            Source::Safetensors(Weights::open(weights)?),
            side_files(weights)?,
        )
    };
    let mut files: Vec<(&str, Vec<u8>)> = files;
    if let Some(path) = &options.tokenizer {
        let bytes = fs::read(path).map_err(at!(Read, path))?;
        files.retain(|(name, _)| *name != TOKENIZER);
        files.push((TOKENIZER, bytes));
    }
    let built = write(&config, &source, out, options)?;
    for (name, bytes) in files {
        write_whole(&out.join(name), &bytes)?;
    }
    Ok(built)
}

const TOKENIZER: &str = "tokenizer.json";

/// The files of a Hugging Face folder that go beside the graph as they are.
fn side_files(folder: &Path) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let names = [
        "config.json",
        "generation_config.json",
        TOKENIZER,
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "special_tokens_map.json",
    ];
    let present = names.into_iter().filter(|name| folder.join(name).is_file());
    present
        .map(|name| {
            let path = folder.join(name);
            let bytes = fs::read(&path).map_err(at!(Read, path))?;
            Ok((name, bytes))
        })
        .collect()
}

/// Builds a model with random weights (the same for the same `seed`) into the folder `out`. It has no tokenizer.
///
/// # Errors
/// When `config` contradicts itself or `out` cannot be written.
pub fn build_random(config: &LlamaConfig, seed: u64, out: &Path, options: &Options) -> Result<Built> {
    config.check()?;
    let built = write(config, &Source::Random(RandomWeights::new(seed)), out, options)?;
    let text = serde_json::to_string_pretty(&config.to_json())?;
    write_whole(&out.join("config.json"), text.as_bytes())?;
    Ok(built)
}

/// The shape of the model in a GGUF file's bytes, after all the checks that [`build`] makes before it writes; `path` is
/// what errors call the file.
///
/// # Errors
/// As [`build`]'s.
pub fn check_gguf(bytes: Bytes, path: &Path) -> Result<LlamaConfig> {
    let model = GgufModel::parse(bytes, path, true)?;
    let source = Source::Gguf(model.weights);
    plan(&model.config, &source, Dtype::F32, None)?;
    plan(&model.config, &source, Dtype::F32, Some(Activations::F32))?;
    Ok(model.config)
}

/// The graph, for which `source` has all weights and no others.
fn plan(config: &LlamaConfig, source: &Source, dtype: Dtype, q4: Option<Activations>) -> Result<Llama> {
    // Before a graph of as many layers is made.
    if let Some(tensors) = source.count().filter(|tensors| *tensors < config.layers) {
        let layers = config.layers;
        return Err(Error::Layers { layers, tensors });
    }
    let llama = match q4 {
        None => graph::llama(config, dtype),
        Some(activations) => graph::quantised_llama(config, source, activations),
    };
    initializer::check(source, config, &llama.initializers)?;
    Ok(llama)
}

fn write(config: &LlamaConfig, source: &Source, out: &Path, options: &Options) -> Result<Built> {
    let dtype = options.q4.map_or(options.dtype, Activations::dtype);
    let llama = plan(config, source, dtype, options.q4)?;
    fs::create_dir_all(out).map_err(at!(MakeFolder, out))?;
    let places = Places::of(&llama.initializers, dtype);
    let weight_bytes = places.weight_bytes;
    let external = weight_bytes > options.external_threshold;
    let job = Job {
        config,
        source,
        dtype,
        llama: &llama,
    };
    let model = out.join("model.onnx");
    let data = out.join(DATA);
    let weights = if external {
        Some(job.write_data(&data, &places)?)
    } else {
        None
    };
    let message = proto::model(&llama, dtype, |i, init| {
        if external {
            let place = places.offsets.get(i);
            let offset = place.ok_or(Error::Internal("an initializer without a place in the data file"))?;
            Ok(proto::Data::External {
                location: DATA,
                offset: *offset,
                length: init.bytes(dtype) as u64,
            })
        } else {
            let mut bytes = vec![0; init.bytes(dtype)];
            job.fill(i, init, 0, &mut bytes)?;
            Ok(proto::Data::Inline(bytes))
        }
    })?;
    // An older graph must not meet newer weights, should this be interrupted.
    for old in [&model, &data] {
        if old.exists() {
            fs::remove_file(old).map_err(at!(Replace, old))?;
        }
    }
    if let Some(weights) = weights {
        persist(weights, &data, true)?;
    }
    write_model(&message, &model, true)?;
    let genai = serde_json::to_string_pretty(&genai::config(config))?;
    write_whole(&out.join("genai_config.json"), genai.as_bytes())?;
    let parameters = llama.initializers.iter().map(|i| i.parameters() as u64).sum();
    let rounded = options.q4.map(|_| rounded(source, &llama.initializers));
    Ok(Built {
        model,
        parameters,
        weight_bytes,
        external,
        rounded: rounded.unwrap_or_default(),
    })
}

/// Name of the external data file, as exporters call it.
const DATA: &str = "model.onnx.data";

/// Where initializers are in the data file, and how long it is.
struct Places {
    offsets: Vec<u64>,
    end: u64,
    /// Of all initializers, each counted once.
    weight_bytes: u64,
}

impl Places {
    fn of(initializers: &[Initializer], dtype: Dtype) -> Self {
        let mut places = Self {
            offsets: Vec::new(),
            end: 0,
            weight_bytes: 0,
        };
        let mut by_name = HashMap::new();
        for init in initializers {
            let shared = init.same_as.as_ref().and_then(|name| by_name.get(name)).copied();
            let offset = shared.unwrap_or_else(|| {
                let offset = places.end.next_multiple_of(ALIGNMENT);
                places.end = offset + init.bytes(dtype) as u64;
                places.weight_bytes += init.bytes(dtype) as u64;
                offset
            });
            by_name.insert(&init.name, offset);
            places.offsets.push(offset);
        }
        places
    }
}

/// Written beside and renamed, so that the file is there whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        File::create(&part)?.write_all(bytes)?;
        fs::rename(&part, path)
    };
    write().map_err(at!(Write, path))
}

struct Job<'a> {
    config: &'a LlamaConfig,
    source: &'a Source,
    dtype: Dtype,
    llama: &'a Llama,
}

/// A run of rows of one initializer and where it goes in the data file.
struct Piece<'a> {
    index: usize,
    init: &'a Initializer,
    row: usize,
    bytes: usize,
    offset: u64,
}

impl Job<'_> {
    fn fill(&self, index: usize, init: &Initializer, row: usize, out: &mut [u8]) -> Result<()> {
        initializer::fill(self.source, self.config, index, init, self.dtype, row, out)
    }

    /// Makes and writes the pieces of all initializers with as many threads as the machine has; a thread holds one
    /// piece. The file is a temporary one beside `path`.
    fn write_data(&self, path: &Path, places: &Places) -> Result<NamedTempFile> {
        remove_abandoned(folder_of(path));
        let temporary = new_file_beside(path).map_err(at!(Write, path))?;
        let file = temporary.as_file();
        file.set_len(places.end).map_err(|source| Error::Extend {
            path: path.to_owned(),
            bytes: places.end,
            source,
        })?;
        let pieces = self.pieces(&places.offsets);
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            let mut buffer = Vec::new();
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                buffer.clear();
                buffer.resize(piece.bytes, 0);
                self.fill(piece.index, piece.init, piece.row, &mut buffer)?;
                let written = write_all_at(file, &buffer, piece.offset);
                written.map_err(at!(Write, path))?;
            }
            Ok(())
        };
        let threads = thread::available_parallelism().map_or(1, usize::from);
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .try_for_each(|w| w.join().unwrap_or(Err(Error::Internal("a writing thread failed"))))
        })?;
        Ok(temporary)
    }

    fn pieces(&self, offsets: &[u64]) -> Vec<Piece<'_>> {
        let mut pieces = Vec::new();
        for ((index, init), &offset) in self.llama.initializers.iter().enumerate().zip(offsets) {
            if init.same_as.is_some() {
                continue;
            }
            let row_bytes = init.row_bytes(self.dtype);
            let step = rows_of_a_piece(row_bytes);
            for row in (0..init.rows()).step_by(step) {
                let bytes = step.min(init.rows() - row) * row_bytes;
                pieces.push(Piece {
                    index,
                    init,
                    row,
                    bytes,
                    offset: offset + (row * row_bytes) as u64,
                });
            }
        }
        pieces
    }
}

/// Rows that a thread makes at a time. Blocks of quantised weights run along the rows: a piece that begins or ends in the
/// middle of one makes it twice, so that it is as many as a whole number of blocks, where this stays small.
fn rows_of_a_piece(row_bytes: usize) -> usize {
    let rows = (CHUNK / row_bytes.max(1)).max(1);
    [LARGEST_BLOCK, SMALLEST_BLOCK]
        .map(|block| rows.next_multiple_of(block))
        .into_iter()
        .find(|rows| rows * row_bytes <= 4 * CHUNK)
        .unwrap_or(rows)
}

/// Checks an output folder before work starts: it must not be the folder that is read.
///
/// # Errors
/// When it is.
pub fn check_out(weights: &Path, out: &Path) -> Result<()> {
    let same = weights
        .canonicalize()
        .ok()
        .zip(out.canonicalize().ok())
        .is_some_and(|(a, b)| a == b);
    if same {
        return Err(Error::WeightsFolder(out.to_owned()));
    }
    Ok(())
}
