//! Functions of each number by itself, or of numbers at the same place of tensors that are broadcast.

use super::{OpCall, creation};
use crate::eval::{
    Error, Tensor,
    layout::broadcast,
    lazy::Lazy,
    tensor::{is_stored, numel},
};
use ndarray::Zip;
use retro_onnx::DataType;

/// 1 for true, 0 for false: how booleans are stored.
pub(super) fn truth(x: bool) -> f64 {
    f64::from(u8::from(x))
}

/// A number as a type stores it, of those that a Cast or a kernel makes: cut to a whole number, or infinite beyond the largest.
/// Rounding follows in [`Tensor::round_to_type`].
fn converted(x: f64, t: DataType) -> f64 {
    let most = match t {
        DataType::Float => f64::from(f32::MAX),
        DataType::Float16 => 65504.0,
        DataType::Bool => return truth(x != 0.0),
        DataType::Double | DataType::Bfloat16 => return x,
        _ => return if x.is_nan() { 0.0 } else { x.trunc() },
    };
    if x.abs() > most { x.signum() * f64::INFINITY } else { x }
}

/// A function of each number.
pub(super) fn map(t: &Tensor, data_type: DataType, f: impl Fn(f64) -> f64 + 'static) -> Result<Tensor, Error> {
    if let Some(data) = &t.data {
        let data = data.iter().map(|x| f(*x)).collect();
        return Ok(Tensor::new(t.shape.clone(), data_type, data));
    }
    match t.numbers() {
        Some(numbers) => Tensor::computed(t.shape.clone(), data_type, numbers.map(f)),
        None => Ok(Tensor::unknown(t.shape.clone(), data_type)),
    }
}

/// A function of the numbers of two tensors, broadcast.
fn zip(a: &Tensor, b: &Tensor, data_type: DataType, f: impl Fn(f64, f64) -> f64 + 'static) -> Result<Tensor, Error> {
    let shape = broadcast(&a.shape, &b.shape)?;
    numel(&shape)?;
    if !a.has_numbers() || !b.has_numbers() {
        return Ok(Tensor::unknown(shape, data_type));
    }
    if is_stored(&shape)
        && let (Some(x), Some(y)) = (&a.data, &b.data)
    {
        if a.shape == b.shape {
            let numbers = x.iter().zip(y).map(|(x, y)| converted(f(*x, *y), data_type));
            return Ok(Tensor::new(shape, data_type, numbers.collect()));
        }
        let (x, y) = (a.broadcast_view(&shape)?, b.broadcast_view(&shape)?);
        let numbers = Zip::from(&x)
            .and(&y)
            .map_collect(|x, y| converted(f(*x, *y), data_type));
        return Ok(Tensor::of_array(numbers, data_type));
    }
    let (x, y) = (a.broadcast_numbers(&shape)?, b.broadcast_numbers(&shape)?);
    let numbers = Lazy::new(&[&x.clone(), &y.clone()], move |at| {
        converted(f(x.at(at), y.at(at)), data_type)
    });
    Tensor::computed(shape, data_type, numbers)
}

/// A function of all inputs, from the first to the last.
pub(super) fn fold(
    call: &OpCall,
    data_type: Option<DataType>,
    f: impl Fn(f64, f64) -> f64 + Clone + 'static,
) -> Result<Tensor, Error> {
    let mut result = call.need(0)?.clone();
    for slot in 1..call.inputs.len() {
        let to = data_type.unwrap_or(result.data_type);
        result = zip(&result, call.need(slot)?, to, f.clone())?;
    }
    Ok(result)
}

/// Operators on broadcast inputs of which only the shape is computed, as [PRelu](https://onnx.ai/onnx/operators/onnx__PRelu.html).
pub(super) fn broadcast_shape(call: &OpCall) -> Result<Tensor, Error> {
    let first = call.need(0)?;
    let mut shape = first.shape.clone();
    for slot in 1..call.inputs.len() {
        shape = broadcast(&shape, &call.need(slot)?.shape)?;
        numel(&shape)?;
    }
    Ok(Tensor::unknown(shape, first.data_type))
}

/// [Cast](https://onnx.ai/onnx/operators/onnx__Cast.html)
pub(super) fn cast(call: &OpCall) -> Result<Tensor, Error> {
    let to = creation::data_type(call.int("to", 1)).ok_or("a cast to an unknown type")?;
    map(call.need(0)?, to, move |x| converted(x, to))
}

