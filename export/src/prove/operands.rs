//! Queries, keys and values: their sizes, and the values of the graph that hold them.
//!
//! Between a projection and the product of queries and keys exporters reshape, transpose, scale and repeat heads. The
//! operator takes heads in one of three layouts, so the value farthest before the product that still holds the same heads
//! is the operand. It is found by substituting numbers for each and reading what they become.

use super::{
    attention_match::{HeadLayout, Rope},
    cache::KvCache,
    call_invariant::invariant_chain,
    call_shape::CallShape,
    candidate::AttentionCandidate,
    model_inputs::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS},
    noise::noise,
    refusal::{OperandKind, OperandRefusal, ProofRefusal, Refusal},
    sample_calls::SampleCalls,
};
use crate::eval::{Env, Tensor, reads};
use retro_onnx::DataType;
use std::collections::HashSet;

/// The call that sizes and layouts are read from, and the one for models that take several tokens only without a past.
const FIRST: [CallShape; 2] = [CallShape::new(2, 3, 4, 0), CallShape::new(2, 3, 0, 0)];

/// Sizes of an attention: Hq query heads, Hkv heads of keys and values, D elements a head.
#[derive(Clone, Copy, Debug)]
pub struct HeadSizes {
    pub hq: usize,
    pub hkv: usize,
    pub d: usize,
}

impl HeadSizes {
    /// The head of keys and values that a query head reads.
    pub fn kv_head(self, query_head: usize) -> usize {
        query_head / (self.hq / self.hkv)
    }
}

/// A value of the graph, how it is laid out, and what it is multiplied with on the way to where the attention takes it.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    pub name: &'a str,
    pub layout: HeadLayout,
    pub factor: f64,
}

/// What an attention reads.
pub struct Operands<'a> {
    pub cache: KvCache<'a>,
    pub heads: HeadSizes,
    /// Queries, keys and values. The keys and values are multiplied with 1.
    pub qkv: [Operand<'a>; 3],
}

impl<'a> Operands<'a> {
    /// Finds them in the values of the call `first`.
    ///
    /// # Errors
    /// Queries, keys, values or caches don't have the sizes of an attention, or are in an order that is not supported.
    pub fn find(
        samples: &SampleCalls<'a>,
        (first, env): (CallShape, &Env<'a>),
        candidate: &AttentionCandidate<'a>,
        cache: KvCache<'a>,
    ) -> Result<Self, Refusal> {
        let heads = head_sizes(first, env, candidate, &cache)?;
        let find = |kind: OperandKind, name: &'a str, heads_of: usize, factor: Option<f64>| {
            find_operand(samples, env, name, [first.b, heads_of, first.s, heads.d], factor)
                .map_err(|why| in_kind(kind, why))
        };
        let query = find(OperandKind::Queries, candidate.query, heads.hq, None)?;
        let key = find(OperandKind::Keys, cache.new[0], heads.hkv, Some(1.0))?;
        let value = find(OperandKind::Values, cache.new[1], heads.hkv, Some(1.0))?;
        Ok(Self {
            cache,
            heads,
            qkv: [query, key, value],
        })
    }
}

fn in_kind(kind: OperandKind, why: Refusal) -> Refusal {
    let why = Box::new(why);
    Refusal::In { kind, why }
}

/// The first call in which the attention's inputs and output have shapes.
///
/// # Errors
/// There is none; or queries, keys or values come from an input that a decoder's call doesn't have.
pub fn first_call<'a>(samples: &SampleCalls<'a>, candidate: &AttentionCandidate<'a>) -> Result<CallShape, Refusal> {
    let operands = [
        (OperandKind::Queries, candidate.query),
        (OperandKind::Keys, candidate.key),
        (OperandKind::Values, candidate.value),
    ];
    let mut first_failure = None;
    for call in FIRST {
        let env = samples.run(call)?;
        let mut known = operands
            .map(|(_, name)| name)
            .into_iter()
            .chain([candidate.output])
            .map(|name| env.need(name));
        match known.find_map(Result::err) {
            None => {
                let foreign = operands
                    .into_iter()
                    .find_map(|(kind, from)| Some((kind, foreign_input(samples, from)?)));
                return foreign.map_or(Ok(call), |(kind, input)| Err(comes_from(kind, input)));
            }
            Some(why) => {
                let explained = || unknown_input(samples, &env, operands).unwrap_or_else(|| why.into());
                first_failure.get_or_insert_with(explained);
            }
        }
    }
    Err(first_failure.unwrap_or_else(|| ProofRefusal::NoOutput.into()))
}

/// The input that a value comes from, where it depends on no token and no cache: of what an encoder gave, for instance.
fn foreign_input<'a>(samples: &SampleCalls<'a>, value: &'a str) -> Option<&'a str> {
    let view = samples.view;
    let (mut open, mut seen, mut other) = (vec![value], HashSet::new(), None);
    while let Some(name) = open.pop() {
        if !seen.insert(name) || view.initializer(name).is_some() {
            continue;
        }
        if view.is_input(name) {
            match name {
                INPUT_IDS | INPUTS_EMBEDS => return None,
                ATTENTION_MASK | POSITION_IDS => {}
                _ if samples.is_cache(name) => return None,
                _ => other = Some(name),
            }
        }
        open.extend(view.producer(name).into_iter().flat_map(reads));
    }
    other
}

