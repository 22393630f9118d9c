//! Opening a model, with decoding steps that are captured as a CUDA graph where it allows that.

use std::path::Path;

use retro_contract::limits;

use crate::{
    decoder::{
        error::{Error, NotCapturable, Result},
        inputs::Feed,
        model::Model,
        session::{OpenOptions, Steps},
    },
    runtime::Runtime,
};

/// Tokens that a cache for the first try holds, where the model does not say.
const CAPACITY: usize = 64;
/// Steps of the first try: the first is not captured, as its output tells a shape; the next is, and the last one
/// replayed.
const STEPS: usize = 3;

impl Model {
    /// Loads the graph of a folder (or an ONNX file). With [`Steps::CapturedIfPossible`] a few steps are tried, so that
    /// what cannot be captured shows before anything is to be lost.
    ///
    /// # Errors
    /// When the folder is incomplete, ONNX Runtime refuses the graph, the plugin is needed and missing, or steps are to
    /// be captured ([`Steps::Captured`]) and cannot be.
    pub fn open(runtime: &Runtime, path: &Path, options: &OpenOptions) -> Result<Self> {
        if options.steps != Steps::CapturedIfPossible {
            return Self::load(runtime, path, options);
        }
        let with = |steps| OpenOptions {
            steps,
            ..options.clone()
        };
        if options.device.gpu()?.is_none() {
            return Self::load(runtime, path, &with(Steps::Plain));
        }
        let why = match Self::load(runtime, path, &with(Steps::Captured)) {
            // Caches that grow are refused on a GPU: by whoever asks for one.
            Ok(model) if !model.fixed_capacity => return Ok(model),
            Ok(mut model) => match model.try_steps() {
                Ok(()) => return Ok(model),
                // There will be none without a graph either.
                Err(error @ Error::NoMemory { .. }) => return Err(error),
                Err(Error::Capture(error)) => with_causes(*error),
                Err(error) => with_causes(error),
            },
            Err(Error::NotCapturable { why, .. }) => *why,
            Err(error) => return Err(error),
        };
        let mut model = Self::load(runtime, path, &with(Steps::Plain))?;
        model.not_captured = Some(why);
        Ok(model)
    }

    /// Runs a prompt of a few tokens and the steps after it, on a state of its own.
    pub(crate) fn try_steps(&mut self) -> Result<()> {
        let batch = self.io.batch.unwrap_or(1);
        let page = self.retro.as_ref().map_or(limits::PAGE_SIZE, |r| r.page_size);
        let capacity = self.io.capacity.unwrap_or(CAPACITY.max(page));
        let mut state = self.new_state(batch, capacity)?;
        let prompt = self.io.input_ids.width.unwrap_or(2);
        let steps = STEPS.min(capacity.saturating_sub(prompt));
        let calls = std::iter::once((prompt, -1)).chain(std::iter::repeat_n((1, 0), steps));
        let mut length = 0;
        for (fed, retro_length) in calls {
            length += fed;
            let feed = Feed {
                ids: vec![0; batch * fed],
                lengths: vec![length; batch],
                retro_length,
                graph_capturable: retro_length >= 0,
                ..Feed::default()
            };
            self.run(&mut state, &feed)?;
        }
        Ok(())
    }
}

/// What a try failed of, and what that came of.
fn with_causes(error: Error) -> NotCapturable {
    NotCapturable::Tried(format!("{:#}", anyhow::Error::from(error)))
}
