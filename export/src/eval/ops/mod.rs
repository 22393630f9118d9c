//! One operator after the other: shapes always, numbers where they are known. What is not listed gives the shape of its
//! first input (norms, activations and the like); a wrong guess shows, because shapes then no longer go together.

mod attention;

pub use attention::{fused_scores, windows};

use super::{
    Error,
    tensor::{Lazy, Tensor, are_held, broadcast, numbers, numel, strided, strides},
};
use retro_onnx::{DataType, NodeProto};
use std::{cell::RefCell, collections::HashMap, rc::Rc};

type Inputs<'i> = &'i [Option<Rc<Tensor>>];
type Outputs = Vec<Option<Tensor>>;

/// Multiplications that are worth doing.
const MAX_WORK: usize = 1 << 25;

/// A node's inputs and attributes in short.
struct Call<'c> {
    node: &'c NodeProto,
    inputs: Inputs<'c>,
    opset: i64,
}

impl<'c> Call<'c> {
    fn get(&self, slot: usize) -> Option<&'c Tensor> {
        self.inputs.get(slot)?.as_deref()
    }

    fn need(&self, slot: usize) -> Result<&'c Tensor, Error> {
        self.get(slot).ok_or(Error::InputAbsent(slot))
    }

    fn int(&self, name: &str, default: i64) -> i64 {
        self.node.attribute(name).map_or(default, |a| a.i())
    }

    fn ints_attribute(&self, name: &str) -> Option<Vec<i64>> {
        self.node.attribute(name).map(|a| a.ints.clone())
    }

    /// Integers that are an input in new opsets and an attribute in old ones.
    fn ints(&self, slot: usize, name: &str) -> Result<Option<Vec<i64>>, Error> {
        match self.get(slot) {
            Some(t) => t.as_ints().map(Some),
            None => Ok(self.ints_attribute(name)),
        }
    }
}

fn axis_of(axis: i64, rank: usize) -> Result<usize, Error> {
    let r = rank as i64;
    let at = if axis < 0 {
        axis.checked_add(r).unwrap_or(-1)
    } else {
        axis
    };
    usize::try_from(at)
        .ok()
        .filter(|a| *a < rank)
        .ok_or(Error::Axis { axis, rank })
}

/// What is outside of the data.
fn beyond(at: usize, data: &[f64]) -> Error {
    Error::IndexOutOfRange {
        index: at as i64,
        len: data.len(),
    }
}

fn size(value: i64) -> Result<usize, Error> {
    usize::try_from(value).map_err(|_| Error::NegativeSize(value))
}

/// Operators that compute numbers when they are asked for, where there are many.
const ON_DEMAND: [&str; 27] = [
    "Identity",
    "Dropout",
    "Cast",
    "CastLike",
    "Shape",
    "Size",
    "Reshape",
    "Flatten",
    "Unsqueeze",
    "Squeeze",
    "Transpose",
    "Expand",
    "Tile",
    "Concat",
    "Slice",
    "Split",
    "Gather",
    "GatherND",
    "ScatterND",
    "ConstantOfShape",
    "EyeLike",
    "Where",
    "Trilu",
    "Pad",
    "ReduceMax",
    "ReduceMin",
    "Attention",
];

pub(super) fn evaluate(node: &NodeProto, inputs: Inputs, opset: i64) -> Result<Outputs, Error> {
    let op = node.op_type();
    let on_demand = node.op_domain().is_empty()
        && [&ON_DEMAND[..], &UNARY, &BINARY].iter().any(|ops| ops.contains(&op))
        || node.is("com.microsoft", "MultiHeadAttention");
    if on_demand || !inputs.iter().flatten().any(|t| t.lazy.is_some()) {
        return compute(node, inputs, opset);
    }
    let hold = |t: &Option<Rc<Tensor>>| t.as_ref().map(|t| t.held().into_owned()).map(Rc::new);
    compute(node, &inputs.iter().map(hold).collect::<Vec<_>>(), opset)
}

/// Whether a node makes other numbers than it reads.
pub(super) fn calculates(node: &NodeProto) -> bool {
    let op = node.op_type();
    UNARY.contains(&op) || BINARY.contains(&op) || op == "Cast" || op == "CastLike"
}

fn compute(node: &NodeProto, inputs: Inputs, opset: i64) -> Result<Outputs, Error> {
    let call = Call { node, inputs, opset };
    let one = |t: Tensor| Ok(vec![Some(t)]);
    match (node.op_domain(), node.op_type()) {
        ("", "Constant") => one(constant(node)?),
        ("", "Identity" | "Dropout") => one(call.need(0)?.clone()),
        ("", "Cast") => one(cast(call.need(0)?, call.int("to", 1))?),
        ("", "CastLike") => one(cast(call.need(0)?, i64::from(i32::from(call.need(1)?.data_type)))?),
        ("", "Shape") => one(shape(&call)?),
        ("", "Size") => one(Tensor::new(
            vec![],
            DataType::Int64,
            vec![numel(&call.need(0)?.shape)? as f64],
        )),
        ("", "Reshape") => one(reshape(&call)?),
        ("", "Flatten") => one(flatten(&call)?),
        ("", "Unsqueeze") => one(unsqueeze(&call)?),
        ("", "Squeeze") => one(squeeze(&call)?),
        ("", "Transpose") => one(transpose(&call)?),
        ("", "Expand") => one(expand(&call)?),
        ("", "Tile") => one(tile(&call)?),
        ("", "Concat") => one(concat(&call)?),
        ("", "Slice") => one(slice(&call)?),
        ("", "Split") => split(&call),
        ("", "Gather") => one(gather(&call)?),
        ("", "GatherND") => one(gather_nd(&call)?),
        ("", "GatherElements") => one(gather_elements(&call)?),
        ("", "ScatterND") => one(scatter_nd(&call)?),
        ("", "Range") => one(range(&call)?),
        ("", "ConstantOfShape") => one(constant_of_shape(&call)?),
        ("", "EyeLike") => one(eye_like(&call)?),
        ("", "Pad") => one(pad(&call)?),
        ("", "Where") => one(choose(&call)?),
        ("", "Trilu") => one(trilu(&call)?),
        ("", "CumSum") => one(cumsum(&call)?),
        ("", "NonZero") => one(non_zero(&call)?),
        ("", "Softmax") => one(softmax(&call)?),
        (
            "",
            "ReduceSum" | "ReduceMean" | "ReduceMax" | "ReduceMin" | "ReduceProd" | "ReduceSumSquare" | "ReduceL2",
        ) => one(reduce(&call)?),
        ("", "ArgMax" | "ArgMin") => one(arg_extreme(&call)?),
        ("", "MatMul" | "MatMulInteger") => one(matmul(call.need(0)?, call.need(1)?, 1.0)?),
        ("com.microsoft", "FusedMatMul") => one(fused_matmul(&call)?),
        ("", "Gemm") => one(gemm(&call)?),
        ("", "Einsum") => one(einsum(&call)?),
        ("com.microsoft", "MatMulNBits" | "MatMulBnb4" | "MatMulFpQ4") => {
            let x = call.need(0)?;
            let mut shape = x.shape.clone();
            if let (Some(last), Some(n)) = (shape.last_mut(), node.attribute("N")) {
                *last = size(n.i())?;
            }
            one(Tensor::unknown(shape, x.data_type))
        }
        ("com.microsoft", "GatherBlockQuantized") => {
            let (table, ids) = (call.need(0)?, call.need(1)?);
            let packed = table.data_type == DataType::Uint8 && call.int("bits", 4) == 4;
            let mut shape = ids.shape.clone();
            shape.extend(table.shape.iter().skip(1));
            if let Some(last) = shape.last_mut().filter(|_| packed) {
                *last = last.saturating_mul(2);
            }
            let of = call.need(2)?.data_type;
            one(Tensor::unknown(shape, of))
        }
        ("", "DequantizeLinear") => one(Tensor::unknown(call.need(0)?.shape.clone(), call.need(1)?.data_type)),
        ("", "QuantizeLinear") => one(Tensor::unknown(call.need(0)?.shape.clone(), DataType::Uint8)),
        ("", "DynamicQuantizeLinear") => Ok(vec![
            Some(Tensor::unknown(call.need(0)?.shape.clone(), DataType::Uint8)),
            Some(Tensor::unknown(vec![], DataType::Float)),
            Some(Tensor::unknown(vec![], DataType::Uint8)),
        ]),
        ("com.microsoft", "SkipSimplifiedLayerNormalization" | "SkipLayerNormalization") => {
            let same = || {
                Some(Tensor::unknown(
                    call.inputs.first()?.as_ref()?.shape.clone(),
                    call.get(0)?.data_type,
                ))
            };
            Ok(vec![same(), None, None, same()])
        }
        ("com.microsoft", "GroupQueryAttention") => grouped(&call),
        ("com.microsoft", "MultiHeadAttention") | ("", "Attention") => attention::fused(node, inputs),
        ("", op) if UNARY.contains(&op) => one(unary(&call, op)?),
        ("", op) if BINARY.contains(&op) => one(binary(&call, op)?),
        ("", "TopK") => {
            let t = call.need(0)?;
            let k = call
                .ints(1, "k")?
                .and_then(|k| k.first().copied())
                .ok_or("how many is not known")?;
            let axis = axis_of(call.int("axis", -1), t.shape.len())?;
            let mut shape = t.shape.clone();
            shape[axis] = size(k)?;
            Ok(vec![
                Some(Tensor::unknown(shape.clone(), t.data_type)),
                Some(Tensor::unknown(shape, DataType::Int64)),
            ])
        }
        ("", "Loop" | "Scan" | "Unique" | "NonMaxSuppression" | "OneHot" | "Resize") => Err(Error::NotSupported {
            domain: node.op_domain().to_owned(),
            op_type: node.op_type().to_owned(),
        }),
        _ => {
            let first = call.need(0)?;
            one(Tensor::unknown(first.shape.clone(), first.data_type))
        }
    }
}

