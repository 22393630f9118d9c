//! Quantised weights and activations: shapes and types. No proof needs their numbers.

use super::{OpCall, Outputs, matmul::product_shape, size};
use crate::eval::{Error, Tensor, tensor::numel};
use retro_onnx::DataType;

/// Products with weights of 4 to 8 bits, `[.., K] -> [.., N]`:
/// [com.microsoft.MatMulNBits](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits),
/// MatMulBnb4 and MatMulFpQ4.
pub(super) fn matmul_packed(call: &OpCall) -> Result<Tensor, Error> {
    let x = call.need(0)?;
    let mut shape = x.shape.clone();
    if let (Some(last), Some(n)) = (shape.last_mut(), call.node.attribute("N")) {
        *last = size(n.i())?;
    }
    numel(&shape)?;
    Ok(Tensor::unknown(shape, x.data_type))
}

/// Products whose numbers are not computed and whose result has the type of what dequantises it:
/// [com.microsoft.MatMulIntegerToFloat](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulIntegerToFloat),
/// and DynamicQuantizeMatMul, of float activations by quantised weights.
pub(super) fn matmul_to_float(call: &OpCall) -> Result<Tensor, Error> {
    let shape = product_shape(call.need(0)?, call.need(1)?)?;
    Ok(Tensor::unknown(shape, call.need(2)?.data_type))
}

/// [QLinearMatMul](https://onnx.ai/onnx/operators/onnx__QLinearMatMul.html)
pub(super) fn qlinear_matmul(call: &OpCall) -> Result<Tensor, Error> {
    let (a, b) = (call.need(0)?, call.need(3)?);
    Ok(Tensor::unknown(product_shape(a, b)?, a.data_type))
}

/// [com.microsoft.GatherBlockQuantized](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GatherBlockQuantized):
/// rows of a table of 4 or 8 bits, two numbers a byte where it is bytes of 4 bits.
pub(super) fn gather_block_quantized(call: &OpCall) -> Result<Tensor, Error> {
    let (table, ids) = (call.need(0)?, call.need(1)?);
    let packed = table.data_type == DataType::Uint8 && call.int("bits", 4) == 4;
    let mut shape = ids.shape.clone();
    shape.extend(table.shape.iter().skip(1));
    if let Some(last) = shape.last_mut().filter(|_| packed) {
        *last = last.saturating_mul(2);
    }
    numel(&shape)?;
    Ok(Tensor::unknown(shape, call.need(2)?.data_type))
}

/// [DequantizeLinear](https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html), and those that other exporters write with
/// the same inputs: the type is the scale's.
pub(super) fn dequantize(call: &OpCall) -> Result<Tensor, Error> {
    Ok(Tensor::unknown(call.need(0)?.shape.clone(), call.need(1)?.data_type))
}

/// [QuantizeLinear](https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html), and those that other exporters write with the same
/// inputs.
pub(super) fn quantize(call: &OpCall) -> Result<Tensor, Error> {
    Ok(Tensor::unknown(call.need(0)?.shape.clone(), DataType::Uint8))
}

/// [DynamicQuantizeLinear](https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html): numbers, scale and zero point.
pub(super) fn dynamic_quantize(call: &OpCall) -> Result<Outputs, Error> {
    Ok(vec![
        Some(quantize(call)?),
        Some(Tensor::unknown(vec![], DataType::Float)),
        Some(Tensor::unknown(vec![], DataType::Uint8)),
    ])
}
