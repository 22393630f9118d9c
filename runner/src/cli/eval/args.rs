//! Options of `retro-run eval`.

use std::path::PathBuf;

use clap::Args;
use retro_contract::Budget;

use crate::{
    cli::args::SessionArgs,
    decoder::decode_loop::CHUNK,
    eval::{
        policy::PolicySpec,
        scorer::Scorer,
        tasks::{Lengths, Task},
    },
    model_spec::ModelSpec,
};

/// Documents that are made here.
#[derive(Args)]
#[command(next_help_heading = "Tasks")]
pub struct TaskArgs {
    /// Make the documents of a task instead of reading --data: RULER's synthetic tasks, or look-ups in real text.
    #[arg(long, value_name = "NAME")]
    pub(super) task: Option<Task>,
    /// Tokens of prompt and question, in the model's: 4096, 4k, or a range as 4k-7k.
    #[arg(long, default_value = "4k", value_name = "TOKENS", requires = "task", conflicts_with_all = ["data", "perplexity"])]
    pub(super) length: Lengths,
    /// Number of documents.
    #[arg(
        long,
        default_value_t = 100,
        value_name = "N",
        requires = "task",
        conflicts_with = "docs"
    )]
    pub(super) cases: usize,
    /// Decides what is drawn: the same documents for a seed.
    #[arg(long, default_value_t = 1, value_name = "N", requires = "task", conflicts_with_all = ["data", "perplexity"])]
    pub(super) seed: u64,
    /// Text files to hide in; without any, sentences that say nothing.
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "task", conflicts_with_all = ["data", "perplexity"])]
    pub(super) text: Vec<PathBuf>,
    /// Also write the documents to this file, as --data takes them.
    #[arg(long, value_name = "FILE", requires = "task", conflicts_with_all = ["data", "perplexity"])]
    pub(super) save_data: Option<PathBuf>,
}

/// Options of `retro-run eval`.
#[derive(Args)]
pub struct EvalArgs {
    /// Unconverted model: a folder, an ONNX file, or a folder of Llama weights. It is converted for each policy, in a
    /// temporary folder.
    #[arg(value_name = "MODEL", required_unless_present = "runs")]
    pub(super) model: Option<PathBuf>,
    /// Graph to use from a folder with several: its file name or variant.
    #[arg(long, value_name = "NAME", requires = "model")]
    pub(super) graph: Option<String>,
    /// Documents with known answers to generate on: JSON lines with prompt and answers, and question, scorer, reference
    /// and n_predict where they are wanted.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present_any = ["perplexity", "task"],
        conflicts_with_all = ["perplexity", "task"]
    )]
    pub(super) data: Option<PathBuf>,
    /// Compare next-token distributions on these texts instead: perplexity, and KL divergence from dense attention.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "task")]
    pub(super) perplexity: Vec<PathBuf>,
    #[command(flatten)]
    pub(super) task: TaskArgs,
    /// Number of documents [default: all].
    #[arg(long, value_name = "N")]
    pub(super) docs: Option<usize>,
    /// Policy: dense, streaming (StreamingLLM), periodic (pi-Attention's pattern), quest, retro (the paper's selection)
    /// or recommended (retro-export's defaults, but for the floor: every policy reads 64 tokens at least). Options
    /// follow:
    /// retro,window=4,rectify=32,selector=moments,group-score=softmax,lambda=2.5,correlation=0.2,sketch-bits=2,page-size=16,
    /// min-pages=4,sink-pages=1,dense-layers=0+1. May be given several times [default: all but periodic].
    #[arg(long = "policy", value_name = "NAME[,OPTION=VALUE]...", requires = "model")]
    pub(super) policies: Vec<PolicySpec>,
    /// Windows of the policies retro and recommended.
    #[arg(short, long = "windows", value_delimiter = ',', default_values_t = [2, 4, 8], value_name = "W,W")]
    pub(super) windows: Vec<usize>,
    /// Budgets: what a decoding step reads of the cache, as shares (0.10) or in tokens (2048).
    #[arg(
        short,
        long = "budgets",
        alias = "budget",
        value_delimiter = ',',
        default_value = "0.10",
        value_name = "B,B"
    )]
    pub(super) budgets: Vec<Budget>,
    /// Also compare a model as it is, converted or not: NAME=DIR[,window=W][,budget=B][,rectify=N][,graph=NAME]; may be given
    /// several times.
    #[arg(long = "run", value_name = "NAME=DIR")]
    pub(super) runs: Vec<ModelSpec>,
    /// Batch size: documents (or texts) decoded together.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub(super) batch: usize,
    /// How answers are scored, where a line of --data does not say it.
    #[arg(
        long,
        visible_alias = "scorer",
        default_value = "ledger",
        value_name = "NAME",
        conflicts_with = "task"
    )]
    pub(super) score: Scorer,
    /// Prefill questions with their prompts, with dense attention, instead of decoding them under the policy.
    #[arg(long, conflicts_with = "perplexity")]
    pub(super) dense_questions: bool,
    /// Maximum tokens to generate per document [default: what the documents say, or a few more than the longest
    /// reference, else until the context is full]; with --perplexity, maximum tokens to predict per text [default: 1024].
    #[arg(short, long, value_name = "N")]
    pub(super) n_predict: Option<usize>,
    /// With --perplexity: tokens of each text that are prefilled with dense attention.
    #[arg(long, default_value_t = 1024, value_name = "TOKENS")]
    pub(super) prompt_tokens: usize,
    /// Prompt tokens per prefill chunk.
    #[arg(long, default_value_t = CHUNK, value_name = "TOKENS")]
    pub(super) chunk: usize,
    /// Append results to this file, and skip those that it already has.
    #[arg(long, value_name = "FILE")]
    pub(super) resume: Option<PathBuf>,
    /// Write a self-contained HTML report with table and figures.
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// Write the figures to this folder as SVG files.
    #[arg(long, value_name = "DIR")]
    pub(super) figures: Option<PathBuf>,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) session: SessionArgs,
}
