//! A tensor as the evaluator sees it: always a shape, sometimes numbers.

use super::{Error, ops};
use half::{bf16, f16};
use retro_onnx::{DataType, NodeProto, TensorProto};
use std::{
    borrow::Cow,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Component, Path},
    rc::Rc,
};

/// Numbers that one tensor may hold.
const MAX_NUMBERS: usize = 1 << 23;
/// From here on results are computed number by number, when they are asked for: a mask of all tokens by all tokens is read in a few
/// rows only.
const MAX_HELD: usize = 1 << 18;
/// Steps that are worth doing for numbers that are asked for together.
const MAX_STEPS: f64 = 4e8;
/// Elements that a shape may have.
const MAX_ELEMENTS: usize = 1 << 46;

#[derive(Clone, Debug)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data_type: DataType,
    /// Row-major; integers and booleans too.
    pub data: Option<Vec<f64>>,
    /// The numbers of a tensor that is too large to hold them.
    pub lazy: Option<Lazy>,
}

/// Gives a number by its place in row-major order; NaN where there is none.
#[derive(Clone)]
pub struct Lazy {
    number: Rc<dyn Fn(usize) -> f64>,
    /// Steps that a number takes: values that are read several times are computed as often, which may double with each node.
    each: f64,
    /// Steps that the first number of a row takes besides.
    row: f64,
}

impl Lazy {
    /// `of`: the numbers that one of these is computed from.
    pub(super) fn new(of: &[&Self], number: impl Fn(usize) -> f64 + 'static) -> Self {
        Self {
            number: Rc::new(number),
            each: 1.0 + of.iter().map(|l| l.each).sum::<f64>(),
            row: of.iter().map(|l| l.row).sum(),
        }
    }

    /// Numbers that are computed from whole rows of `d` others, once a row.
    pub(super) fn of_rows(of: &Self, d: usize, number: impl Fn(usize) -> f64 + 'static) -> Self {
        Self {
            number: Rc::new(number),
            each: 1.0,
            row: of.row + of.each * d as f64,
        }
    }

    pub fn at(&self, place: usize) -> f64 {
        (self.number)(place)
    }

    /// Whether so many numbers of so many rows are worth computing.
    pub fn is_affordable(&self, numbers: usize, rows: usize) -> bool {
        self.each * numbers as f64 + self.row * rows as f64 <= MAX_STEPS
    }

    /// Elements of `shape`, each axis by its own stride.
    pub(super) fn strided(self, offset: isize, shape: &[usize], by: &[isize]) -> Self {
        let own = strides(shape);
        // Axes of one element never move.
        let axes: Vec<(usize, usize, isize)> = own
            .iter()
            .zip(shape)
            .zip(by)
            .filter(|((_, d), _)| **d > 1)
            .map(|((s, d), by)| (*s, *d, *by))
            .collect();
        let of = self.clone();
        Self::new(&[&of], move |place| {
            let steps = axes.iter().map(|(s, d, by)| (place / s % d) as isize * by);
            let at = offset + steps.sum::<isize>();
            usize::try_from(at).map_or(f64::NAN, |at| self.at(at))
        })
    }
}

impl std::fmt::Debug for Lazy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("numbers on demand")
    }
}

/// Elements of a shape.
///
/// # Errors
/// More than any model has.
pub fn numel(shape: &[usize]) -> Result<usize, Error> {
    let product = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    product
        .filter(|n| *n <= MAX_ELEMENTS)
        .ok_or_else(|| Error::TooManyElements(shape.to_vec()))
}

/// The same for a tensor whose numbers are to be held.
pub(super) fn numbers(shape: &[usize]) -> Result<usize, Error> {
    let n = numel(shape)?;
    if n > MAX_NUMBERS {
        return Err(Error::TooManyNumbers(n));
    }
    Ok(n)
}

/// Whether so many numbers are held; more are computed when they are asked for.
pub(super) fn are_held(shape: &[usize]) -> bool {
    numel(shape).is_ok_and(|n| n <= MAX_HELD)
}

pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}

/// Reads `shape` elements out of `data`, each axis by its own stride.
pub(super) fn strided(data: &[f64], offset: isize, shape: &[usize], strides: &[isize]) -> Result<Vec<f64>, Error> {
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
        let beyond = Error::IndexOutOfRange {
            index: at as i64,
            len: data.len(),
        };
        match found.ok_or(beyond)? {
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

pub(super) fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>, Error> {
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
            _ => Err(Error::Broadcast {
                left: a.to_vec(),
                right: b.to_vec(),
            }),
        })
        .collect()
}