fn constant(node: &NodeProto) -> Result<Tensor, Error> {
    let a = node.attribute.first().ok_or("a Constant without a value")?;
    let scalar = |t, x: f64| Tensor::new(vec![], t, vec![x]);
    Ok(match a.name() {
        "value" => {
            let t = a.t.as_deref().ok_or("a Constant without a value")?;
            Tensor::constant(t, 1 << 22, None).ok_or("a Constant of a strange shape")?
        }
        "value_int" => scalar(DataType::Int64, a.i() as f64),
        "value_float" => scalar(DataType::Float, f64::from(a.f())),
        "value_ints" => Tensor::ints(a.ints.iter().map(|x| *x as f64).collect()),
        "value_floats" => {
            let data: Vec<f64> = a.floats.iter().map(|x| f64::from(*x)).collect();
            Tensor::new(vec![data.len()], DataType::Float, data)
        }
        other => return Err(Error::NotComputed(format!("a Constant with {other}"))),
    })
}

/// A number as its type holds it.
fn held(x: f64, t: DataType) -> f64 {
    let most = match t {
        DataType::Float => f64::from(f32::MAX),
        DataType::Float16 => 65504.0,
        DataType::Bool => return f64::from(u8::from(x != 0.0)),
        DataType::Double | DataType::Bfloat16 => return x,
        _ => return if x.is_nan() { 0.0 } else { x.trunc() },
    };
    if x.abs() > most { x.signum() * f64::INFINITY } else { x }
}

fn cast(t: &Tensor, to: i64) -> Result<Tensor, Error> {
    let to = i32::try_from(to).ok().and_then(|to| DataType::try_from(to).ok());
    let to = to.ok_or("a cast to an unknown type")?;
    each(t, to, move |x| held(x, to))
}

/// A function of each number.
fn each(t: &Tensor, data_type: DataType, f: impl Fn(f64) -> f64 + 'static) -> Result<Tensor, Error> {
    if let Some(data) = &t.data {
        let data = data.iter().map(|x| f(*x)).collect();
        return Ok(Tensor::new(t.shape.clone(), data_type, data));
    }
    match t.numbers() {
        Some(numbers) => Tensor::computed(
            t.shape.clone(),
            data_type,
            Lazy::new(&[&numbers.clone()], move |at| f(numbers.at(at))),
        ),
        None => Ok(Tensor::unknown(t.shape.clone(), data_type)),
    }
}

fn shape(call: &Call) -> Result<Tensor, Error> {
    let dims = &call.need(0)?.shape;
    let rank = dims.len() as i64;
    let bound = |x: i64| (if x < 0 { x.saturating_add(rank) } else { x }).clamp(0, rank) as usize;
    let (from, to) = (bound(call.int("start", 0)), bound(call.int("end", rank)));
    let part = dims.get(from..to.max(from)).unwrap_or_default();
    Ok(Tensor::ints(part.iter().map(|d| *d as f64).collect()))
}

fn with_shape(t: &Tensor, shape: Vec<usize>) -> Result<Tensor, Error> {
    if numel(&shape)? != numel(&t.shape)? {
        return Err(Error::Reshape {
            from: t.shape.clone(),
            into: shape.iter().map(|d| *d as i64).collect(),
        });
    }
    Ok(Tensor { shape, ..t.clone() })
}

fn reshape(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let wanted = call.ints(1, "shape")?.ok_or("no shape")?;
    let keep_zero = call.int("allowzero", 0) != 0;
    let mut shape = Vec::with_capacity(wanted.len());
    let mut free = None;
    for (axis, d) in wanted.iter().enumerate() {
        shape.push(match *d {
            0 if !keep_zero => *t.shape.get(axis).ok_or("a 0 without a dimension")?,
            -1 if free.is_none() => {
                free = Some(axis);
                1
            }
            d => size(d)?,
        });
    }
    if let Some(axis) = free {
        let known = numel(&shape)?;
        let all = numel(&t.shape)?;
        if known == 0 || !all.is_multiple_of(known) {
            return Err(Error::Reshape {
                from: t.shape.clone(),
                into: wanted,
            });
        }
        shape[axis] = all / known;
    }
    with_shape(t, shape)
}

fn flatten(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let axis = call.int("axis", 1);
    let rank = t.shape.len();
    let axis = if axis == rank as i64 {
        rank
    } else {
        axis_of(axis, rank.max(1))?
    };
    let (a, b) = t.shape.split_at(axis.min(rank));
    with_shape(t, vec![numel(a)?, numel(b)?])
}

fn unsqueeze(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let axes = call.ints(1, "axes")?.ok_or("no axes")?;
    let rank = t.shape.len() + axes.len();
    if rank > 64 {
        return Err(Error::TooManyDimensions(rank));
    }
    let axes: Vec<usize> = axes.iter().map(|a| axis_of(*a, rank)).collect::<Result<_, _>>()?;
    let mut old = t.shape.iter();
    let shape: Vec<usize> = (0..rank)
        .map(|i| {
            if axes.contains(&i) {
                1
            } else {
                old.next().copied().unwrap_or(1)
            }
        })
        .collect();
    with_shape(t, shape)
}

fn squeeze(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let axes: Option<Vec<usize>> = call
        .ints(1, "axes")?
        .map(|axes| {
            axes.iter()
                .map(|a| axis_of(*a, t.shape.len()))
                .collect::<Result<_, _>>()
        })
        .transpose()?;
    let keep = |i: usize, d: usize| axes.as_ref().map_or(d != 1, |axes| !axes.contains(&i));
    let shape = t
        .shape
        .iter()
        .enumerate()
        .filter(|(i, d)| keep(*i, **d))
        .map(|(_, d)| *d);
    with_shape(t, shape.collect())
}

fn transpose(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let rank = t.shape.len();
    let order: Vec<usize> = match call.ints_attribute("perm") {
        Some(perm) => perm.iter().map(|a| axis_of(*a, rank)).collect::<Result<_, _>>()?,
        None => (0..rank).rev().collect(),
    };
    if order.len() != rank {
        return Err("a permutation of another rank".into());
    }
    let shape: Vec<usize> = order.iter().map(|a| t.shape[*a]).collect();
    let own = strides(&t.shape);
    let by: Vec<isize> = order.iter().map(|a| own[*a] as isize).collect();
    t.rearranged(0, shape, &by)
}

fn spread_to(t: &Tensor, shape: Vec<usize>) -> Result<Tensor, Error> {
    if !t.is_known() {
        return Ok(Tensor::unknown(shape, t.data_type));
    }
    if t.data.is_some() && are_held(&shape) {
        let data = t.spread(&shape)?;
        return Ok(Tensor::new(shape, t.data_type, data));
    }
    let numbers = t.spread_numbers(&shape)?;
    Tensor::computed(shape, t.data_type, numbers)
}

fn expand(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let wanted: Vec<usize> = call
        .need(1)?
        .as_ints()?
        .iter()
        .map(|d| size(*d))
        .collect::<Result<_, _>>()?;
    let shape = broadcast(&t.shape, &wanted)?;
    numel(&shape)?;
    spread_to(t, shape)
}

fn tile(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let times: Vec<usize> = call
        .need(1)?
        .as_ints()?
        .iter()
        .map(|d| size(*d))
        .collect::<Result<_, _>>()?;
    if times.len() != t.shape.len() {
        return Err("as many repeats as dimensions are needed".into());
    }
    let shape: Vec<usize> = t.shape.iter().zip(&times).map(|(d, n)| d.saturating_mul(*n)).collect();
    numel(&shape)?;
    // Each axis twice: the repeat, which does not move, and the element.
    let own = strides(&t.shape);
    let (mut pairs, mut by) = (Vec::new(), Vec::new());
    for ((d, n), stride) in t.shape.iter().zip(&times).zip(&own) {
        pairs.extend([*n, *d]);
        by.extend([0, *stride as isize]);
    }
    with_shape(&t.rearranged(0, pairs, &by)?, shape)
}

