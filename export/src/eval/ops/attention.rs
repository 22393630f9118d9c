//! Attention nodes of one operator, as numbers: com.microsoft::MultiHeadAttention and ai.onnx::Attention.

use crate::eval::{
    Error,
    tensor::{Lazy, Tensor, broadcast, numel},
};
use retro_onnx::{DataType, NodeProto};
use std::rc::Rc;

type Inputs<'i> = &'i [Option<Rc<Tensor>>];

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
    let t = past.checked_add(new).ok_or("absurd sizes")?;
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
/// The node has an input or an attribute that isn't understood.
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
    let numbers = mask.spread_numbers(shape).map_err(wrong)?;
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

/// A tensor `[B, S, H*D]` or `[B, H, S, D]` as `[B, H, S, D]`, plus a bias of `H*D`.
fn by_heads(t: &Tensor, [b, h, s, d]: [usize; 4], bias: Option<&[f64]>) -> Option<Vec<f64>> {
    let data = t.data.as_ref()?;
    let flat = t.shape.len() == 3;
    let mut out = Vec::with_capacity(data.len());
    for bi in 0..b {
        for hi in 0..h {
            for si in 0..s {
                for di in 0..d {
                    let at = if flat {
                        ((bi * s + si) * h + hi) * d + di
                    } else {
                        ((bi * h + hi) * s + si) * d + di
                    };
                    let more = bias.map_or(Some(0.0), |bias| bias.get(hi * d + di).copied())?;
                    out.push(data.get(at)? + more);
                }
            }
        }
    }
    Some(out)
}

/// `past` before `new`, along the tokens of `[B, H, T, D]`.
pub(super) fn append(past: &[f64], new: &[f64], rows: usize, past_len: usize, new_len: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(past.len() + new.len());
    for row in 0..rows {
        out.extend(past.iter().skip(row * past_len).take(past_len));
        out.extend(new.iter().skip(row * new_len).take(new_len));
    }
    out
}

/// Softmax over rows of `width`; a row without any key gives zeros.
pub(super) fn softmax(data: &mut [f64], width: usize) {
    for row in data.chunks_mut(width.max(1)) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shift = if max.is_finite() { max } else { 0.0 };
        row.iter_mut().for_each(|x| *x = (*x - shift).exp());
        let sum: f64 = row.iter().sum();
        if sum > 0.0 {
            row.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

/// Output, present key and present value.
pub(super) fn fused(node: &NodeProto, inputs: Inputs) -> Result<Vec<Option<Tensor>>, Error> {
    let z = sizes(node, inputs)?;
    let standard = node.is("", "Attention");
    let first = input(inputs, 0).ok_or("it has no query")?;
    let data_type = first.data_type;
    let flat = first.shape.len() == 3;
    let out_shape = if flat {
        vec![z.b, z.s, z.hq * z.dv]
    } else {
        vec![z.b, z.hq, z.s, z.dv]
    };
    let cache = |d: usize| vec![z.b, z.hkv, z.t, d];
    let shapes = [out_shape, cache(z.d), cache(z.dv)];
    let nothing = || {
        shapes
            .iter()
            .map(|s| Some(Tensor::unknown(s.clone(), data_type)))
            .collect()
    };
    if numel(&shapes[1])? > 1 << 22 || numel(&[z.b, z.hq, z.s, z.t, z.d])? > 1 << 24 {
        return Ok(nothing());
    }
    let bias = if standard {
        None
    } else {
        input(inputs, 3).and_then(|b| b.data.as_deref())
    };
    if !standard && input(inputs, 3).is_some() && bias.is_none() {
        return Ok(nothing());
    }
    let part = |from: usize, len: usize| match bias {
        None => Ok(None),
        Some(b) => b
            .get(from..from + len)
            .map(Some)
            .ok_or(Error::Invalid("its bias is too short")),
    };
    let (qw, kw, vw) = (z.hq * z.d, z.hkv * z.d, z.hkv * z.dv);
    let new = z.t - z.past;
    let whole = |slot: usize, shape, bias| input(inputs, slot).and_then(|t| by_heads(t, shape, bias));
    let (q, k, v) = (
        whole(0, [z.b, z.hq, z.s, z.d], part(0, qw)?),
        whole(1, [z.b, z.hkv, new, z.d], part(qw, kw)?),
        whole(2, [z.b, z.hkv, new, z.dv], part(qw + kw, vw)?),
    );
    let (Some(q), Some(mut k), Some(mut v)) = (q, k, v) else {
        return Ok(nothing());
    };
    let slots = past_slots(node);
    if let (Some(pk), Some(pv)) = (input(inputs, slots.0), input(inputs, slots.1)) {
        let (Some(pk), Some(pv)) = (&pk.data, &pv.data) else {
            return Ok(nothing());
        };
        if pk.len() != z.b * z.hkv * z.past * z.d || pv.len() != z.b * z.hkv * z.past * z.dv {
            return Err("its past has another shape than its keys and values".into());
        }
        k = append(pk, &k, z.b * z.hkv, z.past * z.d, new * z.d);
        v = append(pv, &v, z.b * z.hkv, z.past * z.dv, new * z.dv);
    }
    let scores = fused_scores(node, inputs)?;
    let given = node.attribute("scale").map_or(0.0, |a| f64::from(a.f()));
    let scale = if given == 0.0 { 1.0 / (z.d as f64).sqrt() } else { given };
    let softcap = if standard {
        node.attribute("softcap").map_or(0.0, |a| f64::from(a.f()))
    } else {
        0.0
    };
    let heads = scores.shape[1];
    let mask = scores.bias.numbers().ok_or("its mask is not known")?;
    let mut out = vec![0.0; numel(&shapes[0])?];
    let mut row = vec![0.0; z.t];
    for b in 0..z.b {
        for h in 0..z.hq {
            let kv = b * z.hkv + h / (z.hq / z.hkv);
            for i in 0..z.s {
                let at = (b * z.hq + h) * z.s + i;
                for (j, x) in row.iter_mut().enumerate() {
                    let dot: f64 = (0..z.d).map(|d| q[at * z.d + d] * k[(kv * z.t + j) * z.d + d]).sum();
                    let mut score = dot * scale;
                    if softcap != 0.0 {
                        score = softcap * (score / softcap).tanh();
                    }
                    *x = score + mask.at(((b * heads + h.min(heads.saturating_sub(1))) * z.s + i) * z.t + j);
                }
                softmax(&mut row, z.t);
                for d in 0..z.dv {
                    let sum: f64 = row
                        .iter()
                        .enumerate()
                        .map(|(j, p)| p * v[(kv * z.t + j) * z.dv + d])
                        .sum();
                    let to = if flat {
                        ((b * z.s + i) * z.hq + h) * z.dv + d
                    } else {
                        at * z.dv + d
                    };
                    out[to] = sum;
                }
            }
        }
    }
    let [o, ks, vs] = shapes;
    Ok(vec![
        Some(Tensor::new(o, data_type, out)),
        Some(Tensor::new(ks, data_type, k)),
        Some(Tensor::new(vs, data_type, v)),
    ])
}
