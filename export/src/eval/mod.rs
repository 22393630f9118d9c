//! Runs the parts of a graph that decide what an attention does: shapes, masks, positions, scales, layouts. Weights and
//! activations have shapes only, so a run costs next to nothing whatever the model's size; where numbers are known
//! (constants, masks, positions, or values that a rule plants) they are computed, in f64.
//!
//! - [`Program`] is a graph made ready to run, whole or in part; [`Env`] holds the values of a run, and why others are not known.
//! - [`Tensor`] is a value: a shape, and numbers that are stored (computed by `ndarray`) or on demand (`lazy`).
//! - `ops` holds the operators, in one table. An operator that it doesn't list has no shape.
//! - [`Error`] is why a value is not known; its variant tells what may be done about it.

mod constant;
mod error;
mod layout;
mod lazy;
mod ops;
mod tensor;

pub use error::Error;
pub use ops::{fused_scores, windows};
pub use tensor::Tensor;

use retro_onnx::{
    GraphProto, NodeProto, TensorProto,
    graph::{GraphView, subgraphs},
};
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::PathBuf,
    rc::Rc,
};

/// Constants up to this many elements are read; larger ones only where no weight can be meant.
const SMALL: usize = 4096;
const LARGE: usize = 1 << 22;
/// Numbers that one run computes: far more than masks and positions of any model need.
const MAX_COMPUTED: usize = 1 << 25;
/// Graphs inside graphs.
const MAX_DEPTH: usize = 16;

/// Values by name, and why others are not known.
#[derive(Clone, Default)]
pub struct Env<'a> {
    values: HashMap<&'a str, Rc<Tensor>>,
    unknown: HashMap<&'a str, Error>,
    /// Numbers computed so far.
    computed: usize,
}

impl<'a> Env<'a> {
    pub fn get(&self, name: &str) -> Option<&Rc<Tensor>> {
        self.values.get(name)
    }

    pub fn set(&mut self, name: &'a str, value: Tensor) {
        self.values.insert(name, Rc::new(value));
    }

    /// Numbers that the run computed.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// # Errors
    /// Why the value is not known.
    pub fn need(&self, name: &str) -> Result<&Rc<Tensor>, Error> {
        self.get(name).ok_or_else(|| match self.unknown.get(name) {
            Some(why) => why.clone(),
            None => Error::ValueUnknown(name.to_owned()),
        })
    }

    /// Its shape.
    ///
    /// # Errors
    /// Why the value is not known.
    pub fn shape(&self, name: &str) -> Result<&[usize], Error> {
        self.need(name).map(|t| t.shape.as_slice())
    }
}

/// Part of a graph: what some values are computed from.
pub struct GraphSlice<'a> {
    nodes: Vec<usize>,
    constants: HashSet<&'a str>,
}

/// A graph made ready to run.
pub struct Program<'a> {
    pub view: &'a GraphView<'a>,
    order: Vec<usize>,
    /// Where a node stands in `order`.
    place: Vec<usize>,
    constants: HashMap<&'a str, Rc<Tensor>>,
    /// Values that depend on tokens or on what the model remembers, not only on their shapes: never computed unless substituted.
    data: HashSet<&'a str>,
    /// Those of them that depend on a cache.
    cache_dependent: HashSet<&'a str>,
}

impl<'a> Program<'a> {
    /// `tokens` and `caches`: the graph inputs whose numbers are not to be known. `folder`: where external data lies.
    pub fn new(
        view: &'a GraphView<'a>,
        folder: Option<PathBuf>,
        tokens: &HashSet<&'a str>,
        caches: &HashSet<&'a str>,
    ) -> Self {
        let order = order(view);
        let constants = constants(view, folder);
        let mut place = vec![usize::MAX; view.graph.node.len()];
        for (at, index) in order.iter().enumerate() {
            if let Some(place) = place.get_mut(*index) {
                *place = at;
            }
        }
        let both: HashSet<&str> = tokens.union(caches).copied().collect();
        Self {
            data: dependents(view, &order, &both),
            cache_dependent: dependents(view, &order, caches),
            view,
            order,
            place,
            constants,
        }
    }

    /// Whether a value depends on tokens or caches other than through shapes.
    pub fn is_data_dependent(&self, name: &str) -> bool {
        self.data.contains(name)
    }

    /// Whether a value depends on what a cache holds.
    pub fn is_cache_dependent(&self, name: &str) -> bool {
        self.cache_dependent.contains(name)
    }

