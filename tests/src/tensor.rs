//! Tensors that a session can read and write in place.

use std::slice;

use half::{bf16, f16};
use ort::{
    memory::Allocator,
    value::{DynTensor, TensorElementType},
};

use crate::host::environment;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
    /// On CUDA only.
    Bf16,
    I32,
    I64,
    /// Codes.
    U8,
}

impl Dtype {
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I64 => 8,
            Self::U8 => 1,
        }
    }

    pub fn element(self) -> TensorElementType {
        match self {
            Self::F32 => TensorElementType::Float32,
            Self::F16 => TensorElementType::Float16,
            Self::Bf16 => TensorElementType::Bfloat16,
            Self::I32 => TensorElementType::Int32,
            Self::I64 => TensorElementType::Int64,
            Self::U8 => TensorElementType::Uint8,
        }
    }

    /// How far outputs may be off, as a share of the largest: the contract's for 16 bits.
    pub fn tolerance(self) -> f32 {
        match self {
            Self::F16 => 2e-3,
            Self::Bf16 => 1.5e-2,
            _ => 0.0,
        }
    }

    /// The number a tensor of this type holds for `x`.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
            _ => x,
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
    /// Filled with what nobody may read: NaN (in bytes: of any float) or [`POISON_STEP`].
    pub fn poisoned(dtype: Dtype, shape: &[usize]) -> Self {
        let dims: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        environment(); // loads ONNX Runtime, whose allocator follows
        let value =
            DynTensor::new(&Allocator::default(), dtype.element(), dims).expect("ONNX Runtime allocates a tensor");
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
            Dtype::Bf16 => self.slice_mut::<bf16>().fill(bf16::NAN),
            Dtype::I32 => self.slice_mut::<i32>().fill(POISON_STEP),
            Dtype::I64 => self.slice_mut::<i64>().fill(i64::MIN),
            Dtype::U8 => self.bytes_mut().fill(u8::MAX),
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
            Dtype::Bf16 => {
                for (to, &from) in self.slice_mut::<bf16>()[at..].iter_mut().zip(data) {
                    *to = bf16::from_f32(from);
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
            Dtype::Bf16 => self.slice::<bf16>().iter().map(|x| x.to_f32()).collect(),
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
        // SAFETY: the tensor owns that many bytes, on the CPU, for as long as `self` is borrowed; `poisoned`
        // initialised them.
        unsafe { slice::from_raw_parts(data, self.len() * self.dtype.bytes()) }
    }

    /// For a device's copy to be written back.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        if self.is_empty() {
            return &mut [];
        }
        let len = self.len() * self.dtype.bytes();
        // SAFETY: as in `bytes`, any bits are valid for every dtype, and `self` is borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.value.data_ptr_mut().cast::<u8>(), len) }
    }

    pub fn copy_from(&mut self, other: &Tens) {
        assert_eq!((self.dtype, &self.shape), (other.dtype, &other.shape));
        self.bytes_mut().copy_from_slice(other.bytes());
    }

    /// Whether an element is what [`Self::poison`] wrote, or another NaN.
    pub fn is_poison(&self, at: usize) -> bool {
        match self.dtype {
            Dtype::F32 => self.slice::<f32>()[at].is_nan(),
            Dtype::F16 => self.slice::<f16>()[at].is_nan(),
            Dtype::Bf16 => self.slice::<bf16>()[at].is_nan(),
            Dtype::I32 => self.slice::<i32>()[at] == POISON_STEP,
            Dtype::I64 => self.slice::<i64>()[at] == i64::MIN,
            Dtype::U8 => self.bytes()[at] == u8::MAX,
        }
    }

    fn slice<T>(&self) -> &[T] {
        assert_eq!(size_of::<T>(), self.dtype.bytes());
        if self.is_empty() {
            return &[]; // the pointer may be null
        }
        // SAFETY: the tensor owns `len` elements of that size, aligned by the allocator and initialised by `poisoned`;
        // every T used here (f32, f16, bf16, i32, i64) is valid for any bits.
        unsafe { slice::from_raw_parts(self.value.data_ptr().cast::<T>(), self.len()) }
    }

    fn slice_mut<T>(&mut self) -> &mut [T] {
        assert_eq!(size_of::<T>(), self.dtype.bytes());
        let len = self.len();
        if len == 0 {
            return &mut []; // the pointer may be null
        }
        // SAFETY: as in `slice`, and `self` is borrowed mutably: no other reference to the data is alive, and no
        // session runs on it because a run borrows the tensor too.
        unsafe { slice::from_raw_parts_mut(self.value.data_ptr_mut().cast::<T>(), len) }
    }
}