/// Names an input whose shape is not known where queries, keys or values come from one.
fn unknown_input(samples: &SampleCalls, env: &Env, operands: [(OperandKind, &str); 3]) -> Option<Refusal> {
    for (kind, from) in operands {
        let mut open = vec![from];
        let mut seen = HashSet::new();
        while let Some(name) = open.pop() {
            if env.get(name).is_some() || !seen.insert(name) {
                continue;
            }
            if samples.view.is_input(name) {
                return Some(comes_from(kind, name));
            }
            open.extend(samples.view.producer(name).into_iter().flat_map(reads));
        }
    }
    None
}

fn comes_from(kind: OperandKind, input: &str) -> Refusal {
    let input = input.to_owned();
    OperandRefusal::ForeignInput { kind, input }.into()
}

/// Heads and head size, from the shapes of the caches and of the queries in a call.
fn head_sizes(
    first: CallShape,
    env: &Env,
    candidate: &AttentionCandidate,
    cache: &KvCache,
) -> Result<HeadSizes, Refusal> {
    let [(hkv, d), (value_heads, value_size)] = cache.past_sizes(env)?;
    if d != value_size || hkv != value_heads {
        return Err(OperandRefusal::KeysAndValues {
            key_heads: hkv,
            key_size: d,
            value_heads,
            value_size,
        }
        .into());
    }
    let queries = env.shape(candidate.query);
    let elements: usize = queries
        .map_err(|why| in_kind(OperandKind::Queries, why.into()))?
        .iter()
        .product();
    let hq = elements.checked_div(first.b * first.s * d).unwrap_or(0);
    if hkv == 0 || hq == 0 || hq * first.b * first.s * d != elements || !hq.is_multiple_of(hkv) {
        return Err(OperandRefusal::QueryHeads {
            elements,
            head_size: d,
            kv_heads: hkv,
        }
        .into());
    }
    cache.has_total(env, [first.b, hkv, first.total(), d])?;
    Ok(HeadSizes { hq, hkv, d })
}

/// `[b, h, s, d]` numbers as a value of a layout has them.
pub fn laid_out(data: &[f64], [b, h, s, d]: [usize; 4], layout: HeadLayout) -> Vec<f64> {
    if layout == HeadLayout::Heads {
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

/// Layouts that a shape may have, for `[b, h, s, d]` numbers.
pub fn layouts(shape: &[usize], [b, h, s, d]: [usize; 4]) -> Vec<HeadLayout> {
    let mut found = Vec::new();
    if shape == [b, s, h * d] {
        found.push(HeadLayout::Flat);
    }
    if shape == [b, s, h, d] {
        found.push(HeadLayout::TokenHeads);
    }
    if shape == [b, h, s, d] {
        found.push(HeadLayout::Heads);
    }
    found
}

/// The value farthest before `target` that holds the same heads in a known layout, all multiplied with one number; with
/// `factor` where that is given.
fn find_operand<'a>(
    samples: &SampleCalls<'a>,
    env: &Env<'a>,
    target: &'a str,
    dims: [usize; 4],
    factor: Option<f64>,
) -> Result<Operand<'a>, Refusal> {
    let shape = env.shape(target)?;
    let flat_target = shape.len() == 3 && shape == [dims[0], dims[2], dims[1] * dims[3]];
    let truth = noise(dims.iter().product(), 1);
    let expected = laid_out(
        &truth,
        dims,
        if flat_target {
            HeadLayout::Flat
        } else {
            HeadLayout::Heads
        },
    );
    let mut best: Option<Operand> = None;
    for name in invariant_chain(samples, target) {
        let Ok(shape) = env.shape(name) else { continue };
        for layout in layouts(shape, dims) {
            let substituted = Tensor::new(shape.to_vec(), DataType::Float, laid_out(&truth, dims, layout));
            let tried = samples.program().substitute(env, vec![(name, substituted)], &[target]);
            let Some(got) = tried.get(target).and_then(|t| t.data.as_ref()) else {
                continue;
            };
            let fits = |f: &f64| factor.is_none_or(|expected| (f - expected).abs() < 1e-9);
            let Some(factor) = ratio(&expected, got).filter(fits) else {
                continue;
            };
            // Flat needs no node, the others do: of two equally good ones, the farther.
            if best.is_none_or(|b| layout as u8 <= b.layout as u8) {
                best = Some(Operand { name, layout, factor });
            }
        }
    }
    best.ok_or_else(|| {
        let shape = env.shape(target).unwrap_or_default().to_vec();
        OperandRefusal::Layout {
            name: target.to_owned(),
            shape,
            heads: dims[1],
            head_size: dims[3],
        }
        .into()
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

/// Whether rotary embedding shows before a value, within a few nodes.
pub fn rope_before(samples: &SampleCalls, name: &str) -> Rope {
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
