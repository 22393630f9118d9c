//! The command line of `retro-export`.

use crate::{ExternalMode, Options, Repository, Settings, SlidingCache, Verify};
use clap::{Parser, Subcommand};
use retro_runtime::Device;
use std::path::PathBuf;

/// Converts the attention of an ONNX language model to retrospective sparse attention.
///
/// Every supported attention layer becomes an ai.retro::RetroAttention node, however it was written. All else stays as it is.
/// The result needs the operator's plugin, libretro_attention.so. Models of less than 1 GB are compared with their original
/// afterwards, if ONNX Runtime is found.
#[derive(Debug, Parser)]
#[command(
    name = "retro-export",
    version,
    max_term_width = 120,
    args_conflicts_with_subcommands = true
)]
#[command(subcommand_negates_reqs = true)]
pub struct Cli {
    /// Other commands
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
    #[arg(long, conflicts_with_all = [
        "window", "Settings", "dense_layers", "dry_run", "verify", "tolerance", "partial", "all_logits", "sliding_cache", "no_matmul",
    ])]
    pub revert: bool,

    /// Compare the result with the original in ONNX Runtime, whatever the model's size
    #[arg(long, conflicts_with = "no_verify")]
    pub verify: bool,

    /// Don't compare the result with the original
    #[arg(long)]
    pub no_verify: bool,

    /// What the output is for: cpu, or cuda (cuda:N is a GPU by its number). Products of packed weights (MatMulNBits) then
    /// become an operator of the plugin that reads the weights once for a whole window, where it has a kernel. The
    /// comparison runs on that device, and is made as with --verify unless there is --no-verify [default: cpu, with all
    /// products as they are]
    #[arg(long, value_name = "DEVICE", conflicts_with = "revert")]
    pub device: Option<Device>,

    /// Leave products of packed weights (MatMulNBits) as they are, also with --device
    #[arg(long)]
    pub no_matmul: bool,

    /// Largest logit difference that counts as equal, per unit of the largest logit
    /// [default: 1e-4 for float32, 2e-2 for float16 and quantised models]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub tolerance: Option<f32>,

    /// Most tokens fed in a decoding step, 1 to 64: the new one, and up to window - 1 earlier ones that are fed again and
    /// corrected; 1 is Quest [default: 2, but 1 where most weights are in products of ONNX Runtime's that are slow for two
    /// rows]
    #[arg(short, long, value_name = "TOKENS")]
    pub window: Option<usize>,

    /// Settings of the operator
    #[command(flatten)]
    pub settings: Settings,

    /// Layers that read the whole cache, by index
    #[arg(long, value_delimiter = ',', value_name = "LAYERS")]
    pub dense_layers: Vec<usize>,

    /// Return the logits of all tokens fed, not the newest one's alone
    #[arg(long)]
    pub all_logits: bool,

    /// Convert the supported attention layers, even if others are refused
    #[arg(long)]
    pub partial: bool,

    /// What becomes of layers with a sliding-window cache [default: keep with --window 1, full otherwise]
    #[arg(long)]
    pub sliding_cache: Option<SlidingCache>,

    /// What becomes of weights in files of their own [default: reference beside the model, copy elsewhere]
    #[arg(long)]
    pub external_data: Option<ExternalMode>,

    /// Replace what is at the output
    #[arg(short, long)]
    pub force: bool,

    /// Report what would be done, and write nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,

    /// Report as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What else `retro-export` does.
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
    /// Write a converted model into a model repository of NVIDIA's Triton Inference Server
    Triton(Repository),
}

