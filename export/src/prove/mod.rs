//! What the rules for attention other than GroupQueryAttention share: given where the scores and the output are, find out what
//! the attention is by trying it, and prove it.
//!
//! A rule names a [`Core`]. From there: the values that queries, new keys and new values can be taken from; the cache that
//! the keys are appended to; the mask ([`mask`]); scale, softcap and head sinks. In the end the whole core, on random
//! queries, keys, values and caches, must give the numbers of the operator's formula; only then is it a [`AttentionMatch`].

pub(crate) mod cache_aliases;
mod call_invariant;
pub mod input_sizes;
mod mask;
pub mod sample_calls;
mod window_candidates;

use crate::{
    eval::{Cone, Env, Error, Tensor, fused_scores, reads},
    rules::{AttentionMatch, Layout, LengthSource, Rope},
};
use call_invariant::{is_call_invariant, others_are_call_invariant};
use input_sizes::foreign;
use mask::{Bias, Mask, Places, Unread};
use retro_onnx::{DataType, NodeProto, graph::GraphView};
use sample_calls::{CallShape, SampleCalls, noise};
use std::{cell::Cell, collections::HashSet, rc::Rc};
use window_candidates::{WindowCandidates, mask_key};

const MAX_CHAIN: usize = 64;
/// What is said of a mask that the evaluator has no numbers for.
pub const MORE: &str = "depends on more than masks and positions";
const MAX_CONSTANTS: usize = 96;
/// Numbers that are computed for one mask.
const MAX_SPENT: usize = 1 << 30;
/// Tokens of calls that are made once for the whole graph; of larger ones what a mask needs is computed alone.
const SMALL_CALL: usize = 16;
const CLOSE: f64 = 1e-4;
/// Calls that the whole core is tried in.
const CALLS: [CallShape; 4] = [
    CallShape::new(1, 1, 3, 0),
    CallShape::new(2, 3, 4, 2),
    CallShape::new(1, 4, 0, 0),
    CallShape::new(2, 1, 5, 2),
];
/// The call that sizes and layouts are read from, and the one for models that take several tokens only without a past.
const FIRST: [CallShape; 2] = [CallShape::new(2, 3, 4, 0), CallShape::new(2, 3, 0, 0)];

/// Where an attention's scores come from.
#[derive(Clone, Copy)]
pub enum Scores<'a> {
    /// Products of queries and keys, and what a Softmax takes of them.
    Spelled { product: &'a str, masked: &'a str },
    /// Inside one node.
    Fused(&'a NodeProto),
}

/// Past and present of a node that appends to its cache itself.
#[derive(Clone, Copy)]
pub struct InnerCache<'a> {
    pub past: [&'a str; 2],
    pub present: [&'a str; 2],
}

impl<'a> InnerCache<'a> {
    /// The cache of a node with these slots of past key and value, whose presents are its outputs 1 and 2: whole, or none.
    pub fn read(node: &'a NodeProto, [key, value]: [usize; 2]) -> Result<Option<Self>, String> {
        let past = [node.input(key), node.input(value)];
        let present = [node.output(1), node.output(2)];
        if past == ["", ""] {
            return Ok(None);
        }
        if past.iter().chain(&present).any(|name| name.is_empty()) {
            return Err("its cache is not complete (past_key, past_value, present_key, present_value)".to_owned());
        }
        Ok(Some(Self { past, present }))
    }
}

/// Refuses a node with an attribute whose meaning is not known here.
pub fn only_known_attributes(node: &NodeProto, known: &[&str]) -> Result<(), String> {
    match node.attribute.iter().find(|a| !known.contains(&a.name())) {
        Some(other) => Err(format!("its attribute {} is not understood", other.name())),
        None => Ok(()),
    }
}

/// An attention as a rule sees it.
#[derive(Clone, Copy)]
pub struct Core<'a> {
    pub query: &'a str,
    pub key: &'a str,
    pub value: &'a str,
    pub output: &'a str,
    pub scores: Scores<'a>,
    pub cache: Option<InnerCache<'a>>,
    /// Biases of queries, keys and values in one, added inside the node.
    pub bias: &'a str,
    /// Logits that stand beside the scores without a value.
    pub sink: Option<&'a str>,
}

/// A value, how it is laid out, and what it is multiplied with on the way.
#[derive(Clone, Copy, Debug)]
struct Cut<'a> {
    name: &'a str,
    layout: Layout,
    factor: f64,
}

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
struct Heads {
    hq: usize,
    hkv: usize,
    d: usize,
}

