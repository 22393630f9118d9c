//! A loaded model: the ONNX Runtime session, its inputs and outputs, and one call that runs a step.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, anyhow, ensure};
use half::slice::HalfFloatSliceExt;
use ort::{
    logging::LogLevel,
    memory::Allocator,
    session::{Session, SessionInputValue, builder::SessionBuilder},
    value::{DynValue, Tensor, TensorElementType},
};
use retro_contract::{graph, limits, metadata};
use retro_export::onnx::{external_files, folder_of, read_model};

use crate::{
    Device,
    decoder::{
        integers,
        io::{BudgetInput, ModelIo, SlotKind, StateSlot, TokenInput},
        kv_cache::{Bound, State, Store},
        page_reads::PageReads,
    },
    device::{Placed, left_to_cpu, placement},
    gpu::Gpu,
    model_folder::ModelFolder,
    runtime::{PLUGIN, PLUGIN_VARIABLE, Runtime, one_line},
};

/// What a converted model says about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct RetroMetadata {
    /// The window w it was converted with: the most tokens a step may feed.
    pub window: usize,
    pub page_size: usize,
    /// As in the metadata: "0.15" or "2048".
    pub budget: String,
    /// Least pages that a share of the context is rounded up to.
    pub min_pages: usize,
    pub selector: String,
    pub group_score: String,
    /// Layers that carry the operator.
    pub layers: Vec<usize>,
    /// Those of them that attend to everything.
    pub dense_layers: Vec<usize>,
    /// The attention mask's width tells it how many tokens there are.
    pub lengths_from_width: bool,
}

/// How to open a model.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Threads of ONNX Runtime's pool; `None`: as many as there are cores.
    pub threads: Option<usize>,
    /// The plugin's file. Only models that were converted load it.
    pub plugin: Option<PathBuf>,
    pub device: Device,
    /// Replay decoding steps of one shape as a CUDA graph.
    pub cuda_graph: bool,
    /// Threads of the pool do not go on looking for work after a run: where several sessions take turns, those of one would
    /// take the cores of the next.
    pub idle_between_runs: bool,
    /// Feed steps from buffers that stay where they are, as a CUDA graph wants it. On the CPU this gains nothing but the
    /// knowledge that it works.
    pub fixed_buffers: bool,
}

/// A model ready to run. State lives apart from it ([`State`]), so one model serves many sequences.
pub struct Model {
    session: Session,
    pub folder: ModelFolder,
    pub io: ModelIo,
    pub retro: Option<RetroMetadata>,
    /// Caches have a fixed capacity and are updated in place; otherwise every step's outputs are the next one's inputs.
    pub fixed_capacity: bool,
    device: Device,
    gpu: Option<Arc<Gpu>>,
    /// What a GPU leaves to the CPU, in words.
    left_to_cpu: Option<String>,
    /// Number of the last CUDA graph; `None`: none are made.
    graphs: Option<usize>,
}

/// The tokens of one step.
#[derive(Clone, Debug, Default)]
pub struct Feed {
    /// Tokens, B rows of S.
    pub ids: Vec<i64>,
    /// Valid tokens of each of the B sequences after the step.
    pub lengths: Vec<usize>,
    /// Retrospective tokens among the S, or -1 for prefill. Ignored by models that were not converted.
    pub retro_length: i32,
    /// Pages per KV head of each sequence; `None`: as converted.
    pub budgets: Option<Vec<i32>>,
    /// A decoding step like those to come: as many tokens, as many of them retrospective. Such steps share a CUDA graph.
    pub graph_capturable: bool,
}

/// Scores of the next token: B rows of `vocab`.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    pub values: Arc<Vec<f32>>,
    pub vocab: usize,
}

impl Logits {
    /// The scores of one sequence; empty when there is no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        self.values.get(row * self.vocab..(row + 1) * self.vocab).unwrap_or(&[])
    }
}

