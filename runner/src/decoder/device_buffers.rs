//! Buffers on a device (CPU or GPU), tensors in them, and bindings of such tensors to a session.
//!
//! ONNX Runtime's allocators allocate one tensor at a time. Here sessions share buffers, and one buffer serves tensors
//! of several shapes.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    cell::RefCell,
    ffi::{CString, c_void},
    ptr,
    rc::Rc,
    sync::Arc,
};

use ort::{
    AsPointer,
    session::{IoBinding, NoSelectedOutputs, RunOptions, Session},
    value::TensorElementType,
};

use crate::{
    Device,
    decoder::error::{Error, Result, require},
    gpu::{Gpu, GpuMemory},
    runtime::{check, ort_error},
};

/// Alignment of tensors in bytes: enough for every element type and every kernel's vector loads.
pub const ALIGNMENT: usize = 256;

/// A buffer on one device. It is freed with the last clone and the last tensor in it.
#[derive(Clone)]
pub struct DeviceBuffer(Rc<Block>);

struct Block {
    device: Device,
    bytes: usize,
    memory: Memory,
}

enum Memory {
    Host(*mut u8, Layout),
    Gpu(RefCell<GpuMemory>),
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Self::Host(data, layout) = self {
            // SAFETY: allocated with this layout by `DeviceBuffer::new`, freed once.
            unsafe { dealloc(*data, *layout) };
        }
    }
}

const NO_ADDRESS: Error = Error::Internal("host memory without an address");

/// Checks that a range lies inside a buffer of `size` bytes.
fn inside(offset: usize, bytes: usize, size: usize) -> Result<()> {
    let ends = offset.checked_add(bytes).is_some_and(|end| end <= size);
    require!(ends, retro_runtime::Error::OutOfRange { offset, bytes, size });
    Ok(())
}