/// Finds out what an attention is.
///
/// # Errors
/// Why it can't be converted, with the value that failed.
pub fn attention_match<'a>(samples: &SampleCalls<'a>, core: Core<'a>) -> Result<AttentionMatch, String> {
    let first = first_call(samples, &core)?;
    let env = samples.run(first)?;
    let cache = match core.cache {
        Some(cache) => {
            let [key, value] = cache.past.map(|past| {
                source_cache(samples, past)
                    .ok_or_else(|| format!("its cache {past} is not an input of the graph of 4 dimensions"))
            });
            Cache {
                past: [key?, value?],
                total: cache.present,
                new: [core.key, core.value],
            }
        }
        None => outer_cache(samples, &core)?,
    };
    grows(samples.view, &cache)?;
    let heads = sizes(first, &env, &core, &cache)?;
    let kv = |name: &'a str, d: usize| cut(samples, &env, name, [first.b, heads.hkv, first.s, d], Some(1.0));
    let q = cut(samples, &env, core.query, [first.b, heads.hq, first.s, heads.d], None)
        .map_err(|why| format!("its queries: {why}"))?;
    let k = kv(cache.new[0], heads.d).map_err(|why| format!("its keys: {why}"))?;
    let v = kv(cache.new[1], heads.d).map_err(|why| format!("its values: {why}"))?;
    let mask = find_mask(samples, &core)?;
    let sinks = core
        .sink
        .map(|sink| find_sinks(samples, first, sink, heads.hq))
        .transpose()?;
    only_weighed(samples, &core, heads, mask, sinks.as_deref())?;
    let (scale, softcap) = match core.scores {
        Scores::Fused(node) => fused_scale(node, heads.d, q.factor),
        Scores::Spelled { .. } => spelled_scale(samples, &core, &cache, heads, [q, k, v])?,
    };
    let output = prove(
        samples,
        &core,
        &cache,
        heads,
        [q, k, v],
        mask,
        scale,
        softcap,
        sinks.as_deref(),
    )?;
    let node = samples
        .view
        .producer_index(output.name)
        .ok_or("nothing makes its output")?;
    let present = [0, 1].map(|i| graph_output(samples, cache.total[i]));
    let [Some(present_key), Some(present_value)] = present else {
        return Err(format!(
            "its cache {} is not an output of the graph",
            if present[0].is_none() {
                cache.total[0]
            } else {
                cache.total[1]
            }
        ));
    };
    let past_type = samples.view.data_type(cache.past[0]).unwrap_or_default();
    cache_aliases::same_type(samples.view, cache.past[0], present_key)?;
    cache_aliases::same_type(samples.view, cache.past[1], present_value)?;
    let of = |name: &str| env.get(name).map_or(DataType::Undefined, |t| t.data_type);
    let matched = AttentionMatch {
        query: q.name.to_owned(),
        key: k.name.to_owned(),
        value: v.name.to_owned(),
        query_layout: q.layout,
        key_layout: k.layout,
        value_layout: v.layout,
        output_layout: output.layout,
        past_key: cache.past[0].to_owned(),
        past_value: cache.past[1].to_owned(),
        present_key: present_key.to_owned(),
        present_value: present_value.to_owned(),
        total_key: cache.total[0].to_owned(),
        total_value: cache.total[1].to_owned(),
        output: output.name.to_owned(),
        replaces: Some(node),
        lengths: LengthSource::FromMask { padding: mask.padding },
        bias: core.bias.to_owned(),
        sinks: sinks.map(|s| s.iter().map(|x| *x as f32).collect()),
        q_heads: heads.hq as i64,
        kv_heads: heads.hkv as i64,
        head_size: Some(heads.d as i64),
        data_type: past_type,
        query_type: of(q.name),
        kv_type: of(k.name),
        output_type: of(output.name),
        scale: scale as f32,
        softcap: softcap as f32,
        rope: rope_before(samples, q.name),
        local_window_size: mask.window.map_or(-1, |w| w as i64),
        ..Default::default()
    };
    if !matches!(past_type, DataType::Float | DataType::Float16 | DataType::Bfloat16) {
        return Err(format!(
            "its cache holds {}, not float32, float16 or bfloat16",
            past_type.label()
        ));
    }
    Ok(matched)
}

/// The first call in which the attention's inputs and output have shapes.
fn first_call<'a>(samples: &SampleCalls<'a>, core: &Core<'a>) -> Result<CallShape, String> {
    let mut why = String::new();
    for z in FIRST {
        let env = samples.run(z)?;
        let mut known = [core.query, core.key, core.value, core.output]
            .into_iter()
            .map(|name| env.need(name));
        match known.find_map(Result::err) {
            None => {
                let operands = [("queries", core.query), ("keys", core.key), ("values", core.value)];
                let foreign = operands
                    .into_iter()
                    .find_map(|(what, from)| Some((what, foreign(samples, from)?)));
                return foreign.map_or(Ok(z), |(what, input)| Err(strange(what, input)));
            }
            Some(first) if why.is_empty() => why = strange_input(samples, &env, core).unwrap_or_else(|| first.into()),
            Some(_) => {}
        }
    }
    Err(why)
}

/// An input that a decoder's call doesn't have, where queries, keys or values come from one.
fn strange_input(samples: &SampleCalls, env: &Env, core: &Core) -> Option<String> {
    for (what, from) in [("queries", core.query), ("keys", core.key), ("values", core.value)] {
        let mut open = vec![from];
        let mut seen = HashSet::new();
        while let Some(name) = open.pop() {
            if env.get(name).is_some() || !seen.insert(name) {
                continue;
            }
            if samples.view.is_input(name) {
                return Some(strange(what, name));
            }
            open.extend(samples.view.producer(name).into_iter().flat_map(reads));
        }
    }
    None
}

fn strange(what: &str, input: &str) -> String {
    format!(
        "its {what} come from {input}, an input that is none of tokens, mask, positions and caches (cross-attention has such)"
    )
}