impl Model {
    /// Loads the graph of a folder (or an ONNX file).
    ///
    /// # Errors
    /// When the folder is incomplete, ONNX Runtime refuses the graph, or the plugin is needed and missing.
    pub fn open(runtime: &Runtime, path: &Path, options: &OpenOptions) -> Result<Self> {
        let folder = ModelFolder::open(path, None)?;
        let gpu = options.device.gpu()?;
        ensure!(
            gpu.is_some() || !options.cuda_graph,
            "--cuda-graph needs a GPU: give --device cuda"
        );
        let session =
            open_session(runtime, &folder.graph, options).map_err(|text| load_error(&folder.graph, options, &text))?;
        let left_to_cpu = match &gpu {
            Some(_) => left_to_cpu(&session)
                .with_context(|| format!("cannot run {} on {}", folder.graph.display(), options.device))?,
            None => None,
        };
        let retro = retro_metadata(&session)?;
        let graphs = options.cuda_graph || options.fixed_buffers;
        ensure!(
            !(graphs && retro.as_ref().is_some_and(|r| r.lengths_from_width)),
            "{} takes its length from the width of the attention mask, which grows with the text, while a CUDA graph keeps every \
             shape: run it without --cuda-graph",
            folder.graph.display()
        );
        let io = ModelIo::read(&session, &folder).with_context(|| format!("cannot run {}", folder.graph.display()))?;
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
            graphs: graphs.then_some(0),
        })
    }

    /// One line for people: the GPU, and what does not run there. `None` on the CPU.
    pub fn device_line(&self) -> Option<String> {
        let gpu = self.gpu.as_ref()?;
        let name = gpu.describe().map_or_else(|_| "unknown".to_owned(), |(name, _)| name);
        let left = self.left_to_cpu.as_deref().unwrap_or("all nodes run there");
        let graphs = if self.graphs.is_some() {
            "; decoding steps as a CUDA graph"
        } else {
            ""
        };
        Some(format!("{} ({name}): {left}{graphs}", self.device))
    }

    /// Which execution provider runs which node.
    ///
    /// # Errors
    /// When ONNX Runtime does not say.
    pub fn placement(&self) -> Result<Vec<Placed>> {
        placement(&self.session)
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// Whether states have buffers that steps are fed from.
    pub(crate) fn feeds_from_buffers(&self) -> bool {
        self.gpu.is_some() || self.graphs.is_some()
    }

    pub(crate) fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.gpu.as_ref()
    }

    /// One line for people: whether and how the plugin works in this model.
    pub fn plugin_line(&self) -> String {
        let total = self.io.layers();
        match &self.retro {
            None => format!("dense attention on all {total} layers (not converted; see retro-export)"),
            Some(r) => {
                let dense = match r.dense_layers.len() {
                    0 => String::new(),
                    n => format!(", {n} of them dense"),
                };
                format!(
                    "plugin active on {} of {total} layers{dense} (window {}, budget {}, page size {}, selector {} {})",
                    r.layers.len(),
                    r.window,
                    r.budget,
                    r.page_size,
                    r.selector,
                    r.group_score
                )
            }
        }
    }

    /// The longest context of a sequence, as far as it is known.
    pub fn context_length(&self) -> Option<usize> {
        let lengths = [self.io.capacity, self.folder.context_length];
        lengths.into_iter().flatten().min()
    }

    /// How many of `asked` sequences the model decodes at a time.
    pub fn batch(&self, asked: usize) -> usize {
        if self.fixed_capacity && self.io.batch.is_none() {
            asked
        } else {
            1
        }
    }

    /// The window to decode with: `asked`, or the one the model was converted with; 1 for a model that was not.
    ///
    /// # Errors
    /// When `asked` is more than the model has room for.
    pub fn window(&self, asked: Option<usize>) -> Result<usize> {
        let exported = self.retro.as_ref().map(|r| r.window);
        match (asked, exported) {
            (Some(0), _) => Err(anyhow!(
                "--window 0: the smallest window is 1 (Quest, without correction)"
            )),
            (Some(w), Some(most)) => {
                ensure!(
                    w <= most,
                    "--window {w}: the model was converted for windows up to {most}; convert it again with retro-export --window {w}"
                );
                Ok(w)
            }
            (Some(w), None) => {
                ensure!(
                    w == 1,
                    "--window {w}: the model was not converted; convert it with retro-export --window {w}"
                );
                Ok(1)
            }
            (None, exported) => Ok(exported.unwrap_or(1)),
        }
    }

    /// Pages per cache of `capacity` tokens; 0 for a model without the operator.
    pub fn pages(&self, capacity: usize) -> usize {
        self.retro
            .as_ref()
            .map_or(0, |r| retro_contract::pages_for(capacity, r.page_size))
    }

    /// Bytes of keys, values and, if pages are `scored`, page summaries that a decoding step of one sequence reads in all
    /// layers. A layer that selects no pages reads every valid token.
    pub fn bytes_per_step(&self, reading: &PageReads, scored: bool) -> f64 {
        let length = reading.length().unwrap_or(0.0);
        let sparse = sparse_layers(self);
        let selects = |layer: usize| {
            let mut slots = sparse.iter().filter_map(|&i| self.io.slots.get(i));
            slots.any(|s| s.layer == layer)
        };
        let caches = self.io.slots.iter().filter(|s| s.kind == SlotKind::Cache);
        let bytes = caches.map(|slot| {
            // One token of a cache, all its heads: as many bytes as one of a page summary's two vectors.
            let elements: usize = slot.shape(1, 1, 1).iter().product();
            let vector = slot.element.byte_size(elements).unwrap_or(0) as f64;
            let read = match (reading.tokens(), reading.valid_pages()) {
                (Some(tokens), Some(pages)) if selects(slot.layer) => tokens + if scored { pages } else { 0.0 },
                _ => length,
            };
            vector * read
        });
        bytes.sum()
    }

    /// Fresh state for `batch` sequences of up to `capacity` tokens.
    ///
    /// # Errors
    /// When memory runs out, `batch` exceeds 1 on a model whose caches grow, or the graph is declared for another batch or for
    /// fewer tokens.
    pub fn new_state(&self, batch: usize, capacity: usize) -> Result<State> {
        ensure!(
            batch == 1 || self.fixed_capacity,
            "this model's caches grow with every step: it decodes one sequence at a time"
        );
        let declared = self.io.batch.unwrap_or(batch);
        ensure!(
            declared == batch,
            "this model takes batches of {declared}, by its declared shapes, not of {batch}"
        );
        let most = self.io.capacity.unwrap_or(capacity);
        ensure!(
            capacity <= most,
            "this model's caches hold {most} tokens, by their declared shapes, not {capacity}"
        );
        // A buffer of declared size has that size however little is asked for.
        State::new(self, batch, most)
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// Runs one step or one chunk of a prompt: writes the caches and the operator's state, returns the newest tokens' logits.
    ///
    /// # Errors
    /// When the feed contradicts itself or ONNX Runtime fails.
    pub fn run(&mut self, state: &mut State, feed: &Feed) -> Result<Logits> {
        let batch = state.batch();
        ensure!(
            batch > 0 && feed.lengths.len() == batch && !feed.ids.is_empty() && feed.ids.len().is_multiple_of(batch),
            "a step of {} tokens and {} lengths does not fit a batch of {batch}",
            feed.ids.len(),
            feed.lengths.len()
        );
        let longest = feed.lengths.iter().copied().max().unwrap_or(0);
        ensure!(
            longest <= state.capacity(),
            "{longest} tokens do not fit a cache of {}",
            state.capacity()
        );

        let Self {
            session,
            io,
            gpu,
            graphs,
            ..
        } = self;
        if let Store::Bound(bound) = state.store_mut()
            && let Bound {
                binding,
                steps: Some(steps),
                buffers,
            } = &mut **bound
        {
            return steps.run(gpu.as_ref(), session, io, binding, buffers, feed, graphs);
        }
        let inputs = inputs(io, batch, longest, feed, true)?;
        match state.store_mut() {
            Store::Bound(bound) => {
                let Bound { binding, buffers, .. } = &mut **bound;
                for (name, value) in &inputs {
                    binding
                        .bind_input(*name, value)
                        .map_err(|e| anyhow!("{}", one_line(&e)))?;
                }
                // Bound anew each time: its shape changes with S, and a binding remembers the last output.
                let cpu = Allocator::default();
                binding
                    .bind_output_to_device(&io.logits, &cpu.memory_info().to_owned())
                    .map_err(|e| anyhow!("{}", one_line(&e)))?;
                let outputs = session.run_binding(binding).map_err(|e| anyhow!("{}", one_line(&e)))?;
                let logits = outputs.get(&io.logits).context("the graph gave no logits")?;
                let logits = last_rows(logits, io.logits_type, batch)?;
                drop(outputs);
                buffers.iter_mut().try_for_each(|b| b.take_turns(binding))?;
                Ok(logits)
            }
            Store::Growing { past, .. } => {
                let mut all: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = Vec::new();
                all.extend(
                    inputs
                        .iter()
                        .map(|(name, value)| (Cow::from(*name), SessionInputValue::from(value))),
                );
                all.extend(
                    io.slots
                        .iter()
                        .zip(past.iter())
                        .map(|(slot, v)| (Cow::from(slot.past.as_str()), v.into())),
                );
                let mut outputs = session.run(all).map_err(|e| anyhow!("{}", one_line(&e)))?;
                let logits = outputs.get(&io.logits).context("the graph gave no logits")?;
                let logits = last_rows(logits, io.logits_type, batch)?;
                let next: Option<Vec<DynValue>> = io.slots.iter().map(|slot| outputs.remove(&slot.present)).collect();
                drop(outputs);
                let next = next.context("the graph did not give all its present outputs")?;
                for (slot, value) in io.slots.iter().zip(&next) {
                    keeps_its_size(slot, value)?;
                }
                *past = next;
                Ok(logits)
            }
        }
    }
}

