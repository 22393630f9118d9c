//! Shapes, and elements that move: Shape, Reshape, Transpose, Expand, Concat, Split and the like.

use super::{OpCall, Outputs, axis_of, size};
use crate::eval::{
    Error, Tensor,
    layout::{Layout, strides},
    lazy::Lazy,
    tensor::{is_stored, numel},
};
use ndarray::{Axis, concatenate};
use retro_onnx::DataType;

/// [Identity](https://onnx.ai/onnx/operators/onnx__Identity.html), and
/// [Dropout](https://onnx.ai/onnx/operators/onnx__Dropout.html), which does nothing at inference.
pub(super) fn identity(call: &OpCall) -> Result<Tensor, Error> {
    call.need(0).cloned()
}

/// [Shape](https://onnx.ai/onnx/operators/onnx__Shape.html), of some of the axes since opset 15.
pub(super) fn shape(call: &OpCall) -> Result<Tensor, Error> {
    let dims = &call.need(0)?.shape;
    let rank = dims.len() as i64;
    let bound = |x: i64| (if x < 0 { x.saturating_add(rank) } else { x }).clamp(0, rank) as usize;
    let (from, to) = (bound(call.int("start", 0)), bound(call.int("end", rank)));
    let part = dims.get(from..to.max(from)).unwrap_or_default();
    Ok(Tensor::ints(part.iter().map(|d| *d as f64).collect()))
}

/// [Size](https://onnx.ai/onnx/operators/onnx__Size.html)
pub(super) fn element_count(call: &OpCall) -> Result<Tensor, Error> {
    let n = numel(&call.need(0)?.shape)?;
    Ok(Tensor::new(vec![], DataType::Int64, vec![n as f64]))
}

/// [Reshape](https://onnx.ai/onnx/operators/onnx__Reshape.html)
pub(super) fn reshape(call: &OpCall) -> Result<Tensor, Error> {
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
        let others = numel(&shape)?;
        let all = numel(&t.shape)?;
        if others == 0 || !all.is_multiple_of(others) {
            return Err(Error::Reshape {
                from: t.shape.clone(),
                into: wanted,
            });
        }
        shape[axis] = all / others;
    }
    t.reshaped(shape)
}

/// [Flatten](https://onnx.ai/onnx/operators/onnx__Flatten.html)
pub(super) fn flatten(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let axis = call.int("axis", 1);
    let rank = t.shape.len();
    let axis = if axis == rank as i64 {
        rank
    } else {
        axis_of(axis, rank.max(1))?
    };
    let (a, b) = t.shape.split_at(axis.min(rank));
    t.reshaped(vec![numel(a)?, numel(b)?])
}

/// [Unsqueeze](https://onnx.ai/onnx/operators/onnx__Unsqueeze.html)
pub(super) fn unsqueeze(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let axes = call.ints(1, "axes")?.ok_or("no axes")?;
    let rank = t.shape.len() + axes.len();
    if rank > 64 {
        return Err(Error::TooManyDimensions(rank));
    }
    let axes: Vec<usize> = axes.iter().map(|a| axis_of(*a, rank)).collect::<Result<_, _>>()?;
    let mut old = t.shape.iter();
    let dim = |i: usize| match axes.contains(&i) {
        true => 1,
        false => old.next().copied().unwrap_or(1),
    };
    t.reshaped((0..rank).map(dim).collect())
}

/// [Squeeze](https://onnx.ai/onnx/operators/onnx__Squeeze.html)
pub(super) fn squeeze(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let rank = t.shape.len();
    let axes: Option<Vec<usize>> = call
        .ints(1, "axes")?
        .map(|axes| axes.iter().map(|a| axis_of(*a, rank)).collect::<Result<_, _>>())
        .transpose()?;
    let keep = |i: usize, d: usize| axes.as_ref().map_or(d != 1, |axes| !axes.contains(&i));
    let dims = t.shape.iter().enumerate().filter(|(i, d)| keep(*i, **d));
    t.reshaped(dims.map(|(_, d)| *d).collect())
}

/// [Transpose](https://onnx.ai/onnx/operators/onnx__Transpose.html)
pub(super) fn transpose(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let rank = t.shape.len();
    let order: Vec<usize> = match call.ints_attribute("perm") {
        Some(perm) => perm.iter().map(|a| axis_of(*a, rank)).collect::<Result<_, _>>()?,
        None => (0..rank).rev().collect(),
    };
    if order.len() != rank {
        return Err("a permutation of another rank".into());
    }
    if (0..rank).any(|axis| !order.contains(&axis)) {
        return Err("a permutation that names an axis twice".into());
    }
    t.rearranged(Layout::of(&t.shape).permuted(&order))
}

/// The last two axes exchanged.
///
/// # Errors
/// There are fewer.
pub(super) fn matrix_transposed(t: &Tensor) -> Result<Tensor, Error> {
    let rank = t.shape.len();
    if rank < 2 {
        return Err("no matrix".into());
    }
    let mut order: Vec<usize> = (0..rank).collect();
    order.swap(rank - 1, rank - 2);
    t.rearranged(Layout::of(&t.shape).permuted(&order))
}