/// A cache and what is appended to it. Keys, then values.
struct Cache<'a> {
    past: [&'a str; 2],
    /// Past and new together.
    total: [&'a str; 2],
    new: [&'a str; 2],
}

/// The cache of an attention that reads past and new tokens put together before it.
fn outer_cache<'a>(samples: &SampleCalls<'a>, core: &Core<'a>) -> Result<Cache<'a>, String> {
    let find = |what: &str, operand: &'a str| -> Result<[&'a str; 3], String> {
        let total = *chain(samples, operand).last().unwrap_or(&operand);
        let node = samples.view.producer(total).filter(|n| n.is("", "Concat"));
        let inputs: Option<[&str; 2]> =
            node.and_then(|n| n.input.iter().map(String::as_str).collect::<Vec<_>>().try_into().ok());
        let cache = inputs.and_then(|[past, new]| Some([source_cache(samples, past)?, total, new]));
        match cache {
            Some(cache) => Ok(cache),
            _ if samples.caches().next().is_none() => Err(
                "the graph keeps no cache: it recomputes every token; export it with past key values (of split decoders, \
                 convert the one with past: decoder_with_past_model.onnx)"
                    .to_owned(),
            ),
            _ => {
                let by = samples.view.producer(total).map_or("an input of the graph", |n| n.op_type());
                Err(format!(
                    "its {what} ({total}, by {by}) are not a cache of the graph followed by new ones: cross-attention, or a \
                     cache of another kind"
                ))
            }
        }
    };
    let (k, v) = (find("keys", core.key)?, find("values", core.value)?);
    Ok(Cache {
        past: [k[0], v[0]],
        total: [k[1], v[1]],
        new: [k[2], v[2]],
    })
}

/// A cache that is declared with so many tokens and gets more in each call doesn't fit the next one.
fn grows(view: &GraphView, cache: &Cache) -> Result<(), String> {
    for (past, total) in cache.past.into_iter().zip(cache.total) {
        let axis = view
            .producer(total)
            .filter(|n| n.is("", "Concat"))
            .map(|n| n.attribute("axis"));
        let by_tokens = axis.is_none_or(|axis| axis.is_some_and(|axis| [2, -2].contains(&axis.i())));
        if let Some(tokens) = view.declared_from_end(past, 2).filter(|_| by_tokens) {
            return Err(format!(
                "its cache {past} comes in with {tokens} tokens, no other number, and goes out with more: the caller would have to cut \
                 it between two calls; export it with a cache of open length"
            ));
        }
    }
    Ok(())
}

/// A value and those before it, as long as each is made from one value that depends on tokens, and in the same way in every
/// call: rearranged or scaled, but not by what depends on the position.
fn chain<'a>(samples: &SampleCalls<'a>, from: &'a str) -> Vec<&'a str> {
    let program = samples.program();
    let mut names = vec![from];
    let mut name = from;
    while names.len() < MAX_CHAIN {
        let Some(node) = samples.view.producer(name) else { break };
        let mut data = node.input.iter().map(String::as_str).filter(|i| program.is_data(i));
        let (Some(one), None) = (data.next(), data.next()) else {
            break;
        };
        if !others_are_call_invariant(samples, node, one) {
            break;
        }
        name = one;
        names.push(name);
    }
    names
}

fn sizes(first: CallShape, env: &Env, core: &Core, cache: &Cache) -> Result<Heads, String> {
    let past = |i: usize| match env.shape(cache.past[i])? {
        &[_, h, _, d] => Ok([h, d]),
        other => Err(format!("{} has shape {other:?}", cache.past[i])),
    };
    let ([hkv, d], [hv, dv]) = (past(0)?, past(1)?);
    if d != dv || hkv != hv {
        return Err(format!(
            "its keys are {hkv} heads of {d}, its values {hv} of {dv}; the operator needs them alike"
        ));
    }
    let n: usize = env
        .shape(core.query)
        .map_err(|why| format!("its queries: {why}"))?
        .iter()
        .product();
    let hq = n.checked_div(first.b * first.s * d).unwrap_or(0);
    if hkv == 0 || hq == 0 || hq * first.b * first.s * d != n || !hq.is_multiple_of(hkv) {
        return Err(format!(
            "its queries of {n} elements are not heads of {d} for {hkv} key heads"
        ));
    }
    let total = env.shape(cache.total[0])?;
    if total != [first.b, hkv, first.total(), d] {
        return Err(format!(
            "its cache becomes {total:?}, not {:?}",
            [first.b, hkv, first.total(), d]
        ));
    }
    Ok(Heads { hq, hkv, d })
}

/// `[b, h, s, d]` numbers as a value of a layout has them.
fn laid_out(data: &[f64], [b, h, s, d]: [usize; 4], layout: Layout) -> Vec<f64> {
    if layout == Layout::Heads {
        return data.to_vec();
    }
    let mut out = Vec::with_capacity(data.len());
    for bi in 0..b {
        for si in 0..s {
            for hi in 0..h {
                let from = ((bi * h + hi) * s + si) * d;
                out.extend_from_slice(data.get(from..from + d).unwrap_or_default());
            }
        }
    }
    out
}

/// Layouts that a shape may have.
fn layouts(shape: &[usize], [b, h, s, d]: [usize; 4]) -> Vec<Layout> {
    let mut found = Vec::new();
    if shape == [b, s, h * d] {
        found.push(Layout::Flat);
    }
    if shape == [b, s, h, d] {
        found.push(Layout::TokenHeads);
    }
    if shape == [b, h, s, d] {
        found.push(Layout::Heads);
    }
    found
}

/// The value farthest before `from` that holds the same heads in a known layout, all multiplied with one number.
fn cut<'a>(
    samples: &SampleCalls<'a>,
    env: &Env<'a>,
    target: &'a str,
    dims: [usize; 4],
    factor: Option<f64>,
) -> Result<Cut<'a>, String> {
    let shape = env.shape(target)?;
    let flat_target = shape.len() == 3 && shape == [dims[0], dims[2], dims[1] * dims[3]];
    let truth = noise(dims.iter().product(), 1);
    let expected = laid_out(&truth, dims, if flat_target { Layout::Flat } else { Layout::Heads });
    let names = chain(samples, target);
    let mut best: Option<Cut> = None;
    for name in names {
        let Ok(shape) = env.shape(name) else { continue };
        for layout in layouts(shape, dims) {
            let planted = Tensor::new(shape.to_vec(), DataType::Float, laid_out(&truth, dims, layout));
            let tried = samples.program().plant(env, vec![(name, planted)], &[target]);
            let Some(got) = tried.get(target).and_then(|t| t.data.as_ref()) else {
                continue;
            };
            let Some(found) = ratio(&expected, got).filter(|f| factor.is_none_or(|want| (f - want).abs() < 1e-9))
            else {
                continue;
            };
            // Flat needs no node, the others do: of two equally good ones, the farther.
            if best.is_none_or(|b| layout as u8 <= b.layout as u8) {
                best = Some(Cut {
                    name,
                    layout,
                    factor: found,
                });
            }
        }
    }
    best.ok_or_else(|| {
        format!(
            "{target} of shape {:?} is not {} heads of {} in an order that is understood",
            env.shape(target).unwrap_or_default(),
            dims[1],
            dims[3]
        )
    })
}

