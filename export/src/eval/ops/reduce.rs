//! Along one axis or several: sums, extremes, their places, cumulative sums, Softmax, TopK.

use super::{OpCall, Outputs, axis_of, size};
use crate::eval::{
    Error, Tensor,
    lazy::Lazy,
    tensor::{numel, storable},
};
use ndarray::{ArrayD, Axis};
use retro_onnx::DataType;
use std::{cell::RefCell, collections::HashMap};

/// What a Reduce operator does with the numbers along its axes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reduction {
    Sum,
    Mean,
    Max,
    Min,
    Product,
    /// One of which only the shape is computed.
    Other,
}

/// The axes that are reduced, and the result's shape: with ones for them, and as the node gives it.
struct Reduced {
    axes: Vec<usize>,
    kept: Vec<usize>,
    shape: Vec<usize>,
}

/// None where nothing is reduced.
fn reduced(call: &OpCall, t: &Tensor) -> Result<Option<Reduced>, Error> {
    let rank = t.shape.len();
    let axes: Vec<usize> = match call.ints(1, "axes")? {
        Some(axes) if !axes.is_empty() => axes.iter().map(|a| axis_of(*a, rank)).collect::<Result<_, _>>()?,
        _ if call.int("noop_with_empty_axes", 0) != 0 => return Ok(None),
        _ => (0..rank).collect(),
    };
    let dims = || t.shape.iter().copied().enumerate();
    let kept: Vec<usize> = dims().map(|(i, d)| if axes.contains(&i) { 1 } else { d }).collect();
    let shape = if call.int("keepdims", 1) != 0 {
        kept.clone()
    } else {
        dims().filter(|(i, _)| !axes.contains(i)).map(|(_, d)| d).collect()
    };
    Ok(Some(Reduced { axes, kept, shape }))
}

fn reduce(call: &OpCall, reduction: Reduction) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let Some(Reduced { axes, kept, shape }) = reduced(call, t)? else {
        return Ok(t.clone());
    };
    let extreme = matches!(reduction, Reduction::Max | Reduction::Min);
    if let (Some(lazy), [axis], true) = (&t.lazy, axes.as_slice(), extreme) {
        return extreme_on_demand(t, lazy.clone(), *axis, shape, reduction == Reduction::Max);
    }
    if t.data.is_none() {
        return Ok(Tensor::unknown(shape, t.data_type));
    }
    let (start, op): (f64, fn(f64, f64) -> f64) = match reduction {
        Reduction::Sum | Reduction::Mean => (0.0, |a, b| a + b),
        Reduction::Max => (f64::NEG_INFINITY, f64::max),
        Reduction::Min => (f64::INFINITY, f64::min),
        Reduction::Product => (1.0, |a, b| a * b),
        Reduction::Other => return Ok(Tensor::unknown(shape, t.data_type)),
    };
    let n = storable(&kept)?;
    let mut out = t.view()?.to_owned();
    // From the last, so that the others keep their numbers.
    for axis in (0..kept.len()).rev().filter(|axis| axes.contains(axis)) {
        out = out.fold_axis(Axis(axis), start, |a, b| op(*a, *b));
    }
    if reduction == Reduction::Mean {
        let count = numel(&t.shape)?.checked_div(n).unwrap_or(0) as f64;
        out.mapv_inplace(|x| x / count);
    }
    Tensor::of_array(out, t.data_type).reshaped(shape)
}

/// [ReduceSum](https://onnx.ai/onnx/operators/onnx__ReduceSum.html)
pub(super) fn sum(call: &OpCall) -> Result<Tensor, Error> {
    reduce(call, Reduction::Sum)
}

/// [ReduceMean](https://onnx.ai/onnx/operators/onnx__ReduceMean.html)
pub(super) fn mean(call: &OpCall) -> Result<Tensor, Error> {
    reduce(call, Reduction::Mean)
}

/// [ReduceMax](https://onnx.ai/onnx/operators/onnx__ReduceMax.html)
pub(super) fn max(call: &OpCall) -> Result<Tensor, Error> {
    reduce(call, Reduction::Max)
}

/// [ReduceMin](https://onnx.ai/onnx/operators/onnx__ReduceMin.html)
pub(super) fn min(call: &OpCall) -> Result<Tensor, Error> {
    reduce(call, Reduction::Min)
}

/// [ReduceProd](https://onnx.ai/onnx/operators/onnx__ReduceProd.html)
pub(super) fn product(call: &OpCall) -> Result<Tensor, Error> {
    reduce(call, Reduction::Product)
}

/// Reductions of which only the shape is computed, as [ReduceL2](https://onnx.ai/onnx/operators/onnx__ReduceL2.html).
pub(super) fn shape_only(call: &OpCall) -> Result<Tensor, Error> {
    reduce(call, Reduction::Other)
}