/// [Expand](https://onnx.ai/onnx/operators/onnx__Expand.html)
pub(super) fn expand(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let shape = crate::eval::layout::broadcast(&t.shape, &call.sizes(1)?)?;
    t.expanded(&shape)
}

/// [Tile](https://onnx.ai/onnx/operators/onnx__Tile.html)
pub(super) fn tile(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let times = call.sizes(1)?;
    if times.len() != t.shape.len() {
        return Err("as many repeats as dimensions are needed".into());
    }
    let shape: Vec<usize> = t.shape.iter().zip(&times).map(|(d, n)| d.saturating_mul(*n)).collect();
    numel(&shape)?;
    // Each axis twice: the repeat, which does not move, and the element.
    let axes = t.shape.iter().zip(&times).enumerate();
    let pairs = axes.flat_map(|(axis, (d, n))| [(*n, vec![]), (*d, vec![axis])]);
    t.rearranged(Layout::of(&t.shape).gathered(pairs))?.reshaped(shape)
}

/// [Concat](https://onnx.ai/onnx/operators/onnx__Concat.html)
pub(super) fn concat(call: &OpCall) -> Result<Tensor, Error> {
    let parts: Vec<&Tensor> = call.inputs.iter().filter_map(|t| t.as_deref()).collect();
    let first = *parts.first().ok_or("nothing to put together")?;
    let axis = axis_of(call.int("axis", 0), first.shape.len())?;
    let mut shape = first.shape.clone();
    shape[axis] = 0;
    for part in &parts {
        let mut pairs = part.shape.iter().zip(&shape).enumerate();
        if part.shape.len() != shape.len() || pairs.any(|(i, (a, b))| i != axis && a != b) {
            return Err(Error::Concat {
                first: first.shape.clone(),
                other: part.shape.clone(),
                axis,
            });
        }
        shape[axis] = shape[axis].saturating_add(part.shape[axis]);
    }
    numel(&shape)?;
    if !is_stored(&shape) || parts.iter().any(|p| p.data.is_none()) {
        return concat_on_demand(&parts, shape, axis);
    }
    let views: Vec<_> = parts.iter().map(|p| p.view()).collect::<Result<_, _>>()?;
    let all = concatenate(Axis(axis), &views).map_err(|_| Error::Invalid("parts that do not fit"))?;
    Ok(Tensor::of_array(all, first.data_type))
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

/// [Split](https://onnx.ai/onnx/operators/onnx__Split.html)
pub(super) fn split(call: &OpCall) -> Result<Outputs, Error> {
    let t = call.need(0)?;
    let axis = axis_of(call.int("axis", 0), t.shape.len())?;
    let len = t.shape[axis];
    let count = call.node.output.len();
    let sizes: Vec<usize> = match call.ints(1, "split")? {
        Some(sizes) => sizes.iter().map(|d| size(*d)).collect::<Result<_, _>>()?,
        None => {
            let each = len.div_ceil(count.max(1));
            let left = |i: usize| len.saturating_sub(i.saturating_mul(each));
            (0..count).map(|i| each.min(left(i))).collect()
        }
    };
    if sizes.iter().try_fold(0usize, |n, d| n.checked_add(*d)) != Some(len) {
        return Err(Error::Split { sizes, len });
    }
    let mut from = 0;
    let mut parts = Vec::new();
    for d in sizes {
        parts.push(Some(t.rearranged(Layout::of(&t.shape).sliced(axis, from, d, 1))?));
        from += d;
    }
    Ok(parts)
}

/// [Pad](https://onnx.ai/onnx/operators/onnx__Pad.html): more around a tensor, or, where the pads are negative, less. Numbers in the
/// mode `constant` only.
pub(super) fn pad(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let rank = t.shape.len();
    let pads = call.ints(1, "pads")?.ok_or("how much to pad is not known")?;
    let axes: Vec<usize> = match call.get(3) {
        Some(axes) => {
            let axes = axes.as_ints()?;
            axes.iter().map(|a| axis_of(*a, rank)).collect::<Result<_, _>>()?
        }
        None => (0..rank).collect(),
    };
    if pads.len() != 2 * axes.len() {
        return Err(Error::Sizes(format!("{} pads for {} axes", pads.len(), axes.len())));
    }
    let (mut shape, mut before) = (t.shape.clone(), vec![0i64; rank]);
    for (i, axis) in axes.iter().enumerate() {
        let wide = i64::try_from(t.shape[*axis]).ok();
        let wide = wide.and_then(|d| d.checked_add(pads[i])?.checked_add(pads[axes.len() + i]));
        shape[*axis] = size(wide.ok_or("a pad that is too large")?)?;
        before[*axis] = pads[i];
    }
    numel(&shape)?;
    let mode = call.node.attribute("mode").map_or(&b"constant"[..], |a| a.s());
    let around = match call.get(2) {
        Some(value) => value.first(),
        None => Some(call.float("value").unwrap_or(0.0)),
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
