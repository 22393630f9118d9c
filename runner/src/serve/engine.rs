//! A model that is being served: the scheduler in a thread of its own, and what must be known to ask it.

use std::{
    sync::{Arc, mpsc::sync_channel},
    thread::{Builder, JoinHandle},
};

use retro_contract::{Budget, CUDA_MAX_RAGGED};

use crate::{
    Device, Model, ModelTokenizer,
    decoder::{
        Error, Result,
        cache_rows::CacheRows,
        decode_loop::{CHUNK, Policy},
        require,
    },
    serve::{
        metrics::Metrics,
        scheduler::{Handle, Scheduler},
    },
};

/// How a model is served.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Requests that run at a time.
    pub parallel: usize,
    /// Tokens of prompt and output of a request; `None`: the model's context, [`CONTEXT`](crate::decoder::model::CONTEXT) at most.
    pub context: Option<usize>,
    /// Tokens of prompts that are read between two decoding steps.
    pub chunk: usize,
    /// Requests that wait at a time.
    pub queue: usize,
    /// Window and budget of requests that ask for none.
    pub policy: Policy,
}

impl EngineOptions {
    /// The defaults under a policy.
    pub fn new(policy: Policy) -> Self {
        Self {
            parallel: 8,
            context: None,
            chunk: CHUNK,
            queue: 64,
            policy,
        }
    }
}

/// A model that is being served.
pub struct Engine {
    handle: Handle,
    tokenizer: Arc<ModelTokenizer>,
    ends: Arc<[u32]>,
    options: EngineOptions,
    context: usize,
    /// The largest window that a request may ask for.
    most_window: usize,
    takes_budget: bool,
    converted: bool,
    /// The budget that the model was converted with.
    own_budget: Option<Budget>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts serving a model. `more_ends` are tokens that end a text beside those that the model's files name.
    ///
    /// # Errors
    /// When the model cannot be served, the context exceeds the model's or is unknown, or memory runs out.
    pub fn start(
        model: Model,
        tokenizer: Arc<ModelTokenizer>,
        more_ends: &[u32],
        options: EngineOptions,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let context = model.cache_context(options.context)?;
        let context = context.ok_or(Error::UnknownContext)?;
        let most_window = model.window(None)?;
        require!(!model.keeps_window(), Error::RowsOfWindow);
        // Sequences that began at different times have different numbers of retrospective tokens.
        require!(
            options.policy.window == 1 || model.io.retro_lengths,
            Error::OneRetroLength
        );
        let most_window = if model.io.retro_lengths { most_window } else { 1 };
        fits_device(model.device(), most_window, options.parallel)?;
        let takes_budget = model.retro.is_some() && model.io.page_budget.is_some();
        let converted = model.retro.is_some();
        options.policy.fits(context)?;
        let own_budget = model.retro.as_ref().and_then(|r| r.budget);
        let mut ends = tokenizer.ends(&model.folder);
        ends.extend(more_ends);
        let (ready, started) = sync_channel(1);
        let text = Arc::clone(&tokenizer);
        let serve = move || {
            // Made here: buffers stay in the thread that runs on them.
            let made = CacheRows::new(model, options.parallel, context);
            let made = made.map(|rows| Scheduler::new(rows, text, metrics, options.chunk, options.queue));
            match made {
                Ok((scheduler, handle)) => {
                    if ready.send(Ok(handle)).is_ok() {
                        drop(ready);
                        scheduler.run();
                    }
                }
                Err(e) => _ = ready.send(Err(e)),
            }
        };
        let thread = Builder::new().name("scheduler".to_owned()).spawn(serve);
        let thread = thread.map_err(|_| Error::Internal("no thread for the scheduler"))?;
        let gone = Error::Internal("the scheduler ended");
        let handle = started.recv().map_err(|_| gone)??;
        Ok(Self {
            handle,
            tokenizer,
            ends: ends.into(),
            options,
            context,
            most_window,
            takes_budget,
            converted,
            own_budget,
            thread: Some(thread),
        })
    }

    /// Where requests are handed in.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<ModelTokenizer> {
        &self.tokenizer
    }

    /// Tokens that end a text.
    pub fn ends(&self) -> &Arc<[u32]> {
        &self.ends
    }

    /// How the model is served.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Tokens of prompt and output of a request.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The largest window that a request may ask for.
    pub fn most_window(&self) -> usize {
        self.most_window
    }

    /// Whether a request may ask for a budget.
    pub fn takes_budget(&self) -> bool {
        self.takes_budget
    }

    /// Whether the model was converted: others read everything.
    pub fn is_converted(&self) -> bool {
        self.converted
    }

    /// Whether requests are still served: the scheduler's thread ends with its last handle, or by a mistake.
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// The budget of a request that asks for none.
    pub fn budget(&self) -> Option<Budget> {
        self.options.policy.budget.or(self.own_budget)
    }

    /// Waits until all that was handed in is done. Nothing is taken any more once all clones of the handle are dropped.
    pub fn stop(self) {
        let Self { handle, thread, .. } = self;
        drop(handle);
        if let Some(thread) = thread {
            // A panic of the scheduler was reported when it happened.
            let _: std::thread::Result<()> = thread.join();
        }
    }
}

/// Whether a device decodes so many sequences together. With windows above 1 each has its own number of retrospective
/// tokens, of which kernels of a GPU take so many.
///
/// # Errors
/// When there are more.
fn fits_device(device: Device, most_window: usize, parallel: usize) -> Result<()> {
    require!(
        device == Device::Cpu || most_window == 1 || parallel <= CUDA_MAX_RAGGED,
        Error::RowsOnGpu {
            asked: parallel,
            most: CUDA_MAX_RAGGED
        }
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_decodes_so_many_sequences_with_windows_of_their_own() {
        let gpu = Device::Cuda(0);
        let refused = fits_device(gpu, 2, 513).unwrap_err().to_string();
        assert!(
            refused.contains("at most 512") && refused.contains("not 513"),
            "{refused}"
        );
        for (device, most_window, parallel) in [(gpu, 2, 512), (gpu, 1, 513), (Device::Cpu, 2, 513)] {
            fits_device(device, most_window, parallel).unwrap();
        }
    }
}