    pub fn constant(&self, name: &str) -> Option<&Rc<Tensor>> {
        self.constants.get(name)
    }

    /// Runs the whole graph on these inputs.
    pub fn run(&self, inputs: Env<'a>) -> Env<'a> {
        let mut env = inputs;
        for (name, value) in &self.constants {
            env.values.entry(name).or_insert_with(|| value.clone());
        }
        for node in self.order.iter().filter_map(|i| self.view.graph.node.get(*i)) {
            if !(node.is("", "Constant") && env.values.contains_key(node.output(0))) {
                self.step(node, &mut env, None);
            }
        }
        env
    }

    /// What `targets` are computed from, to be run again and again.
    pub fn slice_to(&self, targets: &[&'a str]) -> GraphSlice<'a> {
        let mut above: BTreeSet<usize> = BTreeSet::new();
        let mut read: HashSet<&'a str> = HashSet::new();
        let mut open = targets.to_vec();
        while let Some(name) = open.pop() {
            if !read.insert(name) {
                continue;
            }
            if let Some(index) = self.view.producer_index(name)
                && let Some(place) = self.place.get(index)
                && above.insert(*place)
                && let Some(node) = self.view.graph.node.get(index)
            {
                open.extend(reads(node));
            }
        }
        let nodes = above.iter().filter_map(|at| self.order.get(*at).copied()).collect();
        read.retain(|name| self.constants.contains_key(name));
        GraphSlice { nodes, constants: read }
    }

    /// Runs a part of the graph on these inputs.
    pub fn run_slice(&self, inputs: Env<'a>, slice: &GraphSlice<'a>) -> Env<'a> {
        let mut env = inputs;
        for name in &slice.constants {
            if let Some(value) = self.constants.get(name) {
                env.values.entry(name).or_insert_with(|| value.clone());
            }
        }
        for node in slice.nodes.iter().filter_map(|i| self.view.graph.node.get(*i)) {
            if !(node.is("", "Constant") && env.values.contains_key(node.output(0))) {
                self.step(node, &mut env, None);
            }
        }
        env
    }

    /// Computes what `targets` become when values of `base` are replaced: the nodes between them only, numbers and all.
    pub fn substitute(&self, base: &Env<'a>, seeds: Vec<(&'a str, Tensor)>, targets: &[&str]) -> Env<'a> {
        let substituted: HashSet<&str> = seeds.iter().map(|(name, _)| *name).collect();
        let place = |index: usize| self.place.get(index).copied().unwrap_or(usize::MAX);
        // What stands before every reader of a seed can't depend on one.
        let readers = substituted.iter().flat_map(|name| self.view.reader_indices(name));
        let first = readers.map(|i| place(*i)).min().unwrap_or(usize::MAX);
        let mut above: BTreeSet<usize> = BTreeSet::new();
        let mut open: Vec<&str> = targets.to_vec();
        while let Some(name) = open.pop() {
            if substituted.contains(name) {
                continue;
            }
            if let Some(index) = self.view.producer_index(name)
                && place(index) >= first
                && above.insert(place(index))
                && let Some(node) = self.view.graph.node.get(index)
            {
                open.extend(reads(node));
            }
        }
        let mut env = Env::default();
        let mut touched: HashSet<&str> = substituted.clone();
        for (name, value) in seeds {
            env.set(name, value);
        }
        for index in above.iter().filter_map(|at| self.order.get(*at)) {
            let Some(node) = self.view.graph.node.get(*index) else {
                continue;
            };
            if reads(node).any(|i| touched.contains(i)) {
                touched.extend(
                    node.output
                        .iter()
                        .map(String::as_str)
                        .filter(|o| !substituted.contains(o)),
                );
                self.step(node, &mut env, Some(base));
            }
        }
        env
    }