/// The largest or smallest number along one axis of a tensor on demand; each is remembered, a row reads it many times.
fn extreme_on_demand(t: &Tensor, lazy: Lazy, axis: usize, shape: Vec<usize>, most: bool) -> Result<Tensor, Error> {
    let (d, inner) = (t.shape[axis], numel(&t.shape[axis + 1..])?);
    let found: RefCell<HashMap<usize, f64>> = RefCell::default();
    let numbers = Lazy::of_rows(&lazy.clone(), d, move |place| {
        if let Some(x) = found.borrow().get(&place) {
            return *x;
        }
        let (outer, rest) = (place / inner, place % inner);
        let row = (0..d).map(|i| lazy.at((outer * d + i) * inner + rest));
        let x = if most {
            row.fold(f64::NEG_INFINITY, f64::max)
        } else {
            row.fold(f64::INFINITY, f64::min)
        };
        found.borrow_mut().insert(place, x);
        x
    });
    Tensor::computed(shape, t.data_type, numbers)
}

/// [ArgMax](https://onnx.ai/onnx/operators/onnx__ArgMax.html)
pub(super) fn arg_max(call: &OpCall) -> Result<Tensor, Error> {
    arg_extreme(call, |x, best| x > best)
}

/// [ArgMin](https://onnx.ai/onnx/operators/onnx__ArgMin.html)
pub(super) fn arg_min(call: &OpCall) -> Result<Tensor, Error> {
    arg_extreme(call, |x, best| x < best)
}

/// The first place whose number none is better than.
fn arg_extreme(call: &OpCall, better: fn(f64, f64) -> bool) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let axis = axis_of(call.int("axis", 0), t.shape.len())?;
    let mut shape = t.shape.clone();
    shape[axis] = 1;
    let kept = shape.clone();
    if call.int("keepdims", 1) == 0 {
        shape.remove(axis);
    }
    if t.data.is_none() {
        return Ok(Tensor::unknown(shape, DataType::Int64));
    }
    storable(&kept)?;
    let best = t.view()?.map_axis(Axis(axis), |lane| {
        let mut best = 0;
        for (at, x) in lane.iter().enumerate() {
            if better(*x, lane[best]) {
                best = at;
            }
        }
        best as f64
    });
    Tensor::of_array(best, DataType::Int64).reshaped(shape)
}

/// [CumSum](https://onnx.ai/onnx/operators/onnx__CumSum.html)
pub(super) fn cumsum(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    if t.data.is_none() {
        return Ok(t.clone());
    }
    let axis = call.need(1)?.as_ints()?.first().copied().unwrap_or(0);
    let axis = axis_of(axis, t.shape.len())?;
    let (exclusive, reverse) = (call.int("exclusive", 0) != 0, call.int("reverse", 0) != 0);
    let mut out: ArrayD<f64> = t.view()?.to_owned();
    if reverse {
        out.invert_axis(Axis(axis));
    }
    for mut lane in out.lanes_mut(Axis(axis)) {
        let mut sum = 0.0;
        for x in &mut lane {
            let next = sum + *x;
            *x = if exclusive { sum } else { next };
            sum = next;
        }
    }
    if reverse {
        out.invert_axis(Axis(axis));
    }
    Ok(Tensor::of_array(out, t.data_type))
}

/// [Softmax](https://onnx.ai/onnx/operators/onnx__Softmax.html): along the last axis, or, before opset 13, over all from an axis on.
pub(super) fn softmax(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let Some(data) = &t.data else { return Ok(t.clone()) };
    let rank = t.shape.len();
    let axis = axis_of(call.int("axis", if call.opset >= 13 { -1 } else { 1 }), rank)?;
    if call.opset >= 13 && axis + 1 != rank {
        return Err(Error::NotComputed(format!("a Softmax along axis {axis} of {rank}")));
    }
    let mut out = data.clone();
    let width = numel(&t.shape[axis..])?;
    out.chunks_mut(width.max(1)).for_each(softmax_row);
    Ok(Tensor::new(t.shape.clone(), t.data_type, out))
}

/// Softmax of a row; one without any key gives zeros.
pub(super) fn softmax_row(row: &mut [f64]) {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let shift = if max.is_finite() { max } else { 0.0 };
    row.iter_mut().for_each(|x| *x = (*x - shift).exp());
    let sum: f64 = row.iter().sum();
    if sum > 0.0 {
        row.iter_mut().for_each(|x| *x /= sum);
    }
}

/// [TopK](https://onnx.ai/onnx/operators/onnx__TopK.html): shapes.
pub(super) fn top_k(call: &OpCall) -> Result<Outputs, Error> {
    let t = call.need(0)?;
    let k = call
        .ints(1, "k")?
        .and_then(|k| k.first().copied())
        .or_else(|| call.node.attribute("k").map(|a| a.i()))
        .ok_or("how many is not known")?;
    let axis = axis_of(call.int("axis", -1), t.shape.len())?;
    let mut shape = t.shape.clone();
    shape[axis] = size(k)?;
    Ok(vec![
        Some(Tensor::unknown(shape.clone(), t.data_type)),
        Some(Tensor::unknown(shape, DataType::Int64)),
    ])
}