/// Whether what came out goes in again where sizes are declared.
fn keeps_its_size(slot: &StateSlot, value: &DynValue) -> Result<()> {
    let shape = value.dtype().tensor_shape().map(|s| s.to_vec()).unwrap_or_default();
    let fits = |(want, have): (&Option<usize>, &i64)| want.is_none_or(|want| usize::try_from(*have) == Ok(want));
    ensure!(
        shape.len() == slot.dims.len() && slot.dims.iter().zip(&shape).all(fits),
        "{} came out as {shape:?}, which {} does not take: retro-run needs it to keep its declared size",
        slot.present,
        slot.past
    );
    Ok(())
}

/// The inputs other than caches and state, with the mask or without.
pub(crate) fn inputs<'a>(
    io: &'a ModelIo,
    batch: usize,
    longest: usize,
    feed: &Feed,
    mask: bool,
) -> Result<Vec<(&'a str, DynValue)>> {
    let fed = feed.ids.len() / batch;
    let ids = &io.input_ids;
    let give = |input: &TokenInput, tokens: usize, numbers: Vec<i64>| {
        let numbers = input.numbers(numbers).into_iter();
        integers::tensor(input.element, &input.shape(batch, tokens), numbers)
    };
    let mut inputs = vec![(ids.name.as_str(), give(ids, fed, feed.ids.clone())?)];
    if let Some(input) = io.attention_mask.as_ref().filter(|_| mask) {
        let numbers = match input.width {
            // As wide as the cache, where it says how much of it is filled.
            Some(width) => {
                ensure!(
                    longest <= width,
                    "{longest} tokens exceed the attention mask, which is declared for {width}"
                );
                let row = |&n: &usize| (0..width).map(move |i| i64::from(i < n));
                feed.lengths.iter().flat_map(row).collect()
            }
            // Shorter sequences are padded on the left.
            None => {
                let row = |&n: &usize| (0..longest).map(move |i| i64::from(i + n >= longest));
                feed.lengths.iter().flat_map(row).collect()
            }
        };
        inputs.push((&input.name, give(input, input.width.unwrap_or(longest), numbers)?));
    }
    if let Some(input) = &io.position_ids {
        let row = |&n: &usize| (0..fed).map(move |i| (n + i) as i64 - fed as i64);
        inputs.push((
            &input.name,
            give(input, fed, feed.lengths.iter().flat_map(row).collect())?,
        ));
    }
    for constant in &io.constants {
        let value = integers::tensor(constant.element, &constant.shape, std::iter::once(constant.value))?;
        inputs.push((&constant.name, value));
    }
    if io.retro_length {
        inputs.push((graph::RETRO_LENGTH, int32([1], vec![feed.retro_length])?));
    }
    if let Some(takes) = io.page_budget {
        // Always bound, since a binding remembers: 0 is what the model was converted with.
        let budgets = feed.budgets.clone().unwrap_or_else(|| vec![0; batch]);
        let (shape, data) = match takes {
            BudgetInput::PerSequence => (budgets.len(), budgets),
            // The longest sequence's: the others of a batch read at most the few pages more that it has.
            BudgetInput::PerBatch => (1, vec![budgets.iter().copied().max().unwrap_or(0)]),
        };
        inputs.push((graph::PAGE_BUDGET, int32([shape], data)?));
    }
    Ok(inputs)
}

