//! Elements that indices choose: Slice, Gather and ScatterND with their relatives, NonZero.
//!
//! `ndarray` chooses along one axis. GatherND and ScatterND choose along several at once, and stored and lazy numbers are found by
//! the same places, so those places are computed here.

use super::{OpCall, axis_of, size};
use crate::eval::{
    Error, Tensor,
    layout::{Layout, strides},
    lazy::Lazy,
    tensor::{is_stored, numel, storable},
};
use ndarray::IxDyn;
use retro_onnx::DataType;

/// An index, from the end if it is negative; none out of range.
fn index_of(id: f64, len: usize) -> Option<usize> {
    let id = id as i64;
    let id = if id < 0 { id.checked_add(len as i64)? } else { id };
    usize::try_from(id).ok().filter(|id| *id < len)
}

/// The same, of an index that is there already.
fn index(id: f64, len: usize) -> Result<usize, Error> {
    index_of(id, len).ok_or(Error::IndexOutOfRange { index: id as i64, len })
}

/// First element and count of a slice of `d` elements, as Slice's bounds name them.
fn bounds(start: i64, end: i64, step: i64, d: i64) -> Result<(usize, usize), Error> {
    let wrap = |x: i64| if x < 0 { x.saturating_add(d) } else { x };
    let (from, len, by) = match step {
        1.. => {
            let (from, to) = (wrap(start).clamp(0, d), wrap(end).clamp(0, d));
            (from, to - from, step)
        }
        0 => return Err("a step of 0".into()),
        _ => {
            let (from, to) = (wrap(start).clamp(-1, d - 1), wrap(end).clamp(-1, d - 1));
            let back = step.checked_neg().ok_or("a step that is too large")?;
            (from, from - to, back)
        }
    };
    let count = if len > 0 { (len - 1) / by + 1 } else { 0 };
    Ok((size(from.max(0))?, size(count)?))
}

/// [Slice](https://onnx.ai/onnx/operators/onnx__Slice.html)
pub(super) fn slice(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let starts = call.ints(1, "starts")?.ok_or("no starts")?;
    let ends = call.ints(2, "ends")?.ok_or("no ends")?;
    let axes = call
        .ints(3, "axes")?
        .unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = call.get(4).map(Tensor::as_ints).transpose()?;
    let steps = steps.unwrap_or_else(|| vec![1; starts.len()]);
    if ends.len() != starts.len() || axes.len() != starts.len() || steps.len() != starts.len() {
        return Err("starts, ends, axes and steps differ in number".into());
    }
    let mut layout = Layout::of(&t.shape);
    let mut seen = Vec::new();
    for (((start, end), axis), step) in starts.iter().zip(&ends).zip(&axes).zip(&steps) {
        let axis = axis_of(*axis, t.shape.len())?;
        if seen.contains(&axis) {
            return Err("a slice that names an axis twice".into());
        }
        seen.push(axis);
        let (from, count) = bounds(*start, *end, *step, t.shape[axis] as i64)?;
        layout = layout.sliced(axis, from, count, *step as isize);
    }
    t.rearranged(layout)
}

