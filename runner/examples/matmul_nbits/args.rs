//! The command line and its types.

use std::{fmt, path::PathBuf, str::FromStr};

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use retro_run::{Device, runtime::check_threads};

use crate::common::dtype::Dtype;

#[derive(Parser)]
#[command(about = "Times MatMulNBits nodes by the rows of A")]
pub struct Args {
    /// cuda, cuda:N or cpu.
    #[arg(long, default_value = "cuda")]
    pub device: Device,
    /// Shapes of weights, KxN: rows of K times K x N. The default is Llama-3.1-8B's.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "4096x14336,14336x4096,4096x4096,4096x1024,4096x6144,4096x128256"
    )]
    pub shape: Vec<WeightShape>,
    /// Rows of A.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16")]
    pub rows: Vec<usize>,
    /// Bits of a weight: 4 or 8.
    #[arg(long, default_value_t = 4)]
    pub bits: usize,
    /// Weights that share a scale.
    #[arg(long, default_value_t = 32)]
    pub block: usize,
    /// Element type of A and of the scales; the default is f16 on a GPU and f32 on the CPU.
    #[arg(long)]
    pub dtype: Option<Dtype>,
    #[arg(long, default_value = "none")]
    pub zero_points: ZeroPoints,
    /// The attribute accuracy_level: 0, or 4 for int8 activations.
    #[arg(long, default_value_t = 0)]
    pub accuracy_level: i64,
    /// Operators; the default is com.microsoft's, and ai.retro's where the plugin has it.
    #[arg(long, value_delimiter = ',')]
    pub op: Vec<Operator>,
    /// Megabytes of weights in a session; the default is 512 on a GPU and 128 on the CPU.
    #[arg(long)]
    pub weights: Option<usize>,
    #[arg(short, long)]
    pub threads: Option<usize>,
    /// Runs per timed sample; the default is 20 on a GPU and 1 on the CPU.
    #[arg(long)]
    pub runs: Option<usize>,
    /// Samples, interleaved; the median is reported.
    #[arg(short, long, default_value_t = 7)]
    pub repetitions: usize,
    /// Report the fastest sample instead of the median: for a CPU that others use too.
    #[arg(long)]
    pub best: bool,
    /// One JSON object instead of the table.
    #[arg(long)]
    pub json: bool,
    #[arg(long)]
    pub plugin: Option<PathBuf>,
    #[arg(long)]
    pub ort: Option<PathBuf>,
}

impl Args {
    pub fn check(&self) -> Result<()> {
        check_threads(self.threads)?;
        ensure!([4, 8].contains(&self.bits), "--bits {}: 4 or 8", self.bits);
        ensure!(
            self.block.is_power_of_two() && (16..=256).contains(&self.block),
            "--block {}: a power of two from 16 to 256",
            self.block
        );
        ensure!(
            self.rows.iter().all(|rows| (1..=4096).contains(rows)),
            "--rows: each from 1 to 4096"
        );
        ensure!(
            self.repetitions >= 1 && self.runs != Some(0) && self.weights != Some(0),
            "nothing to measure"
        );
        Ok(())
    }

    fn on_gpu(&self) -> bool {
        self.device != Device::Cpu
    }

    pub fn dtype(&self) -> Dtype {
        let default = if self.on_gpu() { Dtype::F16 } else { Dtype::F32 };
        self.dtype.unwrap_or(default)
    }

    pub fn runs(&self) -> usize {
        self.runs.unwrap_or(if self.on_gpu() { 20 } else { 1 })
    }

    /// Runs before a sample. On a GPU the first captures a CUDA graph, in the first sample.
    pub fn warm_up(&self) -> usize {
        if self.on_gpu() { 3 } else { 1 }
    }

    /// The least bytes of weights in a session.
    pub fn weight_bytes(&self) -> usize {
        self.weights.unwrap_or(if self.on_gpu() { 512 } else { 128 }) << 20
    }
}

/// K x N.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightShape {
    pub k: usize,
    pub n: usize,
}

impl FromStr for WeightShape {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let size = |s: &str| s.parse().ok().filter(|n| (1..=1 << 20).contains(n));
        let parts = s.split_once('x').and_then(|(k, n)| size(k).zip(size(n)));
        parts
            .map(|(k, n)| Self { k, n })
            .ok_or_else(|| format!("shape {s:?}: expected KxN, like 4096x14336"))
    }
}

impl fmt::Display for WeightShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.k, self.n)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ZeroPoints {
    /// 8 for 4 bits, 128 for 8.
    None,
    /// Packed like the weights.
    Packed,
    /// In the element type of A.
    Float,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Operator {
    /// com.microsoft::MatMulNBits, of ONNX Runtime.
    Ort,
    /// ai.retro::MatMulNBits, of the plugin.
    Retro,
}

impl Operator {
    pub fn domain(self) -> &'static str {
        match self {
            Self::Ort => "com.microsoft",
            Self::Retro => retro_contract::DOMAIN,
        }
    }
}
