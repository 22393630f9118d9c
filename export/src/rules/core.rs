//! What the rules for attention other than GroupQueryAttention share: given where the scores and the output are, find out what
//! the attention is by trying it, and prove it.
//!
//! A rule names a [`Core`]. From there: the values that queries, new keys and new values can be taken from; the cache that
//! the keys are appended to; the mask ([`super::mask`]); scale, softcap and head sinks. In the end the whole core, on random
//! queries, keys, values and caches, must give the numbers of the operator's formula; only then is it a [`Site`].

use super::{
    Layout, Lengths, Rope, Site, copies,
    inputs::foreign,
    mask::{self, Bias, Mask},
    mentioned::Mentioned,
    probe::{Probes, Setting, noise},
    steady::others_are_steady,
};
use crate::{
    eval::{Env, Tensor, fused_scores, reads},
    onnx::{DataType, NodeProto},
};
use std::collections::HashSet;

const MAX_CHAIN: usize = 64;
const MAX_CONSTANTS: usize = 24;
const CLOSE: f64 = 1e-4;
/// Calls that the whole core is tried in.
const CALLS: [Setting; 4] = [
    Setting::new(1, 1, 3, 0),
    Setting::new(2, 3, 4, 2),
    Setting::new(1, 4, 0, 0),
    Setting::new(2, 1, 5, 2),
];
/// The call that sizes and layouts are read from, and the one for models that take several tokens only without a past.
const FIRST: [Setting; 2] = [Setting::new(2, 3, 4, 0), Setting::new(2, 3, 0, 0)];

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
pub fn site<'a>(probes: &Probes<'a>, core: Core<'a>) -> Result<Site, String> {
    let first = first_call(probes, &core)?;
    let env = probes.run(first)?;
    let cache = match core.cache {
        Some(cache) => {
            let [key, value] = cache.past.map(|past| {
                source_cache(probes, past)
                    .ok_or_else(|| format!("its cache {past} is not an input of the graph of 4 dimensions"))
            });
            Cache {
                past: [key?, value?],
                total: cache.present,
                new: [core.key, core.value],
            }
        }
        None => outer_cache(probes, &core)?,
    };
    let heads = sizes(first, &env, &core, &cache)?;
    let kv = |name: &'a str, d: usize| cut(probes, &env, name, [first.b, heads.hkv, first.s, d], Some(1.0));
    let q = cut(probes, &env, core.query, [first.b, heads.hq, first.s, heads.d], None)
        .map_err(|why| format!("its queries: {why}"))?;
    let k = kv(cache.new[0], heads.d).map_err(|why| format!("its keys: {why}"))?;
    let v = kv(cache.new[1], heads.d).map_err(|why| format!("its values: {why}"))?;
    let mask = find_mask(probes, &core)?;
    let sinks = core
        .sink
        .map(|sink| find_sinks(first, &env, sink, heads.hq))
        .transpose()?;
    let (scale, softcap) = match core.scores {
        Scores::Fused(node) => fused_scale(node, heads.d, q.factor),
        Scores::Spelled { .. } => spelled_scale(probes, &core, &cache, heads, [q, k, v])?,
    };
    let output = prove(
        probes,
        &core,
        &cache,
        heads,
        [q, k, v],
        mask,
        scale,
        softcap,
        sinks.as_deref(),
    )?;
    let node = probes
        .view
        .producer_index(output.name)
        .ok_or("nothing makes its output")?;
    let present = [0, 1].map(|i| graph_output(probes, cache.total[i]));
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
    let past_type = probes.view.data_type(cache.past[0]).unwrap_or_default();
    copies::same_type(probes.view, cache.past[0], present_key)?;
    copies::same_type(probes.view, cache.past[1], present_value)?;
    let of = |name: &str| env.get(name).map_or(DataType::Undefined, |t| t.data_type);
    let site = Site {
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
        lengths: Lengths::FromMask { padding: mask.padding },
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
        rope: rope_before(probes, q.name),
        local_window_size: mask.window.map_or(-1, |w| w as i64),
        ..Default::default()
    };
    if !matches!(past_type, DataType::Float | DataType::Float16 | DataType::Bfloat16) {
        return Err(format!(
            "its cache holds {}, not float32, float16 or bfloat16",
            past_type.label()
        ));
    }
    Ok(site)
}

