//! Tensors of a running kernel: borrowed from the host, never owned.

use std::ffi::c_void;
use std::ptr;

use ort_sys::OrtValue;
use smallvec::SmallVec;

use super::api::{api, api_version, check, ort};
use super::{DataType, Error, Result};

/// The first version of the table that gives a tensor's shape by reference.
const REFERENCES_API: u32 = 24;

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
impl Plain for u8 {
    const DATA_TYPE: DataType = DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}
impl Plain for i32 {
    const DATA_TYPE: DataType = DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
}

/// Size of an element.
fn element_bytes(data_type: DataType) -> Result<usize> {
    match data_type {
        DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT | DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 => Ok(4),
        DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 => Ok(1),
        DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 | DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 => Ok(2),
        other => Err(Error::runtime(format!("a tensor of the operator holds {other:?}"))),
    }
}

impl Tensor {
    /// Its sizes.
    pub fn shape(&self) -> Result<SmallVec<[i64; 6]>> {
        Ok(self.type_and_shape()?.1)
    }

    fn type_and_shape(&self) -> Result<(DataType, SmallVec<[i64; 6]>)> {
        if api_version() >= REFERENCES_API {
            return self.referenced_type_and_shape();
        }
        self.with_info(|info| {
            let mut data_type = DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
            ort!(GetTensorElementType(info, &mut data_type))?;
            let mut rank = 0;
            ort!(GetDimensionsCount(info, &mut rank))?;
            let mut dims = SmallVec::from_elem(0, rank);
            ort!(GetDimensions(info, dims.as_mut_ptr(), rank))?;
            Ok((data_type, dims))
        })
    }

    /// The same from where the host keeps it: a step of a decoder asks for dozens of shapes, and the host makes an object
    /// for each otherwise.
    fn referenced_type_and_shape(&self) -> Result<(DataType, SmallVec<[i64; 6]>)> {
        let mut data_type = DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        let (mut dims, mut rank) = (ptr::null(), 0);
        // SAFETY: the table has the function since REFERENCES_API, which the caller asked for; the places are ours.
        check(unsafe {
            ((*api()).GetTensorElementTypeAndShapeDataReference)(self.0, &mut data_type, &mut dims, &mut rank)
        })?;
        if rank == 0 || dims.is_null() {
            return Ok((data_type, SmallVec::new()));
        }
        // SAFETY: the host gives `rank` numbers, which live as long as the tensor.
        let dims = unsafe { std::slice::from_raw_parts(dims, rank) };
        Ok((data_type, SmallVec::from_slice(dims)))
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

    /// Copies a tensor of the same type and shape, unless both are the same memory (a buffer shared by past and
    /// present).
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
        let (data_type, shape) = self.type_and_shape()?;
        Ok(element_count(&shape)? * element_bytes(data_type)?)
    }

    fn elements(&self) -> Result<usize> {
        element_count(&self.shape()?)
    }
}

fn element_count(shape: &[i64]) -> Result<usize> {
    let product = |n: usize, &d: &i64| n.checked_mul(usize::try_from(d).ok()?);
    let count = shape.iter().try_fold(1, product);
    count.ok_or_else(|| Error::invalid("a tensor's shape overflows"))
}

/// The data of a CPU tensor for one call, or for as long as a constant lives: the host's own memory, or a copy where
/// that lies at an address that its elements cannot be used at. A host may hand over memory at any address, as ONNX
/// Runtime does with weights that it maps from a file.
pub struct Elements {
    data_type: DataType,
    len: usize,
    /// Where the host has the data.
    address: *mut c_void,
    /// In words that every element type can be read from.
    copy: Option<Vec<u64>>,
}

// SAFETY: the pointer is the host's, which hands tensors to any thread; what is done with their memory is up to the
// callers of the unsafe functions.
unsafe impl Send for Elements {}
// SAFETY: as above.
unsafe impl Sync for Elements {}

impl Elements {
    /// # Safety
    /// The tensor lives on the CPU, for as long as this does, and nothing writes to its memory meanwhile.
    pub unsafe fn of(tensor: &Tensor) -> Result<Self> {
        let (data_type, shape) = tensor.type_and_shape()?;
        let (len, address) = (element_count(&shape)?, tensor.address()?);
        if len > 0 && address.is_null() {
            return Err(Error::runtime("a tensor's memory is null"));
        }
        let mut all = Self {
            data_type,
            len,
            address,
            copy: None,
        };
        let size = element_bytes(data_type)?;
        if len > 0 && !address.addr().is_multiple_of(size) {
            let mut words = vec![0u64; (len * size).div_ceil(size_of::<u64>())];
            // SAFETY: the tensor has `len * size` bytes at `address`, and the words have as many.
            unsafe { ptr::copy_nonoverlapping(address.cast::<u8>(), words.as_mut_ptr().cast(), len * size) };
            all.copy = Some(words);
        }
        Ok(all)
    }

    /// Whether the host's memory is misaligned.
    pub fn is_copy(&self) -> bool {
        self.copy.is_some()
    }

    /// Whether this is the data of a tensor.
    pub fn is_of(&self, tensor: &Tensor) -> Result<bool> {
        Ok(self.address == tensor.address()? && self.len == tensor.elements()?)
    }

    fn check_type<T: Plain>(&self) -> Result<()> {
        if self.data_type != T::DATA_TYPE {
            return Err(Error::invalid(format!(
                "a tensor holds {:?}, expected {:?}",
                self.data_type,
                T::DATA_TYPE
            )));
        }
        Ok(())
    }