fn int32<const N: usize>(shape: [usize; N], data: Vec<i32>) -> Result<DynValue> {
    Ok(Tensor::from_array((shape, data))
        .map_err(|e| anyhow!("{}", one_line(&e)))?
        .into_dyn())
}

/// The last of each sequence's rows of logits `[B, S, V]` (S may be 1 whatever was fed), as f32.
pub(crate) fn last_rows(logits: &DynValue, element: TensorElementType, batch: usize) -> Result<Logits> {
    let LogitsShape { rows, vocab } = logits_shape(logits, batch)?;
    let mut values = Vec::with_capacity(batch * vocab);
    let newest = |b: usize| {
        let start = (b * rows + rows - 1) * vocab;
        start..start + vocab
    };
    match element {
        TensorElementType::Float32 => {
            let (_, data) = logits
                .try_extract_tensor::<f32>()
                .map_err(|e| anyhow!("{}", one_line(&e)))?;
            (0..batch).for_each(|b| values.extend_from_slice(data.get(newest(b)).unwrap_or(&[])));
        }
        TensorElementType::Float16 => {
            let (_, data) = logits
                .try_extract_tensor::<half::f16>()
                .map_err(|e| anyhow!("{}", one_line(&e)))?;
            (0..batch).for_each(|b| widen(data.get(newest(b)).unwrap_or(&[]), &mut values));
        }
        TensorElementType::Bfloat16 => {
            let (_, data) = logits
                .try_extract_tensor::<half::bf16>()
                .map_err(|e| anyhow!("{}", one_line(&e)))?;
            (0..batch).for_each(|b| widen(data.get(newest(b)).unwrap_or(&[]), &mut values));
        }
        other => anyhow::bail!("the logits are {other}, expected float32, float16 or bfloat16"),
    }
    ensure!(values.len() == batch * vocab, "the logits are shorter than their shape");
    Ok(Logits {
        values: Arc::new(values),
        vocab,
    })
}

