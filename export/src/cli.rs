//! The command line of `retro-export`.

use crate::{ExternalMode, Options, Settings, SlidingCache, Verify};
use clap::{Parser, Subcommand};
use retro_contract::{Budget, GroupScore, Mode, Selector};
use retro_runtime::Device;
use std::path::PathBuf;

/// Converts the attention of an ONNX language model to retrospective sparse attention.
///
/// Every attention that is understood becomes an ai.retro::RetroAttention node, however it was written. All else stays as it
/// is. The result needs the operator's plugin, libretro_attention.so. Models of less than 1 GB are compared with their
/// original afterwards, if ONNX Runtime is found.
#[derive(Debug, Parser)]
#[command(
    name = "retro-export",
    version,
    max_term_width = 120,
    args_conflicts_with_subcommands = true
)]
#[command(subcommand_negates_reqs = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The model to convert: a file, or a folder with its configuration and tokenizer
    #[arg(required = true)]
    pub model: Option<PathBuf>,

    /// Which graph of a folder that holds several: its file's name (model_q4f16.onnx) or its variant (q4f16)
    #[arg(long, value_name = "NAME")]
    pub graph: Option<String>,

    /// Where to write: a folder for a folder; for a file, a file if the name ends in .onnx, else a folder with all that belongs to
    /// the model
    #[arg(short, long, value_name = "PATH", required_unless_present = "dry_run")]
    pub output: Option<PathBuf>,

    /// Restore the original of a converted model, byte for byte, instead of converting
    #[arg(long, conflicts_with_all = ["window", "budget", "dry_run", "verify", "partial", "all_logits"])]
    pub revert: bool,

    /// Compare the result with the original in ONNX Runtime, whatever the model's size
    #[arg(long, conflicts_with = "no_verify")]
    pub verify: bool,

    /// Don't compare
    #[arg(long)]
    pub no_verify: bool,

    /// Where to compare: cpu, cuda or cuda:N, the GPU of that number; as --verify does [default: cpu]
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["no_verify", "revert"])]
    pub device: Option<Device>,

    /// Largest logit difference that counts as equal, per unit of the largest logit
    /// [default: 1e-4 for float32, 2e-2 for float16 and quantised models]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub tolerance: Option<f32>,

    /// Tokens that a decoding step feeds at most: the new one and window - 1 corrected ones; 1 is Quest
    #[arg(short, long, default_value_t = Settings::default().window, value_name = "TOKENS")]
    pub window: usize,

    /// How much of the cache a step reads: a share of the context (0.15) or a number of tokens (2048)
    #[arg(short, long, default_value_t = Settings::default().budget, value_name = "SHARE|TOKENS")]
    pub budget: Budget,

    /// Least pages that a share of the context is rounded up to
    #[arg(long, default_value_t = Settings::default().min_pages, value_name = "PAGES")]
    pub min_pages: usize,

    /// Tokens a page: a power of two, 4 to 128, from 1 on with --selector sketch; on CUDA 8 and more
    #[arg(long, default_value_t = Settings::default().page_size, value_name = "TOKENS")]
    pub page_size: usize,

    /// First pages of the context that are always read
    #[arg(long, default_value_t = Settings::default().sink_pages, value_name = "PAGES")]
    pub sink_pages: usize,

    /// Layers that read everything, by number
    #[arg(long, value_delimiter = ',', value_name = "LAYERS")]
    pub dense_layers: Vec<usize>,

    /// What stands for a page when the best ones are chosen: bounds (the paper's), moments,
    /// signed_moments, or sketch (every key again in a few bits; on the CPU only)
    #[arg(long, default_value_t = Settings::default().selector)]
    pub selector: Selector,

    /// How the heads of a group agree on pages: max (the paper's) or softmax
    #[arg(long, default_value_t = Settings::default().group_score)]
    pub group_score: GroupScore,

    /// Standard deviations that the selectors moments and signed_moments add to the mean
    #[arg(long, default_value_t = Settings::default().selector_lambda, value_name = "NUMBER")]
    pub selector_lambda: f32,

    /// Share of the spread that the selector signed_moments takes from a page's principal direction, 0 to 1
    #[arg(long, default_value_t = Settings::default().selector_correlation, value_name = "NUMBER")]
    pub selector_correlation: f32,

    /// Bits of an element of a key's sketch with the selector sketch: 1 or 2
    #[arg(long, default_value_t = Settings::default().sketch_bits, value_name = "BITS")]
    pub sketch_bits: usize,

    /// Which pages a step reads: retro (the best ones), dense (all), or streaming (the first and the newest: StreamingLLM)
    #[arg(long, default_value_t = Settings::default().mode)]
    pub mode: Mode,

    /// Return the logits of all tokens fed, not the newest one's alone
    #[arg(long)]
    pub all_logits: bool,

    /// Convert the layers that can be, even if some can't
    #[arg(long)]
    pub partial: bool,

    /// Layers with a sliding-window cache: keep them as they are, or give them a full cache, which --window > 1 needs
    /// [default: keep with --window 1, full otherwise]
    #[arg(long, value_name = "keep|full")]
    pub sliding_cache: Option<SlidingCache>,

    /// Weights in files of their own: reference, link (hard links, which Python's onnx refuses to load) or copy
    /// [default: reference beside the model, copy elsewhere]
    #[arg(long, value_name = "reference|link|copy")]
    pub external_data: Option<ExternalMode>,

    /// Replace what is at the output
    #[arg(short, long)]
    pub force: bool,

    /// Only say what would be done
    #[arg(short = 'n', long)]
    pub dry_run: bool,

    /// Report as one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say what a model is: inputs, outputs, sizes, attention, whether and how it is converted
    Inspect {
        /// A file, or a folder with a model
        model: PathBuf,
        /// Which graph of a folder that holds several: its file's name or its variant
        #[arg(long, value_name = "NAME")]
        graph: Option<String>,
        /// As one JSON object
        #[arg(long)]
        json: bool,
    },
}

