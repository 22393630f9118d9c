//! `retro-models`: the command.

// println! and its like panic when nobody reads.
#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use retro_models::{Activations, Dtype, EXTERNAL_THRESHOLD, Family, LlamaConfig, Options, RopeScaling, Rounded};

/// Builds ONNX graphs of language models of the Llama family.
#[derive(Parser)]
#[command(name = "retro-models", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build a model folder: model.onnx, its weights, genai_config.json, config.json and the tokenizer's files.
    Build(Box<Build>),
    /// Write documents of the task `ledger`: facts and problems, and their answers. Seed 4242 makes
    /// models/ledger/documents.jsonl.
    Ledger(Ledger),
}

#[derive(Args)]
struct Ledger {
    /// The same documents as the recipe's for a seed.
    #[arg(long, default_value_t = 4242, value_name = "N")]
    seed: u64,
    /// How many.
    #[arg(long, default_value_t = 96, value_name = "N")]
    docs: usize,
    /// How long.
    #[arg(long, value_enum, default_value_t = retro_models::ledger::Size::Eval)]
    size: retro_models::ledger::Size,
    /// File to write.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

fn ledger(args: &Ledger) -> Result<()> {
    let mut text = String::new();
    for document in retro_models::ledger::documents(args.seed, args.docs, args.size)? {
        text += &document.to_string();
        text.push('\n');
    }
    // Beside and renamed: a failure leaves what was there.
    let part = args.output.with_extension(format!("part-{}", std::process::id()));
    let write = std::fs::write(&part, text).and_then(|()| std::fs::rename(&part, &args.output));
    if write.is_err() {
        // What is left of a failure is of no use; that it could not be removed changes nothing.
        let _ = std::fs::remove_file(&part);
    }
    write.with_context(|| format!("cannot write {}", args.output.display()))?;
    note(&format!("{}: {} documents", args.output.display(), args.docs));
    Ok(())
}

#[derive(Args)]
struct Build {
    /// GGUF file, or folder with config.json, model.safetensors or its shards (Hugging Face names) and tokenizer.json.
    #[arg(
        value_name = "MODEL",
        required_unless_present_any = ["random", "weights"],
        conflicts_with_all = ["random", "weights"]
    )]
    model: Option<PathBuf>,
    /// The same as MODEL.
    #[arg(long, value_name = "MODEL", conflicts_with = "random")]
    weights: Option<PathBuf>,
    /// Random weights; the shape comes from the options below.
    #[arg(long)]
    random: bool,
    /// A tokenizer.json in the place of the model's own.
    #[arg(long, value_name = "FILE", conflicts_with = "random")]
    tokenizer: Option<PathBuf>,
    /// Folder to write to.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Type of weights.
    #[arg(long, value_enum, default_value_t = WeightType::F32)]
    dtype: WeightType,
    /// With --dtype q4: what MatMulNBits multiplies weights with (its attribute accuracy_level). 1 is f32; 4 is 8 bits:
    /// faster, and less exact. onnxruntime-genai's builder sets 4 for the CPU.
    /// [default: 1]
    #[arg(long, value_parser = accuracy_level, value_name = "1|4")]
    accuracy_level: Option<Activations>,
    /// Weights of more than this many bytes go to model.onnx.data.
    #[arg(long, default_value_t = EXTERNAL_THRESHOLD, value_name = "BYTES")]
    external_threshold: u64,
    #[command(flatten)]
    shape: Shape,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WeightType {
    /// float32, as are activations, keys and values.
    F32,
    /// float16, as are activations, keys and values.
    F16,
    /// 4 and 8 bits; activations, keys and values are float32.
    Q4,
    /// 4 bits (8 where a GGUF file has more); scales, the embedding, activations, keys and values are float16. As
    /// onnxruntime-genai's int4 exports for CUDA.
    Q4f16,
}

fn accuracy_level(text: &str) -> Result<Activations, &'static str> {
    match text {
        "1" => Ok(Activations::F32),
        "4" => Ok(Activations::Int8),
        _ => Err("the levels are 1 (f32) and 4 (int8)"),
    }
}

