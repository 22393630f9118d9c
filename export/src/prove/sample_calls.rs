//! What a model takes, and small calls of it that rules try: so many sequences, tokens, past tokens, padding.

use super::{
    cache_aliases,
    call_shape::CallShape,
    input_sizes::{self, Size},
    model_inputs::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS},
    refusal::{InputRefusal, MaskRefusal},
    supported_mask::SupportedMask,
};
use crate::eval::{Env, GraphSlice, Program, Tensor};
use retro_onnx::{DataType, Dimension, ValueInfoProto, graph::GraphView};
use std::{
    cell::{OnceCell, RefCell},
    collections::{HashMap, HashSet},
    path::PathBuf,
    rc::Rc,
};

/// Calls that are kept.
const MAX_RUNS: usize = 32;
/// Calls of many tokens, in which a dependence on the position shows.
pub const FAR_CALLS: [CallShape; 5] = [
    CallShape::new(1, 1, 64, 0),
    CallShape::new(1, 3, 1024, 0),
    CallShape::new(1, 1, 4096, 0),
    CallShape::new(1, 1, 9001, 0),
    CallShape::new(1, 1, 30_011, 0),
];

/// Calls of a model, made when they are first asked for.
pub struct SampleCalls<'a> {
    /// The model's main graph.
    pub view: &'a GraphView<'a>,
    folder: Option<PathBuf>,
    program: OnceCell<Program<'a>>,
    /// Sizes of caches whose declaration leaves them open: heads and head size.
    open_sizes: OnceCell<HashMap<&'a str, [usize; 2]>>,
    runs: RefCell<HashMap<CallShape, Result<Rc<Env<'a>>, InputRefusal>>>,
    /// What masks were found to be, by all that they are computed from: layers share them.
    pub masks: RefCell<HashMap<String, Result<SupportedMask, MaskRefusal>>>,
}

impl<'a> SampleCalls<'a> {
    /// `folder`: where external data lies.
    pub fn new(view: &'a GraphView<'a>, folder: Option<PathBuf>) -> Self {
        Self {
            view,
            folder,
            program: OnceCell::new(),
            open_sizes: OnceCell::new(),
            runs: RefCell::new(HashMap::new()),
            masks: RefCell::new(HashMap::new()),
        }
    }