fn widen<H>(halves: &[H], to: &mut Vec<f32>)
where
    [H]: HalfFloatSliceExt,
{
    let at = to.len();
    to.resize(at + halves.len(), 0.0);
    halves.convert_to_f32_slice(to.get_mut(at..).unwrap_or_default());
}

pub(crate) struct LogitsShape {
    pub(crate) rows: usize,
    pub(crate) vocab: usize,
}

pub(crate) fn logits_shape(logits: &DynValue, batch: usize) -> Result<LogitsShape> {
    let shape: Vec<usize> = logits
        .dtype()
        .tensor_shape()
        .map(|s| s.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect())
        .unwrap_or_default();
    let (rows, vocab) = match shape.as_slice() {
        [b, rows, vocab] if *b == batch => (*rows, *vocab),
        [b, vocab] if *b == batch => (1, *vocab),
        _ => anyhow::bail!("the logits have shape {shape:?} for a batch of {batch}"),
    };
    ensure!(
        rows > 0 && vocab > 0,
        "the logits have shape {shape:?}: nothing is in them"
    );
    Ok(LogitsShape { rows, vocab })
}

/// Errors as text: `ort`'s builder errors carry the builder, which cannot leave the thread.
fn open_session(runtime: &Runtime, graph: &Path, options: &OpenOptions) -> std::result::Result<Session, String> {
    let mut builder = session_builder(runtime, options, options.plugin.is_some() && may_need_plugin(graph))?;
    builder.commit_from_file(graph).map_err(|e| one_line(&e))
}

/// A session's options: log level, threads, and the plugin if it is wanted.
pub(crate) fn session_builder(
    runtime: &Runtime,
    options: &OpenOptions,
    plugin: bool,
) -> std::result::Result<SessionBuilder, String> {
    let text = |e: &dyn std::fmt::Display| one_line(e);
    let mut builder = Session::builder(runtime.environment()).map_err(|e| text(&e))?;
    // Every error comes back as a value and is told once; $ORT_LOG asks for ONNX Runtime's own account.
    if std::env::var_os("ORT_LOG").is_none() {
        builder = builder.with_log_level(LogLevel::Fatal).map_err(|e| text(&e))?;
    }
    // Every step has another shape: remembering memory patterns for each would only cost.
    let mut builder: SessionBuilder = builder.with_memory_pattern(false).map_err(|e| text(&e))?;
    builder = options.device.provide(builder, options.cuda_graph)?;
    if let Some(threads) = options.threads {
        builder = builder.with_intra_threads(threads).map_err(|e| text(&e))?;
    }
    if options.idle_between_runs {
        builder = builder
            .with_config_entry("session.force_spinning_stop", "1")
            .map_err(|e| text(&e))?;
    }
    if let Some(plugin) = options.plugin.as_ref().filter(|_| plugin) {
        builder = builder
            .with_operator_library(plugin)
            .map_err(|e| format!("the plugin {} does not load: {}", plugin.display(), text(&e)))?;
    }
    Ok(builder)
}

