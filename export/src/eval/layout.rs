//! Where the elements of a rearranged tensor lie in the tensor that it is made of.

use super::{Error, lazy::Lazy};
use ndarray::{ArrayViewD, IxDyn, ShapeBuilder};

/// A tensor that holds fewer numbers than its shape says: never the call's fault.
const OUTSIDE: Error = Error::Invalid("it has fewer numbers than its shape");

/// A strided view: the element at `index` of `shape` lies at `offset` plus the sum of `index[i] * strides[i]`.
///
/// One description serves both kinds of numbers: `ndarray` reads those that are stored, and [`Layout::lazy`] finds the place of
/// those that are computed on demand, which no array can hold.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    offset: isize,
    pub shape: Vec<usize>,
    strides: Vec<isize>,
}

/// Elements from one to the next along each axis of a tensor in row-major order.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}

/// The shape that two broadcast to, by [ONNX's rules](https://onnx.ai/onnx/repo-docs/Broadcasting.html).
///
/// # Errors
/// They don't broadcast.
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

impl Layout {
    /// A tensor as it is, row-major.
    pub fn of(shape: &[usize]) -> Self {
        Self {
            offset: 0,
            shape: shape.to_vec(),
            strides: strides(shape).into_iter().map(|s| s as isize).collect(),
        }
    }

    /// Axes in another order, each once.
    pub fn permuted(&self, order: &[usize]) -> Self {
        Self {
            offset: self.offset,
            shape: order.iter().map(|a| self.shape[*a]).collect(),
            strides: order.iter().map(|a| self.strides[*a]).collect(),
        }
    }

    /// An axis for each pair of a size and the axes of this one that move along with it: none repeats, several are a diagonal.
    pub fn gathered(&self, axes: impl Iterator<Item = (usize, Vec<usize>)>) -> Self {
        let along = |axes: Vec<usize>| axes.into_iter().map(|a| self.strides[a]).sum::<isize>();
        let (shape, strides) = axes.map(|(size, axes)| (size, along(axes))).unzip();
        Self {
            offset: self.offset,
            shape,
            strides,
        }
    }

    /// `count` elements of an axis, from `from` on, each `step` after the one before.
    pub fn sliced(mut self, axis: usize, from: usize, count: usize, step: isize) -> Self {
        let stride = self.strides[axis];
        self.offset = self.offset.saturating_add((from as isize).saturating_mul(stride));
        self.shape[axis] = count;
        self.strides[axis] = stride.saturating_mul(step);
        self
    }

    /// Spread to a shape that it broadcasts to.
    ///
    /// # Errors
    /// It doesn't.
    pub fn broadcast(&self, shape: &[usize]) -> Result<Self, Error> {
        if broadcast(&self.shape, shape)? != shape {
            return Err(Error::Broadcast {
                left: self.shape.clone(),
                right: shape.to_vec(),
            });
        }
        let shift = shape.len() - self.shape.len();
        let stride = |axis: usize| match axis.checked_sub(shift) {
            Some(i) if self.shape[i] != 1 => self.strides[i],
            _ => 0,
        };
        Ok(Self {
            offset: self.offset,
            shape: shape.to_vec(),
            strides: (0..shape.len()).map(stride).collect(),
        })
    }

    /// Numbers that are stored, row-major in the tensor that this is made of.
    ///
    /// # Errors
    /// The layout leaves them.
    pub fn view<'d>(&self, data: &'d [f64]) -> Result<ArrayViewD<'d, f64>, Error> {
        if self.shape.contains(&0) {
            return ArrayViewD::from_shape(IxDyn(&self.shape), &[]).map_err(|_| OUTSIDE);
        }
        // The view begins at its lowest element, which is its last along an axis that goes backwards.
        let back = |(d, s): (&usize, &isize)| s.saturating_mul(*d as isize - 1).min(0);
        let lowest = self.shape.iter().zip(&self.strides).map(back);
        let lowest = lowest.fold(self.offset, isize::saturating_add);
        let data = usize::try_from(lowest)
            .ok()
            .and_then(|from| data.get(from..))
            .ok_or(OUTSIDE)?;
        let strides: Vec<usize> = self.strides.iter().map(|s| *s as usize).collect();
        let shape = IxDyn(&self.shape).strides(IxDyn(&strides));
        ArrayViewD::from_shape(shape, data).map_err(|_| OUTSIDE)
    }

    /// Numbers that are computed on demand, by their place in this layout.
    pub fn lazy(&self, numbers: Lazy) -> Lazy {
        let axes = self.moving_axes();
        let (of, offset) = (numbers.clone(), self.offset);
        Lazy::new(&[&of], move |place| {
            let (mut rest, mut at) = (place, offset);
            for (size, stride) in &axes {
                at += (rest % size) as isize * stride;
                rest /= size;
            }
            usize::try_from(at).map_or(f64::NAN, |at| numbers.at(at))
        })
    }

    /// Size and stride of each axis, the last one first. Axes of one element never move, and axes that follow one another like the
    /// digits of a number are one: each costs a division for every number that is asked for.
    fn moving_axes(&self) -> Vec<(usize, isize)> {
        let mut axes: Vec<(usize, isize)> = Vec::new();
        for (size, stride) in self
            .shape
            .iter()
            .zip(&self.strides)
            .rev()
            .filter(|(size, _)| **size > 1)
        {
            match axes.last_mut() {
                Some((inner, by)) if *stride == by.saturating_mul(*inner as isize) => {
                    *inner = inner.saturating_mul(*size)
                }
                _ => axes.push((*size, *stride)),
            }
        }
        axes
    }
}