/// The number that every element is multiplied with; none if there is no one number.
fn ratio(from: &[f64], to: &[f64]) -> Option<f64> {
    if from.len() != to.len() {
        return None;
    }
    let (at, most) = from.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))?;
    let factor = to.get(at)? / most;
    let fits = factor.is_finite()
        && from
            .iter()
            .zip(to)
            .all(|(a, b)| (a * factor - b).abs() <= 1e-9 * factor.abs().max(1e-9));
    fits.then_some(factor)
}

/// Reads what is added to an attention's scores.
struct BiasReader<'p, 'a> {
    samples: &'p SampleCalls<'a>,
    core: &'p Core<'a>,
    /// What the scores and what is added to them are computed from.
    cone: Cone<'a>,
    /// Scores are known to be multiplied with one number everywhere.
    even: bool,
    /// What lies between the products and the Softmax takes each number by itself, so that one head tells of all whose mask is
    /// the same.
    by_number: bool,
    /// Numbers that were computed.
    spent: Cell<usize>,
}

impl<'p, 'a> BiasReader<'p, 'a> {
    fn new(samples: &'p SampleCalls<'a>, core: &'p Core<'a>) -> Self {
        const BY_NUMBER: [&str; 11] = [
            "Add", "Sub", "Mul", "Div", "Where", "Cast", "CastLike", "Tanh", "Identity", "Max", "Min",
        ];
        let targets: Vec<&str> = match core.scores {
            Scores::Spelled { masked, .. } => vec![masked],
            Scores::Fused(node) => node
                .input
                .iter()
                .map(String::as_str)
                .filter(|i| !i.is_empty())
                .collect(),
        };
        let by_number = |node: &NodeProto| node.op_domain().is_empty() && BY_NUMBER.contains(&node.op_type());
        Self {
            samples,
            core,
            cone: samples.program().cone(&targets),
            even: path_to_scores(samples, core).is_some_and(|path| scaled_evenly(samples, &path)),
            by_number: path_to_scores(samples, core).is_some_and(|path| path.iter().all(|(node, _)| by_number(node))),
            spent: Cell::new(0),
        }
    }

    /// What is added to the scores in a call, at some places, and what scores are multiplied with.
    fn read(&self, z: CallShape, places: Places) -> Result<Bias, Unread> {
        if self.spent.get() > MAX_SPENT {
            return Err(Unread::Long);
        }
        let env = match z.total() {
            0..=SMALL_CALL => self.samples.run(z)?,
            _ => Rc::new(self.samples.run_cone(z, &self.cone)?),
        };
        self.spent.set(self.spent.get() + env.spent());
        match self.core.scores {
            Scores::Fused(node) => {
                let mut inputs = Vec::new();
                for name in &node.input {
                    inputs.push(if name.is_empty() {
                        None
                    } else {
                        Some(env.need(name)?.clone())
                    });
                }
                let scores = fused_scores(node, &inputs)?;
                Ok(Bias {
                    data: self.places(&scores.bias, scores.shape, &places)?,
                    heads: scores.shape[1],
                    places,
                    gain: None,
                })
            }
            Scores::Spelled { product, masked } => self.spelled(&env, z, places, product, masked),
        }
    }

    fn places(&self, tensor: &Tensor, full: [usize; 4], places: &Places) -> Result<Vec<f64>, Unread> {
        let data = read_places(tensor, full, places).ok_or(Unread::Long)?;
        self.spent.set(self.spent.get() + data.len());
        Ok(data)
    }

    fn spelled(
        &self,
        env: &Env<'a>,
        z: CallShape,
        places: Places,
        product: &'a str,
        masked: &str,
    ) -> Result<Bias, Unread> {
        let mut shape = env.shape(product)?.to_vec();
        if self.by_number && shape.len() == 4 {
            shape[1] = 1;
        }
        let scored = |x: f64| -> Result<Env<'a>, String> {
            let scores = Tensor::filled(shape.clone(), DataType::Float, x)?;
            Ok(self.samples.program().plant(env, vec![(product, scores)], &[masked]))
        };
        let tried = scored(0.0)?;
        let got = tried
            .get(masked)
            .or_else(|| env.get(masked))
            .ok_or_else(|| match tried.need(masked) {
                Err(why) => why,
                Ok(_) => Error::ValueUnknown(masked.to_owned()),
            })?;
        let unknown = || format!("{masked} {MORE}");
        let n: usize = got.shape.iter().product();
        let each = z.b * z.s * z.total();
        let tokens = got.shape.get(got.shape.len().saturating_sub(2)..);
        if tokens != Some(&[z.s, z.total()]) || each == 0 || !n.is_multiple_of(each) {
            return Err(format!("{masked} has shape {:?}", got.shape).into());
        }
        let full = [z.b, n / each, z.s, z.total()];
        if !got.is_known() {
            return Err(unknown().into());
        }
        let data = self.places(got, full, &places)?;
        let gain = if !self.even && z.b == 1 && z.pad == 0 {
            let ones = scored(1.0)?;
            let ones = ones.get(masked).filter(|t| t.is_known()).ok_or_else(unknown)?;
            let ones = self.places(ones, full, &places)?;
            mask::gain(&data, &ones)
        } else {
            None
        };
        Ok(Bias {
            data,
            heads: full[1],
            places,
            gain,
        })
    }
}

