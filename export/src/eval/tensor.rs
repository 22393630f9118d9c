//! A tensor as the evaluator sees it: always a shape, sometimes numbers.

use crate::onnx::{DataType, TensorProto};
use half::{bf16, f16};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Component, Path},
};

/// Numbers that one tensor may hold.
const MAX_NUMBERS: usize = 1 << 23;
/// Elements that a shape may have.
const MAX_ELEMENTS: usize = 1 << 46;

#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data_type: DataType,
    /// Row-major; integers and booleans too.
    pub data: Option<Vec<f64>>,
}

/// Elements of a shape.
///
/// # Errors
/// More than any model has.
pub fn numel(shape: &[usize]) -> Result<usize, String> {
    let product = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    product
        .filter(|n| *n <= MAX_ELEMENTS)
        .ok_or_else(|| format!("the shape {shape:?} is absurd"))
}

/// The same for a tensor whose numbers are to be held.
pub(super) fn numbers(shape: &[usize]) -> Result<usize, String> {
    let n = numel(shape)?;
    if n > MAX_NUMBERS {
        return Err(format!("{n} numbers are more than are looked at"));
    }
    Ok(n)
}

pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}

/// Reads `shape` elements out of `data`, each axis by its own stride.
pub(super) fn strided(data: &[f64], offset: isize, shape: &[usize], strides: &[isize]) -> Result<Vec<f64>, String> {
    let n = numbers(shape)?;
    let mut out = Vec::with_capacity(n);
    // The last axis a row at a time, where it is side by side or one number.
    let (outer, row) = match (shape.split_last(), strides.last()) {
        (Some((row, outer)), Some(0 | 1)) => (outer, *row),
        _ => (shape, 1),
    };
    let repeats = strides.last() == Some(&0);
    let mut index = vec![0usize; outer.len()];
    let mut at = offset;
    for _ in 0..n.checked_div(row).unwrap_or(0) {
        let start = usize::try_from(at).ok();
        let len = if repeats { 1 } else { row };
        let found = start.and_then(|start| data.get(start..start.checked_add(len)?));
        match found.ok_or("an index is out of range")? {
            [one] => out.resize(out.len() + row, *one),
            several => out.extend_from_slice(several),
        }
        for axis in (0..outer.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < outer[axis] {
                break;
            }
            at -= strides[axis] * outer[axis] as isize;
            index[axis] = 0;
        }
    }
    Ok(out)
}

pub(super) fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>, String> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], i: usize| {
        (i + s.len())
            .checked_sub(rank)
            .and_then(|i| s.get(i))
            .copied()
            .unwrap_or(1)
    };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Ok(x),
            (1, y) => Ok(y),
            (x, 1) => Ok(x),
            _ => Err(format!("shapes {a:?} and {b:?} do not go together")),
        })
        .collect()
}

impl Tensor {
    pub fn unknown(shape: Vec<usize>, data_type: DataType) -> Self {
        Self {
            shape,
            data_type,
            data: None,
        }
    }

    pub fn new(shape: Vec<usize>, data_type: DataType, data: Vec<f64>) -> Self {
        Self {
            shape,
            data_type,
            data: Some(data),
        }
    }

    pub(super) fn ints(values: Vec<f64>) -> Self {
        Self::new(vec![values.len()], DataType::Int64, values)
    }

    pub(super) fn is_int(&self) -> bool {
        !matches!(
            self.data_type,
            DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double
        )
    }

    /// The numbers as integers.
    pub(super) fn as_ints(&self) -> Result<Vec<i64>, String> {
        let data = self.data.as_ref().ok_or("its numbers are not known")?;
        Ok(data.iter().map(|x| *x as i64).collect())
    }

    /// The tensor's numbers spread to a shape that it goes into.
    pub(super) fn spread(&self, shape: &[usize]) -> Result<Vec<f64>, String> {
        let data = self.data.as_ref().ok_or("its numbers are not known")?;
        if self.shape == shape {
            return Ok(data.clone());
        }
        let own = strides(&self.shape);
        let shift = shape
            .len()
            .checked_sub(self.shape.len())
            .ok_or("a shape has too many dimensions")?;
        let by_axis: Vec<isize> = (0..shape.len())
            .map(|axis| match axis.checked_sub(shift) {
                Some(i) if self.shape[i] != 1 => own[i] as isize,
                _ => 0,
            })
            .collect();
        strided(data, 0, shape, &by_axis)
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
        Some(Self { shape, data_type, data })
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