    fn step(&self, node: &'a NodeProto, env: &mut Env<'a>, base: Option<&Env<'a>>) {
        let outcome = {
            let lookup = |name: &str| -> Option<Rc<Tensor>> {
                let own = env.values.get(name).or_else(|| {
                    if env.unknown.contains_key(name) {
                        return None;
                    }
                    base.and_then(|b| b.values.get(name))
                });
                own.cloned()
            };
            if env.computed > MAX_COMPUTED {
                Err(Error::TooMuchWork)
            } else {
                evaluate(node, &lookup, self.view.opset, 0)
            }
        };
        match outcome {
            Ok(outputs) => {
                for (name, value) in node.output.iter().map(String::as_str).zip(outputs) {
                    match value {
                        _ if name.is_empty() => {}
                        // A substituted value stays as substituted.
                        _ if base.is_some() && env.values.contains_key(name) => {}
                        Some(mut value) => {
                            if base.is_none() && self.data.contains(name) {
                                value.drop_numbers();
                            }
                            if base.is_none() {
                                value.round_to_type(|| ops::calculates(node));
                            }
                            env.computed += value.data.as_ref().map_or(0, Vec::len);
                            if env.computed > MAX_COMPUTED {
                                value.drop_numbers();
                            }
                            env.set(name, value);
                        }
                        None => {
                            env.unknown
                                .insert(name, at(node, Error::OutputUnknown(name.to_owned())));
                        }
                    }
                }
            }
            Err(why) => {
                for name in node.output.iter().map(String::as_str).filter(|o| !o.is_empty()) {
                    // The first reason along the way is the one that explains.
                    let known = |i: &str| env.unknown.get(i).or_else(|| base?.unknown.get(i)).cloned();
                    let first = reads(node).find_map(known);
                    let why = first.unwrap_or_else(|| at(node, why.clone()));
                    env.unknown.insert(name, why);
                }
            }
        }
    }
}

/// A failure, told with its node.
fn at(node: &NodeProto, source: Error) -> Error {
    Error::Node {
        label: node.label(),
        op_type: node.op_type().to_owned(),
        source: Box::new(source),
    }
}

/// Values by name, as a node sees them.
type Lookup<'l> = &'l dyn Fn(&str) -> Option<Rc<Tensor>>;

fn evaluate(node: &NodeProto, lookup: Lookup, opset: i64, depth: usize) -> Result<Vec<Option<Tensor>>, Error> {
    if node.is("", "If") {
        return branch(node, lookup, opset, depth);
    }
    let inputs: Vec<Option<Rc<Tensor>>> = node
        .input
        .iter()
        .map(|name| (!name.is_empty()).then(|| lookup(name)).flatten())
        .collect();
    if let ([Some(known), None, ..] | [None, Some(known), ..], true) = (inputs.as_slice(), depth == 0)
        && known.shape.len() == 3
        && let Some(outputs) = residual(node)
    {
        // A residual connection around something of unknown shape (experts chosen by the data, recurrent layers): it keeps the
        // shape. Were it otherwise, the attention behind it would not come out as expected.
        let sum = || Some(Tensor::unknown(known.shape.clone(), known.data_type));
        return Ok(outputs.iter().map(|is_sum| is_sum.then(sum).flatten()).collect());
    }
    for (name, value) in node.input.iter().zip(&inputs) {
        if !name.is_empty() && value.is_none() {
            return Err(Error::InputUnknown(name.clone()));
        }
    }
    ops::evaluate(node, &inputs, opset)
}

/// Of a node that adds its first two inputs, which outputs have the sum's shape.
fn residual(node: &NodeProto) -> Option<&'static [bool]> {
    match (node.op_domain(), node.op_type()) {
        ("", "Add") => Some(&[true]),
        ("com.microsoft", "SkipSimplifiedLayerNormalization" | "SkipLayerNormalization") => {
            Some(&[true, false, false, true])
        }
        _ => None,
    }
}

/// An If whose condition is known: what its branch gives. Else its shapes, when both branches agree.
fn branch(node: &NodeProto, lookup: Lookup, opset: i64, depth: usize) -> Result<Vec<Option<Tensor>>, Error> {
    if depth >= MAX_DEPTH {
        return Err(Error::TooDeep(MAX_DEPTH));
    }
    let graph_of = |name: &str| node.attribute(name).and_then(|a| a.g.as_deref());
    let (Some(yes), Some(no)) = (graph_of("then_branch"), graph_of("else_branch")) else {
        return Err("a branch is missing".into());
    };
    let condition = lookup(node.input(0)).and_then(|c| c.data.as_ref()?.first().copied());
    match condition {
        Some(c) => Ok(inside(if c != 0.0 { yes } else { no }, lookup, opset, depth)),
        None => {
            let (a, b) = (inside(yes, lookup, opset, depth), inside(no, lookup, opset, depth));
            let agree = |(a, b): (Option<Tensor>, Option<Tensor>)| {
                let (a, b) = (a?, b?);
                (a.shape == b.shape).then(|| Tensor::unknown(a.shape, a.data_type))
            };
            Ok(a.into_iter().zip(b).map(agree).collect())
        }
    }
}

