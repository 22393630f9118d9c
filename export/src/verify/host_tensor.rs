//! Tensors on their way into a session and out of it.

use anyhow::{Result, anyhow, bail, ensure};
use half::{bf16, f16};
use ort::{
    memory::Allocator,
    value::{DynTensor, DynValue, PrimitiveTensorElementType, TensorElementType, ValueType},
};

/// A tensor of the host: bytes of a type in a shape.
#[derive(Clone, Debug)]
pub struct Value {
    pub element: TensorElementType,
    pub shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn size_of(element: TensorElementType) -> Result<usize> {
    Ok(match element {
        TensorElementType::Float32 | TensorElementType::Int32 | TensorElementType::Uint32 => 4,
        TensorElementType::Float16
        | TensorElementType::Bfloat16
        | TensorElementType::Int16
        | TensorElementType::Uint16 => 2,
        TensorElementType::Int64 | TensorElementType::Uint64 | TensorElementType::Float64 => 8,
        TensorElementType::Bool | TensorElementType::Uint8 | TensorElementType::Int8 => 1,
        other => bail!("a tensor of {other:?} is not understood"),
    })
}

impl Value {
    pub fn zeros(element: TensorElementType, shape: &[usize]) -> Result<Self> {
        let n: usize = shape.iter().product();
        Ok(Self {
            element,
            shape: shape.to_vec(),
            bytes: vec![0; n * size_of(element)?],
        })
    }

    /// Integers in whatever integer or floating type is wanted.
    pub fn numbers(element: TensorElementType, shape: &[usize], values: &[i64]) -> Result<Self> {
        let bytes = match element {
            TensorElementType::Int64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            TensorElementType::Int32 => values.iter().flat_map(|v| (*v as i32).to_le_bytes()).collect(),
            TensorElementType::Bool => values.iter().map(|v| u8::from(*v != 0)).collect(),
            TensorElementType::Int8 | TensorElementType::Uint8 => values.iter().map(|v| *v as u8).collect(),
            _ => {
                let values: Vec<f64> = values.iter().map(|v| *v as f64).collect();
                return Self::reals(element, shape, &values);
            }
        };
        Self::of(element, shape, bytes)
    }

    /// Numbers in whatever floating type is wanted.
    pub fn reals(element: TensorElementType, shape: &[usize], values: &[f64]) -> Result<Self> {
        let bytes = match element {
            TensorElementType::Float32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
            TensorElementType::Float64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            TensorElementType::Float16 => values.iter().flat_map(|v| f16::from_f64(*v).to_le_bytes()).collect(),
            TensorElementType::Bfloat16 => values.iter().flat_map(|v| bf16::from_f64(*v).to_le_bytes()).collect(),
            other => bail!("an input of {other:?} is not understood"),
        };
        Self::of(element, shape, bytes)
    }

    fn of(element: TensorElementType, shape: &[usize], bytes: Vec<u8>) -> Result<Self> {
        let wanted = shape.iter().product::<usize>() * size_of(element)?;
        ensure!(
            bytes.len() == wanted,
            "{} bytes for a tensor of shape {shape:?}, which has {wanted}",
            bytes.len()
        );
        Ok(Self {
            element,
            shape: shape.to_vec(),
            bytes,
        })
    }

    /// As floats, for numbers that are floats.
    pub fn floats(&self) -> Result<Vec<f32>> {
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
            other => bail!("{other:?} instead of floats"),
        })
    }

    /// The first `tokens` rows of `[B, H, T, D]`.
    pub fn first_tokens(&self, tokens: usize) -> Result<Self> {
        let &[b, h, t, d] = self.shape.as_slice() else {
            bail!("a cache of shape {:?}", self.shape)
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

    pub fn to_ort(&self) -> Result<DynTensor> {
        let dims: Vec<i64> = self.shape.iter().map(|d| *d as i64).collect();
        let mut tensor = DynTensor::new(&Allocator::default(), self.element, dims).map_err(|e| anyhow!("{e}"))?;
        if !self.bytes.is_empty() {
            // SAFETY: ONNX Runtime has just allocated a tensor of this type and shape on the CPU, which holds as many bytes
            // as `bytes` by `zeros` and `numbers`; nobody else has it yet.
            unsafe {
                std::ptr::copy_nonoverlapping(self.bytes.as_ptr(), tensor.data_ptr_mut().cast(), self.bytes.len());
            }
        }
        Ok(tensor)
    }

    pub fn from_ort(value: &DynValue) -> Result<Self> {
        let ValueType::Tensor { ty, shape, .. } = value.dtype() else {
            bail!("an output is no tensor")
        };
        let shape: Vec<usize> = shape.iter().map(|d| usize::try_from(*d)).collect::<Result<_, _>>()?;
        fn bytes<T: PrimitiveTensorElementType + Copy, const N: usize>(
            value: &DynValue,
            to_bytes: impl Fn(T) -> [u8; N],
        ) -> Result<Vec<u8>> {
            let (_, data) = value.try_extract_tensor::<T>().map_err(|e| anyhow!("{e}"))?;
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
            other => bail!("an output of {other:?} is not understood"),
        };
        Ok(Self {
            element: *ty,
            shape,
            bytes,
        })
    }
}
