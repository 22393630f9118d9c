//! Attentions that are one node:
//! [Attention](https://onnx.ai/onnx/operators/onnx__Attention.html) and
//! [com.microsoft.MultiHeadAttention](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention)
//! with their numbers, others of com.microsoft with their shapes.

use super::{Inputs, OpCall, Outputs, reduce::softmax_row, size};
use crate::eval::{Error, Tensor, layout::broadcast, lazy::Lazy, tensor::numel};
use ndarray::{Array4, ArrayView4, Axis, concatenate, s};
use retro_onnx::{DataType, NodeProto};

/// What a node adds to its scores, and the sizes that it works with.
pub struct Scores {
    /// B, heads, S, T, row-major; -inf where nothing is attended to.
    pub bias: Tensor,
    /// B, heads, S, T. One head stands for all where they don't differ.
    pub shape: [usize; 4],
}

struct Sizes {
    b: usize,
    hq: usize,
    hkv: usize,
    s: usize,
    /// Tokens that the node's own past holds.
    past: usize,
    /// All keys.
    t: usize,
    d: usize,
    dv: usize,
}

fn attribute(node: &NodeProto, name: &str, default: i64) -> i64 {
    node.attribute(name).map_or(default, |a| a.i())
}

fn input<'i>(inputs: Inputs<'i>, slot: usize) -> Option<&'i Tensor> {
    inputs.get(slot)?.as_deref()
}

/// Where the past comes in.
fn past_slots(node: &NodeProto) -> (usize, usize) {
    if node.is("", "Attention") { (4, 5) } else { (6, 7) }
}

fn sizes(node: &NodeProto, inputs: Inputs) -> Result<Sizes, Error> {
    let standard = node.is("", "Attention");
    let (hq, hkv) = if standard {
        (attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0))
    } else {
        let heads = attribute(node, "num_heads", 0);
        (heads, heads)
    };
    let [q, k, v] = [0, 1, 2].map(|slot| input(inputs, slot));
    let (Some(q), Some(k), Some(v)) = (q, k, v) else {
        return Err("query, key and value are not three inputs".into());
    };
    // Heads, tokens and size of each, in whichever of the two shapes it comes.
    let read = |t: &Tensor, heads: i64| -> Result<[usize; 4], Error> {
        match *t.shape.as_slice() {
            [b, h, s, d] => Ok([b, h, s, d]),
            [b, s, w] => {
                let h = usize::try_from(heads).ok().filter(|h| *h > 0 && w % h == 0);
                let h = h.ok_or_else(|| Error::Sizes(format!("{w} elements are not {heads} heads")))?;
                Ok([b, h, s, w / h])
            }
            _ => Err(Error::Shape {
                what: "a query, key or value",
                actual: t.shape.clone(),
            }),
        }
    };
    let ([b, hq, s, d], [_, hkv, new, _], [_, _, _, dv]) = (read(q, hq)?, read(k, hkv)?, read(v, hkv)?);
    let past = match input(inputs, past_slots(node).0).map(|p| p.shape.as_slice()) {
        None => 0,
        Some(&[_, _, past, _]) => past,
        Some(other) => {
            return Err(Error::Shape {
                what: "the past key",
                actual: other.to_vec(),
            });
        }
    };
    if hkv == 0 || hq % hkv != 0 {
        return Err(Error::Sizes(format!("{hq} query heads do not go into {hkv} key heads")));
    }
    let t = past.checked_add(new).ok_or("sizes that are too large")?;
    Ok(Sizes {
        b,
        hq,
        hkv,
        s,
        past,
        t,
        d,
        dv,
    })
}