fn inside(graph: &GraphProto, lookup: Lookup, opset: i64, depth: usize) -> Vec<Option<Tensor>> {
    let mut own: HashMap<&str, Option<Rc<Tensor>>> = HashMap::new();
    for tensor in &graph.initializer {
        own.insert(tensor.name(), Tensor::constant(tensor, SMALL, None).map(Rc::new));
    }
    for node in &graph.node {
        let outputs = {
            let lookup = |name: &str| match own.get(name) {
                Some(known) => known.clone(),
                None => lookup(name),
            };
            evaluate(node, &lookup, opset, depth + 1).unwrap_or_default()
        };
        let mut outputs = outputs.into_iter();
        for name in &node.output {
            let mut value = outputs.next().flatten();
            if let Some(value) = &mut value {
                value.round_to_type(|| ops::calculates(node));
            }
            own.insert(name, value.map(Rc::new));
        }
    }
    let outputs = graph.output.iter().map(|o| match own.get(o.name()) {
        Some(known) => known.as_deref().cloned(),
        None => lookup(o.name()).as_deref().cloned(),
    });
    outputs.collect()
}

/// Nodes so that each comes after those it reads from.
fn order(view: &GraphView) -> Vec<usize> {
    let nodes = &view.graph.node;
    let mut done = vec![false; nodes.len()];
    let mut order = Vec::with_capacity(nodes.len());
    for start in 0..nodes.len() {
        let mut open = vec![(start, false)];
        while let Some((index, expanded)) = open.pop() {
            let Some(node) = nodes.get(index) else { continue };
            match done.get_mut(index) {
                Some(true) | None => continue,
                Some(done) if expanded => {
                    *done = true;
                    order.push(index);
                    continue;
                }
                Some(_) => open.push((index, true)),
            }
            let before = reads(node).filter_map(|name| view.producer_index(name));
            open.extend(before.filter(|i| done.get(*i) == Some(&false)).map(|i| (i, false)));
            // A circle, which validation has refused, would grow this without end.
            if open.len() > 4 * nodes.len() + 64 * 1024 {
                return order;
            }
        }
    }
    order
}

/// What a node reads, itself and in its subgraphs.
pub fn reads(node: &NodeProto) -> impl Iterator<Item = &str> {
    let mut names: Vec<&str> = node.input.iter().map(String::as_str).collect();
    let mut open: Vec<&GraphProto> = subgraphs(node).collect();
    while let Some(graph) = open.pop() {
        for inner in &graph.node {
            names.extend(inner.input.iter().map(String::as_str));
            open.extend(subgraphs(inner));
        }
        names.extend(graph.output.iter().map(|o| o.name()));
    }
    names.into_iter().filter(|n| !n.is_empty())
}

/// All values that depend on `roots` other than through their shapes.
fn dependents<'a>(view: &GraphView<'a>, order: &[usize], roots: &HashSet<&'a str>) -> HashSet<&'a str> {
    let mut found = roots.clone();
    for node in order.iter().filter_map(|i| view.graph.node.get(*i)) {
        let shape_only = node.is("", "Shape") || node.is("", "Size");
        if !shape_only && reads(node).any(|i| found.contains(i)) {
            found.extend(node.output.iter().map(String::as_str).filter(|o| !o.is_empty()));
        }
    }
    found
}

fn constants<'a>(view: &GraphView<'a>, folder: Option<PathBuf>) -> HashMap<&'a str, Rc<Tensor>> {
    let limit = |tensor: &TensorProto| {
        let weight = view.readers(tensor.name()).any(ops::reads_weights);
        if weight { SMALL } else { LARGE }
    };
    let read = |t: &'a TensorProto| {
        let tensor = Tensor::constant(t, limit(t), folder.as_deref())?;
        Some((t.name(), Rc::new(tensor)))
    };
    let initializers = view.graph.initializer.iter().filter_map(read);
    // Masks of all positions may stand in nodes; each run would make them anew.
    let nodes = view.graph.node.iter().filter(|n| n.is("", "Constant"));
    let nodes = nodes.filter_map(|node| {
        let tensor = ops::evaluate(node, &[], view.opset).ok()?.pop()??;
        Some((node.output(0), Rc::new(tensor)))
    });
    nodes.chain(initializers).collect()
}
