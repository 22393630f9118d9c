//! Tensors that a session can read and write in place.

use std::slice;

use half::f16;
use ort::{
    memory::Allocator,
    value::{DynTensor, TensorElementType},
};

use crate::host::environment;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
    I32,
    I64,
}

impl Dtype {
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F16 => 2,
            Self::I64 => 8,
        }
    }
}

/// A tensor allocated by ONNX Runtime, so that it can be bound as an output as well as an input.
pub struct Tens {
    value: DynTensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// An integer that no page step is.
pub const POISON_STEP: i32 = -0x5a5a5a;

impl Tens {
    /// Filled with what nobody may read: NaN or [`POISON_STEP`].
    pub fn poisoned(dtype: Dtype, shape: &[usize]) -> Self {
        let element = match dtype {
            Dtype::F32 => TensorElementType::Float32,
            Dtype::F16 => TensorElementType::Float16,
            Dtype::I32 => TensorElementType::Int32,
            Dtype::I64 => TensorElementType::Int64,
        };
        let dims: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        environment(); // loads ONNX Runtime, whose allocator follows
        let value = DynTensor::new(&Allocator::default(), element, dims).expect("ONNX Runtime allocates a tensor");
        let mut tensor = Self {
            value,
            dtype,
            shape: shape.to_vec(),
        };
        tensor.poison();
        tensor
    }

    /// From floats, rounded to the dtype.
    pub fn floats(dtype: Dtype, shape: &[usize], data: &[f32]) -> Self {
        let mut tensor = Self::poisoned(dtype, shape);
        assert_eq!(tensor.len(), data.len(), "data for shape {shape:?}");
        tensor.write(0, data);
        tensor
    }

    pub fn ints(shape: &[usize], data: &[i32]) -> Self {
        let mut tensor = Self::poisoned(Dtype::I32, shape);
        tensor.ints_mut().copy_from_slice(data);
        tensor
    }

    pub fn longs(shape: &[usize], data: &[i64]) -> Self {
        let mut tensor = Self::poisoned(Dtype::I64, shape);
        tensor.slice_mut::<i64>().copy_from_slice(data);
        tensor
    }

    pub fn value(&self) -> &DynTensor {
        &self.value
    }

    pub fn value_mut(&mut self) -> &mut DynTensor {
        &mut self.value
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn poison(&mut self) {
        match self.dtype {
            Dtype::F32 => self.slice_mut::<f32>().fill(f32::NAN),
            Dtype::F16 => self.slice_mut::<f16>().fill(f16::NAN),
            Dtype::I32 => self.slice_mut::<i32>().fill(POISON_STEP),
            Dtype::I64 => self.slice_mut::<i64>().fill(i64::MIN),
        }
    }

    /// Writes floats from element `at` on, rounded to the dtype.
    pub fn write(&mut self, at: usize, data: &[f32]) {
        match self.dtype {
            Dtype::F32 => self.slice_mut::<f32>()[at..at + data.len()].copy_from_slice(data),
            Dtype::F16 => {
                for (to, &from) in self.slice_mut::<f16>()[at..].iter_mut().zip(data) {
                    *to = f16::from_f32(from);
                }
            }
            other => panic!("floats written to an {other:?} tensor"),
        }
    }

    /// All elements as floats.
    pub fn read(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.slice::<f32>().to_vec(),
            Dtype::F16 => self.slice::<f16>().iter().map(|x| x.to_f32()).collect(),
            other => panic!("floats read from an {other:?} tensor"),
        }
    }

    pub fn ints_ref(&self) -> &[i32] {
        self.slice()
    }

    pub fn ints_mut(&mut self) -> &mut [i32] {
        self.slice_mut()
    }

    pub fn bytes(&self) -> &[u8] {
        let data = self.value.data_ptr().cast::<u8>();
        if self.is_empty() {
            return &[]; // the pointer may be null
        }
        // SAFETY: the tensor owns that many bytes, on the CPU, for as long as `self` is borrowed; `poisoned` initialised them.
        unsafe { slice::from_raw_parts(data, self.len() * self.dtype.bytes()) }
    }

    pub fn copy_from(&mut self, other: &Tens) {
        assert_eq!((self.dtype, &self.shape), (other.dtype, &other.shape));
        match self.dtype {
            Dtype::F32 | Dtype::I32 => self.slice_mut::<i32>().copy_from_slice(other.slice::<i32>()),
            Dtype::F16 => self.slice_mut::<u16>().copy_from_slice(other.slice::<u16>()),
            Dtype::I64 => self.slice_mut::<i64>().copy_from_slice(other.slice::<i64>()),
        }
    }

    fn slice<T>(&self) -> &[T] {
        assert_eq!(size_of::<T>(), self.dtype.bytes());
        if self.is_empty() {
            return &[]; // the pointer may be null
        }
        // SAFETY: the tensor owns `len` elements of that size, aligned by the allocator and initialised by `poisoned`;
        // every T used here (f32, f16, i32, i64, u16) is valid for any bits.
        unsafe { slice::from_raw_parts(self.value.data_ptr().cast::<T>(), self.len()) }
    }

    fn slice_mut<T>(&mut self) -> &mut [T] {
        assert_eq!(size_of::<T>(), self.dtype.bytes());
        let len = self.len();
        if len == 0 {
            return &mut []; // the pointer may be null
        }
        // SAFETY: as in `slice`, and `self` is borrowed mutably: no other reference to the data is alive, and no session
        // runs on it because a run borrows the tensor too.
        unsafe { slice::from_raw_parts_mut(self.value.data_ptr_mut().cast::<T>(), len) }
    }
}