/// What the node adds to its scores for these inputs.
///
/// # Errors
/// The node has an input or an attribute that isn't supported.
pub fn fused_scores(node: &NodeProto, inputs: Inputs) -> Result<Scores, Error> {
    let z = sizes(node, inputs)?;
    let standard = node.is("", "Attention");
    let causal = attribute(node, if standard { "is_causal" } else { "unidirectional" }, 0) != 0;
    let added = input(inputs, if standard { 3 } else { 5 });
    // Masks are mostly the same for all heads.
    let heads = match added.map(|m| m.shape.as_slice()) {
        Some(&[.., heads, _, _]) if heads == z.hq => heads,
        _ => 1,
    };
    let shape = [z.b, heads, z.s, z.t];
    let added = added.map(|mask| mask_numbers(mask, &shape, standard)).transpose()?;
    let padding = match input(inputs, 4).filter(|_| !standard) {
        Some(mask) => Some(key_padding(mask, z.b, z.t)?),
        None => None,
    };
    let [left, right] = windows(node)?;
    let (s, t, past) = (z.s, z.t, z.past);
    let of = added.as_ref().map(|(numbers, _)| numbers.clone());
    let bias = Lazy::new(&of.iter().collect::<Vec<_>>(), move |at| {
        let (j, i, b) = (at % t, at / t % s, at / (t * s * heads));
        let p = i + past;
        let seen = (!causal || j <= p)
            && left.is_none_or(|left| p.saturating_sub(left) <= j)
            && right.is_none_or(|right| j <= p.saturating_add(right))
            && padding.as_ref().is_none_or(|seen| seen(b, j));
        if !seen {
            return f64::NEG_INFINITY;
        }
        match &added {
            Some((numbers, true)) if numbers.at(at) == 0.0 => f64::NEG_INFINITY,
            Some((numbers, false)) => numbers.at(at),
            _ => 0.0,
        }
    });
    let first = input(inputs, 0).map_or(DataType::Float, |q| q.data_type);
    Ok(Scores {
        bias: Tensor::computed(shape.to_vec(), first, bias)?,
        shape,
    })
}

/// A mask's numbers by the place in `shape`, and whether they are truth values.
fn mask_numbers(mask: &Tensor, shape: &[usize; 4], standard: bool) -> Result<(Lazy, bool), Error> {
    let t = shape[3];
    if standard && let Some(last) = mask.shape.last().filter(|last| **last < t && **last != 1) {
        return Err(Error::Sizes(format!("its mask has {last} columns for {t} keys")));
    }
    let wrong = |why| Error::Mask(Box::new(why));
    if broadcast(&mask.shape, shape).map_err(wrong)? != shape {
        return Err(Error::Shape {
            what: "its mask",
            actual: mask.shape.clone(),
        });
    }
    let numbers = mask.broadcast_numbers(shape).map_err(wrong)?;
    Ok((numbers, mask.data_type == DataType::Bool))
}

/// Whether a sequence sees a key.
type Seen = Box<dyn Fn(usize, usize) -> bool>;

fn key_padding(mask: &Tensor, b: usize, t: usize) -> Result<Seen, Error> {
    let numbers = mask.numbers().ok_or("its key_padding_mask is not known")?;
    match *mask.shape.as_slice() {
        [rows] if rows == b => Ok(Box::new(move |b, j| (j as f64) < numbers.at(b))),
        [rows, width] if rows == b && width == t => Ok(Box::new(move |b, j| numbers.at(b * width + j) != 0.0)),
        _ => Err(Error::Shape {
            what: "its key_padding_mask",
            actual: mask.shape.clone(),
        }),
    }
}

/// How many tokens before and after itself a token sees at most (ai.onnx::Attention, opset 25).
pub fn windows(node: &NodeProto) -> Result<[Option<usize>; 2], Error> {
    let read = |name: &str| match attribute(node, name, -1) {
        -1 => Ok(None),
        n => usize::try_from(n).map(Some).map_err(|_| Error::Attribute {
            name: name.to_owned(),
            value: n.to_string(),
        }),
    };
    Ok([read("left_window_size")?, read("right_window_size")?])
}

/// A tensor `[B, S, H*D]` or `[B, H, S, D]` as `[B, H, S, D]`, plus a bias of `H*D`. None where its numbers are not stored, or are
/// fewer.
fn by_heads(t: &Tensor, [b, h, s, d]: [usize; 4], bias: Option<&[f64]>) -> Option<Array4<f64>> {
    let view = t.view().ok()?;
    let mut heads = if t.shape.len() == 3 {
        let tokens = view.into_shape_with_order((b, s, h, d)).ok()?;
        tokens.permuted_axes([0, 2, 1, 3]).to_owned()
    } else {
        view.into_shape_with_order((b, h, s, d)).ok()?.to_owned()
    };
    if let Some(bias) = bias {
        heads += &ndarray::ArrayView3::from_shape((h, 1, d), bias).ok()?;
    }
    Some(heads)
}