/// Some of `[B, heads, S, T]` numbers; none if they are not known or take too long.
fn read_places(tensor: &Tensor, [b, heads, s, t]: [usize; 4], places: &Places) -> Option<Vec<f64>> {
    let mut data = Vec::new();
    let (n, rows) = match places {
        Places::Rows(rows) => (rows.len() * t, rows.len()),
        Places::Cells(cells) => (cells.len(), cells.chunk_by(|a, b| a[0] == b[0]).count()),
    };
    if let Some(lazy) = &tensor.lazy
        && !lazy.is_affordable(b * heads * n, b * heads * rows)
    {
        return None;
    }
    for block in 0..b * heads {
        match places {
            Places::Rows(rows) => {
                for from in rows.iter().map(|row| (block * s + row) * t) {
                    match (&tensor.data, &tensor.lazy) {
                        (Some(held), _) => data.extend_from_slice(held.get(from..from + t)?),
                        (_, lazy) => {
                            let lazy = lazy.as_ref()?;
                            data.extend((from..from + t).map(|at| lazy.at(at)));
                        }
                    }
                }
            }
            Places::Cells(cells) => {
                let numbers = tensor.numbers()?;
                data.extend(cells.iter().map(|[i, j]| numbers.at((block * s + i) * t + j)));
            }
        }
    }
    Some(data)
}

/// The nodes between the Softmax and the products, each with the value that it hands on from them; none for fused ones.
fn path_to_scores<'a>(samples: &SampleCalls<'a>, core: &Core<'a>) -> Option<Vec<(&'a NodeProto, &'a str)>> {
    let Scores::Spelled { product, masked } = core.scores else {
        return Some(Vec::new());
    };
    let mut name = masked;
    let mut path = Vec::new();
    while name != product {
        let node = samples.view.producer(name).filter(|_| path.len() < MAX_CHAIN)?;
        name = node
            .input
            .iter()
            .map(String::as_str)
            .find(|i| samples.program().is_data(i))?;
        path.push((node, name));
    }
    Some(path)
}

/// Whether nothing but masks and sums between the products and the Softmax depends on the position.
fn scaled_evenly(samples: &SampleCalls, path: &[(&NodeProto, &str)]) -> bool {
    const ADDS: [&str; 2] = ["Add", "Where"];
    path.iter().all(|(node, data)| {
        let adds = node.op_domain().is_empty() && ADDS.contains(&node.op_type());
        adds || others_are_call_invariant(samples, node, data)
    })
}

fn find_mask<'a>(samples: &SampleCalls<'a>, core: &Core<'a>) -> Result<Mask, String> {
    let key = mask_key(samples, core);
    let known = samples.masks.borrow().get(&key).cloned();
    if let Some(known) = known {
        return known.map(|(window, padding)| Mask { window, padding });
    }
    let found = look_at_mask(samples, core);
    let plain = found.clone().map(|mask| (mask.window, mask.padding));
    samples.masks.borrow_mut().insert(key, plain);
    found
}

fn look_at_mask<'a>(samples: &SampleCalls<'a>, core: &Core<'a>) -> Result<Mask, String> {
    let mentioned = WindowCandidates::find(samples, core);
    let most = mentioned.numbers.len().max(mentioned.sizes.len());
    if most > MAX_CONSTANTS {
        return Err(format!(
            "what computes its mask mentions {most} numbers, too many to try each as a window"
        ));
    }
    let reader = BiasReader::new(samples, core);
    let bias = |z: CallShape, places: Places| reader.read(z, places);
    mask::classify(&bias, &mentioned.numbers, &mentioned.far())
}

/// Calls in which what lies behind the scores is looked at, where it may depend on the position.
const FAR_CALLS: [CallShape; 5] = [
    CallShape::new(1, 1, 64, 0),
    CallShape::new(1, 3, 1024, 0),
    CallShape::new(1, 1, 4096, 0),
    CallShape::new(1, 1, 9001, 0),
    CallShape::new(1, 1, 30_011, 0),
];

/// One logit per query head, the same for all tokens.
fn find_sinks<'a>(samples: &SampleCalls<'a>, first: CallShape, sink: &'a str, hq: usize) -> Result<Vec<f64>, String> {
    let read = |z: CallShape, env: &Env| -> Result<Vec<f64>, String> {
        let data = env
            .need(sink)?
            .data
            .clone()
            .ok_or_else(|| format!("its head sinks ({sink}) are not constant"))?;
        if data.len() != z.b * hq * z.s {
            return Err(format!(
                "its head sinks ({sink}) have shape {:?}",
                env.shape(sink).unwrap_or_default()
            ));
        }
        let per_head: Vec<f64> = (0..hq).map(|h| data[h * z.s]).collect();
        let same = data.iter().enumerate().all(|(at, x)| *x == per_head[at / z.s % hq]);
        if same {
            Ok(per_head)
        } else {
            Err(format!("its head sinks ({sink}) differ from token to token"))
        }
    };
    let found = read(first, &*samples.run(first)?)?;
    if is_steady_but_spread(samples, sink) {
        return Ok(found);
    }
    let cone = samples.program().cone(&[sink]);
    for z in FAR_CALLS {
        let env = samples.run_cone(z, &cone)?;
        if env.need(sink).is_ok() && read(z, &env)? != found {
            return Err(format!("its head sinks ({sink}) are others with {z}"));
        }
    }
    Ok(found)
}

/// Whether a value is the same in every call but for how often it is repeated.
fn is_steady_but_spread(samples: &SampleCalls, name: &str) -> bool {
    let mut name = name;
    for _ in 0..MAX_CHAIN {
        if is_call_invariant(samples, name) {
            return true;
        }
        match samples.view.producer(name) {
            Some(node) if node.op_domain().is_empty() && others_are_call_invariant(samples, node, node.input(0)) => {
                name = node.input(0);
            }
            _ => return false,
        }
    }
    false
}