fn concat(call: &Call) -> Result<Tensor, Error> {
    let parts: Vec<&Tensor> = call.inputs.iter().filter_map(|t| t.as_deref()).collect();
    let first = *parts.first().ok_or("nothing to put together")?;
    let axis = axis_of(call.int("axis", 0), first.shape.len())?;
    let mut shape = first.shape.clone();
    shape[axis] = 0;
    for part in &parts {
        let fits = part.shape.len() == shape.len()
            && part
                .shape
                .iter()
                .zip(&shape)
                .enumerate()
                .all(|(i, (a, b))| i == axis || a == b);
        if !fits {
            return Err(Error::Concat {
                first: first.shape.clone(),
                other: part.shape.clone(),
                axis,
            });
        }
        shape[axis] = shape[axis].saturating_add(part.shape[axis]);
    }
    numel(&shape)?;
    let known: Option<Vec<&Vec<f64>>> = parts.iter().map(|p| p.data.as_ref()).collect();
    let Some(known) = known.filter(|_| are_held(&shape)) else {
        return concat_on_demand(&parts, shape, axis);
    };
    let outer = numel(&shape[..axis])?;
    let mut data = Vec::with_capacity(numel(&shape)?);
    for row in 0..outer {
        for (part, values) in parts.iter().zip(&known) {
            let inner = numel(&part.shape[axis..])?;
            data.extend(values.iter().skip(row * inner).take(inner));
        }
    }
    Ok(Tensor::new(shape, first.data_type, data))
}

fn concat_on_demand(parts: &[&Tensor], shape: Vec<usize>, axis: usize) -> Result<Tensor, Error> {
    let data_type = parts.first().map_or(DataType::Undefined, |t| t.data_type);
    let mut blocks = Vec::with_capacity(parts.len());
    for part in parts {
        let Some(numbers) = part.numbers() else {
            return Ok(Tensor::unknown(shape, data_type));
        };
        blocks.push((numel(&part.shape[axis..])?, numbers));
    }
    let row: usize = blocks.iter().map(|(n, _)| n).sum();
    let all: Vec<Lazy> = blocks.iter().map(|(_, numbers)| numbers.clone()).collect();
    let numbers = Lazy::new(&all.iter().collect::<Vec<_>>(), move |place| {
        let (outer, mut at) = (place / row.max(1), place % row.max(1));
        for (inner, numbers) in &blocks {
            if at < *inner {
                return numbers.at(outer * inner + at);
            }
            at -= inner;
        }
        f64::NAN
    });
    Tensor::computed(shape, data_type, numbers)
}

fn slice(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let starts = call.ints(1, "starts")?.ok_or("no starts")?;
    let ends = call.ints(2, "ends")?.ok_or("no ends")?;
    let axes = call
        .ints(3, "axes")?
        .unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = call
        .get(4)
        .map(Tensor::as_ints)
        .transpose()?
        .unwrap_or_else(|| vec![1; starts.len()]);
    if ends.len() != starts.len() || axes.len() != starts.len() || steps.len() != starts.len() {
        return Err("starts, ends, axes and steps differ in number".into());
    }
    let own = strides(&t.shape);
    let mut shape = t.shape.clone();
    let mut by: Vec<isize> = own.iter().map(|s| *s as isize).collect();
    let mut offset = 0isize;
    for (((start, end), axis), step) in starts.iter().zip(&ends).zip(&axes).zip(&steps) {
        let axis = axis_of(*axis, t.shape.len())?;
        let d = t.shape[axis] as i64;
        let wrap = |x: i64| if x < 0 { x.saturating_add(d) } else { x };
        let (from, count) = match *step {
            1.. => {
                let (from, to) = (wrap(*start).clamp(0, d), wrap(*end).clamp(0, d));
                (
                    from,
                    (to - from).max(0).div_euclid(*step) + i64::from((to - from).max(0) % step != 0),
                )
            }
            0 => return Err("a step of 0".into()),
            _ => {
                let (from, to) = (wrap(*start).clamp(-1, d - 1), wrap(*end).clamp(-1, d - 1));
                let back = step.checked_neg().ok_or("an absurd step")?;
                (
                    from.max(0),
                    (from - to).max(0).div_euclid(back) + i64::from((from - to).max(0) % back != 0),
                )
            }
        };
        shape[axis] = size(count)?;
        offset += (from as isize).saturating_mul(own[axis] as isize);
        by[axis] = (own[axis] as isize).saturating_mul(*step as isize);
    }
    t.rearranged(offset, shape, &by)
}

fn split(call: &Call) -> Result<Outputs, Error> {
    let t = call.need(0)?;
    let axis = axis_of(call.int("axis", 0), t.shape.len())?;
    let count = call.node.output.len();
    let sizes: Vec<usize> = match call.ints(1, "split")? {
        Some(sizes) => sizes.iter().map(|d| size(*d)).collect::<Result<_, _>>()?,
        None => {
            let each = t.shape[axis].div_ceil(count.max(1));
            (0..count)
                .map(|i| each.min(t.shape[axis].saturating_sub(i * each)))
                .collect()
        }
    };
    if sizes.iter().try_fold(0usize, |n, d| n.checked_add(*d)) != Some(t.shape[axis]) {
        return Err(Error::Split {
            sizes,
            len: t.shape[axis],
        });
    }
    let own = strides(&t.shape);
    let by: Vec<isize> = own.iter().map(|s| *s as isize).collect();
    let mut from = 0;
    let mut parts = Vec::new();
    for d in sizes {
        let mut shape = t.shape.clone();
        shape[axis] = d;
        let at = (from * own[axis]) as isize;
        parts.push(Some(t.rearranged(at, shape, &by)?));
        from += d;
    }
    Ok(parts)
}

fn gather(call: &Call) -> Result<Tensor, Error> {
    let (t, ids) = (call.need(0)?, call.need(1)?);
    let axis = axis_of(call.int("axis", 0), t.shape.len())?;
    let mut shape = t.shape[..axis].to_vec();
    shape.extend(&ids.shape);
    shape.extend(&t.shape[axis + 1..]);
    numel(&shape)?;
    let inner = numel(&t.shape[axis + 1..])?;
    let d = t.shape[axis] as i64;
    // A table of positions ends somewhere, and so do the calls that the model takes.
    if let Some(id) = ids.data.iter().flatten().find(|id| !(-d..d).contains(&(**id as i64))) {
        return Err(Error::IndexOutOfRange {
            index: *id as i64,
            len: t.shape[axis],
        });
    }
    let (Some(data), true, true) = (&t.data, ids.data.is_some(), are_held(&shape)) else {
        return gather_on_demand(t, ids, axis, shape);
    };
    let ids = ids.as_ints()?;
    let mut out = Vec::with_capacity(numbers(&shape)?);
    for outer in 0..numel(&t.shape[..axis])? {
        for id in &ids {
            let id = if *id < 0 { id + d } else { *id };
            let id = usize::try_from(id)
                .ok()
                .filter(|i| (*i as i64) < d)
                .ok_or(Error::IndexOutOfRange {
                    index: id,
                    len: t.shape[axis],
                })?;
            let from = (outer * t.shape[axis] + id) * inner;
            out.extend_from_slice(data.get(from..from + inner).ok_or(beyond(from, data))?);
        }
    }
    Ok(Tensor::new(shape, t.data_type, out))
}

fn gather_on_demand(t: &Tensor, ids: &Tensor, axis: usize, shape: Vec<usize>) -> Result<Tensor, Error> {
    let (Some(numbers), Some(places)) = (t.numbers(), ids.numbers()) else {
        return Ok(Tensor::unknown(shape, t.data_type));
    };
    let (inner, n, d) = (numel(&t.shape[axis + 1..])?, numel(&ids.shape)?, t.shape[axis]);
    let numbers = Lazy::new(&[&numbers.clone(), &places.clone()], move |place| {
        let (outer, id, rest) = (place / inner / n, place / inner % n, place % inner);
        match index_of(places.at(id), d) {
            Some(row) => numbers.at((outer * d + row) * inner + rest),
            None => f64::NAN,
        }
    });
    Tensor::computed(shape, t.data_type, numbers)
}

/// An index, from the end if it is negative; none out of range.
fn index_of(id: f64, d: usize) -> Option<usize> {
    let id = id as i64;
    let id = if id < 0 { id.checked_add(d as i64)? } else { id };
    usize::try_from(id).ok().filter(|id| *id < d)
}