/// Queries, keys and values `[B, H, S or T, D]`, the past before the new ones.
struct Operands {
    q: Array4<f64>,
    k: Array4<f64>,
    v: Array4<f64>,
}

/// None where one is not stored.
fn operands(node: &NodeProto, inputs: Inputs, z: &Sizes) -> Result<Option<Operands>, Error> {
    let bias = input(inputs, 3).filter(|_| !node.is("", "Attention"));
    if bias.is_some_and(|b| b.data.is_none()) {
        return Ok(None);
    }
    let bias = bias.and_then(|b| b.data.as_deref());
    let part = |from: usize, len: usize| match bias {
        None => Ok(None),
        Some(b) => b
            .get(from..from.saturating_add(len))
            .map(Some)
            .ok_or(Error::Invalid("its bias is too short")),
    };
    let (qw, kw, vw) = (z.hq * z.d, z.hkv * z.d, z.hkv * z.dv);
    let new = z.t - z.past;
    let whole = |slot: usize, shape, bias| input(inputs, slot).and_then(|t| by_heads(t, shape, bias));
    let (Some(q), Some(mut k), Some(mut v)) = (
        whole(0, [z.b, z.hq, z.s, z.d], part(0, qw)?),
        whole(1, [z.b, z.hkv, new, z.d], part(qw, kw)?),
        whole(2, [z.b, z.hkv, new, z.dv], part(qw + kw, vw)?),
    ) else {
        return Ok(None);
    };
    let slots = past_slots(node);
    if let (Some(past_k), Some(past_v)) = (input(inputs, slots.0), input(inputs, slots.1)) {
        if past_k.data.is_none() || past_v.data.is_none() {
            return Ok(None);
        }
        let append = |past: &Tensor, new: &Array4<f64>, d: usize| {
            let past = by_heads(past, [z.b, z.hkv, z.past, d], None)?;
            concatenate(Axis(2), &[past.view(), new.view()]).ok()
        };
        let other = Error::Invalid("its past has another shape than its keys and values");
        k = append(past_k, &k, z.d).ok_or(other.clone())?;
        v = append(past_v, &v, z.dv).ok_or(other)?;
    }
    Ok(Some(Operands { q, k, v }))
}

/// Attention of each head, `[B, H, S, Dv]`.
fn attend(z: &Sizes, o: &Operands, scale: f64, softcap: f64, bias: ArrayView4<f64>) -> Array4<f64> {
    let mut out = Array4::zeros((z.b, z.hq, z.s, z.dv));
    for b in 0..z.b {
        for h in 0..z.hq {
            let kv = h / (z.hq / z.hkv);
            let keys = o.k.slice(s![b, kv, .., ..]);
            let mut scores = o.q.slice(s![b, h, .., ..]).dot(&keys.t());
            scores *= scale;
            if softcap != 0.0 {
                scores.mapv_inplace(|x| softcap * (x / softcap).tanh());
            }
            scores += &bias.slice(s![b, h.min(bias.shape()[1] - 1), .., ..]);
            let mut scores = scores.as_standard_layout().into_owned();
            if let Some(scores) = scores.as_slice_mut() {
                scores.chunks_mut(z.t.max(1)).for_each(softmax_row);
            }
            let mixed = scores.dot(&o.v.slice(s![b, kv, .., ..]));
            out.slice_mut(s![b, h, .., ..]).assign(&mixed);
        }
    }
    out
}

