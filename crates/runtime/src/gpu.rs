//! Memory of an NVIDIA GPU, through the driver: what ONNX Runtime does not copy for its users.
//!
//! All copies here are complete when they return, on both sides. ONNX Runtime works on streams of its own, so every
//! operation first waits for the device.

use std::{
    ffi::c_void,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::driver::{
    CudaContext, DriverError,
    result::{
        free_host, free_sync, malloc_host, malloc_sync, memcpy_dtod_sync, memcpy_dtoh_sync, memcpy_htod_sync,
        memset_d8_sync,
    },
    sys::is_culib_present,
};
use ort::{memory::DeviceType, value::DynTensor};

use crate::{Error, Result};

/// A GPU whose primary context (the one that ONNX Runtime uses) is held.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<CudaContext>,
    id: usize,
}

impl Gpu {
    /// The GPU of that number.
    ///
    /// # Errors
    /// When there is no driver or no such GPU.
    pub fn open(id: usize) -> Result<Arc<Self>> {
        // SAFETY: only tries to load the library, whose initialisers are the driver's own.
        let present = unsafe { is_culib_present() };
        if !present {
            return Err(Error::NoDriver);
        }
        let count = CudaContext::device_count();
        // Before the first call the driver wants cuInit, which CudaContext::new makes.
        let context = CudaContext::new(id).map_err(|e| match count {
            Ok(count) if count > 0 => Error::NoSuchGpu {
                id,
                count,
                reason: text(e),
            },
            _ => Error::NoGpu { id, reason: text(e) },
        })?;
        Ok(Arc::new(Self { context, id }))
    }

    /// Its number, as CUDA counts.
    pub fn id(&self) -> usize {
        self.id
    }

    /// The GPU's name and its memory in bytes.
    pub fn describe(&self) -> Result<(String, usize)> {
        let name = self.context.name().map_err(driver("cuDeviceGetName"))?;
        let memory = self.context.total_mem().map_err(driver("cuDeviceTotalMem"))?;
        Ok((name, memory))
    }

    /// Free bytes.
    pub fn free_memory(&self) -> Result<usize> {
        self.context
            .mem_get_info()
            .map(|(free, _)| free)
            .map_err(driver("cuMemGetInfo"))
    }

    /// Waits for everything that was given to the device.
    pub fn synchronize(&self) -> Result<()> {
        self.context.synchronize().map_err(driver("cuCtxSynchronize"))
    }

    /// Memory with undefined contents, at an address that every element type is aligned at.
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> Result<GpuMemory> {
        self.context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        // SAFETY: a context is current; what comes back is read only after it was written.
        let address = unsafe { malloc_sync(bytes.max(1)) }
            .map_err(driver("cuMemAlloc"))
            .map_err(|e| Error::GpuMemory {
                id: self.id,
                bytes,
                reason: e.to_string(),
            })?;
        Ok(GpuMemory {
            gpu: Arc::clone(self),
            address,
            bytes,
        })
    }

    /// Page-locked memory of the host, zeroed: the GPU reads and writes it without a detour.
    pub fn pinned(self: &Arc<Self>, bytes: usize) -> Result<Pinned> {
        self.context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        // SAFETY: a context is current; all bytes are written below, before anything can read them.
        let address = unsafe { malloc_host(bytes.max(1), 0) }
            .map_err(driver("cuMemHostAlloc"))
            .map_err(|e| Error::PinnedMemory {
                bytes,
                reason: e.to_string(),
            })?;
        let address = NonNull::new(address.cast::<u8>()).ok_or_else(|| Error::PinnedMemory {
            bytes,
            reason: "cuMemHostAlloc gave no address".to_owned(),
        })?;
        // SAFETY: just allocated, so many bytes long.
        unsafe { address.write_bytes(0, bytes) };
        Ok(Pinned {
            gpu: Arc::clone(self),
            address,
            bytes,
        })
    }

    /// The memory of a tensor that ONNX Runtime allocated on this GPU.
    pub fn tensor<'a>(&'a self, tensor: &'a mut DynTensor) -> Result<Region<'a>> {
        self.check(tensor)?;
        Ok(Region {
            gpu: self,
            address: tensor.data_ptr_mut() as u64,
            bytes: tensor_bytes(tensor)?,
            _owner: std::marker::PhantomData,
        })
    }