/// Whether a graph imports the operator's domain; yes where only ONNX Runtime can tell.
fn may_need_plugin(graph: &Path) -> bool {
    retro_export::onnx::read_model(graph).map_or(true, |loaded| {
        loaded.model.opset_version(retro_contract::DOMAIN).is_some()
    })
}

fn load_error(graph: &Path, options: &OpenOptions, text: &str) -> anyhow::Error {
    let wants_plugin = text.contains(retro_contract::DOMAIN) || text.contains(retro_contract::OP_TYPE);
    if wants_plugin && options.plugin.is_none() {
        anyhow!(
            "{} was converted and needs the plugin {PLUGIN}, which is not beside this program: build it with `cargo build --release`, or name it with --plugin or {PLUGIN_VARIABLE}",
            graph.display()
        )
    } else if options.cuda_graph && text.contains("graph capture") {
        anyhow!(
            "--cuda-graph: the graph {} has nodes that only the CPU runs between nodes of the GPU, so its steps cannot be captured; leave --cuda-graph out ({text})",
            graph.display()
        )
    } else if let Some(why) = weights_fault(graph).filter(|_| text.to_lowercase().contains("external")) {
        anyhow!("cannot load {}: {why}", graph.display())
    } else {
        anyhow!("cannot load {}: {text}", graph.display())
    }
}

/// What is wrong with a model's weights in files of their own, in less than ONNX Runtime's words.
fn weights_fault(graph: &Path) -> Option<String> {
    let model = read_model(graph).ok()?.model;
    external_files(&model, folder_of(graph)).err().map(|e| format!("{e:#}"))
}

fn retro_metadata(session: &Session) -> Result<Option<RetroMetadata>> {
    let metadata = session
        .metadata()
        .map_err(|e| anyhow!("cannot read the model's metadata: {}", one_line(&e)))?;
    let Some(version) = metadata.custom(metadata::VERSION) else {
        return Ok(None);
    };
    ensure!(
        version == retro_contract::OPSET_VERSION.to_string(),
        "the model was converted for version {version} of the operator, this program knows version {}",
        retro_contract::OPSET_VERSION
    );
    let number = |key: &str, default: usize| -> Result<usize> {
        let Some(text) = metadata.custom(key) else {
            return Ok(default);
        };
        let n = text.parse().ok().filter(|&n| n >= 1);
        n.with_context(|| format!("the model's metadata {key} is {text:?}, expected a positive number"))
    };
    let list = |key: &str| -> Vec<usize> {
        metadata
            .custom(key)
            .unwrap_or_default()
            .split(',')
            .filter_map(|n| n.trim().parse().ok())
            .collect()
    };
    let text = |key: &str, default: &str| metadata.custom(key).unwrap_or_else(|| default.to_owned());
    Ok(Some(RetroMetadata {
        window: number(metadata::WINDOW, limits::WINDOW)?,
        page_size: number(metadata::PAGE_SIZE, limits::PAGE_SIZE)?,
        budget: text(metadata::BUDGET, "?"),
        min_pages: number(metadata::MIN_PAGES, limits::BUDGET_MIN_PAGES)?,
        selector: text(metadata::SELECTOR, "?"),
        group_score: text(metadata::GROUP_SCORE, "?"),
        layers: list(metadata::LAYERS),
        dense_layers: list(metadata::DENSE_LAYERS),
        lengths_from_width: metadata.custom(metadata::LENGTHS).as_deref() == Some(metadata::MASK_WIDTH),
    }))
}

/// Slots of the sparse layers' page steps, in layer order: what measuring looks at.
pub(crate) fn sparse_layers(model: &Model) -> Vec<usize> {
    let dense = model.retro.as_ref().map(|r| r.dense_layers.as_slice()).unwrap_or(&[]);
    let steps = SlotKind::Retro(graph::State::PageSteps);
    let slots = model.io.slots.iter().enumerate();
    slots
        .filter(|(_, s)| s.kind == steps && !dense.contains(&s.layer))
        .map(|(i, _)| i)
        .collect()
}