    /// The elements.
    ///
    /// # Safety
    /// Nothing writes to the tensor's memory while the slice is in use.
    pub unsafe fn slice<T: Plain>(&self) -> Result<&[T]> {
        self.check_type::<T>()?;
        if self.len == 0 {
            return Ok(&[]);
        }
        let data = self
            .copy
            .as_ref()
            .map_or(self.address.cast_const().cast(), |c| c.as_ptr().cast());
        // SAFETY: `len` elements, as `of` found; a tensor at a misaligned address has a copy; the rest is the caller's
        // promise.
        Ok(unsafe { std::slice::from_raw_parts(data, self.len) })
    }

    /// The elements, mutable. What is written to a copy reaches the tensor by [`Self::write_back`].
    ///
    /// # Safety
    /// Nothing else reads or writes the tensor's memory while the slice is in use.
    pub unsafe fn slice_mut<T: Plain>(&mut self) -> Result<&mut [T]> {
        self.check_type::<T>()?;
        if self.len == 0 {
            return Ok(&mut []);
        }
        let data = self
            .copy
            .as_mut()
            .map_or(self.address.cast(), |c| c.as_mut_ptr().cast());
        // SAFETY: as in `slice`.
        Ok(unsafe { std::slice::from_raw_parts_mut(data, self.len) })
    }

    /// Hands what was written over to the tensor.
    ///
    /// # Safety
    /// The tensor is an output, and nothing else reads or writes its memory meanwhile.
    pub unsafe fn write_back(&self) -> Result<()> {
        if let Some(copy) = &self.copy {
            let bytes = self.len * element_bytes(self.data_type)?;
            // SAFETY: both have as many bytes.
            unsafe { ptr::copy_nonoverlapping(copy.as_ptr().cast::<u8>(), self.address.cast(), bytes) };
        }
        Ok(())
    }
}

/// A tensor over memory of ours, for operators that we invoke ourselves.
pub struct OwnedScalar {
    value: Tensor,
    /// From `Box::into_raw`: the tensor points to it, and so it stays a raw pointer until it is freed.
    data: *mut i32,
}

impl OwnedScalar {
    /// An int32 scalar of shape `[1]` on the CPU.
    pub fn new(v: i32) -> Result<Self> {
        let mut memory = ptr::null_mut();
        ort!(CreateCpuMemoryInfo(
            ort_sys::OrtAllocatorType::OrtArenaAllocator,
            ort_sys::OrtMemType::OrtMemTypeDefault,
            &mut memory
        ))?;
        let mut scalar = Self {
            value: Tensor(ptr::null_mut()),
            data: Box::into_raw(Box::new(v)),
        };
        let shape = [1i64];
        let made = ort!(CreateTensorWithDataAsOrtValue(
            memory,
            scalar.data.cast(),
            size_of::<i32>(),
            shape.as_ptr(),
            shape.len(),
            i32::DATA_TYPE,
            &mut scalar.value.0
        ));
        // SAFETY: the memory info came from CreateCpuMemoryInfo and is released once; the value keeps a copy.
        unsafe { ((*api()).ReleaseMemoryInfo)(memory) };
        made.map(|()| scalar)
    }

    /// The tensor, while this lives.
    pub fn tensor(&self) -> Tensor {
        self.value
    }
}

impl Drop for OwnedScalar {
    fn drop(&mut self) {
        // SAFETY: the value, if there is one, came from CreateTensorWithDataAsOrtValue and is released once, before the
        // memory that it points to, which came from Box::into_raw.
        unsafe {
            if !self.value.0.is_null() {
                ((*api()).ReleaseValue)(self.value.0);
            }
            drop(Box::from_raw(self.data));
        }
    }
}

/// A tensor over memory of ours on a CUDA device, for operators that we invoke ourselves.
pub struct DeviceTensor(Tensor);

impl DeviceTensor {
    /// A tensor of this type and shape at `address` on the CUDA device `ordinal`.
    ///
    /// # Safety
    /// The memory holds as many elements for as long as this lives.
    pub unsafe fn new(address: *mut c_void, ordinal: usize, data_type: DataType, shape: &[i64]) -> Result<Self> {
        let elements = shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(usize::try_from(d).ok()?));
        let elements = elements.ok_or_else(|| Error::runtime("a tensor's shape overflows"))?;
        let id = i32::try_from(ordinal).map_err(|_| Error::runtime("a device's number overflows"))?;
        let mut memory = ptr::null_mut();
        ort!(CreateMemoryInfo(
            c"Cuda".as_ptr(),
            ort_sys::OrtAllocatorType::OrtDeviceAllocator,
            id,
            ort_sys::OrtMemType::OrtMemTypeDefault,
            &mut memory
        ))?;
        let mut value = ptr::null_mut();
        let made = ort!(CreateTensorWithDataAsOrtValue(
            memory,
            address,
            elements * element_bytes(data_type)?,
            shape.as_ptr(),
            shape.len(),
            data_type,
            &mut value
        ));
        // SAFETY: the memory info came from CreateMemoryInfo and is released once; the value keeps a copy.
        unsafe { ((*api()).ReleaseMemoryInfo)(memory) };
        made.map(|()| Self(Tensor(value)))
    }

    /// The tensor, while this lives.
    pub fn tensor(&self) -> Tensor {
        self.0
    }
}

impl Drop for DeviceTensor {
    fn drop(&mut self) {
        // SAFETY: the value came from CreateTensorWithDataAsOrtValue and is released once; its memory is not its own.
        unsafe { ((*api()).ReleaseValue)(self.0.0) }
    }
}