/// Between the Softmax and the values nothing may depend on the position: the proof runs that part in small calls only. Where
/// something does (guards for rows without keys), probabilities of equal scores must be equal from afar too.
fn only_weighed<'a>(
    samples: &SampleCalls<'a>,
    core: &Core<'a>,
    heads: Heads,
    mask: Mask,
    sinks: Option<&[f64]>,
) -> Result<(), String> {
    let Scores::Spelled { product, masked } = core.scores else {
        return Ok(());
    };
    let node = samples.view.producer(core.output).ok_or("nothing makes its output")?;
    let Some(weights) = node.input.iter().map(String::as_str).find(|i| *i != core.value) else {
        return Ok(());
    };
    // All that is made of the scores on the way.
    let mut made: HashSet<&str> = [masked].into();
    let mut open = vec![masked];
    while let Some(name) = open.pop() {
        for reader in samples
            .view
            .readers(name)
            .filter(|n| !n.output.iter().any(|o| o == core.output))
        {
            open.extend(reader.output.iter().map(String::as_str).filter(|o| made.insert(o)));
        }
    }
    let mut seen: HashSet<&str> = HashSet::new();
    let mut open = vec![weights];
    let mut steady = true;
    while let Some(name) = open.pop() {
        if name == masked || !seen.insert(name) {
            continue;
        }
        let Some(node) = samples.view.producer(name) else {
            continue;
        };
        let shape_only = |slot: usize| slot == 1 && (node.is("", "Reshape") || node.is("", "Expand"));
        for (slot, input) in node.input.iter().map(String::as_str).enumerate() {
            if made.contains(input) {
                open.push(input);
            } else if !shape_only(slot) && core.sink != Some(input) {
                steady &= is_call_invariant(samples, input);
            }
        }
    }
    if steady {
        return Ok(());
    }
    let cone = samples.program().cone(&[weights]);
    for z in FAR_CALLS {
        let env = samples.run_cone(z, &cone)?;
        let Ok(shape) = env.shape(product).map(<[usize]>::to_vec) else {
            continue;
        };
        let scores = Tensor::filled(shape, DataType::Float, 0.0)?;
        let tried = samples.program().plant(&env, vec![(product, scores)], &[weights]);
        let got = tried.need(weights)?.clone();
        let full = [1, heads.hq, z.s, z.total()];
        let rows = Places::Rows((0..z.s).collect());
        let data = (got.shape.iter().product::<usize>() == full.iter().product::<usize>())
            .then(|| read_places(&got, full, &rows))
            .flatten()
            .ok_or_else(|| format!("with {z}, its probabilities ({weights}) can't be computed"))?;
        for (at, row) in data.chunks(z.total()).enumerate() {
            let (h, query) = (at / z.s, z.past + at % z.s);
            let sink = sinks.and_then(|s| s.get(h)).map_or(0.0, |s| s.exp());
            let keys = mask.window.unwrap_or(usize::MAX).min(query + 1);
            let each = 1.0 / (keys as f64 + sink);
            let expected = |j: usize| if j <= query && query - j < keys { each } else { 0.0 };
            if let Some(j) = (0..row.len()).find(|j| (row[*j] - expected(*j)).abs() > 1e-3 * each) {
                return Err(format!(
                    "with {z}, equal scores give token {query} the probability {} of token {j} where {} is expected: what follows \
                     its Softmax depends on the position",
                    row[j],
                    expected(j)
                ));
            }
        }
    }
    Ok(())
}

fn fused_scale(node: &NodeProto, d: usize, factor: f64) -> (f64, f64) {
    let number = |name: &str| node.attribute(name).map_or(0.0, |a| f64::from(a.f()));
    let given = number("scale");
    let scale = if given == 0.0 { 1.0 / (d as f64).sqrt() } else { given };
    let softcap = if node.is("", "Attention") {
        number("softcap")
    } else {
        0.0
    };
    (scale * factor, softcap)
}

/// Scale from tiny queries, softcap from huge ones.
fn spelled_scale(
    samples: &SampleCalls,
    core: &Core,
    cache: &Cache,
    heads: Heads,
    cuts: [Cut; 3],
) -> Result<(f64, f64), String> {
    let Scores::Spelled { masked, .. } = core.scores else {
        return Err("no scores".to_owned());
    };
    let z = CallShape::new(1, 1, 3, 0);
    let score = |size: f64| -> Result<(f64, f64), String> {
        let call = Call::new(samples, cache, heads, cuts, z, size)?;
        let env = samples.run(z)?;
        let tried = samples.program().plant(&env, call.seeds(cache, cuts), &[masked]);
        let data = tried
            .need(masked)?
            .data
            .as_ref()
            .ok_or("its scores can't be computed")?;
        let dots: Vec<f64> = (0..data.len().min(heads.hq * z.total()))
            .map(|at| call.dot(heads, 0, at / z.total(), 0, at % z.total()))
            .collect();
        let best = dots
            .iter()
            .enumerate()
            .filter(|(at, _)| data[*at] > -9999.0 * size.max(1.0));
        let (at, dot) = best.max_by(|a, b| a.1.total_cmp(b.1)).ok_or("it sees nothing")?;
        Ok((*dot, data[at]))
    };
    let (dot, small) = score(1e-3)?;
    let scale = small / dot;
    if !(scale.is_finite() && scale > 0.0) {
        return Err(format!("its scale is {scale}"));
    }
    // As float32 writes it: 0.17677669 for 1/sqrt(32).
    let (dot, large) = score(1e4)?;
    let straight = (large / (scale * dot) - 1.0).abs() < 1e-4;
    if straight {
        Ok((large / dot, 0.0))
    } else {
        softcapped(&score, large)
    }
}

fn softcapped(score: &dyn Fn(f64) -> Result<(f64, f64), String>, cap: f64) -> Result<(f64, f64), String> {
    if !(cap.is_finite() && cap > 0.0) {
        return Err(format!("its scores end at {cap}"));
    }
    let (dot, small) = score(1e-3)?;
    Ok(((small / cap).atanh() * cap / dot, cap))
}

/// A call of the core on random numbers.
struct Call {
    z: CallShape,
    q: Vec<f64>,
    /// Past, new, keys and values, `[B, Hkv, tokens, D]`.
    past: [Vec<f64>; 2],
    new: [Vec<f64>; 2],
    shapes: [Vec<usize>; 3],
    heads: Heads,
}

