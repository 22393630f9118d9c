//! Integers in the element type that a graph declares for an input.

use half::{bf16, f16};
use ort::value::{DynValue, Tensor, TensorElementType};

use crate::{
    decoder::error::{Error, Result},
    runtime::ort_error,
};

/// Element types of token ids and positions.
pub(crate) const INTEGERS: [TensorElementType; 2] = [TensorElementType::Int64, TensorElementType::Int32];

/// Element types of attention masks.
pub(crate) const MASKS: [TensorElementType; 8] = [
    TensorElementType::Int64,
    TensorElementType::Int32,
    TensorElementType::Int8,
    TensorElementType::Uint8,
    TensorElementType::Bool,
    TensorElementType::Float32,
    TensorElementType::Float16,
    TensorElementType::Bfloat16,
];

/// Integers as bytes of an element type.
pub(crate) fn bytes(element: TensorElementType, numbers: impl Iterator<Item = i64>) -> Result<Vec<u8>> {
    Ok(match element {
        TensorElementType::Int64 => numbers.flat_map(i64::to_le_bytes).collect(),
        TensorElementType::Int32 => numbers.flat_map(|n| (n as i32).to_le_bytes()).collect(),
        TensorElementType::Int8 | TensorElementType::Uint8 => numbers.map(|n| n as u8).collect(),
        TensorElementType::Bool => numbers.map(|n| u8::from(n != 0)).collect(),
        TensorElementType::Float32 => numbers.flat_map(|n| (n as f32).to_le_bytes()).collect(),
        TensorElementType::Float16 => numbers.flat_map(|n| f16::from_f32(n as f32).to_le_bytes()).collect(),
        TensorElementType::Bfloat16 => numbers.flat_map(|n| bf16::from_f32(n as f32).to_le_bytes()).collect(),
        other => return Err(Error::IntegerType(other)),
    })
}

/// A tensor of integers on the host.
pub(crate) fn tensor(
    element: TensorElementType,
    shape: &[usize],
    numbers: impl Iterator<Item = i64>,
) -> Result<DynValue> {
    let shape = shape.to_vec();
    let value = match element {
        TensorElementType::Int64 => make(shape, numbers.collect::<Vec<i64>>()),
        TensorElementType::Int32 => make(shape, numbers.map(|n| n as i32).collect::<Vec<_>>()),
        TensorElementType::Int8 => make(shape, numbers.map(|n| n as i8).collect::<Vec<_>>()),
        TensorElementType::Uint8 => make(shape, numbers.map(|n| n as u8).collect::<Vec<_>>()),
        TensorElementType::Bool => make(shape, numbers.map(|n| n != 0).collect::<Vec<_>>()),
        TensorElementType::Float32 => make(shape, numbers.map(|n| n as f32).collect::<Vec<_>>()),
        TensorElementType::Float16 => make(shape, numbers.map(|n| f16::from_f32(n as f32)).collect::<Vec<_>>()),
        TensorElementType::Bfloat16 => make(shape, numbers.map(|n| bf16::from_f32(n as f32)).collect::<Vec<_>>()),
        other => return Err(Error::IntegerType(other)),
    };
    Ok(value.map_err(ort_error)?)
}

fn make<T: ort::value::PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static>(
    shape: Vec<usize>,
    data: Vec<T>,
) -> ort::Result<DynValue> {
    Ok(Tensor::from_array((shape, data))?.into_dyn())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_ones_and_zeros_in_every_type() {
        for element in MASKS {
            let bytes = bytes(element, [0, 1].into_iter()).unwrap();
            let size = element.byte_size(1).unwrap();
            assert_eq!(bytes.len(), 2 * size, "{element}");
            assert!(bytes[..size].iter().all(|b| *b == 0) && bytes[size..].iter().any(|b| *b != 0));
        }
        assert_eq!(bytes(TensorElementType::Float16, [1].into_iter()).unwrap(), [0, 0x3c]);
        assert_eq!(
            bytes(TensorElementType::Bfloat16, [1].into_iter()).unwrap(),
            [0x80, 0x3f]
        );
        assert!(bytes(TensorElementType::String, [1].into_iter()).is_err());
    }
}
