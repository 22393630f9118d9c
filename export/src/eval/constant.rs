//! Constants of a graph, read.

use super::{Tensor, ops, tensor::numel};
use half::{bf16, f16};
use retro_onnx::{DataType, NodeProto, TensorProto};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Component, Path},
};

impl Tensor {
    /// A constant in a graph inside a node: its numbers too if it is small.
    pub fn small(tensor: &TensorProto) -> Option<Self> {
        Self::constant(tensor, super::SMALL, None)
    }

    /// The value of a Constant node.
    pub fn of_constant(node: &NodeProto) -> Option<Self> {
        ops::evaluate(node, &[], 0).ok()?.pop()?
    }

    /// A constant: its shape, and its numbers when there are at most `limit`. `folder`: where external data lies.
    pub(super) fn constant(tensor: &TensorProto, limit: usize, folder: Option<&Path>) -> Option<Self> {
        let shape: Option<Vec<usize>> = tensor.dims.iter().map(|d| usize::try_from(*d).ok()).collect();
        let shape = shape?;
        let data_type = DataType::try_from(tensor.data_type()).ok()?;
        let n = numel(&shape).ok()?;
        let data = if n <= limit {
            values(tensor, data_type, n, folder)
        } else {
            None
        };
        Some(Self {
            data,
            ..Self::unknown(shape, data_type)
        })
    }
}

fn values(tensor: &TensorProto, data_type: DataType, n: usize, folder: Option<&Path>) -> Option<Vec<f64>> {
    let size = usize::try_from(data_type.bits()?.checked_div(8)?)
        .ok()
        .filter(|s| *s > 0)?;
    let typed: Vec<f64> = match data_type {
        _ if tensor.is_external() => return decode(&external(tensor, n.checked_mul(size)?, folder?)?, data_type, n),
        _ if tensor.raw_data.is_some() => return decode(tensor.raw_data.as_ref()?, data_type, n),
        DataType::Float => tensor.float_data.iter().map(|x| f64::from(*x)).collect(),
        DataType::Double => tensor.double_data.clone(),
        DataType::Int64 => tensor.int64_data.iter().map(|x| *x as f64).collect(),
        DataType::Uint64 | DataType::Uint32 => tensor.uint64_data.iter().map(|x| *x as f64).collect(),
        DataType::Float16 => tensor
            .int32_data
            .iter()
            .map(|x| f16::from_bits(*x as u16).to_f64())
            .collect(),
        DataType::Bfloat16 => tensor
            .int32_data
            .iter()
            .map(|x| bf16::from_bits(*x as u16).to_f64())
            .collect(),
        _ => tensor.int32_data.iter().map(|x| f64::from(*x)).collect(),
    };
    (typed.len() == n).then_some(typed)
}

fn decode(raw: &[u8], data_type: DataType, n: usize) -> Option<Vec<f64>> {
    fn each<const N: usize>(raw: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        raw.as_chunks::<N>().0.iter().map(|c| f(*c)).collect()
    }
    let out = match data_type {
        DataType::Float => each(raw, |b| f64::from(f32::from_le_bytes(b))),
        DataType::Double => each(raw, f64::from_le_bytes),
        DataType::Float16 => each(raw, |b| f16::from_le_bytes(b).to_f64()),
        DataType::Bfloat16 => each(raw, |b| bf16::from_le_bytes(b).to_f64()),
        DataType::Int64 => each(raw, |b| i64::from_le_bytes(b) as f64),
        DataType::Uint64 => each(raw, |b| u64::from_le_bytes(b) as f64),
        DataType::Int32 => each(raw, |b| f64::from(i32::from_le_bytes(b))),
        DataType::Uint32 => each(raw, |b| f64::from(u32::from_le_bytes(b))),
        DataType::Int16 => each(raw, |b| f64::from(i16::from_le_bytes(b))),
        DataType::Uint16 => each(raw, |b| f64::from(u16::from_le_bytes(b))),
        DataType::Int8 => each(raw, |b| f64::from(i8::from_le_bytes(b))),
        DataType::Uint8 | DataType::Bool => each(raw, |[b]| f64::from(b)),
        _ => return None,
    };
    (out.len() == n).then_some(out)
}

/// A small tensor's bytes from a file inside the model's folder.
fn external(tensor: &TensorProto, len: usize, folder: &Path) -> Option<Vec<u8>> {
    let entry = |key: &str| tensor.external_entry(key);
    let location = Path::new(entry("location")?);
    let plain = location
        .components()
        .all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    let path = folder.join(location);
    if !plain || !path.is_file() {
        return None;
    }
    let offset: u64 = entry("offset").map_or(Some(0), |o| o.parse().ok())?;
    let mut file = File::open(path).ok()?;
    file.seek(SeekFrom::Start(offset)).ok()?;
    let mut bytes = Vec::new();
    file.take(len as u64).read_to_end(&mut bytes).ok()?;
    (bytes.len() == len).then_some(bytes)
}
