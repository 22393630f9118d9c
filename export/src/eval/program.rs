//! A graph made ready to run, whole or in part, and the values of a run.

use super::{
    Error, SMALL, Tensor,
    node::{at, evaluate},
    ops,
};
use retro_onnx::{
    GraphProto, NodeProto, TensorProto,
    graph::{GraphView, subgraphs},
};
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::PathBuf,
    rc::Rc,
};

/// Constants that can't be weights are read up to this many elements.
const LARGE: usize = 1 << 22;
/// Numbers that one run computes: far more than masks and positions of any model need.
const MAX_COMPUTED: usize = 1 << 25;

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
    /// Values that depend on tokens or on what caches hold, not only on their shapes: computed only where a value is substituted.
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
        self.run_nodes(inputs, self.constants.keys(), &self.order)
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
        self.run_nodes(inputs, &slice.constants, &slice.nodes)
    }

    fn run_nodes<'n>(
        &self,
        inputs: Env<'a>,
        constants: impl IntoIterator<Item = &'n &'a str>,
        nodes: &[usize],
    ) -> Env<'a>
    where
        'a: 'n,
    {
        let mut env = inputs;
        for name in constants {
            if let Some(value) = self.constants.get(name) {
                env.values.entry(name).or_insert_with(|| value.clone());
            }
        }
        for node in nodes.iter().filter_map(|i| self.view.graph.node.get(*i)) {
            if !(node.is("", "Constant") && env.values.contains_key(node.output(0))) {
                self.step(node, &mut env, None);
            }
        }
        env
    }

    /// Computes what `targets` become when values of `base` are replaced: the nodes between them only, numbers and all.
    pub fn substitute(&self, base: &Env<'a>, replaced: Vec<(&'a str, Tensor)>, targets: &[&str]) -> Env<'a> {
        let names: HashSet<&str> = replaced.iter().map(|(name, _)| *name).collect();
        let nodes = self.nodes_between(&names, targets);
        let mut env = Env::default();
        for (name, value) in replaced {
            env.set(name, value);
        }
        let mut changed: HashSet<&str> = names.clone();
        for node in nodes.iter().filter_map(|i| self.view.graph.node.get(*i)) {
            if reads(node).any(|i| changed.contains(i)) {
                changed.extend(node.output.iter().map(String::as_str).filter(|o| !names.contains(o)));
                self.step(node, &mut env, Some(base));
            }
        }
        env
    }

    /// Nodes that `targets` are computed from, those that can depend on `names` among them, in order.
    fn nodes_between(&self, names: &HashSet<&str>, targets: &[&str]) -> Vec<usize> {
        let place = |index: usize| self.place.get(index).copied().unwrap_or(usize::MAX);
        // What stands before every reader can't depend on one.
        let readers = names.iter().flat_map(|name| self.view.reader_indices(name));
        let first = readers.map(|i| place(*i)).min().unwrap_or(usize::MAX);
        let mut above: BTreeSet<usize> = BTreeSet::new();
        let mut open: Vec<&str> = targets.to_vec();
        while let Some(name) = open.pop() {
            if names.contains(name) {
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
        above.iter().filter_map(|at| self.order.get(*at).copied()).collect()
    }

    /// Computes a node. `base`: values that those of `env` replace; then numbers are kept that depend on tokens and caches.
    fn step(&self, node: &'a NodeProto, env: &mut Env<'a>, base: Option<&Env<'a>>) {
        match self.outputs(node, env, base) {
            Ok(outputs) => {
                for (name, value) in node.output.iter().map(String::as_str).zip(outputs) {
                    // A replaced value stays what it was replaced with.
                    if name.is_empty() || base.is_some() && env.values.contains_key(name) {
                        continue;
                    }
                    match value {
                        Some(value) => self.store(node, env, name, value, base.is_some()),
                        None => {
                            let why = at(node, Error::OutputUnknown(name.to_owned()));
                            env.unknown.insert(name, why);
                        }
                    }
                }
            }
            Err(why) => {
                for name in node.output.iter().map(String::as_str).filter(|o| !o.is_empty()) {
                    // The first reason along the way is the one that explains.
                    let reason = |i: &str| env.unknown.get(i).or_else(|| base?.unknown.get(i)).cloned();
                    let first = reads(node).find_map(reason);
                    let why = first.unwrap_or_else(|| at(node, why.clone()));
                    env.unknown.insert(name, why);
                }
            }
        }
    }

    /// What a node gives for the values of `env`, or where it has none, of `base`.
    fn outputs(&self, node: &NodeProto, env: &Env<'a>, base: Option<&Env<'a>>) -> Result<Vec<Option<Tensor>>, Error> {
        if env.computed > MAX_COMPUTED {
            return Err(Error::TooMuchWork);
        }
        let lookup = |name: &str| -> Option<Rc<Tensor>> {
            let own = env.values.get(name).or_else(|| {
                if env.unknown.contains_key(name) {
                    return None;
                }
                base.and_then(|b| b.values.get(name))
            });
            own.cloned()
        };
        evaluate(node, &lookup, self.view.opset, 0)
    }

    fn store(&self, node: &NodeProto, env: &mut Env<'a>, name: &'a str, mut value: Tensor, substituted: bool) {
        if !substituted {
            if self.data.contains(name) {
                value.drop_numbers();
            }
            value.round_to_type(|| ops::calculates(node));
        }
        env.computed += value.data.as_ref().map_or(0, Vec::len);
        if env.computed > MAX_COMPUTED {
            value.drop_numbers();
        }
        env.set(name, value);
    }
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

/// The nodes that values come of, by place. `read`: what a node comes of.
pub fn leading_to<'a>(
    graph: &'a GraphProto,
    names: impl IntoIterator<Item = &'a str>,
    read: impl Fn(&'a NodeProto) -> Vec<&'a str>,
) -> Vec<bool> {
    let mut producers: HashMap<&str, usize> = HashMap::new();
    for (index, node) in graph.node.iter().enumerate() {
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            producers.insert(output, index);
        }
    }
    let mut leads = vec![false; graph.node.len()];
    let mut open: Vec<&str> = names.into_iter().collect();
    while let Some(name) = open.pop() {
        let Some(index) = producers.get(name).copied() else {
            continue;
        };
        if let (Some(leads), Some(node)) = (leads.get_mut(index), graph.node.get(index))
            && !*leads
        {
            *leads = true;
            open.extend(read(node));
        }
    }
    leads
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