/// The shape of a random model.
#[derive(Args)]
#[command(next_help_heading = "Shape, with --random")]
struct Shape {
    #[arg(long, default_value_t = 24, requires = "random", value_name = "N")]
    layers: usize,
    /// Query heads.
    #[arg(long, default_value_t = 14, requires = "random", value_name = "N")]
    heads: usize,
    /// Key/value heads; they divide the query heads.
    #[arg(long, default_value_t = 2, requires = "random", value_name = "N")]
    kv_heads: usize,
    #[arg(long, default_value_t = 64, requires = "random", value_name = "N")]
    head_dim: usize,
    /// Width of the residual stream [default: heads x head-dim].
    #[arg(long, requires = "random", value_name = "N")]
    hidden: Option<usize>,
    /// Width of the feed-forward layer [default: 3.5 x hidden, rounded up to 64].
    #[arg(long, requires = "random", value_name = "N")]
    ffn: Option<usize>,
    #[arg(long, default_value_t = 32000, requires = "random", value_name = "N")]
    vocab: usize,
    /// Longest context.
    #[arg(long, default_value_t = 32768, requires = "random", value_name = "N")]
    max_pos: usize,
    /// RoPE's base.
    #[arg(long, default_value_t = 500000.0, requires = "random", value_name = "X")]
    rope_theta: f64,
    /// The output projection is the embedding.
    #[arg(long, requires = "random")]
    tied: bool,
    #[arg(long, default_value_t = 0, requires = "random", value_name = "N")]
    seed: u64,
}

impl Shape {
    fn config(&self) -> LlamaConfig {
        let hidden_size = self.hidden.unwrap_or(self.heads.saturating_mul(self.head_dim));
        LlamaConfig {
            family: Family::Llama,
            vocab_size: self.vocab,
            hidden_size,
            intermediate_size: self
                .ffn
                .unwrap_or((hidden_size.saturating_mul(7) / 2).div_ceil(64).saturating_mul(64)),
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            rms_norm_eps: 1e-5,
            rope_theta: self.rope_theta,
            rope_scaling: RopeScaling::None,
            max_positions: self.max_pos,
            sliding_window: None,
            tie_word_embeddings: self.tied,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
        }
    }
}

fn build(args: &Build) -> Result<()> {
    let start = Instant::now();
    if args.accuracy_level.is_some() && args.dtype != WeightType::Q4 {
        bail!("--accuracy-level is for --dtype q4 only");
    }
    let options = Options {
        dtype: match args.dtype {
            WeightType::F16 | WeightType::Q4f16 => Dtype::F16,
            WeightType::F32 | WeightType::Q4 => Dtype::F32,
        },
        q4: match args.dtype {
            WeightType::Q4 => Some(args.accuracy_level.unwrap_or(Activations::F32)),
            WeightType::Q4f16 => Some(Activations::F16),
            WeightType::F32 | WeightType::F16 => None,
        },
        external_threshold: args.external_threshold,
        tokenizer: args.tokenizer.clone(),
    };
    let built = if args.random {
        retro_models::build_random(&args.shape.config(), args.shape.seed, &args.output, &options)?
    } else {
        let weights = args.model.as_deref().or(args.weights.as_deref());
        let weights = weights.context("give MODEL or --random")?;
        retro_models::check_out(weights, &args.output)?;
        retro_models::build(weights, &args.output, &options)?
    };
    for Rounded { from, bits, tensors } in &built.rounded {
        let noun = if *tensors == 1 { "tensor" } else { "tensors" };
        note(&format!("note: {tensors} {noun} of {from} rounded to {bits} bits"));
    }
    note(&format!(
        "{}: {:.1} M parameters, {:.1} MiB of weights {}, {:.1} s",
        built.model.display(),
        built.parameters as f64 / 1e6,
        built.weight_bytes as f64 / (1 << 20) as f64,
        if built.external { "in model.onnx.data" } else { "inline" },
        start.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// Writes a line for people to stderr. That nobody takes it (a closed pipe, a full disk) must not end the work.
fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Build(args) => build(&args),
        Command::Ledger(args) => ledger(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            note(&format!("error: {e:#}"));
            ExitCode::FAILURE
        }
    }
}