    /// The graph made ready to run: numbers of tokens and caches stay unknown.
    pub fn program(&self) -> &Program<'a> {
        self.program.get_or_init(|| {
            let caches: HashSet<&str> = self.caches().map(ValueInfoProto::name).collect();
            let tokens = [INPUT_IDS, INPUTS_EMBEDS].into_iter().collect();
            Program::new(self.view, self.folder.clone(), &tokens, &caches)
        })
    }

    /// Inputs that are caches: floating point, four dimensions. A mask made by the caller has a row for each token fed.
    pub fn caches(&self) -> impl Iterator<Item = &'a ValueInfoProto> {
        let fed = |name: &str| self.view.declared_dims(name)?.get(1)?.symbol();
        let fed = fed(INPUT_IDS).or_else(|| fed(INPUTS_EMBEDS));
        let is_mask = move |dims: &[Dimension]| match dims {
            [.., rows, keys] => {
                fed.is_some() && rows.symbol() == fed && keys.symbol().is_some_and(|keys| Some(keys) != fed)
            }
            _ => false,
        };
        let is_cache = move |i: &&'a ValueInfoProto| {
            let floats = matches!(
                i.data_type(),
                Some(DataType::Float | DataType::Float16 | DataType::Bfloat16)
            );
            floats && i.dims().is_some_and(|d| d.len() == 4 && !is_mask(d)) && self.view.initializer(i.name()).is_none()
        };
        self.view.graph.input.iter().filter(is_cache)
    }

    /// Whether a value is one of [`Self::caches`].
    pub fn is_cache(&self, name: &str) -> bool {
        self.caches().any(|c| c.name() == name)
    }

    /// The values of the whole graph in a call.
    ///
    /// # Errors
    /// No call can be made of the model's inputs.
    pub fn run(&self, call: CallShape) -> Result<Rc<Env<'a>>, InputRefusal> {
        if let Some(known) = self.runs.borrow().get(&call) {
            return known.clone();
        }
        let open = self.open_sizes.get_or_init(|| self.find_open_sizes());
        let run = self
            .inputs(call, open)
            .map(|inputs| Rc::new(self.program().run(inputs)));
        let mut runs = self.runs.borrow_mut();
        if runs.len() < MAX_RUNS {
            runs.insert(call, run.clone());
        }
        drop(runs);
        run
    }

    /// The values of a part of the graph in a call.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_slice(&self, call: CallShape, slice: &GraphSlice<'a>) -> Result<Env<'a>, InputRefusal> {
        let open = self.open_sizes.get_or_init(|| self.find_open_sizes());
        let inputs = self.inputs(call, open)?;
        Ok(self.program().run_slice(inputs, slice))
    }

    /// The graph's inputs in a call. `open`: heads and head size of caches whose declaration leaves them open.
    fn inputs(&self, call: CallShape, open: &HashMap<&'a str, [usize; 2]>) -> Result<Env<'a>, InputRefusal> {
        let mut env = Env::default();
        let names = input_sizes::named_sizes(self.view);
        for input in &self.view.graph.input {
            if self.view.initializer(input.name()).is_some() {
                continue;
            }
            if let Some(value) = self.input(call, open, &names, input)? {
                env.set(input.name(), value);
            }
        }
        Ok(env)
    }

    /// An input in a call; none where its shape can't be told. Tokens and caches have shapes only, masks and positions numbers.
    fn input(
        &self,
        call: CallShape,
        open: &HashMap<&'a str, [usize; 2]>,
        names: &HashMap<&str, Size>,
        input: &ValueInfoProto,
    ) -> Result<Option<Tensor>, InputRefusal> {
        let data_type = input.data_type().unwrap_or(DataType::Float);
        let rank = input.dims().map(<[_]>::len);
        let value = match (input.name(), rank) {
            (INPUT_IDS, _) => Tensor::unknown(vec![call.b, call.s], data_type),
            (INPUTS_EMBEDS, Some(3)) => {
                let width = fixed(input, 2).or_else(|| input_sizes::width(self.view, INPUTS_EMBEDS));
                let width = width.ok_or(InputRefusal::EmbeddingWidth)?;
                Tensor::unknown(vec![call.b, call.s, width], data_type)
            }
            (ATTENTION_MASK, Some(2) | None) => {
                let row = |b: usize| (0..call.total()).map(move |j| f64::from(u8::from(j >= call.first(b))));
                Tensor::new(
                    vec![call.b, call.total()],
                    data_type,
                    (0..call.b).flat_map(row).collect(),
                )
            }
            (ATTENTION_MASK, Some(rank)) => return Err(InputRefusal::MaskRank { rank }),
            (POSITION_IDS, rank) => positions(call, input, rank, data_type),
            (name, Some(4)) if self.is_cache(name) => {
                let [h, d] = open.get(name).copied().unwrap_or([1, 1]);
                let shape = vec![
                    call.b,
                    fixed(input, 1).unwrap_or(h),
                    call.past,
                    fixed(input, 3).unwrap_or(d),
                ];
                Tensor::unknown(shape, data_type)
            }
            // Whatever else it takes: its shape.
            (_, Some(rank)) if rank <= 8 => match input_sizes::sizes(self.view, names, input) {
                Some(sizes) => {
                    let size = |size: &Size| size.of(call.b, call.s, call.past);
                    Tensor::unknown(sizes.iter().map(size).collect(), data_type)
                }
                None => return Ok(None),
            },
            _ => return Ok(None),
        };
        Ok(Some(value))
    }

    /// Sizes that a cache's declaration leaves open are those of what is appended to it.
    fn find_open_sizes(&self) -> HashMap<&'a str, [usize; 2]> {
        let open = |c: &&ValueInfoProto| {
            c.dims()
                .is_some_and(|d| [1, 3].iter().any(|i| d.get(*i).is_none_or(|d| d.fixed().is_none())))
        };
        let open: Vec<&str> = self.caches().filter(open).map(ValueInfoProto::name).collect();
        let mut sizes = HashMap::new();
        // What is appended in a layer may wait for the shapes of the layer before.
        for _ in 0..=open.len().min(64) {
            let Ok(inputs) = self.inputs(CallShape::new(1, 1, 1, 0), &sizes) else {
                break;
            };
            if open.iter().all(|name| sizes.contains_key(name)) {
                break;
            }
            let env = self.program().run(inputs);
            let before = sizes.len();
            for name in &open {
                let names = cache_aliases::ahead(self.view, name);
                let appends = names.iter().flat_map(|(own, _)| {
                    let readers = self.view.readers(own).filter(|n| n.is("", "Concat"));
                    readers.map(move |n| (own, n))
                });
                for (own, reader) in appends {
                    let new = reader
                        .input
                        .iter()
                        .filter(|i| i.as_str() != *own)
                        .find_map(|i| env.get(i));
                    if let Some(&[_, h, _, d]) = new.map(|t| t.shape.as_slice()) {
                        sizes.insert(*name, [h, d]);
                    }
                }
            }
            if sizes.len() == before {
                break;
            }
        }
        sizes
    }
}

/// The size of an input's dimension, where it is declared as a number.
fn fixed(input: &ValueInfoProto, axis: usize) -> Option<usize> {
    input.dims()?.get(axis)?.fixed()?.try_into().ok()
}

/// Positions from 0 for the first token that is no padding: `[B, S]`, or `[N, B, S]` of N sections (as for M-RoPE).
fn positions(call: CallShape, input: &ValueInfoProto, rank: Option<usize>, data_type: DataType) -> Tensor {
    let row = |b: usize| (call.past..call.total()).map(move |j| j.saturating_sub(call.first(b)) as f64);
    let rows: Vec<f64> = (0..call.b).flat_map(row).collect();
    if rank != Some(3) {
        return Tensor::new(vec![call.b, call.s], data_type, rows);
    }
    let n = fixed(input, 0).unwrap_or(3).min(8);
    let data = (0..n).flat_map(|_| rows.iter().copied()).collect();
    Tensor::new(vec![n, call.b, call.s], data_type, data)
}