impl Cli {
    /// The conversion that was asked for.
    pub fn options(&self) -> Options {
        Options {
            source: self.model.clone().unwrap_or_default(),
            graph: self.graph.clone(),
            target: self.output.clone(),
            settings: Settings {
                window: self.window,
                budget: self.budget,
                min_pages: self.min_pages,
                page_size: self.page_size,
                sink_pages: self.sink_pages,
                selector: self.selector,
                group_score: self.group_score,
                selector_lambda: self.selector_lambda,
                selector_correlation: self.selector_correlation,
                sketch_bits: self.sketch_bits,
                mode: self.mode,
                dense_layers: self.dense_layers.iter().copied().collect(),
            },
            all_logits: self.all_logits,
            partial: self.partial,
            sliding_cache: self.sliding_cache,
            external_data: self.external_data,
            force: self.force,
            dry_run: self.dry_run,
            verify: match (self.verify || self.device.is_some(), self.no_verify) {
                (true, _) => Verify::Always,
                (false, true) => Verify::Never,
                (false, false) => Verify::IfPossible,
            },
            device: self.device.unwrap_or_default(),
            tolerance: self.tolerance,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn flags_are_sound_and_default_to_the_settings() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["retro-export", "m.onnx", "-o", "out.onnx"]).unwrap();
        assert_eq!(cli.options().settings, Settings::default());
        let cli =
            Cli::try_parse_from(["retro-export", "m", "-n", "--dense-layers", "0,2", "--budget", "2048"]).unwrap();
        let settings = cli.options().settings;
        assert_eq!(settings.dense_layers.into_iter().collect::<Vec<_>>(), [0, 2]);
        assert_eq!(settings.budget, Budget::Tokens(2048));
        assert!(
            Cli::try_parse_from(["retro-export", "m.onnx"]).is_err(),
            "an output is needed"
        );
    }
}
