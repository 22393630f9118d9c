//! Options that several commands share.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use retro_contract::Budget;
use retro_model_io::SamplingDefaults;

use crate::{
    Device, Model, OpenOptions, Runtime,
    decoder::{
        self,
        decode_loop::{CHUNK, Policy},
        sampling::Sampling,
        session::Steps,
    },
    model_folder::chosen,
    runtime,
};

/// The model to run.
#[derive(Args)]
pub struct ModelArgs {
    /// Model folder (model.onnx, genai_config.json or config.json, tokenizer.json), ONNX file, or folder of Llama
    /// weights.
    #[arg(value_name = "DIR", required_unless_present = "model", conflicts_with = "model")]
    folder: Option<PathBuf>,
    /// Same as DIR.
    #[arg(short, long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Graph to use from a folder with several: its file name (model_q4f16.onnx) or variant (q4f16).
    #[arg(long, value_name = "NAME")]
    graph: Option<String>,
}

impl ModelArgs {
    /// The graph or folder that is named.
    pub fn path(&self) -> Result<PathBuf> {
        let named = self.folder.as_ref().or(self.model.as_ref());
        let named = named.context("name a model folder")?;
        Ok(chosen(named, self.graph.as_deref())?)
    }
}

/// How much is fed and read at a time.
#[derive(Args)]
pub struct ReadingArgs {
    /// Window: tokens fed per decoding step, from 1 (Quest, no correction) to the converted model's [default: that].
    #[arg(short, long, value_name = "W")]
    pub window: Option<usize>,
    /// Budget: what a decoding step reads of the cache, as a share (0.15) or in tokens (2048) [default: as converted].
    #[arg(short, long, value_name = "B")]
    pub budget: Option<Budget>,
    /// Rectifying pass: after every N tokens decoded, dense attention over these N writes their keys and values anew
    /// [default: none].
    #[arg(long, value_name = "N")]
    pub rectify: Option<usize>,
    /// Read contexts of up to so many tokens whole, one token a step; 0: none [default: as converted, with --window 1 up to
    /// 1024, on a CPU and without --budget].
    #[arg(long, value_name = "TOKENS")]
    dense_below: Option<usize>,
    /// Prompt tokens per prefill chunk.
    #[arg(long, default_value_t = CHUNK, value_name = "TOKENS")]
    pub chunk: usize,
}

impl ReadingArgs {
    /// What steps feed and read, and the rectifying passes between them.
    pub fn policy(&self, model: &Model) -> decoder::Result<Policy> {
        let policy = Policy::new(model, self.window, self.budget)?.rectified(model, self.rectify)?;
        match self.dense_below {
            Some(tokens) => policy.dense_below(model, tokens),
            None => Ok(policy),
        }
    }

    /// Checks what no model is needed for.
    pub fn check(&self) -> Result<()> {
        ensure!(self.chunk >= 1, "--chunk 0: a chunk has at least one token");
        Ok(())
    }
}

/// How tokens are chosen.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Random seed.
    #[arg(short, long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Temperature; 0 is greedy decoding [default: 0; for a turn of a chat as the model's generation_config.json says,
    /// where do_sample is true].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temp: Option<f32>,
    /// Top-k sampling: keep the K most likely tokens; 0 keeps all [default: 0, or as for --temp].
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Top-p sampling: keep the most likely tokens up to this cumulative probability [default: 1, or as for --temp].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Min-p sampling: keep tokens with at least this share of the top token's probability [default: 0, or as for --temp].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Repetition penalty over the last 64 tokens; 1 is off [default: 1; for a turn of a chat as the model's
    /// generation_config.json says].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repeat_penalty: Option<f32>,
}

impl SamplingArgs {
    /// The options, checked.
    pub fn options(&self) -> Result<Sampling> {
        let options = self.over(Sampling::default());
        options.check()?;
        Ok(options)
    }

    /// The options for a turn of a chat: what is not given is as the model's generation_config.json says. A line tells
    /// what that is, if it says anything.
    pub fn options_for(&self, said: &SamplingDefaults) -> Result<(Sampling, Option<String>)> {
        let own = self.options()?;
        let wrong = "generation_config.json has a value that cannot be used; give the option to overrule it";
        let options = self.over(Sampling::of_model(said).context(wrong)?);
        options.check().context(wrong)?;
        let line = (options != own).then(|| format!("sampling by generation_config.json: {}", options.describe()));
        Ok((options, line))
    }

    /// What is given, and the rest of `other`.
    fn over(&self, other: Sampling) -> Sampling {
        Sampling {
            temperature: self.temp.unwrap_or(other.temperature),
            top_k: self.top_k.unwrap_or(other.top_k),
            top_p: self.top_p.unwrap_or(other.top_p),
            min_p: self.min_p.unwrap_or(other.min_p),
            repeat_penalty: self.repeat_penalty.unwrap_or(other.repeat_penalty),
            seed: self.seed,
        }
    }
}

/// Device, threads and libraries of a session.
#[derive(Args, Clone, Debug)]
pub struct SessionArgs {
    /// Device to run on: cpu, cuda or cuda:N. On a GPU float16 models are fastest.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: Device,
    /// Capture decoding steps as a CUDA graph, for less overhead on the host, or fail [default on a GPU: capture them
    /// where the model allows it, but in eval].
    #[arg(long, conflicts_with = "no_cuda_graph")]
    cuda_graph: bool,
    /// Don't capture decoding steps as a CUDA graph.
    #[arg(long)]
    no_cuda_graph: bool,
    /// Threads of ONNX Runtime's pool [default: one per core].
    #[arg(short, long, value_name = "N")]
    pub threads: Option<usize>,
    #[command(flatten)]
    libraries: LibraryArgs,
}

impl SessionArgs {
    /// The device to run on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// ONNX Runtime, and how to open models: their steps are captured where they allow it.
    pub fn load(&self) -> Result<(Runtime, OpenOptions)> {
        self.load_with(Steps::CapturedIfPossible)
    }

    /// As [`Self::load`], with `steps` where no option says whether they are captured.
    pub fn load_with(&self, steps: Steps) -> Result<(Runtime, OpenOptions)> {
        runtime::check_threads(self.threads)?;
        let (runtime, options) = self.libraries.load(self.device)?;
        let options = OpenOptions {
            threads: self.threads,
            steps: match (self.cuda_graph, self.no_cuda_graph) {
                (true, _) => Steps::Captured,
                (_, true) => Steps::Plain,
                _ => steps,
            },
            ..options
        };
        Ok((runtime, options))
    }
}

/// Paths of the libraries.
#[derive(Args, Clone, Debug)]
pub struct LibraryArgs {
    /// Path of the plugin libretro_attention.so [default: $RETRO_ATTENTION_PLUGIN, else beside this program].
    #[arg(long, value_name = "PATH")]
    plugin: Option<PathBuf>,
    /// Path of libonnxruntime.so [default: $ORT_DYLIB_PATH, else beside this program, in .cache/onnxruntime of a folder
    /// above it, or the system's].
    #[arg(long, value_name = "PATH")]
    ort: Option<PathBuf>,
}

impl LibraryArgs {
    pub fn load(&self, device: Device) -> Result<(Runtime, OpenOptions)> {
        let plugin = runtime::find_plugin(self.plugin.as_deref())?;
        let runtime = Runtime::load_for(device, self.ort.as_deref())?;
        let options = OpenOptions {
            plugin,
            device,
            ..Default::default()
        };
        Ok((runtime, options))
    }
}