fn gather_nd(call: &Call) -> Result<Tensor, Error> {
    let (t, ids) = (call.need(0)?, call.need(1)?);
    let batch = size(call.int("batch_dims", 0))?;
    let depth = *ids.shape.last().ok_or("indices without dimensions")?;
    if batch + depth > t.shape.len() || batch >= ids.shape.len() || ids.shape.get(..batch) != t.shape.get(..batch) {
        return Err("indices that do not fit".into());
    }
    let mut shape = ids.shape[..ids.shape.len() - 1].to_vec();
    shape.extend(&t.shape[batch + depth..]);
    numel(&shape)?;
    if t.is_known() && ids.is_known() && (t.lazy.is_some() || ids.lazy.is_some() || !are_held(&shape)) {
        return gather_nd_on_demand(t, ids, batch, shape);
    }
    let (Some(data), Some(_)) = (&t.data, &ids.data) else {
        return Ok(Tensor::unknown(shape, t.data_type));
    };
    let own = strides(&t.shape);
    let inner = numel(&t.shape[batch + depth..])?;
    let per_batch = numel(&ids.shape[batch..ids.shape.len() - 1])?.max(1);
    let block = numel(&t.shape[batch..])?;
    let mut out = Vec::with_capacity(numbers(&shape)?);
    for (n, index) in ids.as_ints()?.chunks(depth.max(1)).enumerate() {
        let mut from = n / per_batch * block;
        for (axis, id) in index.iter().enumerate().take(depth) {
            let d = t.shape[batch + axis] as i64;
            let id = if *id < 0 { id + d } else { *id };
            if !(0..d).contains(&id) {
                return Err(Error::IndexOutOfRange {
                    index: id,
                    len: d as usize,
                });
            }
            from += id as usize * own[batch + axis];
        }
        out.extend_from_slice(data.get(from..from + inner).ok_or(beyond(from, data))?);
    }
    Ok(Tensor::new(shape, t.data_type, out))
}

fn gather_nd_on_demand(t: &Tensor, ids: &Tensor, batch: usize, shape: Vec<usize>) -> Result<Tensor, Error> {
    let (Some(numbers), Some(places)) = (t.numbers(), ids.numbers()) else {
        return Ok(Tensor::unknown(shape, t.data_type));
    };
    let depth = ids.shape.last().copied().unwrap_or(0);
    let inner = numel(&t.shape[batch + depth..])?;
    let per_batch = numel(&ids.shape[batch..ids.shape.len() - 1])?.max(1);
    let block = numel(&t.shape[batch..])?;
    let own = strides(&t.shape);
    let axes: Vec<(usize, usize)> = (batch..batch + depth).map(|axis| (t.shape[axis], own[axis])).collect();
    let of = [vec![numbers.clone()], vec![places.clone(); depth]].concat();
    let numbers = Lazy::new(&of.iter().collect::<Vec<_>>(), move |place| {
        let (n, rest) = (place / inner, place % inner);
        let mut from = n / per_batch * block;
        for (i, (d, stride)) in axes.iter().enumerate() {
            match index_of(places.at(n * depth + i), *d) {
                Some(id) => from += id * stride,
                None => return f64::NAN,
            }
        }
        numbers.at(from + rest)
    });
    Tensor::computed(shape, t.data_type, numbers)
}

fn gather_elements(call: &Call) -> Result<Tensor, Error> {
    let (t, ids) = (call.need(0)?, call.need(1)?);
    let axis = axis_of(call.int("axis", 0), t.shape.len())?;
    if ids.shape.len() != t.shape.len() {
        return Err("indices of another rank".into());
    }
    let (Some(data), Some(_)) = (&t.data, &ids.data) else {
        return Ok(Tensor::unknown(ids.shape.clone(), t.data_type));
    };
    let (own, theirs) = (strides(&t.shape), strides(&ids.shape));
    let mut out = Vec::with_capacity(numbers(&ids.shape)?);
    for (at, id) in ids.as_ints()?.into_iter().enumerate() {
        let d = t.shape[axis] as i64;
        let id = if id < 0 { id + d } else { id };
        let mut from = 0usize;
        for i in 0..own.len() {
            let place = if i == axis {
                size(id)?
            } else {
                at / theirs[i] % ids.shape[i].max(1)
            };
            from = from.saturating_add(place.saturating_mul(own[i]));
        }
        out.push(*data.get(from).ok_or(beyond(from, data))?);
    }
    Ok(Tensor::new(ids.shape.clone(), t.data_type, out))
}

fn scatter_nd(call: &Call) -> Result<Tensor, Error> {
    let (t, ids, updates) = (call.need(0)?, call.need(1)?, call.need(2)?);
    if [t, ids, updates].iter().any(|t| !t.is_known()) {
        return Ok(Tensor::unknown(t.shape.clone(), t.data_type));
    }
    let depth = *ids.shape.last().ok_or("indices without dimensions")?;
    if depth == 0
        || depth > t.shape.len()
        || call
            .node
            .attribute("reduction")
            .is_some_and(|r| r.s() != b"none".as_slice())
    {
        return Err("a scatter that is not understood".into());
    }
    let (Some(data), Some(_), Some(new)) = (&t.data, &ids.data, &updates.data) else {
        return scatter_nd_on_demand(t, ids, updates, depth);
    };
    let own = strides(&t.shape);
    let inner = numel(&t.shape[depth..])?;
    let mut out = data.clone();
    for (n, index) in ids.as_ints()?.chunks(depth).enumerate() {
        let mut to = 0;
        for (axis, id) in index.iter().enumerate() {
            let d = t.shape[axis] as i64;
            let id = if *id < 0 { id + d } else { *id };
            if !(0..d).contains(&id) {
                return Err(Error::IndexOutOfRange {
                    index: id,
                    len: d as usize,
                });
            }
            to += id as usize * own[axis];
        }
        let values = new.get(n * inner..(n + 1) * inner).ok_or("too few updates")?;
        out.get_mut(to..to + inner)
            .ok_or(beyond(to, data))?
            .copy_from_slice(values);
    }
    Ok(Tensor::new(t.shape.clone(), t.data_type, out))
}

/// A scatter into a block that begins at the start of every axis, in order: exporters write assignments to a slice so.
fn scatter_nd_on_demand(t: &Tensor, ids: &Tensor, updates: &Tensor, depth: usize) -> Result<Tensor, Error> {
    let (Some(old), Some(places), Some(new)) = (t.numbers(), ids.numbers(), updates.numbers()) else {
        return Ok(Tensor::unknown(t.shape.clone(), t.data_type));
    };
    let block = &ids.shape[..ids.shape.len() - 1];
    let inner = numel(&t.shape[depth..])?;
    let (n, own) = (numel(block)?, strides(block));
    if block.len() != depth || block.iter().zip(&t.shape).any(|(b, d)| b > d) {
        return Ok(Tensor::unknown(t.shape.clone(), t.data_type));
    }
    let block = block.to_vec();
    let check = places.clone();
    // Each index must be its own place in the block; some are looked at here, others when they are read.
    let in_place = {
        let (block, own) = (block.clone(), own.clone());
        move |row: usize| (0..depth).all(|i| places.at(row * depth + i) == (row / own[i] % block[i]) as f64)
    };
    const SAMPLES: usize = 4096;
    let sampled = (0..SAMPLES.min(n)).map(|i| if n <= SAMPLES { i } else { i * ((n - 1) / (SAMPLES - 1)) });
    if !sampled.chain(n.checked_sub(1)).all(&in_place) {
        return Ok(Tensor::unknown(t.shape.clone(), t.data_type));
    }
    let theirs = strides(&t.shape);
    let dims = t.shape.clone();
    let of = [vec![old.clone(), new.clone()], vec![check; depth]].concat();
    let numbers = Lazy::new(&of.iter().collect::<Vec<_>>(), move |place| {
        let mut row = 0;
        for i in 0..depth {
            let at = place / theirs[i] % dims[i];
            if at >= block[i] {
                return old.at(place);
            }
            row += at * own[i];
        }
        if in_place(row) {
            new.at(row * inner + place % inner)
        } else {
            f64::NAN
        }
    });
    Tensor::computed(t.shape.clone(), t.data_type, numbers)
}

fn range(call: &Call) -> Result<Tensor, Error> {
    let number = |slot| -> Result<f64, Error> {
        let data = call.need(slot)?.data.as_ref().ok_or("its bounds are not known")?;
        data.first().copied().ok_or_else(|| "an empty bound".into())
    };
    let (start, limit, step) = (number(0)?, number(1)?, number(2)?);
    let count = ((limit - start) / step).ceil();
    if !count.is_finite() {
        return Err("an endless range".into());
    }
    let count = count.max(0.0) as usize;
    numbers(&[count])?;
    let data = (0..count).map(|i| start + i as f64 * step).collect();
    Ok(Tensor::new(vec![count], call.need(0)?.data_type, data))
}