/// Output, present key and present value.
pub(super) fn fused(call: &OpCall) -> Result<Outputs, Error> {
    const MAX_CACHE: usize = 1 << 22;
    const MAX_WORK: usize = 1 << 24;
    let (node, inputs) = (call.node, call.inputs);
    let z = sizes(node, inputs)?;
    let standard = node.is("", "Attention");
    let first = call.need(0)?;
    let data_type = first.data_type;
    let flat = first.shape.len() == 3;
    let out_shape = if flat {
        vec![z.b, z.s, z.hq.saturating_mul(z.dv)]
    } else {
        vec![z.b, z.hq, z.s, z.dv]
    };
    let cache = |d: usize| vec![z.b, z.hkv, z.t, d];
    let shapes = [out_shape, cache(z.d), cache(z.dv)];
    for shape in &shapes {
        numel(shape)?;
    }
    let unknown = || {
        shapes
            .iter()
            .map(|s| Some(Tensor::unknown(s.clone(), data_type)))
            .collect()
    };
    let work = numel(&[z.b, z.hq, z.s, z.t, z.d])?.max(numel(&[z.b, z.hq, z.s, z.t, z.dv])?);
    if numel(&shapes[1])? > MAX_CACHE || work > MAX_WORK || numel(&shapes[0])?.max(numel(&shapes[2])?) > MAX_CACHE {
        return Ok(unknown());
    }
    let Some(operands) = operands(node, inputs, &z)? else {
        return Ok(unknown());
    };
    let scores = fused_scores(node, inputs)?;
    let bias = scores.bias.stored();
    if bias.data.is_none() {
        return Ok(unknown());
    }
    let bias = bias
        .view()?
        .into_dimensionality()
        .map_err(|_| Error::Invalid("its mask is not known"))?;
    let scale = call.float("scale").unwrap_or(0.0);
    let scale = if scale == 0.0 { 1.0 / (z.d as f64).sqrt() } else { scale };
    let softcap = call.float("softcap").filter(|_| standard).unwrap_or(0.0);
    let mut out = attend(&z, &operands, scale, softcap, bias);
    if flat {
        out = out.permuted_axes([0, 2, 1, 3]);
    }
    let [shape, ..] = shapes;
    let out = Tensor::of_array(out.into_dyn(), data_type).reshaped(shape)?;
    let cache = |t: Array4<f64>| Some(Tensor::of_array(t.into_dyn(), data_type));
    Ok(vec![Some(out), cache(operands.k), cache(operands.v)])
}

/// Shapes of what
/// [com.microsoft.GroupQueryAttention](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention)
/// gives: output, present key and value.
pub(super) fn grouped(call: &OpCall) -> Result<Outputs, Error> {
    let q = call.need(0)?;
    let (hq, hkv) = (size(call.int("num_heads", 0))?, size(call.int("kv_num_heads", 0))?);
    let &[b, s, width] = q.shape.as_slice() else {
        return Err(Error::Shape {
            what: "a query",
            actual: q.shape.clone(),
        });
    };
    let packed = call.get(1).is_none();
    let heads = if packed {
        hq.saturating_add(hkv.saturating_mul(2))
    } else {
        hq
    };
    if heads == 0 {
        return Err("no heads".into());
    }
    let shape = vec![b, s, (width / heads).saturating_mul(hq)];
    numel(&shape)?;
    let cache = |slot: usize| call.get(slot).map(|t| Tensor::unknown(t.shape.clone(), t.data_type));
    Ok(vec![Some(Tensor::unknown(shape, q.data_type)), cache(3), cache(4)])
}

/// The shape of what
/// [com.microsoft.Attention](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Attention) gives:
/// input `[B, S, C]`, weights `[C, 3*H*D]` or of the sizes that it names, output `[B, S, H*Dv]`.
pub(super) fn packed(call: &OpCall) -> Result<Tensor, Error> {
    let x = call.need(0)?;
    let mut shape = x.shape.clone();
    let named = call
        .ints_attribute("qkv_hidden_sizes")
        .and_then(|sizes| sizes.get(2).copied());
    let width = match (named, call.get(1).map(|w| w.shape.as_slice())) {
        (Some(width), _) => size(width)?,
        (None, Some(&[_, all])) => all / 3,
        _ => return Err("its weights are no matrix".into()),
    };
    *shape.last_mut().ok_or("an input without dimensions")? = width;
    numel(&shape)?;
    Ok(Tensor::unknown(shape, x.data_type))
}

/// Shapes of what
/// [com.microsoft.SkipLayerNormalization](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.SkipLayerNormalization)
/// and SkipSimplifiedLayerNormalization give: the norm, and the sum that it is of.
pub(super) fn skip_norm(call: &OpCall) -> Result<Outputs, Error> {
    let first = call.need(0)?;
    let same = || Some(Tensor::unknown(first.shape.clone(), first.data_type));
    Ok(vec![same(), None, None, same()])
}