impl Call {
    fn new(
        samples: &SampleCalls,
        cache: &Cache,
        heads: Heads,
        cuts: [Cut; 3],
        z: CallShape,
        size: f64,
    ) -> Result<Self, String> {
        let env = samples.run(z)?;
        let shape = |name: &str| env.shape(name).map(<[usize]>::to_vec);
        let shapes = [shape(cuts[0].name)?, shape(cuts[1].name)?, shape(cuts[2].name)?];
        let kv = z.b * heads.hkv * heads.d;
        let dims = [
            [z.b, heads.hq, z.s, heads.d],
            [z.b, heads.hkv, z.s, heads.d],
            [z.b, heads.hkv, z.s, heads.d],
        ];
        for ((shape, dims), cut) in shapes.iter().zip(dims).zip(cuts) {
            if !layouts(shape, dims).contains(&cut.layout) {
                return Err(format!("with {z}, {} has shape {shape:?}", cut.name));
            }
        }
        if env.shape(cache.past[0])? != [z.b, heads.hkv, z.past, heads.d] {
            return Err(format!("with {z}, {} has another shape", cache.past[0]));
        }
        let mut q = noise(z.b * heads.hq * z.s * heads.d, 11);
        q.iter_mut().for_each(|x| *x *= size);
        Ok(Self {
            z,
            q,
            past: [noise(kv * z.past, 12), noise(kv * z.past, 13)],
            new: [noise(kv * z.s, 14), noise(kv * z.s, 15)],
            shapes,
            heads,
        })
    }

    fn seeds<'a>(&self, cache: &Cache<'a>, cuts: [Cut<'a>; 3]) -> Vec<(&'a str, Tensor)> {
        let (z, Heads { hq, hkv, d }) = (self.z, self.heads);
        let mut seeds = Vec::new();
        let values = [(&self.q, hq), (&self.new[0], hkv), (&self.new[1], hkv)];
        for ((cut, shape), (data, h)) in cuts.iter().zip(&self.shapes).zip(values) {
            let data = laid_out(data, [z.b, h, z.s, d], cut.layout);
            seeds.push((cut.name, Tensor::new(shape.clone(), DataType::Float, data)));
        }
        for (name, data) in cache.past.iter().zip(&self.past) {
            seeds.push((
                *name,
                Tensor::new(vec![z.b, hkv, z.past, d], DataType::Float, data.clone()),
            ));
        }
        seeds
    }

    fn row(&self, which: usize, b: usize, kv: usize, j: usize) -> &[f64] {
        let (z, Heads { hkv, d, .. }) = (self.z, self.heads);
        let (from, data) = if j < z.past {
            (((b * hkv + kv) * z.past + j) * d, &self.past[which])
        } else {
            (((b * hkv + kv) * z.s + j - z.past) * d, &self.new[which])
        };
        data.get(from..from + d).unwrap_or_default()
    }

    fn dot(&self, heads: Heads, b: usize, h: usize, i: usize, j: usize) -> f64 {
        let from = ((b * heads.hq + h) * self.z.s + i) * heads.d;
        let q = self.q.get(from..from + heads.d).unwrap_or_default();
        let k = self.row(0, b, h / (heads.hq / heads.hkv), j);
        q.iter().zip(k).map(|(a, b)| a * b).sum()
    }

    /// The operator's formula, `[B, Hq, S, D]`; none for rows of padding.
    fn formula(&self, mask: Mask, scale: f64, softcap: f64, sinks: Option<&[f64]>) -> Vec<Option<Vec<f64>>> {
        let (z, heads) = (self.z, self.heads);
        let mut rows = Vec::new();
        for b in 0..z.b {
            for h in 0..heads.hq {
                for i in 0..z.s {
                    let at = z.past + i;
                    if at < z.first(b) {
                        rows.push(None);
                        continue;
                    }
                    let first = if mask.padding { z.first(b) } else { 0 };
                    let first = first.max(mask.window.map_or(0, |w| (at + 1).saturating_sub(w)));
                    let scores: Vec<f64> = (first..=at)
                        .map(|j| {
                            let score = self.dot(heads, b, h, i, j) * scale;
                            if softcap == 0.0 {
                                score
                            } else {
                                softcap * (score / softcap).tanh()
                            }
                        })
                        .collect();
                    let sink = sinks.and_then(|s| s.get(h).copied());
                    let most = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().copied().chain(sink).map(|s| (s - most).exp()).sum();
                    let mut out = vec![0.0; heads.d];
                    for (j, score) in (first..=at).zip(scores) {
                        let p = (score - most).exp() / sum;
                        let v = self.row(1, b, h / (heads.hq / heads.hkv), j);
                        out.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                    }
                    rows.push(Some(out));
                }
            }
        }
        rows
    }
}