impl DeviceBuffer {
    /// A buffer on the GPU (contents undefined), or on the host (zeroed) without one.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(gpu: Option<&Arc<Gpu>>, bytes: usize) -> Result<Self> {
        let (device, memory) = match gpu {
            Some(gpu) => (Device::Cuda(gpu.id()), Memory::Gpu(RefCell::new(gpu.allocate(bytes)?))),
            None => {
                let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT);
                let layout = layout.map_err(|_| Error::NoHostMemory(bytes))?;
                // SAFETY: the layout's size is not 0.
                let data = unsafe { alloc_zeroed(layout) };
                require!(!data.is_null(), Error::NoHostMemory(bytes));
                (Device::Cpu, Memory::Host(data, layout))
            }
        };
        Ok(Self(Rc::new(Block { device, bytes, memory })))
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    fn host(&self, offset: usize, bytes: usize) -> Result<Option<*mut u8>> {
        inside(offset, bytes, self.0.bytes)?;
        Ok(match &self.0.memory {
            // SAFETY: inside the block, as checked.
            Memory::Host(data, _) => Some(unsafe { data.add(offset) }),
            Memory::Gpu(_) => None,
        })
    }

    /// Replaces the bytes from `offset` on.
    ///
    /// # Errors
    /// When the range exceeds the buffer, or a GPU fails.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        self.write_all(&[(offset, from)])
    }

    /// Replaces several ranges, each from its offset on: on a GPU this costs little more than one.
    ///
    /// # Errors
    /// When a range exceeds the buffer, or a GPU fails.
    pub fn write_all(&self, parts: &[(usize, impl AsRef<[u8]>)]) -> Result<()> {
        if let Memory::Gpu(memory) = &self.0.memory {
            return Ok(memory.borrow_mut().region().write_all(parts)?);
        }
        for (offset, from) in parts {
            let from = from.as_ref();
            let to = self.host(*offset, from.len())?.ok_or(NO_ADDRESS)?;
            // SAFETY: the block holds the range; nothing runs on it meanwhile, as runs happen in this thread (`Rc`) and
            // are complete on the host when they return.
            unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        }
        Ok(())
    }

    /// Copies the bytes from `offset` on to the host.
    ///
    /// # Errors
    /// When the range exceeds the buffer, or a GPU fails.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        match (self.host(offset, to.len())?, &self.0.memory) {
            // SAFETY: as in `write`; the memory was zeroed when it was allocated.
            (Some(from), _) => unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) },
            (None, Memory::Gpu(memory)) => memory.borrow().read(offset, to)?,
            (None, Memory::Host(..)) => return Err(NO_ADDRESS),
        }
        Ok(())
    }

    /// Sets `bytes` bytes from `offset` on to one value.
    ///
    /// # Errors
    /// When the range exceeds the buffer, or a GPU fails.
    pub fn fill(&self, offset: usize, bytes: usize, value: u8) -> Result<()> {
        match (self.host(offset, bytes)?, &self.0.memory) {
            // SAFETY: as in `write`.
            (Some(to), _) => unsafe { ptr::write_bytes(to, value, bytes) },
            (None, Memory::Gpu(memory)) => memory.borrow_mut().region().fill(offset, bytes, value)?,
            (None, Memory::Host(..)) => return Err(NO_ADDRESS),
        }
        Ok(())
    }

    /// Copies `bytes` bytes inside the buffer.
    ///
    /// # Errors
    /// When the ranges overlap or exceed the buffer, or a GPU fails.
    pub fn copy(&self, to: usize, from: usize, bytes: usize) -> Result<()> {
        require!(to.abs_diff(from) >= bytes, retro_runtime::Error::Overlap);
        match (self.host(to, bytes)?, self.host(from, bytes)?, &self.0.memory) {
            // SAFETY: as in `write`, and the places do not overlap.
            (Some(to), Some(from), _) => unsafe { ptr::copy_nonoverlapping(from, to, bytes) },
            (_, _, Memory::Gpu(memory)) => memory.borrow_mut().copy_inside(to, from, bytes)?,
            _ => return Err(NO_ADDRESS),
        }
        Ok(())
    }

    /// A tensor at byte `offset` of the buffer.
    ///
    /// # Errors
    /// When it exceeds the buffer, or `offset` is no multiple of [`ALIGNMENT`].
    pub fn tensor(&self, offset: usize, element: TensorElementType, shape: &[usize]) -> Result<DeviceTensor> {
        require!(offset.is_multiple_of(ALIGNMENT), Error::Misaligned(offset));
        self.tensor_at(offset, element, shape)
    }

    /// As [`Self::tensor`], at any offset: for nodes that read and write at any address, as the operator does.
    ///
    /// # Errors
    /// When it exceeds the buffer.
    pub fn tensor_at(&self, offset: usize, element: TensorElementType, shape: &[usize]) -> Result<DeviceTensor> {
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bytes = elements.and_then(|n| element.byte_size(n));
        let bytes = bytes.ok_or_else(|| Error::TooLarge {
            what: format!("a tensor of {element}"),
            shape: shape.to_vec(),
        })?;
        let data: *mut c_void = match (self.host(offset, bytes)?, &self.0.memory) {
            (Some(data), _) => data.cast(),
            (None, Memory::Gpu(memory)) => memory.borrow().address(offset)?,
            (None, Memory::Host(..)) => return Err(NO_ADDRESS),
        };
        let memory = self.0.device.memory()?;
        let dims: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
        let mut value = ptr::null_mut();
        // SAFETY: the bytes lie in the block, which the tensor keeps alive; shape and description are read during the
        // call.
        check(unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                memory.ptr(),
                data,
                bytes,
                dims.as_ptr(),
                dims.len(),
                element.into(),
                &mut value,
            )
        })?;
        Ok(DeviceTensor {
            value,
            offset,
            bytes,
            buffer: self.clone(),
        })
    }
}

/// A tensor in a [`DeviceBuffer`].
pub struct DeviceTensor {
    value: *mut ort_sys::OrtValue,
    offset: usize,
    bytes: usize,
    buffer: DeviceBuffer,
}

impl DeviceTensor {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Replaces the contents from byte `at` on.
    ///
    /// # Errors
    /// When the range exceeds the tensor, or a GPU fails.
    pub fn write(&self, at: usize, from: &[u8]) -> Result<()> {
        let (offset, from) = self.part(at, from)?;
        self.buffer.write(offset, from)
    }

    /// A range for [`DeviceBuffer::write_all`] that replaces the contents from byte `at` on.
    ///
    /// # Errors
    /// When the range exceeds the tensor.
    pub fn part<B: AsRef<[u8]>>(&self, at: usize, from: B) -> Result<(usize, B)> {
        let bytes = from.as_ref().len();
        inside(at, bytes, self.bytes)?;
        Ok((self.offset + at, from))
    }

