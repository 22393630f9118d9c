//! What to convert, how, and where to.

use super::Error;
use crate::{files::ExternalMode, settings::Settings};
use clap::ValueEnum;
use retro_runtime::Device;
use std::path::PathBuf;

/// What to convert, how, and where to.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A model file, or a folder that holds one.
    pub source: PathBuf,
    /// Which graph of a folder, by its file's name or its variant; none: the usual one.
    pub graph: Option<String>,
    /// A file or a folder for a file, a folder for a folder. May be absent in a dry run.
    pub target: Option<PathBuf>,
    /// Settings of the operator.
    pub settings: Settings,
    /// The window is 1, whatever the settings say, where most weights are in products in which a second row is costly.
    pub choose_window: bool,
    /// Return the logits of all tokens fed, as the source does, not the newest one's alone.
    pub all_logits: bool,
    /// Convert what can be, even if some attention can't.
    pub partial: bool,
    /// What becomes of layers that keep a sliding-window cache; none: kept with a window of 1, else given a full one.
    pub sliding_cache: Option<SlidingCache>,
    /// What becomes of weights in files of their own; none: what fits the place of the output.
    pub external_data: Option<ExternalMode>,
    /// Replace what is at the target.
    pub force: bool,
    /// Find and decide, but write nothing.
    pub dry_run: bool,
    /// Whether the result is compared with the source.
    pub verify: Verify,
    /// What the converted model is for, and where both models run when they are compared; none: the CPU, but for a model
    /// that runs on CUDA alone. For CUDA, products of packed weights become the operator's.
    pub device: Option<Device>,
    /// Leave products of packed weights as they are.
    pub keep_matmul: bool,
    /// Largest logit difference that is rounding, for logits of up to 1; none: by the model's types.
    pub tolerance: Option<f32>,
}

/// What becomes of a layer whose cache holds about its sliding window and shifts. Such a cache can't take tokens that it
/// holds already: the results are wrong from the first shift on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SlidingCache {
    /// The layer stays as it is; every token must be fed once
    Keep,
    /// The layer becomes a RetroAttention of mode dense with the same window and a cache of the whole context
    Full,
}

/// Whether and how the result is compared with the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Not at all.
    #[default]
    Never,
    /// If the model is small and ONNX Runtime is found; else the report says why not.
    IfPossible,
    /// Whatever the model's size; what is missing for it is an error.
    Always,
}

impl Options {
    /// # Errors
    /// A setting or the tolerance is out of range.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.settings.check()?;
        match self.tolerance {
            Some(tolerance) if !tolerance.is_finite() || tolerance < 0.0 => Err(Error::Tolerance(tolerance)),
            _ => Ok(()),
        }
    }

    /// The same with a window that was chosen for the model.
    pub(super) fn with_window(&self, window: usize) -> Self {
        Self {
            settings: Settings {
                window,
                ..self.settings.clone()
            },
            choose_window: false,
            ..self.clone()
        }
    }

    pub(super) fn keeps_sliding_caches(&self) -> bool {
        match self.sliding_cache {
            Some(choice) => choice == SlidingCache::Keep,
            None => self.settings.window == 1,
        }
    }
}
