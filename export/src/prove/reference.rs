//! The operator's formula, computed in f64 on random numbers, to compare an attention with.
//!
//! `out[i] = sum_j p[i,j] v[j]`, `p = softmax_j(softcap * tanh(scale * q[i].k[j] / softcap))` over the keys `j` that the mask
//! lets token `i` see, with one more term in the denominator where a head has a sink. As
//! `com.microsoft::GroupQueryAttention` of ONNX Runtime defines it.

use super::{
    call_shape::CallShape,
    noise::noise,
    operands::{HeadSizes, Operands, laid_out, layouts},
    refusal::{CacheRefusal, OperandRefusal, Refusal},
    sample_calls::SampleCalls,
    supported_mask::SupportedMask,
};
use crate::eval::{Env, Tensor};
use retro_onnx::DataType;

/// What an attention does to its scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    pub scale: f64,
    /// 0: none.
    pub softcap: f64,
}

/// What was found out about an attention, as the formula needs it.
pub struct Formula {
    pub mask: SupportedMask,
    pub scale: Scale,
    /// `[Hq]`: logits beside the scores.
    pub sinks: Option<Vec<f64>>,
}

/// Random queries, keys, values and caches for a call of an attention.
pub struct ReferenceCall {
    call: CallShape,
    heads: HeadSizes,
    /// `[B, Hq, S, D]`.
    queries: Vec<f64>,
    /// Keys and values of the past, `[B, Hkv, past, D]`.
    past: [Vec<f64>; 2],
    /// Keys and values of the tokens fed, `[B, Hkv, S, D]`.
    new: [Vec<f64>; 2],
    /// Shapes that queries, keys and values have in the graph.
    shapes: [Vec<usize>; 3],
}

impl ReferenceCall {
    /// Numbers between -1 and 1; the queries' are multiplied with `size`.
    ///
    /// # Errors
    /// In this call queries, keys, values or caches have other shapes than in the first.
    pub fn new(samples: &SampleCalls, operands: &Operands, call: CallShape, size: f64) -> Result<Self, Refusal> {
        let env = samples.run(call)?;
        let heads = operands.heads;
        let shape = |name: &str| env.shape(name).map(<[usize]>::to_vec);
        let [query, key, value] = operands.qkv.map(|operand| operand.name);
        let shapes = [shape(query)?, shape(key)?, shape(value)?];
        let dims = [heads.hq, heads.hkv, heads.hkv].map(|h| [call.b, h, call.s, heads.d]);
        for ((shape, dims), operand) in shapes.iter().zip(dims).zip(operands.qkv) {
            if !layouts(shape, dims).contains(&operand.layout) {
                return Err(OperandRefusal::LayoutInCall {
                    call,
                    name: operand.name.to_owned(),
                    shape: shape.clone(),
                }
                .into());
            }
        }
        let past_key = operands.cache.past[0];
        if env.shape(past_key)? != [call.b, heads.hkv, call.past, heads.d] {
            let past = past_key.to_owned();
            return Err(CacheRefusal::ShapeInCall { call, past }.into());
        }
        let mut queries = noise(call.b * heads.hq * call.s * heads.d, 11);
        queries.iter_mut().for_each(|x| *x *= size);
        let kv = call.b * heads.hkv * heads.d;
        Ok(Self {
            call,
            heads,
            queries,
            past: [noise(kv * call.past, 12), noise(kv * call.past, 13)],
            new: [noise(kv * call.s, 14), noise(kv * call.s, 15)],
            shapes,
        })
    }

