//! A tensor as the evaluator sees it: always a shape, sometimes numbers.

use super::{Error, layout::Layout, lazy::Lazy};
use half::{bf16, f16};
use ndarray::{ArrayD, ArrayViewD};
use retro_onnx::DataType;
use std::borrow::Cow;

/// Numbers that one tensor may store.
const MAX_NUMBERS: usize = 1 << 23;
/// From here on results are computed number by number, when they are asked for.
const MAX_STORED: usize = 1 << 18;
/// Elements that a shape may have.
const MAX_ELEMENTS: usize = 1 << 46;

/// A shape, a type, and the numbers where they are known: stored, or computed on demand.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data_type: DataType,
    /// Row-major, in f64 whatever the type is; integers and booleans too.
    pub data: Option<Vec<f64>>,
    /// The numbers of a tensor that is too large to store them.
    pub lazy: Option<Lazy>,
}

/// Elements of a shape.
///
/// # Errors
/// More than any model has, even if some other dimension is 0.
pub fn numel(shape: &[usize]) -> Result<usize, Error> {
    let largest = shape.iter().try_fold(1usize, |n, d| n.checked_mul((*d).max(1)));
    match largest {
        Some(n) if n <= MAX_ELEMENTS => Ok(if shape.contains(&0) { 0 } else { n }),
        _ => Err(Error::TooManyElements(shape.to_vec())),
    }
}

/// The same for a tensor whose numbers are to be stored.
pub(super) fn storable(shape: &[usize]) -> Result<usize, Error> {
    let n = numel(shape)?;
    if n > MAX_NUMBERS {
        return Err(Error::TooManyNumbers(n));
    }
    Ok(n)
}

/// Whether results of this shape are stored; larger ones are computed on demand.
pub(super) fn is_stored(shape: &[usize]) -> bool {
    numel(shape).is_ok_and(|n| n <= MAX_STORED)
}

/// Rows of the last axis.
fn rows(shape: &[usize], n: usize) -> usize {
    n.checked_div(shape.last().copied().unwrap_or(1)).unwrap_or(0)
}

