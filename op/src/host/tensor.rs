//! Tensors of a running kernel: borrowed from the host, never owned.

use std::ffi::c_void;
use std::ptr;

use ort_sys::OrtValue;

use super::api::{api, ort};
use super::{DataType, Error, Result};

/// A tensor that the host lends for the duration of one kernel call.
#[derive(Clone, Copy)]
pub struct Tensor(pub(super) *mut OrtValue);

/// Plain element types that a tensor's memory may be viewed as.
pub trait Plain: Copy + 'static {
    const DATA_TYPE: DataType;
}

impl Plain for f32 {
    const DATA_TYPE: DataType = DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
impl Plain for half::f16 {
    const DATA_TYPE: DataType = DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
}
impl Plain for half::bf16 {
    const DATA_TYPE: DataType = DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
}
impl Plain for i32 {
    const DATA_TYPE: DataType = DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
}

impl Tensor {
    pub fn shape(&self) -> Result<Vec<i64>> {
        self.with_info(|info| {
            let mut rank = 0;
            ort!(GetDimensionsCount(info, &mut rank))?;
            let mut dims = vec![0; rank];
            ort!(GetDimensions(info, dims.as_mut_ptr(), rank))?;
            Ok(dims)
        })
    }

    fn data_type(&self) -> Result<DataType> {
        self.with_info(|info| {
            let mut t = DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
            ort!(GetTensorElementType(info, &mut t))?;
            Ok(t)
        })
    }

    fn with_info<R>(&self, f: impl FnOnce(*const ort_sys::OrtTensorTypeAndShapeInfo) -> Result<R>) -> Result<R> {
        let mut info = ptr::null_mut();
        ort!(GetTensorTypeAndShape(self.0, &mut info))?;
        let result = f(info);
        // SAFETY: `info` came from GetTensorTypeAndShape and is released once.
        unsafe { ((*api()).ReleaseTensorTypeAndShapeInfo)(info) };
        result
    }

    /// Address of the data; null for an empty tensor on some hosts.
    pub fn address(&self) -> Result<*mut c_void> {
        let mut p = ptr::null_mut();
        ort!(GetTensorMutableData(self.0, &mut p))?;
        Ok(p)
    }

    /// Copies a tensor of the same type and shape, unless both are the same memory (a buffer shared by past and present).
    pub fn copy_from(&self, source: &Tensor) -> Result<()> {
        let (to, from) = (self.address()?, source.address()?);
        if to == from {
            return Ok(());
        }
        let bytes = self.bytes()?;
        if bytes != source.bytes()? {
            return Err(Error::runtime("a present tensor differs in size from its past"));
        }
        // SAFETY: both are CPU tensors of `bytes` bytes; distinct tensors do not overlap, and `copy` allows it anyway.
        unsafe { ptr::copy(from.cast::<u8>().cast_const(), to.cast::<u8>(), bytes) };
        Ok(())
    }

    /// Size of the data.
    pub fn bytes(&self) -> Result<usize> {
        let element = self.data_type()?;
        let size = match element {
            DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT | DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 => 4,
            DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 | DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 => 2,
            other => return Err(Error::runtime(format!("a state tensor holds {other:?}"))),
        };
        Ok(self.elements()? * size)
    }

    fn elements(&self) -> Result<usize> {
        let product = |n: usize, &d: &i64| n.checked_mul(usize::try_from(d).ok()?);
        let count = self.shape()?.iter().try_fold(1, product);
        count.ok_or_else(|| Error::invalid("a tensor's shape overflows"))
    }

    /// Address and element count, after checking the element type and that the memory is there.
    fn raw<T: Plain>(&self) -> Result<(*mut T, usize)> {
        let got = self.data_type()?;
        if got != T::DATA_TYPE {
            return Err(Error::invalid(format!(
                "a tensor holds {got:?}, expected {:?}",
                T::DATA_TYPE
            )));
        }
        let len = self.elements()?;
        let p = self.address()?.cast::<T>();
        if len > 0 && (p.is_null() || !p.is_aligned()) {
            return Err(Error::runtime("a tensor's memory is null or misaligned"));
        }
        Ok((p, len))
    }

    /// The elements.
    ///
    /// # Safety
    /// The tensor lives on the CPU and nothing writes to its memory while the slice is in use.
    pub unsafe fn slice<'a, T: Plain>(&self) -> Result<&'a [T]> {
        let (p, len) = self.raw()?;
        if len == 0 {
            return Ok(&[]);
        }
        // SAFETY: `raw` checked type, length and alignment; the rest is the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts(p, len) })
    }

    /// The elements, mutable.
    ///
    /// # Safety
    /// The tensor lives on the CPU and nothing else reads or writes its memory while the slice is in use.
    pub unsafe fn slice_mut<'a, T: Plain>(&self) -> Result<&'a mut [T]> {
        let (p, len) = self.raw()?;
        if len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: `raw` checked type, length and alignment; the rest is the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts_mut(p, len) })
    }
}

/// A tensor over memory of ours, for operators that we invoke ourselves.
pub struct OwnedScalar {
    value: Tensor,
    // The tensor points into this box.
    _data: Box<i32>,
}

impl OwnedScalar {
    /// An int32 scalar of shape `[1]` on the CPU.
    pub fn new(v: i32) -> Result<Self> {
        let mut data = Box::new(v);
        let mut memory = ptr::null_mut();
        ort!(CreateCpuMemoryInfo(
            ort_sys::OrtAllocatorType::OrtArenaAllocator,
            ort_sys::OrtMemType::OrtMemTypeDefault,
            &mut memory
        ))?;
        let mut value = ptr::null_mut();
        let shape = [1i64];
        let made = ort!(CreateTensorWithDataAsOrtValue(
            memory,
            (&raw mut *data).cast(),
            size_of::<i32>(),
            shape.as_ptr(),
            shape.len(),
            i32::DATA_TYPE,
            &mut value
        ));
        // SAFETY: the memory info came from CreateCpuMemoryInfo and is released once; the value keeps a copy.
        unsafe { ((*api()).ReleaseMemoryInfo)(memory) };
        made?;
        Ok(Self {
            value: Tensor(value),
            _data: data,
        })
    }

    pub fn tensor(&self) -> Tensor {
        self.value
    }
}

impl Drop for OwnedScalar {
    fn drop(&mut self) {
        // SAFETY: the value came from CreateTensorWithDataAsOrtValue and is released once.
        unsafe { ((*api()).ReleaseValue)(self.value.0) }
    }
}