    /// The numbers as values of the graph.
    pub fn seeds<'a>(&self, operands: &Operands<'a>) -> Vec<(&'a str, Tensor)> {
        let (call, HeadSizes { hq, hkv, d }) = (self.call, self.heads);
        let mut seeds = Vec::new();
        let values = [(&self.queries, hq), (&self.new[0], hkv), (&self.new[1], hkv)];
        for ((operand, shape), (data, h)) in operands.qkv.iter().zip(&self.shapes).zip(values) {
            let data = laid_out(data, [call.b, h, call.s, d], operand.layout);
            seeds.push((operand.name, Tensor::new(shape.clone(), DataType::Float, data)));
        }
        for (name, data) in operands.cache.past.iter().zip(&self.past) {
            let shape = vec![call.b, hkv, call.past, d];
            seeds.push((*name, Tensor::new(shape, DataType::Float, data.clone())));
        }
        seeds
    }

    /// Adds a node's own biases to the queries, keys and values of the tokens fed.
    ///
    /// # Errors
    /// The bias is not `[(Hq+2*Hkv)*D]` constants.
    pub fn add_bias(&mut self, env: &Env, name: &str) -> Result<(), Refusal> {
        let bias = env.need(name)?.data.clone();
        let bias = bias.ok_or_else(|| OperandRefusal::BiasNotConstant { name: name.to_owned() })?;
        let (call, HeadSizes { hq, hkv, d }) = (self.call, self.heads);
        let starts = [0, hq * d, (hq + hkv) * d];
        let [keys, values] = &mut self.new;
        for ((data, h), start) in [(&mut self.queries, hq), (keys, hkv), (values, hkv)]
            .into_iter()
            .zip(starts)
        {
            for (at, x) in data.iter_mut().enumerate() {
                let place = start + at / (d * call.s) % h * d + at % d;
                *x += bias
                    .get(place)
                    .ok_or_else(|| OperandRefusal::BiasTooShort { name: name.to_owned() })?;
            }
        }
        Ok(())
    }

    /// The cache of keys or values with the new tokens, `[B, Hkv, past + S, D]`; `which`: 0 keys, 1 values.
    pub fn total(&self, which: usize) -> Vec<f64> {
        let mut total = Vec::new();
        for b in 0..self.call.b {
            for kv_head in 0..self.heads.hkv {
                (0..self.call.total()).for_each(|j| total.extend_from_slice(self.row(which, b, kv_head, j)));
            }
        }
        total
    }

    /// The key or value of token `j`, `[D]`.
    fn row(&self, which: usize, b: usize, kv_head: usize, j: usize) -> &[f64] {
        let (call, HeadSizes { hkv, d, .. }) = (self.call, self.heads);
        let (from, data) = if j < call.past {
            (((b * hkv + kv_head) * call.past + j) * d, &self.past[which])
        } else {
            (((b * hkv + kv_head) * call.s + j - call.past) * d, &self.new[which])
        };
        data.get(from..from + d).unwrap_or_default()
    }

    /// The product of the query of a head and a token fed with the key of token `j`.
    pub fn dot(&self, b: usize, head: usize, i: usize, j: usize) -> f64 {
        let heads = self.heads;
        let from = ((b * heads.hq + head) * self.call.s + i) * heads.d;
        let query = self.queries.get(from..from + heads.d).unwrap_or_default();
        let key = self.row(0, b, heads.kv_head(head), j);
        query.iter().zip(key).map(|(a, b)| a * b).sum()
    }

    /// The operator's outputs, a row `[D]` for each of `[B, Hq, S]`; none for tokens of padding.
    pub fn outputs(&self, formula: &Formula) -> Vec<Option<Vec<f64>>> {
        let mut rows = Vec::new();
        for b in 0..self.call.b {
            for head in 0..self.heads.hq {
                for i in 0..self.call.s {
                    let padding = self.call.past + i < self.call.first(b);
                    rows.push((!padding).then(|| self.output(formula, b, head, i)));
                }
            }
        }
        rows
    }

    /// What a head gives for a token fed, `[D]`.
    fn output(&self, formula: &Formula, b: usize, head: usize, i: usize) -> Vec<f64> {
        let at = self.call.past + i;
        let first = if formula.mask.padding { self.call.first(b) } else { 0 };
        let first = first.max(formula.mask.window.map_or(0, |w| (at + 1).saturating_sub(w)));
        let Scale { scale, softcap } = formula.scale;
        let scores: Vec<f64> = (first..=at)
            .map(|j| {
                let score = self.dot(b, head, i, j) * scale;
                if softcap == 0.0 {
                    score
                } else {
                    softcap * (score / softcap).tanh()
                }
            })
            .collect();
        let sink = formula.sinks.as_ref().and_then(|s| s.get(head).copied());
        let most = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().copied().chain(sink).map(|s| (s - most).exp()).sum();
        let mut out = vec![0.0; self.heads.d];
        for (j, score) in (first..=at).zip(scores) {
            let p = (score - most).exp() / sum;
            let value = self.row(1, b, self.heads.kv_head(head), j);
            out.iter_mut().zip(value).for_each(|(o, v)| *o += p * v);
        }
        out
    }
}