fn constant_of_shape(call: &Call) -> Result<Tensor, Error> {
    let shape: Vec<usize> = call
        .need(0)?
        .as_ints()?
        .iter()
        .map(|d| size(*d))
        .collect::<Result<_, _>>()?;
    let value = call.node.attribute("value").and_then(|a| a.t.as_deref());
    let value = value.and_then(|t| Tensor::constant(t, 1, None));
    let data_type = value.as_ref().map_or(DataType::Float, |v| v.data_type);
    let fill = value
        .map_or(Some(0.0), |v| v.data?.first().copied())
        .ok_or("a value that is not known")?;
    Tensor::filled(shape, data_type, fill)
}

fn eye_like(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let &[_, columns] = t.shape.as_slice() else {
        return Err("no matrix".into());
    };
    let data_type = match call.int("dtype", 0) {
        0 => t.data_type,
        to => i32::try_from(to)
            .ok()
            .and_then(|to| DataType::try_from(to).ok())
            .ok_or("a matrix of an unknown type")?,
    };
    let k = call.int("k", 0);
    let numbers = Lazy::new(&[], move |at| {
        let (i, j) = ((at / columns.max(1)) as i64, (at % columns.max(1)) as i64);
        f64::from(u8::from(j - i == k))
    });
    Tensor::computed(t.shape.clone(), data_type, numbers)
}

/// A tensor with more around it, or, where the numbers are negative, with less.
fn pad(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let rank = t.shape.len();
    let pads = call.ints(1, "pads")?.ok_or("how much to pad is not known")?;
    let axes: Vec<usize> = match call.get(3) {
        Some(axes) => axes
            .as_ints()?
            .iter()
            .map(|a| axis_of(*a, rank))
            .collect::<Result<_, _>>()?,
        None => (0..rank).collect(),
    };
    if pads.len() != 2 * axes.len() {
        return Err(Error::Sizes(format!("{} pads for {} axes", pads.len(), axes.len())));
    }
    let (mut shape, mut before) = (t.shape.clone(), vec![0i64; rank]);
    for (i, axis) in axes.iter().enumerate() {
        let wide = (t.shape[*axis] as i64)
            .checked_add(pads[i])
            .and_then(|d| d.checked_add(pads[axes.len() + i]));
        shape[*axis] = size(wide.ok_or("an absurd pad")?)?;
        before[*axis] = pads[i];
    }
    numel(&shape)?;
    let mode = call.node.attribute("mode").map_or(&b"constant"[..], |a| a.s());
    let around = match call.get(2) {
        Some(value) => value.data.as_ref().and_then(|d| d.first().copied()),
        None => Some(call.node.attribute("value").map_or(0.0, |a| f64::from(a.f()))),
    };
    let (Some(numbers), Some(around)) = (t.numbers(), around.filter(|_| mode == b"constant")) else {
        return Ok(Tensor::unknown(shape, t.data_type));
    };
    let (own, new) = (strides(&t.shape), strides(&shape));
    let axes: Vec<_> = (0..rank)
        .map(|i| (new[i], shape[i], before[i], t.shape[i], own[i]))
        .collect();
    let numbers = Lazy::new(&[&numbers.clone()], move |place| {
        let mut from = 0;
        for (stride, wide, before, d, own) in &axes {
            let at = ((place / stride % (*wide).max(1)) as i64).wrapping_sub(*before);
            match usize::try_from(at) {
                Ok(at) if at < *d => from += at * own,
                _ => return around,
            }
        }
        numbers.at(from)
    });
    Tensor::computed(shape, t.data_type, numbers)
}

fn choose(call: &Call) -> Result<Tensor, Error> {
    let (c, a, b) = (call.need(0)?, call.need(1)?, call.need(2)?);
    let shape = broadcast(&broadcast(&c.shape, &a.shape)?, &b.shape)?;
    numel(&shape)?;
    if [c, a, b].iter().any(|t| !t.is_known()) {
        return Ok(Tensor::unknown(shape, a.data_type));
    }
    if [c, a, b].iter().any(|t| t.data.is_none()) || !are_held(&shape) {
        let [c, x, y] = [
            c.spread_numbers(&shape)?,
            a.spread_numbers(&shape)?,
            b.spread_numbers(&shape)?,
        ];
        let numbers = Lazy::new(&[&c.clone(), &x.clone(), &y.clone()], move |at| {
            if c.at(at) != 0.0 { x.at(at) } else { y.at(at) }
        });
        return Tensor::computed(shape, a.data_type, numbers);
    }
    let (c, x, y) = (c.spread(&shape)?, a.spread(&shape)?, b.spread(&shape)?);
    let data = c
        .iter()
        .zip(x.iter().zip(y))
        .map(|(c, (x, y))| if *c != 0.0 { *x } else { y });
    Ok(Tensor::new(shape, a.data_type, data.collect()))
}

fn trilu(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    if !t.is_known() {
        return Ok(t.clone());
    }
    let k = match call.get(1) {
        Some(k) => k.as_ints()?.first().copied().unwrap_or(0),
        None => 0,
    };
    let upper = call.int("upper", 1) != 0;
    let &[.., rows, columns] = t.shape.as_slice() else {
        return Err("no matrix".into());
    };
    let (rows, columns) = (rows.max(1), columns.max(1));
    let keep = move |at: usize| {
        let (i, j) = ((at / columns % rows) as i64, (at % columns) as i64);
        let d = j - i;
        if upper { d >= k } else { d <= k }
    };
    let Some(data) = t.data.as_ref().filter(|_| are_held(&t.shape)) else {
        let numbers = t.numbers().ok_or(Error::NumbersUnknown)?;
        let numbers = Lazy::new(
            &[&numbers.clone()],
            move |at| if keep(at) { numbers.at(at) } else { 0.0 },
        );
        return Tensor::computed(t.shape.clone(), t.data_type, numbers);
    };
    let data = data
        .iter()
        .enumerate()
        .map(|(at, x)| if keep(at) { *x } else { 0.0 })
        .collect();
    Ok(Tensor::new(t.shape.clone(), t.data_type, data))
}

fn cumsum(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let Some(data) = &t.data else { return Ok(t.clone()) };
    let axis = call.need(1)?.as_ints()?.first().copied().unwrap_or(0);
    let axis = axis_of(axis, t.shape.len())?;
    let (exclusive, reverse) = (call.int("exclusive", 0) != 0, call.int("reverse", 0) != 0);
    let (inner, d) = (numel(&t.shape[axis + 1..])?, t.shape[axis]);
    let mut out = data.clone();
    for outer in 0..numel(&t.shape[..axis])? {
        for i in 0..inner {
            let mut sum = 0.0;
            for step in 0..d {
                let row = if reverse { d - 1 - step } else { step };
                let at = (outer * d + row) * inner + i;
                let x = *data.get(at).ok_or(beyond(at, data))?;
                out[at] = if exclusive { sum } else { sum + x };
                sum += x;
            }
        }
    }
    Ok(Tensor::new(t.shape.clone(), t.data_type, out))
}

fn non_zero(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let data = t.data.as_ref().ok_or("its size depends on data")?;
    let own = strides(&t.shape);
    let places: Vec<usize> = data
        .iter()
        .enumerate()
        .filter(|(_, x)| **x != 0.0)
        .map(|(i, _)| i)
        .collect();
    let mut out = Vec::new();
    for (axis, stride) in own.iter().enumerate() {
        out.extend(
            places
                .iter()
                .map(|at| (at / stride.max(&1) % t.shape[axis].max(1)) as f64),
        );
    }
    Ok(Tensor::new(vec![own.len(), places.len()], DataType::Int64, out))
}

fn softmax(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let Some(data) = &t.data else { return Ok(t.clone()) };
    let rank = t.shape.len();
    let axis = axis_of(call.int("axis", if call.opset >= 13 { -1 } else { 1 }), rank)?;
    if call.opset >= 13 && axis + 1 != rank {
        return Err(Error::NotComputed(format!("a Softmax along axis {axis} of {rank}")));
    }
    let mut out = data.clone();
    attention::softmax(&mut out, numel(&t.shape[axis..])?);
    Ok(Tensor::new(t.shape.clone(), t.data_type, out))
}

