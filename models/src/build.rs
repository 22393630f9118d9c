//! From a shape and a source of weights to a folder that ONNX Runtime, onnxruntime-genai and `retro-run` can open.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use retro_onnx::write_model;

use crate::{
    config::LlamaConfig,
    dtype::Dtype,
    error::{Error, Result, at},
    genai,
    graph::{self, Llama},
    initializer::{self, Initializer, Source},
    proto,
    random::RandomWeights,
    safetensors::Weights,
};

/// Initializers of more than this many bytes in total go to `model.onnx.data`.
pub const EXTERNAL_THRESHOLD: u64 = 1 << 20;
/// Bytes made and written at a time by a thread.
const CHUNK: usize = 8 << 20;
/// Start of every tensor in the data file: a page, so that it can be mapped.
const ALIGNMENT: u64 = 4096;

/// What to build besides the shape.
#[derive(Clone, Debug)]
pub struct Options {
    /// Element type of weights, activations, keys and values.
    pub dtype: Dtype,
    /// Weights beyond this many bytes are written to `model.onnx.data`; protobuf itself ends at 2 GiB.
    pub external_threshold: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dtype: Dtype::F32,
            external_threshold: EXTERNAL_THRESHOLD,
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
}

/// Builds the model of the folder `weights` (Hugging Face names: config.json, model.safetensors or its shards,
/// tokenizer files) into the folder `out`, which is made if need be.
///
/// # Errors
/// When the folder is incomplete, is no Llama (see [`LlamaConfig::read`]), or `out` cannot be written.
pub fn build(weights: &Path, out: &Path, options: &Options) -> Result<Built> {
    let config_path = weights.join("config.json");
    let mut config = LlamaConfig::read(&config_path)?;
    config.read_generation(&weights.join("generation_config.json"))?;
    let source = Source::Trained(Weights::open(weights)?);
    let built = write(&config, &source, out, options)?;
    for name in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
    ] {
        let from = weights.join(name);
        if from.is_file() {
            // Read and written, not copied: a read-only source must not make a read-only model folder.
            let bytes = fs::read(&from).map_err(at!(Read, from))?;
            write_whole(&out.join(name), &bytes)?;
        }
    }
    Ok(built)
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

fn write(config: &LlamaConfig, source: &Source, out: &Path, options: &Options) -> Result<Built> {
    let llama = graph::llama(config, options.dtype);
    initializer::check(source, &llama.initializers)?;
    fs::create_dir_all(out).map_err(at!(MakeFolder, out))?;
    let sizes: Vec<u64> = llama
        .initializers
        .iter()
        .map(|i| i.bytes(options.dtype) as u64)
        .collect();
    let weight_bytes = sizes.iter().sum();
    let external = weight_bytes > options.external_threshold;
    let job = Job {
        config,
        source,
        dtype: options.dtype,
        llama: &llama,
    };
    let model = out.join("model.onnx");
    let data = out.join(DATA);
    // An older graph must not meet newer weights, should this be interrupted.
    for old in [&model, &data] {
        if old.exists() {
            fs::remove_file(old).map_err(at!(Replace, old))?;
        }
    }
    let message = if external {
        let offsets = layout(&sizes);
        let end = offsets.iter().zip(&sizes).map(|(o, s)| o + s).max().unwrap_or(0);
        job.write_data(&data, &offsets, end)?;
        proto::model(&llama, options.dtype, |i, _| {
            let place = offsets.get(i).zip(sizes.get(i));
            let (offset, length) = place.ok_or(Error::Internal("an initializer without a place in the data file"))?;
            Ok(proto::Data::External {
                location: DATA,
                offset: *offset,
                length: *length,
            })
        })?
    } else {
        proto::model(&llama, options.dtype, |i, init| {
            let mut bytes = vec![0; init.bytes(options.dtype)];
            job.fill(i, init, 0, &mut bytes)?;
            Ok(proto::Data::Inline(bytes))
        })?
    };
    write_model(&message, &model, true)?;
    let genai = serde_json::to_string_pretty(&genai::config(config))?;
    write_whole(&out.join("genai_config.json"), genai.as_bytes())?;
    let parameters = llama
        .initializers
        .iter()
        .filter(|i| !matches!(i.content, initializer::Content::Rope { .. }));
    let parameters = parameters.map(|i| (i.rows() * i.columns()) as u64).sum();
    Ok(Built {
        model,
        parameters,
        weight_bytes,
        external,
    })
}

/// Name of the external data file, as exporters call it.
const DATA: &str = "model.onnx.data";

fn layout(sizes: &[u64]) -> Vec<u64> {
    let mut next = 0u64;
    let place = |size: &u64| {
        let offset = next;
        next = (next + size).next_multiple_of(ALIGNMENT);
        offset
    };
    sizes.iter().map(place).collect()
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
    /// piece.
    fn write_data(&self, path: &Path, offsets: &[u64], end: u64) -> Result<()> {
        let file = File::create(path).map_err(at!(Write, path))?;
        file.set_len(end).map_err(|source| Error::Extend {
            path: path.to_owned(),
            bytes: end,
            source,
        })?;
        let pieces = self.pieces(offsets);
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            let mut buffer = Vec::new();
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                buffer.clear();
                buffer.resize(piece.bytes, 0);
                self.fill(piece.index, piece.init, piece.row, &mut buffer)?;
                let written = file.write_all_at(&buffer, piece.offset);
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
        })
    }

    fn pieces(&self, offsets: &[u64]) -> Vec<Piece<'_>> {
        let mut pieces = Vec::new();
        for ((index, init), &offset) in self.llama.initializers.iter().enumerate().zip(offsets) {
            let row_bytes = init.columns() * self.dtype.size();
            let step = (CHUNK / row_bytes.max(1)).max(1);
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