/// What a type makes of a number: the nearest that it has, or, of whole numbers, what is left of it. None where all numbers are as
/// they are.
fn fitting(data_type: DataType) -> Option<fn(f64) -> f64> {
    Some(match data_type {
        DataType::Float => |x| f64::from(x as f32),
        DataType::Float16 => |x| f16::from_f64(x).to_f64(),
        DataType::Bfloat16 => |x| bf16::from_f64(x).to_f64(),
        DataType::Int8 => |x| wrapped::<8>(x, true),
        DataType::Int16 => |x| wrapped::<16>(x, true),
        DataType::Int32 => |x| wrapped::<32>(x, true),
        DataType::Uint8 => |x| wrapped::<8>(x, false),
        DataType::Uint16 => |x| wrapped::<16>(x, false),
        DataType::Uint32 => |x| wrapped::<32>(x, false),
        _ => return None,
    })
}

/// The last bits of a whole number.
fn wrapped<const BITS: i32>(x: f64, signed: bool) -> f64 {
    let size = f64::powi(2.0, BITS);
    let least = if signed { -size / 2.0 } else { 0.0 };
    if x.is_finite() && !(least..least + size).contains(&x) {
        (x - least).rem_euclid(size) + least
    } else {
        x
    }
}

impl Tensor {
    pub fn unknown(shape: Vec<usize>, data_type: DataType) -> Self {
        Self {
            shape,
            data_type,
            data: None,
            lazy: None,
        }
    }

    pub fn new(shape: Vec<usize>, data_type: DataType, data: Vec<f64>) -> Self {
        Self {
            shape,
            data_type,
            data: Some(data),
            lazy: None,
        }
    }

    /// The same number everywhere.
    pub fn filled(shape: Vec<usize>, data_type: DataType, x: f64) -> Result<Self, Error> {
        Self::computed(shape, data_type, Lazy::new(&[], move |_| x))
    }

    /// Numbers by their place: at once, or when they are asked for if there are too many.
    pub(super) fn computed(shape: Vec<usize>, data_type: DataType, numbers: Lazy) -> Result<Self, Error> {
        let n = numel(&shape)?;
        let rows = n.checked_div(shape.last().copied().unwrap_or(1)).unwrap_or(0);
        Ok(if n <= MAX_HELD && !numbers.is_affordable(n, rows) {
            Self::unknown(shape, data_type)
        } else if n > MAX_HELD {
            Self {
                lazy: Some(numbers),
                ..Self::unknown(shape, data_type)
            }
        } else {
            Self::new(shape, data_type, (0..n).map(|at| numbers.at(at)).collect())
        })
    }

    /// Its numbers as its type holds them, and so as a kernel has them: a bound of a mask may depend on it. Float16 counts no further
    /// than 2048, and squares of distances leave int32 behind 46,340 tokens. Those that are not held need it only where they are
    /// calculated.
    pub(super) fn fit(&mut self, calculated: bool) {
        let Some(fit) = fitting(self.data_type) else { return };
        if let Some(data) = &mut self.data {
            data.iter_mut().for_each(|x| *x = fit(*x));
        }
        if calculated && let Some(lazy) = self.lazy.take() {
            self.lazy = Some(Lazy::new(&[&lazy.clone()], move |at| fit(lazy.at(at))));
        }
    }

    /// Whether its numbers are known, held or not.
    pub fn is_known(&self) -> bool {
        self.data.is_some() || self.lazy.is_some()
    }

    pub(super) fn forget(&mut self) {
        self.data = None;
        self.lazy = None;
    }

    /// Its numbers by their places, if they are known.
    pub fn numbers(&self) -> Option<Lazy> {
        let held = |data: &Vec<f64>| {
            let data = data.clone();
            Lazy::new(&[], move |at| data.get(at).copied().unwrap_or(f64::NAN))
        };
        self.lazy.clone().or_else(|| self.data.as_ref().map(held))
    }