fn reduce(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let rank = t.shape.len();
    let axes: Vec<usize> = match call.ints(1, "axes")? {
        Some(axes) if !axes.is_empty() => axes.iter().map(|a| axis_of(*a, rank)).collect::<Result<_, _>>()?,
        _ if call.int("noop_with_empty_axes", 0) != 0 => return Ok(t.clone()),
        _ => (0..rank).collect(),
    };
    let keep = call.int("keepdims", 1) != 0;
    let kept: Vec<usize> = t
        .shape
        .iter()
        .enumerate()
        .map(|(i, d)| if axes.contains(&i) { 1 } else { *d })
        .collect();
    let shape = if keep {
        kept.clone()
    } else {
        kept.iter()
            .enumerate()
            .filter(|(i, _)| !axes.contains(i))
            .map(|(_, d)| *d)
            .collect()
    };
    if let (Some(lazy), [axis], op @ ("ReduceMax" | "ReduceMin")) = (&t.lazy, axes.as_slice(), call.node.op_type()) {
        return extreme_on_demand(t, lazy.clone(), *axis, shape, op == "ReduceMax");
    }
    let Some(data) = &t.data else {
        return Ok(Tensor::unknown(shape, t.data_type));
    };
    let n = numbers(&kept)?;
    let count = data.len().checked_div(n).unwrap_or(0);
    let (start, mean, op): (f64, bool, fn(f64, f64) -> f64) = match call.node.op_type() {
        "ReduceSum" => (0.0, false, |a, b| a + b),
        "ReduceMean" => (0.0, true, |a, b| a + b),
        "ReduceMax" => (f64::NEG_INFINITY, false, f64::max),
        "ReduceMin" => (f64::INFINITY, false, f64::min),
        "ReduceProd" => (1.0, false, |a, b| a * b),
        _ => return Ok(Tensor::unknown(shape, t.data_type)),
    };
    let (own, theirs) = (strides(&t.shape), strides(&kept));
    let mut out = vec![start; n];
    for (at, x) in data.iter().enumerate() {
        let to: usize = (0..rank)
            .filter(|i| !axes.contains(i))
            .map(|i| at / own[i] % t.shape[i] * theirs[i])
            .sum();
        out[to] = op(out[to], *x);
    }
    if mean {
        out.iter_mut().for_each(|x| *x /= count as f64);
    }
    Ok(Tensor::new(shape, t.data_type, out))
}

/// The largest or smallest number along one axis of a tensor that is not held; each is remembered, a row reads it many times.
fn extreme_on_demand(t: &Tensor, lazy: Lazy, axis: usize, shape: Vec<usize>, most: bool) -> Result<Tensor, Error> {
    let (d, inner) = (t.shape[axis], numel(&t.shape[axis + 1..])?);
    let known: RefCell<HashMap<usize, f64>> = RefCell::default();
    let numbers = Lazy::of_rows(&lazy.clone(), d, move |place| {
        if let Some(x) = known.borrow().get(&place) {
            return *x;
        }
        let (outer, rest) = (place / inner, place % inner);
        let row = (0..d).map(|i| lazy.at((outer * d + i) * inner + rest));
        let x = if most {
            row.fold(f64::NEG_INFINITY, f64::max)
        } else {
            row.fold(f64::INFINITY, f64::min)
        };
        known.borrow_mut().insert(place, x);
        x
    });
    Tensor::computed(shape, t.data_type, numbers)
}

fn arg_extreme(call: &Call) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let axis = axis_of(call.int("axis", 0), t.shape.len())?;
    let mut shape = t.shape.clone();
    shape[axis] = 1;
    let (d, inner) = (t.shape[axis], numel(&t.shape[axis + 1..])?);
    let data = match &t.data {
        None => None,
        Some(data) => {
            let sign = if call.node.op_type() == "ArgMax" { 1.0 } else { -1.0 };
            let mut out = Vec::with_capacity(numbers(&shape)?);
            for outer in 0..numel(&shape[..axis])? {
                for i in 0..inner {
                    let at = |row: usize| {
                        data.get((outer * d + row) * inner + i)
                            .map_or(f64::NEG_INFINITY, |x| sign * x)
                    };
                    let best = (0..d).fold(0, |best, row| if at(row) > at(best) { row } else { best });
                    out.push(best as f64);
                }
            }
            Some(out)
        }
    };
    if call.int("keepdims", 1) == 0 {
        shape.remove(axis);
    }
    Ok(Tensor {
        data,
        ..Tensor::unknown(shape, DataType::Int64)
    })
}

fn matmul(a: &Tensor, b: &Tensor, alpha: f64) -> Result<Tensor, Error> {
    let (sa, sb) = (&a.shape, &b.shape);
    if sa.is_empty() || sb.is_empty() {
        return Err("a product of scalars".into());
    }
    let row = |s: &Vec<usize>| if s.len() == 1 { vec![1, s[0]] } else { s.clone() };
    let column = |s: &Vec<usize>| if s.len() == 1 { vec![s[0], 1] } else { s.clone() };
    let (fa, fb) = (row(sa), column(sb));
    let (&[.., m, k], &[.., k2, n]) = (fa.as_slice(), fb.as_slice()) else {
        return Err("no matrices".into());
    };
    if k != k2 {
        return Err(Error::MatMul {
            left: sa.clone(),
            right: sb.clone(),
        });
    }
    let batch = broadcast(&fa[..fa.len() - 2], &fb[..fb.len() - 2])?;
    let mut full = batch.clone();
    full.extend([m, n]);
    let mut shape = batch.clone();
    if sa.len() > 1 {
        shape.push(m);
    }
    if sb.len() > 1 {
        shape.push(n);
    }
    let work = numel(&full)?.saturating_mul(k);
    if a.data.is_none() || b.data.is_none() || work > MAX_WORK || numbers(&full).is_err() {
        return Ok(Tensor::unknown(shape, a.data_type));
    }
    let stretch = |t: &Tensor, f: &[usize]| {
        let mut to = batch.clone();
        to.extend(&f[f.len() - 2..]);
        Tensor {
            shape: f.to_vec(),
            ..t.clone()
        }
        .spread(&to)
    };
    let (x, y) = (stretch(a, &fa)?, stretch(b, &fb)?);
    let mut out = vec![0.0; numel(&full)?];
    for block in 0..numel(&batch)? {
        for i in 0..m {
            for p in 0..k {
                let left = alpha * x[(block * m + i) * k + p];
                let to = (block * m + i) * n;
                for j in 0..n {
                    out[to + j] += left * y[(block * k + p) * n + j];
                }
            }
        }
    }
    Ok(Tensor::new(shape, a.data_type, out))
}

fn swapped(t: &Tensor) -> Result<Tensor, Error> {
    let rank = t.shape.len();
    if rank < 2 {
        return Err("no matrix".into());
    }
    let mut shape = t.shape.clone();
    shape.swap(rank - 1, rank - 2);
    let mut by: Vec<isize> = strides(&t.shape).iter().map(|s| *s as isize).collect();
    by.swap(rank - 1, rank - 2);
    t.rearranged(0, shape, &by)
}

fn fused_matmul(call: &Call) -> Result<Tensor, Error> {
    if call.int("transBatchA", 0) != 0 || call.int("transBatchB", 0) != 0 {
        return Err("a product with batches moved".into());
    }
    let side = |slot, name| -> Result<Tensor, Error> {
        let t = call.need(slot)?;
        if call.int(name, 0) != 0 {
            swapped(t)
        } else {
            Ok(t.clone())
        }
    };
    let alpha = call.node.attribute("alpha").map_or(1.0, |a| f64::from(a.f()));
    matmul(&side(0, "transA")?, &side(1, "transB")?, alpha)
}

fn gemm(call: &Call) -> Result<Tensor, Error> {
    let side = |slot, name| -> Result<Tensor, Error> {
        let t = call.need(slot)?;
        if call.int(name, 0) != 0 {
            swapped(t)
        } else {
            Ok(t.clone())
        }
    };
    let product = matmul(&side(0, "transA")?, &side(1, "transB")?, 1.0)?;
    Ok(Tensor::unknown(product.shape, product.data_type))
}