    /// Copies part of a tensor on this GPU to the host.
    pub fn read_tensor(&self, tensor: &DynTensor, offset: usize, to: &mut [u8]) -> Result<()> {
        self.check(tensor)?;
        let region = Region {
            gpu: self,
            address: tensor.data_ptr() as u64,
            bytes: tensor_bytes(tensor)?,
            _owner: std::marker::PhantomData,
        };
        region.read(offset, to)
    }

    fn check(&self, tensor: &DynTensor) -> Result<()> {
        let info = tensor.memory_info();
        if info.device_type() == DeviceType::GPU && info.device_id() as usize == self.id {
            return Ok(());
        }
        Err(Error::OtherDevice {
            device: info.allocation_device().as_str().to_owned(),
            number: info.device_id(),
            expected: self.id,
        })
    }
}

fn tensor_bytes(tensor: &DynTensor) -> Result<usize> {
    let elements = tensor.shape().num_elements();
    tensor.data_type().byte_size(elements).ok_or(Error::Strings)
}

/// Memory on a GPU that is ours.
#[derive(Debug)]
pub struct GpuMemory {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: usize,
}

impl GpuMemory {
    /// All of it.
    pub fn region(&mut self) -> Region<'_> {
        Region {
            gpu: &self.gpu,
            address: self.address,
            bytes: self.bytes,
            _owner: std::marker::PhantomData,
        }
    }

    /// Copies bytes from `offset` on to the host.
    ///
    /// # Errors
    /// The range is outside, or the driver fails.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let region = Region {
            gpu: &self.gpu,
            address: self.address,
            bytes: self.bytes,
            _owner: std::marker::PhantomData,
        };
        region.read(offset, to)
    }

    /// Copies inside the memory, between places that do not overlap.
    pub fn copy_inside(&mut self, to: usize, from: usize, bytes: usize) -> Result<()> {
        self.region().copy_inside(to, from, bytes)
    }

    /// Where a byte lies, for ONNX Runtime to make a tensor there.
    pub fn address(&self, offset: usize) -> Result<*mut c_void> {
        if offset > self.bytes {
            return Err(Error::OutOfRange {
                offset,
                bytes: 0,
                size: self.bytes,
            });
        }
        Ok((self.address + offset as u64) as *mut c_void)
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The GPU that it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }
}

impl Drop for GpuMemory {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; the next call of the driver reports it.
        if self.gpu.synchronize().is_ok() {
            // SAFETY: `allocate` got the address in this context, nobody else frees it, and the device is idle.
            let _ = unsafe { free_sync(self.address) };
        }
    }
}

/// Memory of the host that stays where it is, for copies from and to a GPU.
#[derive(Debug)]
pub struct Pinned {
    gpu: Arc<Gpu>,
    address: NonNull<u8>,
    bytes: usize,
}

impl Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `Gpu::pinned` allocated and wrote these bytes; they are ours until the drop, and copies are complete
        // when they return.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the memory is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // As for `GpuMemory`.
        if self.gpu.context.bind_to_thread().is_ok() {
            // SAFETY: `Gpu::pinned` got the address in this context, and nobody else frees it.
            let _ = unsafe { free_host(self.address.as_ptr().cast()) };
        }
    }
}

/// Bytes on a GPU that are borrowed for writing.
pub struct Region<'a> {
    gpu: &'a Gpu,
    address: u64,
    bytes: usize,
    _owner: std::marker::PhantomData<&'a mut [u8]>,
}