/// [Gather](https://onnx.ai/onnx/operators/onnx__Gather.html)
///
/// # Errors
/// [`Error::IndexOutOfRange`], also where the table's numbers are not known: a table of positions ends somewhere, and so do the calls
/// that the model takes.
pub(super) fn gather(call: &OpCall) -> Result<Tensor, Error> {
    let (t, ids) = (call.need(0)?, call.need(1)?);
    let axis = axis_of(call.int("axis", 0), t.shape.len())?;
    let mut shape = t.shape[..axis].to_vec();
    shape.extend(&ids.shape);
    shape.extend(&t.shape[axis + 1..]);
    numel(&shape)?;
    let len = t.shape[axis];
    let rows = ids.data.iter().flatten().map(|id| index(*id, len));
    let rows: Vec<usize> = rows.collect::<Result<_, _>>()?;
    if t.data.is_none() || ids.data.is_none() || !is_stored(&shape) {
        return gather_on_demand(t, ids, axis, shape);
    }
    let (outer, inner) = (numel(&t.shape[..axis])?, numel(&t.shape[axis + 1..])?);
    let blocks = t.view()?.into_shape_with_order((outer, len, inner));
    let blocks = blocks.map_err(|_| Error::Invalid("a table of another size"))?;
    // Row by row: `select` joins a view for each index, which costs more than the few numbers of a row.
    let mut out = Vec::with_capacity(numel(&shape)?);
    for block in blocks.outer_iter() {
        for row in &rows {
            out.extend(block.row(*row).iter());
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

/// Blocks of a tensor that are named by indices of its first axes, after those of a batch.
struct Blocks {
    /// Length and stride of each axis that is indexed.
    axes: Vec<(usize, usize)>,
    /// Index rows that share a place in the batch, and elements of that place.
    rows_per_batch: usize,
    batch_stride: usize,
    /// Elements of a block.
    len: usize,
}

impl Blocks {
    fn new(t: &Tensor, ids: &Tensor, batch: usize, depth: usize) -> Result<Self, Error> {
        let own = strides(&t.shape);
        Ok(Self {
            axes: (batch..batch + depth).map(|axis| (t.shape[axis], own[axis])).collect(),
            rows_per_batch: numel(&ids.shape[batch..ids.shape.len() - 1])?.max(1),
            batch_stride: numel(&t.shape[batch..])?,
            len: numel(&t.shape[batch + depth..])?,
        })
    }

    /// Where the block of an index row begins. `id`: the row's index along an axis.
    fn start(&self, row: usize, id: impl Fn(usize) -> f64) -> Result<usize, Error> {
        let mut at = row / self.rows_per_batch * self.batch_stride;
        for (i, (len, stride)) in self.axes.iter().enumerate() {
            at += index(id(i), *len)? * stride;
        }
        Ok(at)
    }
}

/// [GatherND](https://onnx.ai/onnx/operators/onnx__GatherND.html)
pub(super) fn gather_nd(call: &OpCall) -> Result<Tensor, Error> {
    let (t, ids) = (call.need(0)?, call.need(1)?);
    let batch = size(call.int("batch_dims", 0))?;
    let depth = *ids.shape.last().ok_or("indices without dimensions")?;
    let indexed = batch.saturating_add(depth);
    if indexed > t.shape.len() || batch >= ids.shape.len() || ids.shape.get(..batch) != t.shape.get(..batch) {
        return Err("indices that do not fit".into());
    }
    let mut shape = ids.shape[..ids.shape.len() - 1].to_vec();
    shape.extend(&t.shape[indexed..]);
    numel(&shape)?;
    let blocks = Blocks::new(t, ids, batch, depth)?;
    if let (Some(data), Some(ids), true) = (&t.data, &ids.data, is_stored(&shape)) {
        let mut out = Vec::with_capacity(storable(&shape)?);
        for row in 0..numel(&shape)?.checked_div(blocks.len).unwrap_or(0) {
            let from = blocks.start(row, |i| ids[row * depth + i])?;
            out.extend_from_slice(
                data.get(from..from + blocks.len)
                    .ok_or("a block outside of its tensor")?,
            );
        }
        return Ok(Tensor::new(shape, t.data_type, out));
    }
    let (Some(numbers), Some(places)) = (t.numbers(), ids.numbers()) else {
        return Ok(Tensor::unknown(shape, t.data_type));
    };
    let of = [vec![numbers.clone()], vec![places.clone(); depth]].concat();
    let numbers = Lazy::new(&of.iter().collect::<Vec<_>>(), move |place| {
        let (row, rest) = (place / blocks.len, place % blocks.len);
        match blocks.start(row, |i| places.at(row * depth + i)) {
            Ok(from) => numbers.at(from + rest),
            Err(_) => f64::NAN,
        }
    });
    Tensor::computed(shape, t.data_type, numbers)
}

/// [GatherElements](https://onnx.ai/onnx/operators/onnx__GatherElements.html)
pub(super) fn gather_elements(call: &OpCall) -> Result<Tensor, Error> {
    let (t, ids) = (call.need(0)?, call.need(1)?);
    let axis = axis_of(call.int("axis", 0), t.shape.len())?;
    if ids.shape.len() != t.shape.len() {
        return Err("indices of another rank".into());
    }
    if t.data.is_none() || ids.data.is_none() {
        return Ok(Tensor::unknown(ids.shape.clone(), t.data_type));
    }
    let outside = |(i, (n, d)): (usize, (&usize, &usize))| i != axis && n > d;
    if ids.shape.iter().zip(&t.shape).enumerate().any(outside) {
        return Err("more indices than the tensor has rows".into());
    }
    storable(&ids.shape)?;
    let data = t.view()?;
    let chosen = |(place, id): (IxDyn, &f64)| -> Result<f64, Error> {
        let mut place = place;
        place[axis] = index(*id, t.shape[axis])?;
        data.get(place).copied().ok_or(Error::Invalid("no such element"))
    };
    let out = ids.view()?.indexed_iter().map(chosen).collect::<Result<_, _>>()?;
    Ok(Tensor::new(ids.shape.clone(), t.data_type, out))
}

/// [ScatterND](https://onnx.ai/onnx/operators/onnx__ScatterND.html), without a reduction.
pub(super) fn scatter_nd(call: &OpCall) -> Result<Tensor, Error> {
    let (t, ids, updates) = (call.need(0)?, call.need(1)?, call.need(2)?);
    if [t, ids, updates].iter().any(|t| !t.has_numbers()) {
        return Ok(Tensor::unknown(t.shape.clone(), t.data_type));
    }
    let depth = *ids.shape.last().ok_or("indices without dimensions")?;
    let reduces = call.node.attribute("reduction").is_some_and(|r| r.s() != b"none");
    if depth == 0 || depth > t.shape.len() || reduces {
        return Err("a scatter that is not supported".into());
    }
    let (Some(data), Some(ids_data), Some(new)) = (&t.data, &ids.data, &updates.data) else {
        return scatter_nd_on_demand(t, ids, updates, depth);
    };
    let blocks = Blocks::new(t, ids, 0, depth)?;
    let mut out = data.clone();
    for row in 0..ids_data.len() / depth {
        // The only place in the batch is the first.
        let to = blocks.start(0, |i| ids_data[row * depth + i])?;
        let from = row.saturating_mul(blocks.len);
        let values = new
            .get(from..from.saturating_add(blocks.len))
            .ok_or("too few updates")?;
        out.get_mut(to..to + blocks.len)
            .ok_or("a block outside of its tensor")?
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
    // Each index must be its own place in the block; some are read here, others when their numbers are asked for.
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

/// [NonZero](https://onnx.ai/onnx/operators/onnx__NonZero.html)
pub(super) fn non_zero(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    if t.data.is_none() {
        return Err("its size depends on data".into());
    }
    let view = t.view()?;
    let found = view.indexed_iter().filter(|(_, x)| **x != 0.0);
    let places: Vec<IxDyn> = found.map(|(place, _)| place).collect();
    let rank = t.shape.len();
    let along = |axis: usize| places.iter().map(move |place| place[axis] as f64);
    let data = (0..rank).flat_map(along).collect();
    Ok(Tensor::new(vec![rank, places.len()], DataType::Int64, data))
}