/// Tries the whole core against the operator's formula, and finds the value that is its output.
#[expect(clippy::too_many_arguments, reason = "all that was found out, once")]
fn prove<'a>(
    samples: &SampleCalls<'a>,
    core: &Core<'a>,
    cache: &Cache<'a>,
    heads: Heads,
    cuts: [Cut<'a>; 3],
    mask: Mask,
    scale: f64,
    softcap: f64,
    sinks: Option<&[f64]>,
) -> Result<Cut<'a>, String> {
    let mut outputs = outputs(samples, core.output);
    let mut best: Option<Cut> = None;
    for z in CALLS {
        let env = samples.run(z)?;
        if z.continues() && env.need(core.output).is_err() {
            continue;
        }
        let mut call = Call::new(samples, cache, heads, cuts, z, 1.0)?;
        let mut targets = outputs.clone();
        targets.extend(cache.total);
        let tried = samples.program().plant(&env, call.seeds(cache, cuts), &targets);
        if !core.bias.is_empty() {
            call.add_bias(&env, core.bias)?;
        }
        for (which, name) in cache.total.into_iter().enumerate() {
            let got = tried
                .need(name)?
                .data
                .as_ref()
                .ok_or_else(|| format!("{name} can't be computed"))?;
            let mut expected = Vec::new();
            for b in 0..z.b {
                for kv in 0..heads.hkv {
                    (0..z.total()).for_each(|j| expected.extend_from_slice(call.row(which, b, kv, j)));
                }
            }
            if !alike(&expected, got) {
                return Err(format!("its cache {name} is not the past followed by the new tokens"));
            }
        }
        let rows = call.formula(mask, scale, softcap, sinks);
        let dims = [z.b, heads.hq, z.s, heads.d];
        let mut worst = String::new();
        let mut good = Vec::new();
        for name in &outputs {
            let Some(got) = tried.get(name) else {
                if let Err(why) = tried.need(name) {
                    worst = why.into();
                }
                continue;
            };
            let Some(data) = &got.data else {
                worst = format!("{name} can't be computed");
                continue;
            };
            for layout in layouts(&got.shape, dims) {
                match differs(&rows, data, dims, layout) {
                    None => good.push(Cut {
                        name,
                        layout,
                        factor: 1.0,
                    }),
                    Some(difference) => worst = format!("with {z}, {name} {difference}"),
                }
            }
        }
        outputs.retain(|name| good.iter().any(|g| g.name == *name));
        if outputs.is_empty() {
            let worst = if worst.is_empty() {
                "no value of it has a shape that is understood".to_owned()
            } else {
                worst
            };
            return Err(format!("its output is not that of softmax attention: {worst}"));
        }
        // The farthest in the simplest layout.
        let rank = |c: &Cut| {
            (
                c.layout as u8,
                usize::MAX - outputs.iter().position(|o| *o == c.name).unwrap_or(0),
            )
        };
        best = good.into_iter().min_by_key(rank);
    }
    best.ok_or_else(|| "it has no output".to_owned())
}

impl Call {
    /// Adds a node's own biases to what it was given.
    fn add_bias(&mut self, env: &Env, name: &str) -> Result<(), String> {
        let bias = env
            .need(name)?
            .data
            .clone()
            .ok_or_else(|| format!("its bias {name} is not constant"))?;
        let (z, Heads { hq, hkv, d }) = (self.z, self.heads);
        let starts = [0, hq * d, (hq + hkv) * d];
        let [k, v] = &mut self.new;
        for ((data, h), start) in [(&mut self.q, hq), (k, hkv), (v, hkv)].into_iter().zip(starts) {
            for (at, x) in data.iter_mut().enumerate() {
                let place = start + at / (d * z.s) % h * d + at % d;
                *x += bias.get(place).ok_or_else(|| format!("its bias {name} is too short"))?;
            }
        }
        Ok(())
    }
}

fn alike(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= CLOSE)
}

/// How far a value is from the formula; none when it is equal.
fn differs(rows: &[Option<Vec<f64>>], data: &[f64], [b, h, s, d]: [usize; 4], layout: Layout) -> Option<String> {
    for (at, row) in rows.iter().enumerate() {
        let Some(row) = row else { continue };
        let (bi, hi, si) = (at / (h * s), at / s % h, at % s);
        let from = match layout {
            Layout::Heads => at * d,
            Layout::Flat | Layout::TokenHeads => ((bi * s + si) * h + hi) * d,
        };
        debug_assert!(bi < b);
        let got = data.get(from..from + d).unwrap_or_default();
        if !alike(row, got) {
            let i = row
                .iter()
                .zip(got)
                .position(|(a, b)| (a - b).abs() > CLOSE)
                .unwrap_or(0);
            let (want, got) = (
                row.get(i).copied().unwrap_or(f64::NAN),
                got.get(i).copied().unwrap_or(f64::NAN),
            );
            return Some(format!(
                "has {got:.4} where {want:.4} is expected (head {hi}, token {si})"
            ));
        }
    }
    None
}

/// An output and what is made of it alone, by rearranging and guarding.
fn outputs<'a>(samples: &SampleCalls<'a>, from: &'a str) -> Vec<&'a str> {
    const KEEPS: [&str; 10] = [
        "Transpose",
        "Reshape",
        "Where",
        "Cast",
        "Identity",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Mul",
        "Dropout",
    ];
    let mut names = vec![from];
    let mut name = from;
    while names.len() < 16 && !samples.view.is_output(name) {
        let mut readers = samples.view.readers(name);
        let (Some(node), None) = (readers.next(), readers.next()) else {
            break;
        };
        let keeps = node.op_domain().is_empty() && KEEPS.contains(&node.op_type());
        if !keeps || !others_are_call_invariant(samples, node, name) || node.output(0).is_empty() {
            break;
        }
        name = node.output(0);
        names.push(name);
    }
    names
}

/// The cache of the graph that a value is, itself or by another name.
fn source_cache<'a>(samples: &SampleCalls<'a>, name: &'a str) -> Option<&'a str> {
    let names = cache_aliases::back(samples.view, name);
    names.into_iter().find(|name| samples.is_cache(name))
}

/// The graph output that a value is, itself or by another name.
fn graph_output<'a>(samples: &SampleCalls<'a>, name: &'a str) -> Option<&'a str> {
    cache_aliases::output(samples.view, name).map(|(output, _)| output)
}

/// Whether rotary embedding shows before a value, within a few nodes.
fn rope_before(samples: &SampleCalls, name: &str) -> Rope {
    let mut open = vec![(name, 0)];
    let mut seen = HashSet::new();
    while let Some((name, depth)) = open.pop() {
        let Some(node) = samples.view.producer(name) else {
            continue;
        };
        if !seen.insert(name) || depth > 10 || matches!(node.op_type(), "MatMul" | "Gemm" | "MatMulNBits") {
            continue;
        }
        if matches!(node.op_type(), "RotaryEmbedding" | "Cos" | "Sin") {
            return Rope::Before;
        }
        // Halves swapped, one negated.
        if node.is("", "Neg") {
            return Rope::Before;
        }
        open.extend(node.input.iter().map(|i| (i.as_str(), depth + 1)));
    }
    Rope::None
}
