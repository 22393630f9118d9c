//! The command line and its types.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use retro_contract::{Budget, Mode, limits};
use retro_run::{
    Device,
    bench::{
        args::{PageSelection, TokenCount},
        table::Format,
    },
};

use crate::{
    common::dtype::Dtype,
    graph::Feeding,
    steps::{ROOM, most_steps},
};

#[derive(Parser)]
#[command(about = "Times RetroAttention against GroupQueryAttention")]
pub struct Args {
    /// cuda, cuda:N or cpu.
    #[arg(long, default_value = "cuda")]
    pub device: Device,
    /// Context lengths in tokens, like 4096 or 128k.
    #[arg(long, value_delimiter = ',', default_value = "1k,8k,32k,128k")]
    pub context: Vec<TokenCount>,
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pub batch: Vec<usize>,
    /// Budgets: shares of the context like 0.15, or tokens like 2048.
    #[arg(long, value_delimiter = ',', default_value = "0.15,2048")]
    pub budget: Vec<Budget>,
    /// Windows: tokens fed per step.
    #[arg(long, value_delimiter = ',', default_value = "1,2,8")]
    pub window: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "retro")]
    pub mode: Vec<Mode>,
    #[arg(long, value_delimiter = ',', default_value = "bounds+max", help = PageSelection::help())]
    pub select: Vec<PageSelection>,
    /// Run under a CUDA graph.
    #[arg(long, default_value = "off")]
    pub cuda_graph: When,
    /// Tokens fed per step to GroupQueryAttention; the row with 1 is the baseline.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pub gqa_tokens: Vec<usize>,
    /// Time prefills of these lengths instead of decoding steps.
    #[arg(long, value_delimiter = ',')]
    pub prefill: Vec<TokenCount>,
    /// Page summaries: random, or computed from the cache by a prefill.
    #[arg(long, default_value = "random")]
    pub summaries: Summaries,
    #[arg(long, default_value_t = 16)]
    pub layers: usize,
    #[arg(long, default_value_t = 32)]
    pub heads: usize,
    #[arg(long, default_value_t = 8)]
    pub kv_heads: usize,
    #[arg(long, default_value_t = 128)]
    pub head_size: usize,
    #[arg(long, default_value_t = limits::PAGE_SIZE)]
    pub page_size: usize,
    /// Bits of an element of a sketch.
    #[arg(long, default_value_t = limits::SKETCH_BITS)]
    pub sketch_bits: usize,
    #[arg(long, default_value = "f16")]
    pub dtype: Dtype,
    /// Apply RoPE inside the nodes.
    #[arg(long)]
    pub rotary: bool,
    /// Synchronize the device after every run, as a host does that reads the output.
    #[arg(long)]
    pub sync: bool,
    /// Also time the graph without attention nodes.
    #[arg(long)]
    pub overhead: bool,
    /// Runs per timed sample.
    #[arg(long, default_value_t = 20)]
    pub runs: usize,
    /// Samples per variant, interleaved; the median is reported.
    #[arg(short, long, default_value_t = 7)]
    pub repetitions: usize,
    #[arg(short, long, default_value = "md")]
    pub output: Format,
    #[arg(long)]
    pub plugin: Option<PathBuf>,
    #[arg(long)]
    pub ort: Option<PathBuf>,
}

impl Args {
    pub fn check(&self) -> Result<()> {
        ensure!(
            most_steps(self.runs) < ROOM,
            "--runs: at most {}",
            ROOM - 1 - most_steps(0)
        );
        ensure!(
            self.runs >= 1 && self.repetitions >= 1 && self.layers >= 1,
            "nothing to measure"
        );
        ensure!(self.window.iter().all(|&w| (1..=64).contains(&w)), "--window: 1 to 64");
        ensure!(
            (1..=limits::SKETCH_BITS_MAX).contains(&self.sketch_bits),
            "--sketch-bits: 1 to {}",
            limits::SKETCH_BITS_MAX
        );
        Ok(())
    }

    /// Whether prefills are timed, not decoding steps.
    pub fn prompt(&self) -> bool {
        !self.prefill.is_empty()
    }

    pub fn feeding(&self) -> Feeding {
        if self.prompt() { Feeding::Direct } else { Feeding::Steps }
    }

    /// All pairs of context length and batch size to measure.
    pub fn groups(&self) -> Vec<(usize, usize)> {
        if self.prompt() {
            return self.prefill.iter().map(|s| (s.0, 1)).collect();
        }
        self.context
            .iter()
            .flat_map(|c| self.batch.iter().map(|&b| (c.0, b)))
            .collect()
    }

    pub fn widest_window(&self) -> usize {
        self.window.iter().copied().max().unwrap_or(1)
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum When {
    Off,
    On,
    Both,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Summaries {
    Random,
    Prefill,
}