/// [CastLike](https://onnx.ai/onnx/operators/onnx__CastLike.html)
pub(super) fn cast_like(call: &OpCall) -> Result<Tensor, Error> {
    let to = call.need(1)?.data_type;
    map(call.need(0)?, to, move |x| converted(x, to))
}

/// [Clip](https://onnx.ai/onnx/operators/onnx__Clip.html): its bounds are inputs since opset 11, attributes before.
pub(super) fn clip(call: &OpCall) -> Result<Tensor, Error> {
    let bound = |slot: usize, name: &str| call.get(slot).and_then(Tensor::first).or_else(|| call.float(name));
    let low = bound(1, "min").unwrap_or(f64::NEG_INFINITY);
    let high = bound(2, "max").unwrap_or(f64::INFINITY);
    let t = call.need(0)?;
    map(t, t.data_type, move |x| x.max(low).min(high))
}

/// [Div](https://onnx.ai/onnx/operators/onnx__Div.html): of integers without the remainder; by 0 it is undefined there, and 0 here.
pub(super) fn div(call: &OpCall) -> Result<Tensor, Error> {
    if call.need(0)?.is_int() {
        fold(call, None, |a, b| if b == 0.0 { 0.0 } else { (a / b).trunc() })
    } else {
        fold(call, None, |a, b| a / b)
    }
}

/// [Mod](https://onnx.ai/onnx/operators/onnx__Mod.html): the sign is the divisor's, or, as C's fmod has it, the dividend's.
pub(super) fn modulo(call: &OpCall) -> Result<Tensor, Error> {
    if call.int("fmod", 0) != 0 {
        fold(call, None, |a, b| if b == 0.0 { 0.0 } else { a % b })
    } else {
        fold(call, None, |a, b| if b == 0.0 { 0.0 } else { a - b * (a / b).floor() })
    }
}

/// [BitShift](https://onnx.ai/onnx/operators/onnx__BitShift.html)
pub(super) fn bit_shift(call: &OpCall) -> Result<Tensor, Error> {
    let left = call.node.attribute("direction").is_some_and(|d| d.s() == b"LEFT");
    fold(call, None, move |a, b| {
        let (a, by) = (a as u64, b.clamp(0.0, 63.0) as u32);
        (if left { a << by } else { a >> by }) as f64
    })
}

/// [Where](https://onnx.ai/onnx/operators/onnx__Where.html)
pub(super) fn select(call: &OpCall) -> Result<Tensor, Error> {
    let (c, a, b) = (call.need(0)?, call.need(1)?, call.need(2)?);
    let shape = broadcast(&broadcast(&c.shape, &a.shape)?, &b.shape)?;
    numel(&shape)?;
    let all = [c, a, b];
    if all.iter().any(|t| !t.has_numbers()) {
        return Ok(Tensor::unknown(shape, a.data_type));
    }
    if is_stored(&shape) && all.iter().all(|t| t.data.is_some()) {
        let (c, x, y) = (
            c.broadcast_view(&shape)?,
            a.broadcast_view(&shape)?,
            b.broadcast_view(&shape)?,
        );
        let chosen = Zip::from(&c)
            .and(&x)
            .and(&y)
            .map_collect(|c, x, y| if *c != 0.0 { *x } else { *y });
        return Ok(Tensor::of_array(chosen, a.data_type));
    }
    let (c, x, y) = (
        c.broadcast_numbers(&shape)?,
        a.broadcast_numbers(&shape)?,
        b.broadcast_numbers(&shape)?,
    );
    let numbers = Lazy::new(&[&c.clone(), &x.clone(), &y.clone()], move |at| {
        if c.at(at) != 0.0 { x.at(at) } else { y.at(at) }
    });
    Tensor::computed(shape, a.data_type, numbers)
}

/// [Trilu](https://onnx.ai/onnx/operators/onnx__Trilu.html)
pub(super) fn trilu(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let Some(numbers) = t.numbers() else {
        return Ok(t.clone());
    };
    let k = match call.get(1) {
        Some(k) => k.as_ints()?.first().copied().unwrap_or(0),
        None => 0,
    };
    let upper = call.int("upper", 1) != 0;
    let &[.., rows, columns] = t.shape.as_slice() else {
        return Err("no matrix".into());
    };
    let (rows, columns) = (rows.max(1), columns.max(1));
    let numbers = Lazy::new(&[&numbers.clone()], move |at| {
        let d = (at % columns) as i64 - (at / columns % rows) as i64;
        let kept = if upper { d >= k } else { d <= k };
        if kept { numbers.at(at) } else { 0.0 }
    });
    Tensor::computed(t.shape.clone(), t.data_type, numbers)
}
