//! One CUDA device: its primary context (ONNX Runtime's own) and the loaded module.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::CudaContext;
use cudarc::driver::sys::{
    CUdevice_attribute, CUfunction, CUfunction_attribute, CUlaunchConfig, CUmodule, cuDriverGetVersion,
    cuFuncSetAttribute, cuModuleGetFunction, cuModuleLoadData, cuOccupancyMaxPotentialClusterSize, is_culib_present,
};

use super::check;
use super::cubin::code;
use super::launch::{Kernel, Stream};
use super::scratch::Scratch;
use crate::ort::{Context, Error, Result};

pub struct Device {
    context: Arc<CudaContext>,
    module: CUmodule,
    pub multiprocessors: usize,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_per_sm: usize,
    /// Compute capability 9.0 and up: kernels of a step may overlap (programmatic dependent launch), and blocks may work
    /// together in clusters.
    pub overlaps: bool,
    /// CUDA 12.5 and up: a launch may say how multiprocessors divide their memory.
    pub sets_carveout: bool,
    pub scratch: Scratch,
    /// Places of tensors at addresses that the kernels cannot use.
    pub staged: Scratch,
    /// Weights dequantised for a product of many rows.
    pub dequantised: Scratch,
    /// As CUDA numbers devices.
    pub ordinal: usize,
}

// SAFETY: a module belongs to a context, and the driver's calls on both may come from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// The device `ordinal`, set up once a process; it lives as long as the process, like the sessions' primary context.
    pub fn get(ordinal: usize) -> Result<Arc<Self>> {
        static DEVICES: Mutex<BTreeMap<usize, Arc<Device>>> = Mutex::new(BTreeMap::new());
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = devices.get(&ordinal) {
            return Ok(device.clone());
        }
        let device = Arc::new(Self::open(ordinal)?);
        devices.insert(ordinal, device.clone());
        Ok(device)
    }

    fn open(ordinal: usize) -> Result<Self> {
        // SAFETY: only looks for the library.
        if !unsafe { is_culib_present() } {
            return Err(Error::runtime("the CUDA driver (libcuda.so) is not installed"));
        }
        let failed = |call: &str, e| Error::runtime(format!("{call} failed on CUDA device {ordinal}: {e}"));
        let context = CudaContext::new(ordinal).map_err(|e| failed("cuDevicePrimaryCtxRetain", e))?;
        let attribute = |a| context.attribute(a).map_err(|e| failed("cuDeviceGetAttribute", e));
        let multiprocessors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        let capability = context
            .compute_capability()
            .map_err(|e| failed("cuDeviceGetAttribute", e))?;
        if capability < (8, 0) {
            return Err(Error::runtime(format!(
                "CUDA device {ordinal} has compute capability {}.{}, RetroAttention needs 8.0 or newer",
                capability.0, capability.1
            )));
        }
        let mut driver = 0;
        // SAFETY: the number is ours to write.
        check("cuDriverGetVersion", unsafe { cuDriverGetVersion(&mut driver) })?;
        let image = code(capability)?;
        let mut module = ptr::null_mut();
        // SAFETY: the context is current (CudaContext::new binds it), and the image is a whole fat binary or cubin.
        check("cuModuleLoadData", unsafe {
            cuModuleLoadData(&mut module, image.as_ptr().cast())
        })?;
        Ok(Self {
            context,
            module,
            multiprocessors: usize::try_from(multiprocessors).unwrap_or(1),
            shared_per_sm: usize::try_from(shared).unwrap_or(0),
            overlaps: capability >= (9, 0),
            sets_carveout: driver >= 12050,
            scratch: Scratch::default(),
            staged: Scratch::default(),
            dequantised: Scratch::default(),
            ordinal,
        })
    }

    /// The kernel of this name, for blocks of so many threads. The name stays for good: to be asked for once.
    pub fn kernel(&self, name: String, threads: usize) -> Result<Kernel> {
        Ok(Kernel {
            function: self.function(&name)?,
            name: name.leak(),
            threads: threads as u32,
        })
    }

    fn function(&self, name: &str) -> Result<CUfunction> {
        self.make_current()?;
        let c_name = CString::new(name).map_err(|_| Error::runtime("a kernel's name has a NUL byte"))?;
        let mut function = ptr::null_mut();
        // SAFETY: the module is loaded, the name outlives the call.
        check(&format!("cuModuleGetFunction({name})"), unsafe {
            cuModuleGetFunction(&mut function, self.module, c_name.as_ptr())
        })?;
        Ok(function)
    }

    /// Lets a kernel be launched with more shared memory than the default 48 KiB.
    pub fn allow_shared(&self, kernel: &Kernel, bytes: usize) -> Result<()> {
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = i32::try_from(bytes).map_err(|_| Error::runtime("a kernel asks for too much shared memory"))?;
        // SAFETY: the function belongs to the loaded module.
        check(&format!("cuFuncSetAttribute({}, {bytes})", kernel.name), unsafe {
            cuFuncSetAttribute(kernel.function, attribute, bytes)
        })
    }

    /// How many blocks of a kernel that each have so much shared memory fit in a cluster, a power of two.
    pub fn largest_cluster(&self, kernel: &Kernel, shared: usize) -> Result<usize> {
        if !self.overlaps {
            return Ok(1);
        }
        let config = CUlaunchConfig {
            gridDimX: 1,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: ptr::null_mut(),
            attrs: ptr::null_mut(),
            numAttrs: 0,
        };
        let mut blocks = 0;
        // SAFETY: the function belongs to the loaded module; the number is ours to write.
        let result = unsafe { cuOccupancyMaxPotentialClusterSize(&mut blocks, kernel.function, &config) };
        check(&format!("cuOccupancyMaxPotentialClusterSize({})", kernel.name), result)?;
        let blocks = usize::try_from(blocks).unwrap_or(1).max(1);
        Ok(1 << blocks.ilog2())
    }

    /// The stream of a call.
    pub fn stream(&self, context: &Context) -> Result<Stream> {
        Ok(Stream {
            raw: context.stream()?.cast(),
            overlaps: self.overlaps,
            sets_carveout: self.sets_carveout,
        })
    }

    /// Makes the device's context the calling thread's.
    pub fn make_current(&self) -> Result<()> {
        self.context
            .bind_to_thread()
            .map_err(|e| Error::runtime(format!("cuCtxSetCurrent failed: {e}")))
    }
}