    /// The tensor with its numbers held, where an operator needs them at once and there are few enough.
    pub(super) fn held(&self) -> Cow<'_, Self> {
        match &self.lazy {
            Some(lazy) => match numbers(&self.shape) {
                Ok(n) if lazy.is_affordable(n, n.checked_div(self.shape.last().copied().unwrap_or(1)).unwrap_or(0)) => {
                    let data = (0..n).map(|at| lazy.at(at)).collect();
                    Cow::Owned(Self::new(self.shape.clone(), self.data_type, data))
                }
                _ => Cow::Owned(Self::unknown(self.shape.clone(), self.data_type)),
            },
            None => Cow::Borrowed(self),
        }
    }

    /// Its elements in another order: `shape` of them, each axis by its own stride.
    pub(super) fn rearranged(&self, offset: isize, shape: Vec<usize>, by: &[isize]) -> Result<Self, Error> {
        match &self.data {
            Some(data) if numel(&shape)? <= MAX_HELD => {
                let data = strided(data, offset, &shape, by)?;
                Ok(Self::new(shape, self.data_type, data))
            }
            _ => match self.numbers() {
                Some(numbers) => {
                    let numbers = numbers.strided(offset, &shape, by);
                    Self::computed(shape, self.data_type, numbers)
                }
                None => Ok(Self::unknown(shape, self.data_type)),
            },
        }
    }

    /// How far each axis of `shape` moves in this tensor, when it is spread to it.
    fn spread_strides(&self, shape: &[usize]) -> Result<Vec<isize>, Error> {
        let own = strides(&self.shape);
        let shift = shape
            .len()
            .checked_sub(self.shape.len())
            .ok_or("a shape has too many dimensions")?;
        Ok((0..shape.len())
            .map(|axis| match axis.checked_sub(shift) {
                Some(i) if self.shape[i] != 1 => own[i] as isize,
                _ => 0,
            })
            .collect())
    }

    /// The tensor's numbers by their places in a shape that it is spread to.
    pub(super) fn spread_numbers(&self, shape: &[usize]) -> Result<Lazy, Error> {
        let numbers = self.numbers().ok_or(Error::NumbersUnknown)?;
        if self.shape == shape {
            return Ok(numbers);
        }
        Ok(numbers.strided(0, shape, &self.spread_strides(shape)?))
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
    pub(super) fn as_ints(&self) -> Result<Vec<i64>, Error> {
        let data = self.data.as_ref().ok_or(Error::NumbersUnknown)?;
        Ok(data.iter().map(|x| *x as i64).collect())
    }

    /// The tensor's numbers spread to a shape that it goes into.
    pub(super) fn spread(&self, shape: &[usize]) -> Result<Vec<f64>, Error> {
        let data = self.data.as_ref().ok_or(Error::NumbersUnknown)?;
        if self.shape == shape {
            return Ok(data.clone());
        }
        strided(data, 0, shape, &self.spread_strides(shape)?)
    }

    /// A constant in a graph inside a node, if it is small.
    pub fn small(tensor: &TensorProto) -> Option<Self> {
        Self::constant(tensor, 4096, None)
    }

    /// The value of a Constant.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_what_their_type_holds() {
        for (data_type, x, expected) in [
            (DataType::Float, 0.1, f64::from(0.1f32)),
            (DataType::Float16, 2049.0, 2048.0),
            (DataType::Float16, 1e6, f64::INFINITY),
            (DataType::Bfloat16, 257.0, 256.0),
            (DataType::Int8, 128.0, -128.0),
            (DataType::Int16, 40_000.0, -25_536.0),
            (DataType::Int32, 46_341.0 * 46_341.0, -2_147_479_015.0),
            (DataType::Int32, -2_147_483_648.0, -2_147_483_648.0),
            (DataType::Uint8, 300.0, 44.0),
            (DataType::Uint16, -1.0, 65_535.0),
            (DataType::Uint32, 4_294_967_296.0, 0.0),
            (DataType::Int64, 1e12, 1e12),
            (DataType::Double, 0.1, 0.1),
        ] {
            let mut held = Tensor::new(vec![1], data_type, vec![x]);
            held.fit(false);
            assert_eq!(held.data, Some(vec![expected]), "{data_type:?}");
            let mut asked = Tensor {
                lazy: Some(Lazy::new(&[], move |_| x)),
                ..Tensor::unknown(vec![1], data_type)
            };
            asked.fit(true);
            assert_eq!(asked.numbers().map(|n| n.at(0)), Some(expected), "{data_type:?}");
        }
    }
}
