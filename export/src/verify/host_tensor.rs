//! Tensors on their way into a session and out of it.

use super::error::Error;
use half::{bf16, f16};
use ort::{
    memory::Allocator,
    value::{DynTensor, DynValue, PrimitiveTensorElementType, TensorElementType, ValueType},
};

/// A tensor of the host: bytes of a type in a shape.
#[derive(Clone, Debug)]
pub struct HostTensor {
    pub element: TensorElementType,
    pub shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn size_of(element: TensorElementType) -> Result<usize, Error> {
    Ok(match element {
        TensorElementType::Float32 | TensorElementType::Int32 | TensorElementType::Uint32 => 4,
        TensorElementType::Float16
        | TensorElementType::Bfloat16
        | TensorElementType::Int16
        | TensorElementType::Uint16 => 2,
        TensorElementType::Int64 | TensorElementType::Uint64 | TensorElementType::Float64 => 8,
        TensorElementType::Bool | TensorElementType::Uint8 | TensorElementType::Int8 => 1,
        other => return Err(Error::ElementType(other)),
    })
}

impl HostTensor {
    /// A tensor of zeros.
    pub fn zeros(element: TensorElementType, shape: &[usize]) -> Result<Self, Error> {
        let n: usize = shape.iter().product();
        Ok(Self {
            element,
            shape: shape.to_vec(),
            bytes: vec![0; n * size_of(element)?],
        })
    }

    /// From integers, in an integer or floating type.
    pub fn from_ints(element: TensorElementType, shape: &[usize], values: &[i64]) -> Result<Self, Error> {
        let bytes = match element {
            TensorElementType::Int64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            TensorElementType::Int32 => values.iter().flat_map(|v| (*v as i32).to_le_bytes()).collect(),
            TensorElementType::Bool => values.iter().map(|v| u8::from(*v != 0)).collect(),
            TensorElementType::Int8 | TensorElementType::Uint8 => values.iter().map(|v| *v as u8).collect(),
            _ => {
                let values: Vec<f64> = values.iter().map(|v| *v as f64).collect();
                return Self::from_floats(element, shape, &values);
            }
        };
        Self::of(element, shape, bytes)
    }

    /// From floats, in a floating type.
    pub fn from_floats(element: TensorElementType, shape: &[usize], values: &[f64]) -> Result<Self, Error> {
        let bytes = match element {
            TensorElementType::Float32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
            TensorElementType::Float64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            TensorElementType::Float16 => values.iter().flat_map(|v| f16::from_f64(*v).to_le_bytes()).collect(),
            TensorElementType::Bfloat16 => values.iter().flat_map(|v| bf16::from_f64(*v).to_le_bytes()).collect(),
            other => return Err(Error::ElementType(other)),
        };
        Self::of(element, shape, bytes)
    }

    fn of(element: TensorElementType, shape: &[usize], bytes: Vec<u8>) -> Result<Self, Error> {
        let wanted = shape.iter().product::<usize>() * size_of(element)?;
        if bytes.len() != wanted {
            return Err(Error::Bytes {
                shape: shape.to_vec(),
                expected: wanted,
                actual: bytes.len(),
            });
        }
        Ok(Self {
            element,
            shape: shape.to_vec(),
            bytes,
        })
    }

    /// As floats, for numbers that are floats.
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        Ok(match self.element {
            TensorElementType::Float32 => self
                .bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            TensorElementType::Float16 => self
                .bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b).to_f32())
                .collect(),
            TensorElementType::Bfloat16 => self
                .bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).to_f32())
                .collect(),
            other => return Err(Error::NoFloats(other)),
        })
    }

    /// The first `tokens` rows of `[B, H, T, D]`.
    pub fn first_tokens(&self, tokens: usize) -> Result<Self, Error> {
        let &[b, h, t, d] = self.shape.as_slice() else {
            return Err(Error::CacheShape(self.shape.clone()));
        };
        if t <= tokens {
            return Ok(self.clone());
        }
        let row = d * size_of(self.element)?;
        let rows = self
            .bytes
            .chunks(t * row)
            .flat_map(|head| head[..tokens * row].iter().copied());
        Ok(Self {
            element: self.element,
            shape: vec![b, h, tokens, d],
            bytes: rows.collect(),
        })
    }

    /// As a tensor that ONNX Runtime owns.
    pub fn to_ort(&self) -> Result<DynTensor, Error> {
        let dims: Vec<i64> = self.shape.iter().map(|d| *d as i64).collect();
        let mut tensor =
            DynTensor::new(&Allocator::default(), self.element, dims).map_err(|e| Error::Tensor(e.to_string()))?;
        if !self.bytes.is_empty() {
            // SAFETY: ONNX Runtime has just allocated a tensor of this type and shape on the CPU, which holds as many bytes
            // as `bytes` by `zeros`, `of` and `from_ort`; nobody else has it yet.
            unsafe {
                std::ptr::copy_nonoverlapping(self.bytes.as_ptr(), tensor.data_ptr_mut().cast(), self.bytes.len());
            }
        }
        Ok(tensor)
    }

    /// A copy of a tensor of ONNX Runtime's, wherever it lies.
    pub fn from_ort(value: &DynValue) -> Result<Self, Error> {
        let ValueType::Tensor { ty, shape, .. } = value.dtype() else {
            return Err(Error::OutputNoTensor);
        };
        let sizes = shape.iter().map(|d| usize::try_from(*d));
        let sizes: Result<Vec<usize>, _> = sizes.collect();
        let shape = sizes.map_err(|_| Error::OutputShape(shape.to_vec()))?;
        fn bytes<T: PrimitiveTensorElementType + Copy, const N: usize>(
            value: &DynValue,
            to_bytes: impl Fn(T) -> [u8; N],
        ) -> Result<Vec<u8>, Error> {
            let (_, data) = value
                .try_extract_tensor::<T>()
                .map_err(|e| Error::Tensor(e.to_string()))?;
            Ok(data.iter().flat_map(|x| to_bytes(*x)).collect())
        }
        let bytes = match ty {
            _ if shape.contains(&0) => Vec::new(),
            TensorElementType::Float32 => bytes(value, f32::to_le_bytes)?,
            TensorElementType::Float64 => bytes(value, f64::to_le_bytes)?,
            TensorElementType::Float16 => bytes(value, f16::to_le_bytes)?,
            TensorElementType::Bfloat16 => bytes(value, bf16::to_le_bytes)?,
            TensorElementType::Int64 => bytes(value, i64::to_le_bytes)?,
            TensorElementType::Int32 => bytes(value, i32::to_le_bytes)?,
            TensorElementType::Int8 => bytes(value, i8::to_le_bytes)?,
            TensorElementType::Uint8 => bytes(value, u8::to_le_bytes)?,
            TensorElementType::Bool => bytes(value, |x: bool| [u8::from(x)])?,
            other => return Err(Error::ElementType(*other)),
        };
        Ok(Self {
            element: *ty,
            shape,
            bytes,
        })
    }
}