    /// Copies the contents from byte `at` on to the host.
    ///
    /// # Errors
    /// When the range exceeds the tensor, or a GPU fails.
    pub fn read(&self, at: usize, to: &mut [u8]) -> Result<()> {
        inside(at, to.len(), self.bytes)?;
        self.buffer.read(self.offset + at, to)
    }

    /// Sets every byte to one value.
    ///
    /// # Errors
    /// When a GPU fails.
    pub fn fill(&self, value: u8) -> Result<()> {
        self.buffer.fill(self.offset, self.bytes, value)
    }
}

impl Drop for DeviceTensor {
    fn drop(&mut self) {
        // SAFETY: made by `DeviceBuffer::tensor`, released once; a binding that holds the value shares its ownership.
        unsafe { (ort::api().ReleaseValue)(self.value) };
    }
}

/// Tensors bound to a session's inputs and outputs: an io binding that keeps their buffers alive.
pub struct DeviceBindings {
    io: IoBinding,
    kept: Vec<(String, DeviceBuffer)>,
}

impl DeviceBindings {
    /// Bindings for a session, empty at first.
    ///
    /// # Errors
    /// When ONNX Runtime fails.
    pub fn new(session: &Session) -> Result<Self> {
        let io = session.create_binding().map_err(ort_error)?;
        Ok(Self { io, kept: Vec::new() })
    }

    /// Binds an input.
    ///
    /// # Errors
    /// When the session has no such input.
    pub fn input(&mut self, name: &str, tensor: &DeviceTensor) -> Result<()> {
        bind_input(&self.io, name, tensor)?;
        self.keep(name, tensor);
        Ok(())
    }

    /// Binds an output.
    ///
    /// # Errors
    /// When the session has no such output.
    pub fn output(&mut self, name: &str, tensor: &DeviceTensor) -> Result<()> {
        bind_output(&self.io, name, tensor)?;
        self.keep(name, tensor);
        Ok(())
    }

    /// Binds one tensor as past and as present.
    ///
    /// # Errors
    /// When the session has no such input or output.
    pub fn in_place(&mut self, past: &str, present: &str, tensor: &DeviceTensor) -> Result<()> {
        self.input(past, tensor)?;
        self.output(present, tensor)
    }

    fn keep(&mut self, name: &str, tensor: &DeviceTensor) {
        self.kept.retain(|(other, _)| other != name);
        self.kept.push((name.to_owned(), tensor.buffer.clone()));
    }

    /// Runs the session that the bindings were made for.
    ///
    /// # Errors
    /// When ONNX Runtime fails.
    pub fn run(&self, session: &Session, options: Option<&RunOptions<NoSelectedOutputs>>) -> Result<()> {
        let options = options.map_or(ptr::null(), AsPointer::ptr);
        // SAFETY: session, binding and options are alive, and the blocks of all bound tensors are kept.
        Ok(check(unsafe {
            (ort::api().RunWithBinding)(session.ptr().cast_mut(), options, self.io.ptr())
        })?)
    }
}

/// Runs a session whose outputs are all bound to the caller's tensors.
pub(crate) fn run(session: &mut Session, io: &IoBinding, options: &RunOptions<NoSelectedOutputs>) -> Result<()> {
    // SAFETY: all three are alive; what is bound is alive as long as the state that owns the binding.
    Ok(check(unsafe {
        (ort::api().RunWithBinding)(session.ptr().cast_mut(), options.ptr(), io.ptr())
    })?)
}

/// A name as the C API takes it.
fn c_name(name: &str) -> Result<CString> {
    CString::new(name).map_err(|_| Error::Internal("a name with a zero byte"))
}

/// Binds a tensor as an input of a binding that must not outlive the tensor's block.
pub(crate) fn bind_input(io: &IoBinding, name: &str, tensor: &DeviceTensor) -> Result<()> {
    let name = c_name(name)?;
    // SAFETY: both objects are alive; the name is read during the call; the binding takes a share of the value.
    Ok(check(unsafe {
        (ort::api().BindInput)(io.ptr().cast_mut(), name.as_ptr(), tensor.value)
    })?)
}

/// As [`bind_input`], for an output.
pub(crate) fn bind_output(io: &IoBinding, name: &str, tensor: &DeviceTensor) -> Result<()> {
    let name = c_name(name)?;
    // SAFETY: as in `bind_input`.
    Ok(check(unsafe {
        (ort::api().BindOutput)(io.ptr().cast_mut(), name.as_ptr(), tensor.value)
    })?)
}
