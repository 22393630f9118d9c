//! A loaded model: session, inputs and outputs, settings it was converted with.

use std::{fmt::Display, path::Path, sync::Arc};

use ort::session::Session;
use retro_contract::graph;

use crate::{
    Device,
    decoder::{
        capturable,
        error::{Error, NotCapturable, Result, require},
        io::ModelIo,
        metadata::RetroMetadata,
        session::{OpenOptions, Steps, open_session},
        state_slot::SlotKind,
    },
    device::{Placed, left_to_cpu, placement},
    gpu::Gpu,
    model_folder::ModelFolder,
    runtime::Runtime,
};

/// Tokens that a cache holds where no number is asked for: caches are allocated whole, and those of 128k tokens are
/// large.
pub const CONTEXT: usize = 8192;

/// A model ready to run. The KV cache is apart from it, in a [`DecoderState`](crate::DecoderState), so one model serves
/// many sequences.
pub struct Model {
    /// The model's files, context length and end-of-text tokens.
    pub folder: ModelFolder,
    /// Names and shapes of the graph's inputs and outputs.
    pub io: ModelIo,
    /// The settings it was converted with; `None` for a model that was not converted.
    pub retro: Option<RetroMetadata>,
    /// Caches have a fixed capacity and are updated in place; otherwise every step's outputs are the next one's inputs.
    pub fixed_capacity: bool,
    pub(crate) session: Session,
    pub(crate) gpu: Option<Arc<Gpu>>,
    /// Number of the last CUDA graph; `None`: steps are not captured.
    pub(crate) last_graph: Option<usize>,
    /// Why steps are not captured, where they were to be if the model allows it.
    pub(crate) not_captured: Option<NotCapturable>,
    device: Device,
    /// Description of the nodes that a GPU leaves to the CPU.
    left_to_cpu: Option<String>,
}

impl Model {
    /// Loads the graph of a folder (or an ONNX file), with steps that are captured or not.
    ///
    /// # Errors
    /// As [`Model::open`], and when steps are to be captured and cannot be.
    pub(crate) fn load(runtime: &Runtime, path: &Path, options: &OpenOptions) -> Result<Self> {
        let folder = ModelFolder::open(path, None)?;
        let gpu = options.device.gpu()?;
        require!(
            gpu.is_some() || options.steps != Steps::Captured,
            Error::CaptureWithoutGpu
        );
        let graphs = matches!(options.steps, Steps::FixedBuffers | Steps::Captured);
        if graphs {
            capturable::check(&folder).map_err(|why| Error::NotCapturable {
                graph: folder.graph.clone(),
                why: Box::new(why),
            })?;
        }
        let session = open_session(runtime, &folder.graph, options)?;
        let left_to_cpu = match &gpu {
            Some(_) => left_to_cpu(&session).map_err(|source| Error::CannotRunOn {
                graph: folder.graph.clone(),
                device: options.device,
                source: Box::new(source),
            })?,
            None => None,
        };
        let retro = RetroMetadata::read(&session)?;
        let io = ModelIo::read(&session, &folder).map_err(|source| Error::CannotRun {
            graph: folder.graph.clone(),
            source: Box::new(source),
        })?;
        let fixed_capacity = retro.is_some() || io.retro_length || folder.share_buffer == Some(true);
        Ok(Self {
            session,
            folder,
            io,
            retro,
            fixed_capacity,
            device: options.device,
            gpu,
            left_to_cpu,
            last_graph: graphs.then_some(0),
            not_captured: None,
        })
    }

    /// One line for the user: the GPU, and what does not run there. `None` on the CPU.
    pub fn device_line(&self) -> Option<String> {
        let gpu = self.gpu.as_ref()?;
        let name = gpu.describe().map_or_else(|_| "unknown".to_owned(), |(name, _)| name);
        let left = self.left_to_cpu.as_deref().unwrap_or("all nodes run there");
        let graphs = match &self.not_captured {
            Some(why) => format!("; decoding steps without a CUDA graph: {why}"),
            None if self.last_graph.is_some() => "; decoding steps as a CUDA graph".to_owned(),
            None => String::new(),
        };
        Some(format!("{} ({name}): {left}{graphs}", self.device))
    }

    /// Which execution provider runs which node.
    ///
    /// # Errors
    /// When ONNX Runtime cannot tell.
    pub fn placement(&self) -> Result<Vec<Placed>> {
        Ok(placement(&self.session)?)
    }