impl Region<'_> {
    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Copies bytes from `offset` on to the host.
    ///
    /// # Errors
    /// The range is outside, or the driver fails.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let from = self.at(offset, to.len())?;
        if to.is_empty() {
            return Ok(());
        }
        let _one = self.idle()?;
        // SAFETY: `at` checked that the bytes lie inside memory that is borrowed; the device is idle and the copy
        // synchronous.
        unsafe { memcpy_dtoh_sync(to, from) }.map_err(driver("cuMemcpyDtoH"))
    }

    /// Replaces the bytes from `offset` on.
    ///
    /// # Errors
    /// The range is outside, or the driver fails.
    pub fn write(&mut self, offset: usize, from: &[u8]) -> Result<()> {
        self.write_all(&[(offset, from)])
    }

    /// Replaces several parts, each from its offset on, and waits for the device but once.
    pub fn write_all(&mut self, parts: &[(usize, impl AsRef<[u8]>)]) -> Result<()> {
        let parts = parts.iter().map(|(offset, from)| {
            let from = from.as_ref();
            Ok((self.at(*offset, from.len())?, from))
        });
        let parts: Vec<_> = parts.filter(|p| !matches!(p, Ok((_, [])))).collect::<Result<_>>()?;
        if parts.is_empty() {
            return Ok(());
        }
        let _one = self.idle()?;
        for (to, from) in parts {
            // SAFETY: as in `read`, and the memory is borrowed mutably.
            unsafe { memcpy_htod_sync(to, from) }.map_err(driver("cuMemcpyHtoD"))?;
        }
        // The driver may return while the last bytes are on their way from its own buffer.
        self.gpu.synchronize()
    }

    /// Sets `bytes` bytes from `offset` on to one value.
    ///
    /// # Errors
    /// The range is outside, or the driver fails.
    pub fn fill(&mut self, offset: usize, bytes: usize, value: u8) -> Result<()> {
        let to = self.at(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let _one = self.idle()?;
        // SAFETY: as in `write`.
        unsafe { memset_d8_sync(to, value, bytes) }.map_err(driver("cuMemsetD8"))?;
        self.gpu.synchronize()
    }

    /// Copies inside the region, between places that do not overlap.
    pub fn copy_inside(&mut self, to: usize, from: usize, bytes: usize) -> Result<()> {
        let source = Region {
            gpu: self.gpu,
            address: self.address,
            bytes: self.bytes,
            _owner: std::marker::PhantomData,
        };
        self.copy(to, &source, from, bytes)
    }

    /// Copies `bytes` of a tensor on the same GPU.
    pub fn copy_tensor(&mut self, offset: usize, from: &DynTensor, from_offset: usize, bytes: usize) -> Result<()> {
        self.gpu.check(from)?;
        let source = Region {
            gpu: self.gpu,
            address: from.data_ptr() as u64,
            bytes: tensor_bytes(from)?,
            _owner: std::marker::PhantomData,
        };
        self.copy(offset, &source, from_offset, bytes)
    }

    /// Copies `bytes` from another place of the same GPU; the two must not overlap.
    pub fn copy(&mut self, offset: usize, from: &Region<'_>, from_offset: usize, bytes: usize) -> Result<()> {
        let (to, source) = (self.at(offset, bytes)?, from.at(from_offset, bytes)?);
        if self.gpu.id != from.gpu.id {
            return Err(Error::TwoGpus);
        }
        if to.abs_diff(source) < bytes as u64 {
            return Err(Error::Overlap);
        }
        if bytes == 0 {
            return Ok(());
        }
        let _one = self.idle()?;
        // SAFETY: both ranges were checked, are borrowed and do not overlap.
        unsafe { memcpy_dtod_sync(to, source, bytes) }.map_err(driver("cuMemcpyDtoD"))?;
        self.gpu.synchronize()
    }

    fn at(&self, offset: usize, bytes: usize) -> Result<u64> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(Error::OutOfRange {
                offset,
                bytes,
                size: self.bytes,
            });
        }
        Ok(self.address + offset as u64)
    }

    /// The context current in this thread, and nothing running.
    fn idle(&self) -> Result<std::sync::MutexGuard<'static, ()>> {
        static COPYING: Mutex<()> = Mutex::new(());
        let one = COPYING.lock().unwrap_or_else(PoisonError::into_inner);
        self.gpu.synchronize()?;
        Ok(one)
    }
}

fn driver(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |e| Error::Driver { call, reason: text(e) }
}

fn text(error: DriverError) -> String {
    let part = |s: std::result::Result<&std::ffi::CStr, DriverError>| {
        s.map_or_else(|_| format!("{:?}", error.0), |s| s.to_string_lossy().into_owned())
    };
    format!("{}: {}", part(error.error_name()), part(error.error_string()))
}