/// The first call in which the attention's inputs and output have shapes.
fn first_call<'a>(probes: &Probes<'a>, core: &Core<'a>) -> Result<Setting, String> {
    let mut why = String::new();
    for z in FIRST {
        let env = probes.run(z)?;
        let mut known = [core.query, core.key, core.value, core.output]
            .into_iter()
            .map(|name| env.need(name));
        match known.find_map(Result::err) {
            None => {
                let operands = [("queries", core.query), ("keys", core.key), ("values", core.value)];
                let foreign = operands
                    .into_iter()
                    .find_map(|(what, from)| Some((what, foreign(probes, from)?)));
                return foreign.map_or(Ok(z), |(what, input)| Err(strange(what, input)));
            }
            Some(first) if why.is_empty() => why = strange_input(probes, &env, core).unwrap_or(first),
            Some(_) => {}
        }
    }
    Err(why)
}

/// An input that a decoder's call doesn't have, where queries, keys or values come from one.
fn strange_input(probes: &Probes, env: &Env, core: &Core) -> Option<String> {
    for (what, from) in [("queries", core.query), ("keys", core.key), ("values", core.value)] {
        let mut open = vec![from];
        let mut seen = HashSet::new();
        while let Some(name) = open.pop() {
            if env.get(name).is_some() || !seen.insert(name) {
                continue;
            }
            if probes.view.is_input(name) {
                return Some(strange(what, name));
            }
            open.extend(probes.view.producer(name).into_iter().flat_map(reads));
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
fn outer_cache<'a>(probes: &Probes<'a>, core: &Core<'a>) -> Result<Cache<'a>, String> {
    let find = |what: &str, operand: &'a str| -> Result<[&'a str; 3], String> {
        let total = *chain(probes, operand).last().unwrap_or(&operand);
        let node = probes.view.producer(total).filter(|n| n.is("", "Concat"));
        let inputs: Option<[&str; 2]> =
            node.and_then(|n| n.input.iter().map(String::as_str).collect::<Vec<_>>().try_into().ok());
        let cache = inputs.and_then(|[past, new]| Some([source_cache(probes, past)?, total, new]));
        match cache {
            Some(cache) => Ok(cache),
            _ if probes.caches().next().is_none() => Err(
                "the graph keeps no cache: it recomputes every token; export it with past key values (of split decoders, \
                 convert the one with past: decoder_with_past_model.onnx)"
                    .to_owned(),
            ),
            _ => {
                let by = probes.view.producer(total).map_or("an input of the graph", |n| n.op_type());
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

/// A value and those before it, as long as each is made from one value that depends on tokens, and in the same way in every
/// call: rearranged or scaled, but not by what depends on the position.
fn chain<'a>(probes: &Probes<'a>, from: &'a str) -> Vec<&'a str> {
    let program = probes.program();
    let mut names = vec![from];
    let mut name = from;
    while names.len() < MAX_CHAIN {
        let Some(node) = probes.view.producer(name) else { break };
        let mut data = node.input.iter().map(String::as_str).filter(|i| program.is_data(i));
        let (Some(one), None) = (data.next(), data.next()) else {
            break;
        };
        if !others_are_steady(probes, node, one) {
            break;
        }
        name = one;
        names.push(name);
    }
    names
}

fn sizes(first: Setting, env: &Env, core: &Core, cache: &Cache) -> Result<Heads, String> {
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
    probes: &Probes<'a>,
    env: &Env<'a>,
    target: &'a str,
    dims: [usize; 4],
    factor: Option<f64>,
) -> Result<Cut<'a>, String> {
    let shape = env.shape(target)?;
    let flat_target = shape.len() == 3 && shape == [dims[0], dims[2], dims[1] * dims[3]];
    let truth = noise(dims.iter().product(), 1);
    let expected = laid_out(&truth, dims, if flat_target { Layout::Flat } else { Layout::Heads });
    let names = chain(probes, target);
    let mut best: Option<Cut> = None;
    for name in names {
        let Ok(shape) = env.shape(name) else { continue };
        for layout in layouts(shape, dims) {
            let planted = Tensor::new(shape.to_vec(), DataType::Float, laid_out(&truth, dims, layout));
            let tried = probes.program().plant(env, vec![(name, planted)], &[target]);
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

/// What is added to the scores in a call, and what they are multiplied with, unless that is known to be `even`.
fn bias_of(probes: &Probes, core: &Core, z: Setting, even: bool) -> Result<Bias, String> {
    let env = probes.run(z)?;
    match core.scores {
        Scores::Fused(node) => {
            let inputs: Vec<_> = node
                .input
                .iter()
                .map(|i| if i.is_empty() { None } else { env.get(i).cloned() })
                .collect();
            for (name, value) in node.input.iter().zip(&inputs) {
                if !name.is_empty() && value.is_none() {
                    return env.need(name).map(|_| Bias {
                        data: Vec::new(),
                        heads: 0,
                        gain: None,
                    });
                }
            }
            let scores = fused_scores(node, &inputs)?;
            Ok(Bias {
                data: scores.bias,
                heads: scores.shape[1],
                gain: None,
            })
        }
        Scores::Spelled { product, masked } => {
            let shape = env.shape(product)?.to_vec();
            let n: usize = shape.iter().product();
            if n > 1 << 23 {
                return Err(format!("{n} scores are more than are looked at"));
            }
            let scored = |x: f64| {
                let scores = Tensor::new(shape.clone(), DataType::Float, vec![x; n]);
                probes.program().plant(&env, vec![(product, scores)], &[masked])
            };
            let tried = scored(0.0);
            let got = tried
                .get(masked)
                .or_else(|| env.get(masked))
                .ok_or_else(|| match tried.need(masked) {
                    Err(why) => why,
                    Ok(_) => "it is not known".to_owned(),
                })?;
            let data = got
                .data
                .clone()
                .ok_or_else(|| format!("{masked} depends on more than masks and positions"))?;
            let rows = z.b * z.s * z.total();
            if data.len() != n || rows == 0 || !n.is_multiple_of(rows) {
                return Err(format!("{masked} has shape {:?}", got.shape));
            }
            let gain = if !even && z.b == 1 && z.pad == 0 {
                let ones = scored(1.0).get(masked).and_then(|t| t.data.clone());
                mask::gain(&data, &ones.unwrap_or_default())
            } else {
                None
            };
            Ok(Bias {
                data,
                heads: n / rows,
                gain,
            })
        }
    }
}

/// Whether nothing but masks and sums between the products and the Softmax depends on the position.
fn scaled_evenly(probes: &Probes, core: &Core) -> bool {
    const ADDS: [&str; 2] = ["Add", "Where"];
    let Scores::Spelled { product, masked } = core.scores else {
        return true;
    };
    let program = probes.program();
    let mut name = masked;
    for _ in 0..MAX_CHAIN {
        if name == product {
            return true;
        }
        let Some(node) = probes.view.producer(name) else {
            return false;
        };
        let Some(data) = node.input.iter().map(String::as_str).find(|i| program.is_data(i)) else {
            return false;
        };
        let adds = node.op_domain().is_empty() && ADDS.contains(&node.op_type());
        if !adds && !others_are_steady(probes, node, data) {
            return false;
        }
        name = data;
    }
    false
}

fn find_mask(probes: &Probes, core: &Core) -> Result<Mask, String> {
    let mentioned = Mentioned::find(probes, core);
    let most = mentioned.numbers.len().max(mentioned.sizes.len());
    if most > MAX_CONSTANTS {
        return Err(format!(
            "what computes its mask mentions {most} numbers, too many to try each as a window"
        ));
    }
    let even = scaled_evenly(probes, core);
    let bias = |z| bias_of(probes, core, z, even);
    mask::classify(&bias, &mentioned.numbers, &mentioned.far(probes))
}

/// One logit per query head.
fn find_sinks(first: Setting, env: &Env, sink: &str, hq: usize) -> Result<Vec<f64>, String> {
    let data = env
        .need(sink)?
        .data
        .clone()
        .ok_or_else(|| format!("its head sinks ({sink}) are not constant"))?;
    let (b, s) = (first.b, first.s);
    if data.len() != b * hq * s {
        return Err(format!(
            "its head sinks ({sink}) have shape {:?}",
            env.shape(sink).unwrap_or_default()
        ));
    }
    let per_head: Vec<f64> = (0..hq).map(|h| data[h * s]).collect();
    let same = data.iter().enumerate().all(|(at, x)| *x == per_head[at / s % hq]);
    if same {
        Ok(per_head)
    } else {
        Err(format!("its head sinks ({sink}) differ from token to token"))
    }
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
    probes: &Probes,
    core: &Core,
    cache: &Cache,
    heads: Heads,
    cuts: [Cut; 3],
) -> Result<(f64, f64), String> {
    let Scores::Spelled { masked, .. } = core.scores else {
        return Err("no scores".to_owned());
    };
    let z = Setting::new(1, 1, 3, 0);
    let score = |size: f64| -> Result<(f64, f64), String> {
        let call = Call::new(probes, cache, heads, cuts, z, size)?;
        let env = probes.run(z)?;
        let tried = probes.program().plant(&env, call.seeds(cache, cuts), &[masked]);
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
    z: Setting,
    q: Vec<f64>,
    /// Past, new, keys and values, `[B, Hkv, tokens, D]`.
    past: [Vec<f64>; 2],
    new: [Vec<f64>; 2],
    shapes: [Vec<usize>; 3],
    heads: Heads,
}

impl Call {
    fn new(
        probes: &Probes,
        cache: &Cache,
        heads: Heads,
        cuts: [Cut; 3],
        z: Setting,
        size: f64,
    ) -> Result<Self, String> {
        let env = probes.run(z)?;
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
    probes: &Probes<'a>,
    core: &Core<'a>,
    cache: &Cache<'a>,
    heads: Heads,
    cuts: [Cut<'a>; 3],
    mask: Mask,
    scale: f64,
    softcap: f64,
    sinks: Option<&[f64]>,
) -> Result<Cut<'a>, String> {
    let mut outputs = outputs(probes, core.output);
    let mut best: Option<Cut> = None;
    for z in CALLS {
        let env = probes.run(z)?;
        if z.continues() && env.need(core.output).is_err() {
            continue;
        }
        let mut call = Call::new(probes, cache, heads, cuts, z, 1.0)?;
        let mut targets = outputs.clone();
        targets.extend(cache.total);
        let tried = probes.program().plant(&env, call.seeds(cache, cuts), &targets);
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
                    worst = why;
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
fn outputs<'a>(probes: &Probes<'a>, from: &'a str) -> Vec<&'a str> {
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
    while names.len() < 16 && !probes.view.is_output(name) {
        let mut readers = probes.view.readers(name);
        let (Some(node), None) = (readers.next(), readers.next()) else {
            break;
        };
        let keeps = node.op_domain().is_empty() && KEEPS.contains(&node.op_type());
        if !keeps || !others_are_steady(probes, node, name) || node.output(0).is_empty() {
            break;
        }
        name = node.output(0);
        names.push(name);
    }
    names
}

/// The cache of the graph that a value is, itself or by another name.
fn source_cache<'a>(probes: &Probes<'a>, name: &'a str) -> Option<&'a str> {
    let names = copies::back(probes.view, name);
    names.into_iter().find(|name| probes.is_cache(name))
}

/// The graph output that a value is, itself or by another name.
fn graph_output<'a>(probes: &Probes<'a>, name: &'a str) -> Option<&'a str> {
    copies::output(probes.view, name).map(|(output, _)| output)
}

/// Whether rotary embedding shows before a value, within a few nodes.
fn rope_before(probes: &Probes, name: &str) -> Rope {
    let mut open = vec![(name, 0)];
    let mut seen = HashSet::new();
    while let Some((name, depth)) = open.pop() {
        let Some(node) = probes.view.producer(name) else {
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
