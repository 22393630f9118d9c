//! What a model takes, and small calls of it that rules try: so many sequences, tokens, past tokens, padding.

use super::{cache_aliases, input_sizes as inputs};
use crate::eval::{Cone, Env, Program, Tensor};
use retro_onnx::{DataType, Dimension, ValueInfoProto, graph::GraphView};
use std::{
    cell::{OnceCell, RefCell},
    collections::{HashMap, HashSet},
    path::PathBuf,
    rc::Rc,
};

/// Inputs by which language models are called; runners and exporters agree on these names.
pub const INPUT_IDS: &str = "input_ids";
pub const INPUTS_EMBEDS: &str = "inputs_embeds";
pub const ATTENTION_MASK: &str = "attention_mask";
pub const POSITION_IDS: &str = "position_ids";

/// Calls that are kept.
const MAX_RUNS: usize = 32;

/// A call: B sequences of S tokens after a past of `past`; the last sequence begins with `pad` tokens of padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallShape {
    pub b: usize,
    pub s: usize,
    pub past: usize,
    pub pad: usize,
}

impl CallShape {
    pub const fn new(b: usize, s: usize, past: usize, pad: usize) -> Self {
        Self { b, s, past, pad }
    }

    pub const fn total(&self) -> usize {
        self.past + self.s
    }

    /// Several tokens after a past.
    pub const fn continues(&self) -> bool {
        self.s > 1 && self.past > 0
    }

    /// First valid row of a sequence.
    pub const fn first(&self, b: usize) -> usize {
        if b + 1 == self.b { self.pad } else { 0 }
    }
}

impl std::fmt::Display for CallShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} token(s) after {}", self.s, self.past)?;
        if self.pad > 0 {
            write!(f, ", {} of padding", self.pad)
        } else {
            Ok(())
        }
    }
}

/// Calls of a model, made when they are first asked for.
pub struct SampleCalls<'a> {
    pub view: &'a GraphView<'a>,
    folder: Option<PathBuf>,
    program: OnceCell<Program<'a>>,
    /// Sizes of caches whose declaration leaves them open: heads and head size.
    open_sizes: OnceCell<HashMap<&'a str, [usize; 2]>>,
    runs: RefCell<HashMap<CallShape, Result<Rc<Env<'a>>, String>>>,
    /// What masks were found to be, by all that they are computed from: layers share them.
    pub masks: RefCell<HashMap<String, Result<Known, String>>>,
}

/// A mask's window, and whether it masks padding.
pub type Known = (Option<usize>, bool);

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

    pub fn is_cache(&self, name: &str) -> bool {
        self.caches().any(|c| c.name() == name)
    }

    /// The values of the whole graph in a call.
    ///
    /// # Errors
    /// The model takes something that isn't understood.
    pub fn run(&self, setting: CallShape) -> Result<Rc<Env<'a>>, String> {
        if let Some(known) = self.runs.borrow().get(&setting) {
            return known.clone();
        }
        let open = self.open_sizes.get_or_init(|| self.find_open_sizes());
        let run = self
            .inputs(setting, open)
            .map(|inputs| Rc::new(self.program().run(inputs)));
        let mut runs = self.runs.borrow_mut();
        if runs.len() < MAX_RUNS {
            runs.insert(setting, run.clone());
        }
        drop(runs);
        run
    }

    /// The values of a part of the graph in a call.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_cone(&self, setting: CallShape, cone: &Cone<'a>) -> Result<Env<'a>, String> {
        let open = self.open_sizes.get_or_init(|| self.find_open_sizes());
        let inputs = self.inputs(setting, open)?;
        Ok(self.program().run_cone(inputs, cone))
    }

    fn inputs(&self, z: CallShape, open: &HashMap<&'a str, [usize; 2]>) -> Result<Env<'a>, String> {
        let mut env = Env::default();
        let names = inputs::named_sizes(self.view);
        for input in &self.view.graph.input {
            let name = input.name();
            if self.view.initializer(name).is_some() {
                continue;
            }
            let data_type = input.data_type().unwrap_or(DataType::Float);
            let rank = input.dims().map(<[_]>::len);
            let fixed = |axis: usize| -> Option<usize> { input.dims()?.get(axis)?.fixed()?.try_into().ok() };
            let value = match (name, rank) {
                (INPUT_IDS, _) => Tensor::unknown(vec![z.b, z.s], data_type),
                (INPUTS_EMBEDS, Some(3)) => {
                    let width = fixed(2).or_else(|| inputs::width(self.view, name));
                    let width =
                        width.ok_or("inputs_embeds has no declared width, and nothing in the graph tells it")?;
                    Tensor::unknown(vec![z.b, z.s, width], data_type)
                }
                (ATTENTION_MASK, Some(2) | None) => {
                    let row = |b: usize| (0..z.total()).map(move |j| f64::from(u8::from(j >= z.first(b))));
                    Tensor::new(vec![z.b, z.total()], data_type, (0..z.b).flat_map(row).collect())
                }
                (ATTENTION_MASK, Some(rank)) => {
                    return Err(format!(
                        "the input attention_mask has {rank} dimensions, not 2 (batch, tokens): the caller makes the mask"
                    ));
                }
                (POSITION_IDS, rank) => {
                    let row = |b: usize| (z.past..z.total()).map(move |j| j.saturating_sub(z.first(b)) as f64);
                    let rows: Vec<f64> = (0..z.b).flat_map(row).collect();
                    match rank {
                        Some(3) => {
                            let n = fixed(0).unwrap_or(3).min(8);
                            let data = (0..n).flat_map(|_| rows.iter().copied()).collect();
                            Tensor::new(vec![n, z.b, z.s], data_type, data)
                        }
                        _ => Tensor::new(vec![z.b, z.s], data_type, rows),
                    }
                }
                (name, Some(4)) if self.is_cache(name) => {
                    let [h, d] = open.get(name).copied().unwrap_or([1, 1]);
                    let shape = vec![z.b, fixed(1).unwrap_or(h), z.past, fixed(3).unwrap_or(d)];
                    Tensor::unknown(shape, data_type)
                }
                // Whatever else it takes: its shape.
                (_, Some(rank)) if rank <= 8 => match inputs::sizes(self.view, &names, input) {
                    Some(sizes) => {
                        let shape = sizes.iter().map(|size| size.of(z.b, z.s, z.past)).collect();
                        Tensor::unknown(shape, data_type)
                    }
                    None => continue,
                },
                _ => continue,
            };
            env.set(name, value);
        }
        Ok(env)
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

/// Numbers between -1 and 1 that look random and are the same every time.
pub fn noise(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xd1b5_4a32_d192_ed03;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..n)
        .map(|_| (next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
        .collect()
}