/// What a type makes of a number: the nearest that it has, or, of whole numbers, what is left of it. None where all numbers are as
/// they are.
fn rounding(data_type: DataType) -> Option<fn(f64) -> f64> {
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

/// An array's numbers in row-major order, a row at a time where the rows lie so: `to_owned` goes number by number.
fn row_major(array: &ArrayViewD<f64>) -> Vec<f64> {
    if let Some(data) = array.as_slice() {
        return data.to_vec();
    }
    let mut data = Vec::with_capacity(array.len());
    for row in array.rows() {
        match row.as_slice() {
            Some(row) => data.extend_from_slice(row),
            None => data.extend(row.iter()),
        }
    }
    data
}

impl Tensor {
    /// A tensor of which the shape alone is known.
    pub fn unknown(shape: Vec<usize>, data_type: DataType) -> Self {
        Self {
            shape,
            data_type,
            data: None,
            lazy: None,
        }
    }

    /// A tensor with its numbers, row-major.
    pub fn new(shape: Vec<usize>, data_type: DataType, data: Vec<f64>) -> Self {
        Self {
            shape,
            data_type,
            data: Some(data),
            lazy: None,
        }
    }

    /// The same number everywhere.
    ///
    /// # Errors
    /// The shape has more elements than any model has.
    pub fn filled(shape: Vec<usize>, data_type: DataType, x: f64) -> Result<Self, Error> {
        Self::computed(shape, data_type, Lazy::new(&[], move |_| x))
    }

    /// An array's numbers.
    pub(super) fn of_array(array: ArrayD<f64>, data_type: DataType) -> Self {
        let shape = array.shape().to_vec();
        let data = if array.is_standard_layout() {
            array.into_raw_vec_and_offset().0
        } else {
            row_major(&array.view())
        };
        Self::new(shape, data_type, data)
    }

    /// Numbers by their place: at once, or when they are asked for if there are too many.
    pub(super) fn computed(shape: Vec<usize>, data_type: DataType, numbers: Lazy) -> Result<Self, Error> {
        let n = numel(&shape)?;
        Ok(if n <= MAX_STORED && !numbers.is_affordable(n, rows(&shape, n)) {
            Self::unknown(shape, data_type)
        } else if n > MAX_STORED {
            Self {
                lazy: Some(numbers),
                ..Self::unknown(shape, data_type)
            }
        } else {
            Self::new(shape, data_type, (0..n).map(|at| numbers.at(at)).collect())
        })
    }

    /// Its numbers as its type stores them, and so as a kernel has them: a bound of a mask may depend on it. Float16 counts no
    /// further than 2048, and squares of distances leave int32 behind 46,340 tokens. Those on demand need it only where they are
    /// calculated.
    pub(super) fn round_to_type(&mut self, calculated: impl FnOnce() -> bool) {
        let Some(round) = rounding(self.data_type) else {
            return;
        };
        if let Some(data) = &mut self.data {
            data.iter_mut().for_each(|x| *x = round(*x));
        }
        if self.lazy.is_some() && calculated() {
            self.lazy = self.lazy.take().map(|lazy| lazy.map(round));
        }
    }

    /// Whether its numbers are known, stored or on demand.
    pub fn has_numbers(&self) -> bool {
        self.data.is_some() || self.lazy.is_some()
    }

    pub(super) fn drop_numbers(&mut self) {
        self.data = None;
        self.lazy = None;
    }

    /// Its numbers by their places, if they are known.
    pub fn numbers(&self) -> Option<Lazy> {
        let stored = |data: &Vec<f64>| {
            let data = data.clone();
            Lazy::new(&[], move |at| data.get(at).copied().unwrap_or(f64::NAN))
        };
        self.lazy.clone().or_else(|| self.data.as_ref().map(stored))
    }

    /// The tensor with its numbers stored, where an operator needs them at once and there are few enough.
    pub(super) fn stored(&self) -> Cow<'_, Self> {
        let Some(lazy) = &self.lazy else {
            return Cow::Borrowed(self);
        };
        Cow::Owned(match storable(&self.shape) {
            Ok(n) if lazy.is_affordable(n, rows(&self.shape, n)) => {
                let data = (0..n).map(|at| lazy.at(at)).collect();
                Self::new(self.shape.clone(), self.data_type, data)
            }
            _ => Self::unknown(self.shape.clone(), self.data_type),
        })
    }

    /// Its stored numbers as an array.
    ///
    /// # Errors
    /// They are not stored.
    pub(super) fn view(&self) -> Result<ArrayViewD<'_, f64>, Error> {
        Layout::of(&self.shape).view(self.data.as_deref().ok_or(Error::NumbersUnknown)?)
    }

    /// Its stored numbers as an array of a shape that it broadcasts to.
    ///
    /// # Errors
    /// They are not stored, or it doesn't.
    pub(super) fn broadcast_view(&self, shape: &[usize]) -> Result<ArrayViewD<'_, f64>, Error> {
        let data = self.data.as_deref().ok_or(Error::NumbersUnknown)?;
        Layout::of(&self.shape).broadcast(shape)?.view(data)
    }

    /// Its numbers by their places in a shape that it broadcasts to.
    ///
    /// # Errors
    /// They are not known, or it doesn't.
    pub(super) fn broadcast_numbers(&self, shape: &[usize]) -> Result<Lazy, Error> {
        let numbers = self.numbers().ok_or(Error::NumbersUnknown)?;
        if self.shape == shape {
            return Ok(numbers);
        }
        Ok(Layout::of(&self.shape).broadcast(shape)?.lazy(numbers))
    }

    /// Its elements in another order, or some of them.
    pub(super) fn rearranged(&self, layout: Layout) -> Result<Self, Error> {
        if let Some(data) = self.data.as_ref().filter(|_| is_stored(&layout.shape)) {
            let data = row_major(&layout.view(data)?);
            return Ok(Self::new(layout.shape, self.data_type, data));
        }
        match self.numbers() {
            Some(numbers) => {
                let numbers = layout.lazy(numbers);
                Self::computed(layout.shape, self.data_type, numbers)
            }
            None => Ok(Self::unknown(layout.shape, self.data_type)),
        }
    }

    /// The tensor spread to a shape that it broadcasts to.
    pub(super) fn expanded(&self, shape: &[usize]) -> Result<Self, Error> {
        numel(shape)?;
        self.rearranged(Layout::of(&self.shape).broadcast(shape)?)
    }

    /// Its elements in the same order by another shape of as many.
    ///
    /// # Errors
    /// The shape has more elements, or fewer.
    pub(super) fn reshaped(&self, shape: Vec<usize>) -> Result<Self, Error> {
        if numel(&shape)? != numel(&self.shape)? {
            return Err(Error::Reshape {
                from: self.shape.clone(),
                into: shape.iter().map(|d| *d as i64).collect(),
            });
        }
        Ok(Self { shape, ..self.clone() })
    }

    /// Whole numbers in a row.
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
    ///
    /// # Errors
    /// They are not stored.
    pub(super) fn as_ints(&self) -> Result<Vec<i64>, Error> {
        let data = self.data.as_ref().ok_or(Error::NumbersUnknown)?;
        Ok(data.iter().map(|x| *x as i64).collect())
    }

    /// Its first number, if it is stored.
    pub(super) fn first(&self) -> Option<f64> {
        self.data.as_ref()?.first().copied()
    }
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
            let mut stored = Tensor::new(vec![1], data_type, vec![x]);
            stored.round_to_type(|| false);
            assert_eq!(stored.data, Some(vec![expected]), "{data_type:?}");
            let mut asked = Tensor {
                lazy: Some(Lazy::new(&[], move |_| x)),
                ..Tensor::unknown(vec![1], data_type)
            };
            asked.round_to_type(|| true);
            assert_eq!(asked.numbers().map(|n| n.at(0)), Some(expected), "{data_type:?}");
        }
    }
}