fn einsum(call: &Call) -> Result<Tensor, Error> {
    let equation = call
        .node
        .attribute("equation")
        .map(|a| String::from_utf8_lossy(a.s()).replace(' ', ""));
    let equation = equation.ok_or("no equation")?;
    let (left, right) = equation.split_once("->").ok_or("an equation without an arrow")?;
    let terms: Vec<Vec<u8>> = left.split(',').map(|t| t.bytes().collect()).collect();
    let wanted: Vec<u8> = right.bytes().collect();
    let mut labels: Vec<(u8, usize)> = Vec::new();
    for (slot, term) in terms.iter().enumerate() {
        let t = call.need(slot)?;
        if term.len() != t.shape.len() || term.contains(&b'.') {
            return Err(Error::NotComputed(format!("the equation {equation} is not understood")));
        }
        for (label, d) in term.iter().zip(&t.shape) {
            match labels.iter().find(|(l, _)| l == label) {
                Some((_, known)) if known != d => {
                    return Err(Error::Sizes(format!("{equation} has two sizes for a label")));
                }
                Some(_) => {}
                None => labels.push((*label, *d)),
            }
        }
    }
    let size_of = |label: &u8| labels.iter().find(|(l, _)| l == label).map(|(_, d)| *d);
    let shape: Option<Vec<usize>> = wanted.iter().map(size_of).collect();
    let shape = shape.ok_or("an output label without an input")?;
    let first = call.need(0)?;
    let mut order = wanted.clone();
    order.extend(labels.iter().map(|(l, _)| *l).filter(|l| !wanted.contains(l)));
    let full: Vec<usize> = order.iter().filter_map(size_of).collect();
    let known = (0..terms.len()).all(|slot| call.get(slot).is_some_and(|t| t.data.is_some()));
    if !known || numel(&full)? > 1 << 23 {
        return Ok(Tensor::unknown(shape, first.data_type));
    }
    let mut product = vec![1.0; numel(&full)?];
    for (slot, term) in terms.iter().enumerate() {
        let t = call.need(slot)?;
        let own = strides(&t.shape);
        let by: Vec<isize> = order
            .iter()
            .map(|l| {
                term.iter()
                    .zip(&own)
                    .filter(|(x, _)| *x == l)
                    .map(|(_, s)| *s as isize)
                    .sum()
            })
            .collect();
        let values = strided(t.data.as_deref().unwrap_or_default(), 0, &full, &by)?;
        product.iter_mut().zip(values).for_each(|(p, x)| *p *= x);
    }
    let inner = numel(&full[wanted.len()..])?;
    let data = product.chunks(inner.max(1)).map(|c| c.iter().sum()).collect();
    Ok(Tensor::new(shape, first.data_type, data))
}

/// Shapes of a GroupQueryAttention's outputs.
fn grouped(call: &Call) -> Result<Outputs, Error> {
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
    let out = Tensor::unknown(vec![b, s, (width / heads).saturating_mul(hq)], q.data_type);
    let cache = |slot: usize| call.get(slot).map(|t| Tensor::unknown(t.shape.clone(), t.data_type));
    Ok(vec![Some(out), cache(3), cache(4)])
}

const UNARY: [&str; 24] = [
    "Neg",
    "Abs",
    "Sqrt",
    "Exp",
    "Log",
    "Cos",
    "Sin",
    "Tanh",
    "Reciprocal",
    "Floor",
    "Ceil",
    "Round",
    "Sigmoid",
    "Erf",
    "IsNaN",
    "IsInf",
    "Sign",
    "Not",
    "Relu",
    "Clip",
    "Softplus",
    "Tan",
    "LeakyRelu",
    "Elu",
];

fn unary(call: &Call, op: &str) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let data_type = if matches!(op, "IsNaN" | "IsInf" | "Not") {
        DataType::Bool
    } else {
        t.data_type
    };
    let bound = |slot: usize, name: &str| -> Option<f64> {
        let given = call.get(slot).and_then(|b| b.data.as_ref()?.first().copied());
        given.or_else(|| call.node.attribute(name).map(|a| f64::from(a.f())))
    };
    let truth = |x: bool| f64::from(u8::from(x));
    let f: Rc<dyn Fn(f64) -> f64> = match op {
        "Neg" => Rc::new(|x| -x),
        "Abs" => Rc::new(f64::abs),
        "Sqrt" => Rc::new(f64::sqrt),
        "Exp" => Rc::new(f64::exp),
        "Log" => Rc::new(f64::ln),
        "Cos" => Rc::new(f64::cos),
        "Sin" => Rc::new(f64::sin),
        "Tanh" => Rc::new(f64::tanh),
        "Reciprocal" => Rc::new(f64::recip),
        "Floor" => Rc::new(f64::floor),
        "Ceil" => Rc::new(f64::ceil),
        "Round" => Rc::new(f64::round_ties_even),
        "Sigmoid" => Rc::new(|x| 1.0 / (1.0 + (-x).exp())),
        "IsNaN" => Rc::new(move |x| truth(x.is_nan())),
        "IsInf" => Rc::new(move |x| truth(x.is_infinite())),
        "Sign" => Rc::new(|x| if x == 0.0 { 0.0 } else { x.signum() }),
        "Not" => Rc::new(move |x| truth(x == 0.0)),
        "Relu" => Rc::new(|x| x.max(0.0)),
        "Clip" => {
            let (low, high) = (bound(1, "min"), bound(2, "max"));
            Rc::new(move |x| {
                x.max(low.unwrap_or(f64::NEG_INFINITY))
                    .min(high.unwrap_or(f64::INFINITY))
            })
        }
        _ => return Ok(Tensor::unknown(t.shape.clone(), data_type)),
    };
    each(t, data_type, move |x| f(x))
}

const BINARY: [&str; 22] = [
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Mod",
    "Pow",
    "Max",
    "Min",
    "And",
    "Or",
    "Xor",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "Sum",
    "PRelu",
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
];