impl Cli {
    /// The conversion that was asked for.
    pub fn options(&self) -> Options {
        Options {
            source: self.model.clone().unwrap_or_default(),
            graph: self.graph.clone(),
            target: self.output.clone(),
            settings: Settings {
                window: self.window.unwrap_or(self.settings.window),
                dense_layers: self.dense_layers.iter().copied().collect(),
                ..self.settings.clone()
            },
            choose_window: self.window.is_none(),
            all_logits: self.all_logits,
            partial: self.partial,
            sliding_cache: self.sliding_cache,
            external_data: self.external_data,
            force: self.force,
            dry_run: self.dry_run,
            verify: match (self.no_verify, self.verify || self.device.is_some()) {
                (true, _) => Verify::Never,
                (false, true) => Verify::Always,
                (false, false) => Verify::IfPossible,
            },
            device: self.device,
            keep_matmul: self.no_matmul,
            tolerance: self.tolerance,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use retro_contract::{Budget, GroupScore, Mode, Selector};

    #[test]
    fn flags_are_valid_and_default_to_the_settings() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["retro-export", "m.onnx", "-o", "out.onnx"]).unwrap();
        assert_eq!(cli.options().settings, Settings::default());
        assert!(cli.options().choose_window);
        let cli = Cli::try_parse_from(["retro-export", "m.onnx", "-n", "--window", "2"]).unwrap();
        assert_eq!(
            (cli.options().settings, cli.options().choose_window),
            (Settings::default(), false)
        );
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

    /// The device is what the output is for. It asks for a comparison there, unless there is to be none.
    #[test]
    fn a_device_compares_unless_told_otherwise() {
        let options = |more: &[&str]| {
            let line = ["retro-export", "m", "-o", "o"].into_iter().chain(more.iter().copied());
            Cli::try_parse_from(line).unwrap().options()
        };
        assert_eq!((options(&[]).device, options(&[]).verify), (None, Verify::IfPossible));
        let cuda = Some(Device::Cuda(0));
        for (flags, verify) in [
            (&["--device", "cuda"][..], Verify::Always),
            (&["--device", "cuda", "--verify"], Verify::Always),
            (&["--device", "cuda", "--no-verify"], Verify::Never),
        ] {
            assert_eq!(
                (options(flags).device, options(flags).verify),
                (cuda, verify),
                "{flags:?}"
            );
        }
        assert!(!options(&["--device", "cuda"]).keep_matmul && options(&["--no-matmul"]).keep_matmul);
    }

    /// What a conversion is set to has no meaning on the way back.
    #[test]
    fn revert_takes_no_flag_that_it_would_ignore() {
        let revert = |more: &[&str]| {
            let line = ["retro-export", "m", "-o", "o", "--revert"].into_iter();
            Cli::try_parse_from(line.chain(more.iter().copied()))
        };
        assert!(revert(&["--force", "--json", "--no-verify", "--external-data", "copy"]).is_ok());
        for ignored in [
            &["--window", "2"][..],
            &["--selector", "bounds"],
            &["--page-size", "16"],
            &["--min-pages", "4"],
            &["--mode", "dense"],
            &["--dense-layers", "0"],
            &["--sliding-cache", "full"],
            &["--tolerance", "1"],
            &["--device", "cpu"],
            &["--no-matmul"],
            &["--dry-run"],
        ] {
            let why = revert(ignored).unwrap_err();
            assert_eq!(
                why.kind(),
                clap::error::ErrorKind::ArgumentConflict,
                "{ignored:?}: {why}"
            );
        }
    }

    #[test]
    fn help_lists_every_choice_with_its_meaning() {
        let help = Cli::command().render_long_help().to_string();
        let choices = [
            Selector::ALL
                .iter()
                .map(|c| (c.as_str(), c.meaning()))
                .collect::<Vec<_>>(),
            GroupScore::ALL.iter().map(|c| (c.as_str(), c.meaning())).collect(),
            Mode::ALL.iter().map(|c| (c.as_str(), c.meaning())).collect(),
        ];
        let words: Vec<&str> = help.split_whitespace().collect();
        for (value, meaning) in choices.iter().flatten() {
            let line = format!("- {value}: {}", meaning.trim_end_matches('.'));
            let line: Vec<&str> = line.split_whitespace().collect();
            assert!(words.windows(line.len()).any(|w| w == line), "{value}: {help}");
        }
        for value in ["keep", "full", "reference", "link", "copy"] {
            assert!(help.contains(&format!("- {value}:")), "{value}: {help}");
        }
    }
}
