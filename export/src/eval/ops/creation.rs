//! Tensors that are made from nothing: Constant, ConstantOfShape, EyeLike, Range.

use super::OpCall;
use crate::eval::{Error, Tensor, lazy::Lazy, tensor::storable};
use retro_onnx::DataType;

/// Numbers of a Constant that are read.
const MAX_CONSTANT: usize = 1 << 22;

/// A type by its number in an attribute.
pub(super) fn data_type(number: i64) -> Option<DataType> {
    DataType::try_from(i32::try_from(number).ok()?).ok()
}

/// [Constant](https://onnx.ai/onnx/operators/onnx__Constant.html)
pub(super) fn constant(call: &OpCall) -> Result<Tensor, Error> {
    let a = call.node.attribute.first().ok_or("a Constant without a value")?;
    let scalar = |t, x: f64| Tensor::new(vec![], t, vec![x]);
    Ok(match a.name() {
        "value" => {
            let t = a.t.as_deref().ok_or("a Constant without a value")?;
            Tensor::constant(t, MAX_CONSTANT, None).ok_or("a Constant of a strange shape")?
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

/// [ConstantOfShape](https://onnx.ai/onnx/operators/onnx__ConstantOfShape.html)
pub(super) fn constant_of_shape(call: &OpCall) -> Result<Tensor, Error> {
    let shape = call.sizes(0)?;
    let value = call.node.attribute("value").and_then(|a| a.t.as_deref());
    let value = value.and_then(|t| Tensor::constant(t, 1, None));
    let data_type = value.as_ref().map_or(DataType::Float, |v| v.data_type);
    let fill = value
        .map_or(Some(0.0), |v| v.first())
        .ok_or("a value that is not known")?;
    Tensor::filled(shape, data_type, fill)
}

/// [EyeLike](https://onnx.ai/onnx/operators/onnx__EyeLike.html)
pub(super) fn eye_like(call: &OpCall) -> Result<Tensor, Error> {
    let t = call.need(0)?;
    let &[_, columns] = t.shape.as_slice() else {
        return Err("no matrix".into());
    };
    let data_type = match call.int("dtype", 0) {
        0 => t.data_type,
        to => data_type(to).ok_or("a matrix of an unknown type")?,
    };
    let k = call.int("k", 0);
    let numbers = Lazy::new(&[], move |at| {
        let (i, j) = ((at / columns.max(1)) as i64, (at % columns.max(1)) as i64);
        f64::from(u8::from(j - i == k))
    });
    Tensor::computed(t.shape.clone(), data_type, numbers)
}

/// [Range](https://onnx.ai/onnx/operators/onnx__Range.html)
pub(super) fn range(call: &OpCall) -> Result<Tensor, Error> {
    let number = |slot| -> Result<f64, Error> {
        let data = call.need(slot)?.data.as_ref().ok_or("its bounds are not known")?;
        data.first().copied().ok_or(Error::Invalid("an empty bound"))
    };
    let (start, limit, step) = (number(0)?, number(1)?, number(2)?);
    let count = ((limit - start) / step).ceil();
    if !count.is_finite() {
        return Err("an endless range".into());
    }
    let count = count.max(0.0) as usize;
    storable(&[count])?;
    let data = (0..count).map(|i| start + i as f64 * step).collect();
    Ok(Tensor::new(vec![count], call.need(0)?.data_type, data))
}