fn binary(call: &Call, op: &str) -> Result<Tensor, Error> {
    let mut result = call.need(0)?.clone();
    for slot in 1..call.inputs.len() {
        let other = call.need(slot)?;
        let shape = broadcast(&result.shape, &other.shape)?;
        numel(&shape)?;
        let compares = matches!(
            op,
            "And" | "Or" | "Xor" | "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual"
        );
        let data_type = if compares { DataType::Bool } else { result.data_type };
        if !result.is_known() || !other.is_known() {
            result = Tensor::unknown(shape, data_type);
            continue;
        }
        let whole = result.is_int();
        let truth = |x: bool| f64::from(u8::from(x));
        let f: Rc<dyn Fn(f64, f64) -> f64> = match op {
            "Add" | "Sum" => Rc::new(|a, b| a + b),
            "Sub" => Rc::new(|a, b| a - b),
            "Mul" => Rc::new(|a, b| a * b),
            "Div" if whole => Rc::new(|a, b| if b == 0.0 { 0.0 } else { (a / b).trunc() }),
            "Div" => Rc::new(|a, b| a / b),
            // As C's fmod: the sign is the dividend's.
            "Mod" if call.int("fmod", 0) != 0 => Rc::new(|a, b| if b == 0.0 { 0.0 } else { a % b }),
            "Mod" => Rc::new(|a, b| if b == 0.0 { 0.0 } else { a - b * (a / b).floor() }),
            "BitShift" => {
                let left = call.node.attribute("direction").is_some_and(|d| d.s() == b"LEFT");
                Rc::new(move |a, b| {
                    let (a, by) = (a as u64, b.clamp(0.0, 63.0) as u32);
                    (if left { a << by } else { a >> by }) as f64
                })
            }
            "BitwiseAnd" => Rc::new(|a, b| (a as i64 & b as i64) as f64),
            "BitwiseOr" => Rc::new(|a, b| (a as i64 | b as i64) as f64),
            "BitwiseXor" => Rc::new(|a, b| (a as i64 ^ b as i64) as f64),
            "Pow" => Rc::new(f64::powf),
            "Max" => Rc::new(f64::max),
            "Min" => Rc::new(f64::min),
            "And" => Rc::new(move |a, b| truth(a != 0.0 && b != 0.0)),
            "Or" => Rc::new(move |a, b| truth(a != 0.0 || b != 0.0)),
            "Xor" => Rc::new(move |a, b| truth((a != 0.0) != (b != 0.0))),
            "Equal" => Rc::new(move |a, b| truth(a == b)),
            "Less" => Rc::new(move |a, b| truth(a < b)),
            "LessOrEqual" => Rc::new(move |a, b| truth(a <= b)),
            "Greater" => Rc::new(move |a, b| truth(a > b)),
            "GreaterOrEqual" => Rc::new(move |a, b| truth(a >= b)),
            _ => {
                result = Tensor::unknown(shape, data_type);
                continue;
            }
        };
        if result.data.is_none() || other.data.is_none() || !are_held(&shape) {
            let (x, y) = (result.spread_numbers(&shape)?, other.spread_numbers(&shape)?);
            let numbers = Lazy::new(&[&x.clone(), &y.clone()], move |at| {
                held(f(x.at(at), y.at(at)), data_type)
            });
            result = Tensor::computed(shape, data_type, numbers)?;
            continue;
        }
        let (x, y) = (result.spread(&shape)?, other.spread(&shape)?);
        let data = x.iter().zip(y).map(|(a, b)| held(f(*a, b), data_type)).collect();
        result = Tensor::new(shape, data_type, data);
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use retro_onnx::{AttributeProto, TensorProto};

    fn node(op: &str, attributes: &[AttributeProto]) -> NodeProto {
        let mut node = NodeProto::new("", op, op, &["a", "b", "c", "d"], &["y"]);
        node.attribute = attributes.to_vec();
        node
    }

    fn ints(shape: &[usize], values: &[f64]) -> Tensor {
        Tensor::new(shape.to_vec(), DataType::Int64, values.to_vec())
    }

    fn floats(shape: &[usize], values: &[f64]) -> Tensor {
        Tensor::new(shape.to_vec(), DataType::Float, values.to_vec())
    }

    fn counted(shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        floats(shape, &(0..n).map(|i| i as f64 - 3.0).collect::<Vec<_>>())
    }

    fn result(node: &NodeProto, inputs: &[Tensor]) -> Result<Tensor, Error> {
        let inputs: Vec<_> = inputs.iter().cloned().map(Rc::new).map(Some).collect();
        Ok(evaluate(node, &inputs, 23)?.remove(0).expect("an output"))
    }

    /// The numbers of a tensor on demand only.
    fn on_demand(t: &Tensor) -> Tensor {
        Tensor {
            lazy: t.numbers(),
            ..Tensor::unknown(t.shape.clone(), t.data_type)
        }
    }

    #[test]
    fn numbers_on_demand_are_those_that_are_held() {
        let (t, m) = (counted(&[2, 3, 4]), counted(&[3, 4]));
        let int = AttributeProto::int;
        type Case<'c> = (&'c str, &'c [AttributeProto], &'c [Tensor], &'c [usize]);
        let cases: &[Case] = &[
            ("Cast", &[int("to", 7)], std::slice::from_ref(&t), &[0]),
            ("Neg", &[], std::slice::from_ref(&t), &[0]),
            ("Reshape", &[], &[t.clone(), ints(&[2], &[4.0, 6.0])], &[0]),
            (
                "Transpose",
                &[AttributeProto::ints("perm", &[2, 0, 1])],
                std::slice::from_ref(&t),
                &[0],
            ),
            ("Expand", &[], &[m.clone(), ints(&[3], &[2.0, 1.0, 1.0])], &[0]),
            ("Tile", &[], &[m.clone(), ints(&[2], &[2.0, 3.0])], &[0]),
            (
                "Concat",
                &[int("axis", 1)],
                &[t.clone(), counted(&[2, 1, 4]), t.clone()],
                &[0, 1, 2],
            ),
            (
                "Slice",
                &[],
                &[t.clone(), ints(&[1], &[-1.0]), ints(&[1], &[-4.0]), ints(&[1], &[2.0])],
                &[0],
            ),
            (
                "Gather",
                &[int("axis", 1)],
                &[t.clone(), ints(&[2], &[-1.0, 1.0])],
                &[0, 1],
            ),
            (
                "GatherND",
                &[],
                &[t.clone(), ints(&[2, 2], &[1.0, 2.0, 0.0, -3.0])],
                &[0, 1],
            ),
            ("Where", &[], &[counted(&[4]), t.clone(), m.clone()], &[0, 1, 2]),
            ("Add", &[], &[t.clone(), m.clone()], &[0, 1]),
            ("Less", &[], &[m.clone(), t.clone()], &[0, 1]),
            ("Trilu", &[int("upper", 0)], &[t.clone(), ints(&[], &[1.0])], &[0]),
            ("ReduceMax", &[], &[t.clone(), ints(&[1], &[1.0])], &[0]),
            (
                "ReduceMin",
                &[int("keepdims", 0)],
                &[t.clone(), ints(&[1], &[-1.0])],
                &[0],
            ),
            (
                "Pad",
                &[],
                &[m.clone(), ints(&[4], &[1.0, 0.0, -1.0, 2.0]), floats(&[], &[7.0])],
                &[0],
            ),
            ("CumSum", &[], &[m.clone(), ints(&[], &[1.0])], &[0]),
            (
                "ScatterND",
                &[],
                &[
                    m.clone(),
                    ints(&[2, 2, 2], &[0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]),
                    counted(&[2, 2]),
                ],
                &[0, 1, 2],
            ),
        ];
        for (op, attributes, inputs, large) in cases {
            let node = node(op, attributes);
            let held = result(&node, inputs).unwrap();
            assert!(held.data.is_some(), "{op}");
            for slots in (0..large.len()).map(|i| vec![large[i]]).chain([large.to_vec()]) {
                let mut inputs = inputs.to_vec();
                slots.iter().for_each(|slot| inputs[*slot] = on_demand(&inputs[*slot]));
                let other = result(&node, &inputs).unwrap();
                let other = other.held();
                assert_eq!((&other.shape, &other.data), (&held.shape, &held.data), "{op} {slots:?}");
            }
        }
    }

    #[test]
    fn scatters_on_demand_are_blocks_in_order_only() {
        let m = counted(&[3, 4]);
        let swapped = ints(&[2, 2, 2], &[0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0]);
        let out = result(&node("ScatterND", &[]), &[on_demand(&m), swapped, counted(&[2, 2])]).unwrap();
        assert!(!out.is_known());
    }

    #[test]
    fn operators_of_masks_give_their_numbers() {
        let string = |name: &str, value: &str| AttributeProto {
            name: Some(name.into()),
            s: Some(value.as_bytes().to_vec().into()),
            ..Default::default()
        };
        let numbers = |op: &str, attributes: &[AttributeProto], inputs: &[Tensor]| {
            result(&node(op, attributes), inputs).unwrap().data.unwrap()
        };
        let left = string("direction", "LEFT");
        assert_eq!(
            numbers("BitShift", &[left], &[ints(&[], &[1.0]), ints(&[], &[12.0])]),
            [4096.0]
        );
        let right = string("direction", "RIGHT");
        assert_eq!(
            numbers("BitShift", &[right], &[ints(&[], &[9000.0]), ints(&[], &[12.0])]),
            [2.0]
        );
        assert_eq!(
            numbers("BitwiseAnd", &[], &[ints(&[], &[9000.0]), ints(&[], &[-4096.0])]),
            [8192.0]
        );
        let both = [floats(&[2], &[-7.0, 7.0]), floats(&[], &[4.0])];
        assert_eq!(numbers("Mod", &[], &both), [1.0, 3.0]);
        assert_eq!(numbers("Mod", &[AttributeProto::int("fmod", 1)], &both), [-3.0, 3.0]);
        let eye = numbers("EyeLike", &[AttributeProto::int("k", 1)], &[counted(&[2, 3])]);
        assert_eq!(eye, [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
        // Pads of named axes, and a constant as it was written before opset 11.
        let last = [
            counted(&[1, 2]),
            ints(&[2], &[0.0, 1.0]),
            floats(&[], &[9.0]),
            ints(&[1], &[-1.0]),
        ];
        assert_eq!(numbers("Pad", &[], &last), [-3.0, -2.0, 9.0]);
        let reflected = [counted(&[1, 2]), ints(&[4], &[0.0, 1.0, 0.0, 0.0])];
        let unknown = result(&node("Pad", &[string("mode", "reflect")]), &reflected).unwrap();
        assert_eq!((unknown.shape, unknown.data), (vec![1, 3], None));
    }

    #[test]
    fn a_table_ends_although_its_numbers_are_not_known() {
        let table = Tensor::unknown(vec![100, 8], DataType::Float);
        let gather = node("Gather", &[]);
        assert!(result(&gather, &[table.clone(), ints(&[2], &[99.0, -100.0])]).is_ok());
        let why = result(&gather, &[table, ints(&[1], &[100.0])]).expect_err("out of range");
        assert_eq!(why, Error::IndexOutOfRange { index: 100, len: 100 });
    }

    #[test]
    fn numbers_that_take_too_many_steps_are_not_known() {
        // Each of these is computed twice for the next.
        let mut t = Tensor::filled(vec![1 << 20], DataType::Float, 1.0).unwrap();
        for _ in 0..64 {
            t = result(&node("Max", &[]), &[t.clone(), t]).unwrap();
        }
        let part = [t, ints(&[1], &[0.0]), ints(&[1], &[10.0])];
        assert!(!result(&node("Slice", &[]), &part).unwrap().is_known());
    }

    #[test]
    fn a_mask_of_all_tokens_by_all_tokens_is_read_without_being_held() {
        let shape = ints(&[2], &[60_000.0, 60_000.0]);
        let one = TensorProto::floats("value", &[1], &[1.0]);
        let mut fill = node("ConstantOfShape", &[]);
        fill.attribute.push(AttributeProto {
            name: Some("value".into()),
            t: Some(Box::new(one)),
            ..Default::default()
        });
        let ones = result(&fill, &[shape]).unwrap();
        let low = result(&node("Trilu", &[AttributeProto::int("upper", 0)]), &[ones]).unwrap();
        let numbers = low.numbers().expect("numbers");
        assert!(low.data.is_none());
        assert_eq!(
            [59_999, 50_000, 50_001].map(|j| numbers.at(50_000 * 60_000 + j)),
            [0.0, 1.0, 0.0]
        );
    }
}