    /// Where the model runs.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Free bytes of the GPU; `None` on the CPU.
    ///
    /// # Errors
    /// When the GPU does not say.
    pub fn free_gpu_memory(&self) -> Result<Option<usize>> {
        Ok(self.gpu.as_ref().map(|gpu| gpu.free_memory()).transpose()?)
    }

    /// Whether steps are fed from buffers at fixed addresses.
    pub(crate) fn feeds_from_buffers(&self) -> bool {
        self.gpu.is_some() || self.last_graph.is_some()
    }

    /// One line for the user: whether the plugin is active, and its settings.
    pub fn plugin_line(&self) -> String {
        fn known(value: Option<impl Display>) -> String {
            value.map_or_else(|| "?".to_owned(), |v| v.to_string())
        }
        let total = self.io.layers();
        match &self.retro {
            None => format!("dense attention on all {total} layers (not converted; see retro-export)"),
            Some(r) => {
                let dense = match r.dense_layers.len() {
                    0 => String::new(),
                    n => format!(", {n} of them dense"),
                };
                let in_graph = if r.window_in_graph { " in the graph" } else { "" };
                format!(
                    "plugin active on {} of {total} layers{dense} (window {}{in_graph}, budget {}, page size {}, selector {} {})",
                    r.layers.len(),
                    r.window,
                    known(r.budget),
                    r.page_size,
                    known(r.selector),
                    known(r.group_score)
                )
            }
        }
    }

    /// Maximum context length in tokens, if it is known.
    pub fn context_length(&self) -> Option<usize> {
        let made_for = self.retro.as_ref().and_then(|r| r.context);
        let lengths = [self.io.capacity, self.folder.context_length, made_for];
        lengths.into_iter().flatten().min()
    }

    /// The tokens that a cache is to hold for texts that come one after another: those asked for, else the model's
    /// context, [`CONTEXT`] at most; `None` where nothing says.
    ///
    /// # Errors
    /// When none are asked for, or more than the model's context.
    pub fn cache_context(&self, asked: Option<usize>) -> Result<Option<usize>> {
        require!(asked != Some(0), Error::NoContext);
        let most = self.context_length();
        if let Some((asked, most)) = asked.zip(most) {
            require!(asked <= most, Error::Context { asked, most });
        }
        // Buffers of declared size have it, whatever is asked for.
        Ok(asked.or_else(|| Some(most?.min(self.io.capacity.unwrap_or(CONTEXT)))))
    }

    /// The batch size to use when `asked` sequences are to be decoded: `asked`, or 1 where the model takes one at a
    /// time.
    pub fn batch(&self, asked: usize) -> usize {
        if self.fixed_capacity && self.io.batch.is_none() {
            asked
        } else {
            1
        }
    }

    /// The window to decode with: `asked`, else the converted model's, else 1.
    ///
    /// # Errors
    /// When `asked` is 0 or exceeds the window that the model was converted for.
    pub fn window(&self, asked: Option<usize>) -> Result<usize> {
        let exported = self.retro.as_ref().map(|r| r.window);
        match (asked, exported) {
            (Some(0), _) => Err(Error::NoWindow),
            (Some(asked), Some(most)) if asked > most => Err(Error::Window { asked, most }),
            (Some(asked), Some(window)) if asked != window && self.keeps_window() => {
                Err(Error::WindowInGraph { asked, window })
            }
            (Some(asked), None) if asked > 1 => Err(Error::WindowOfUnconverted(asked)),
            (Some(asked), _) => Ok(asked),
            (None, exported) => Ok(exported.unwrap_or(1)),
        }
    }

    /// Whether the graph feeds the tokens of the window by itself: a step then feeds one token.
    pub fn keeps_window(&self) -> bool {
        self.retro.as_ref().is_some_and(|r| r.window_in_graph)
    }

    /// Pages per cache of `capacity` tokens; 0 for a model without the operator.
    pub fn pages(&self, capacity: usize) -> usize {
        self.retro
            .as_ref()
            .map_or(0, |r| retro_contract::pages_for(capacity, r.page_size))
    }

    /// Indices in [`ModelIo::slots`] of the page steps of layers that select pages, in layer order.
    pub(crate) fn page_step_slots(&self) -> Vec<usize> {
        let dense = self.retro.as_ref().map(|r| r.dense_layers.as_slice()).unwrap_or(&[]);
        let steps = SlotKind::Retro(graph::State::PageSteps);
        let slots = self.io.slots.iter().enumerate();
        slots
            .filter(|(_, s)| s.kind == steps && !dense.contains(&s.layer))
            .map(|(i, _)| i)
            .collect()
    }
}
