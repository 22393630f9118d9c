//! Launching kernels that each take one struct of parameters.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{
    CUfunction, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchAttributeValue_union__bindgen_ty_1 as ClusterDim, CUlaunchConfig, CUstream, cuLaunchKernelEx,
    cuMemcpyDtoDAsync_v2,
};
use smallvec::SmallVec;

use super::abi::Params;
use super::check;
use super::matmul_abi::MatmulParams;
use crate::ort::{Result, Tensor};

/// A kernel by name.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub name: &'static str,
    pub function: CUfunction,
    pub threads: u32,
}

// SAFETY: a function handle is an address that the driver accepts from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// A struct that kernels take by value.
pub trait KernelParams {}
impl KernelParams for Params {}
impl KernelParams for MatmulParams {}

/// The stream of a call.
#[derive(Clone, Copy)]
pub struct Stream {
    pub raw: CUstream,
    /// Whether a kernel may start before the one launched before it has ended.
    pub overlaps: bool,
    /// Whether a launch may say how multiprocessors divide their memory.
    pub sets_carveout: bool,
}

/// Where a kernel stands in a call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum LaunchMode {
    /// After everything before it.
    Plain,
    /// Perhaps before the kernel before it has ended, whose results it waits for by itself.
    Pdl,
    /// The same, on multiprocessors that divide their memory in favour of shared memory: blocks of two kernels are on one of them
    /// at the same time only where they agree in this, and these kernels start while others drain.
    PdlMaxShared,
}

impl Stream {
    pub fn launch(
        &self,
        kernel: &Kernel,
        grid: [usize; 3],
        shared: usize,
        mode: LaunchMode,
        params: &impl KernelParams,
    ) -> Result<()> {
        self.launch_clusters(kernel, 1, grid, shared, mode, params)
    }

    /// Blocks in clusters of `cluster` along the grid's x, which it divides: they are on the device together. More than one
    /// only where the device has clusters.
    pub fn launch_clusters(
        &self,
        kernel: &Kernel,
        cluster: usize,
        grid: [usize; 3],
        shared: usize,
        mode: LaunchMode,
        params: &impl KernelParams,
    ) -> Result<()> {
        let mut attributes = SmallVec::<[CUlaunchAttribute; 3]>::new();
        if mode != LaunchMode::Plain && self.overlaps {
            attributes.push(Self::pdl());
            if mode == LaunchMode::PdlMaxShared && self.sets_carveout {
                attributes.push(Self::max_shared());
            }
        }
        if cluster > 1 {
            attributes.push(Self::clusters(cluster));
        }
        let config = CUlaunchConfig {
            gridDimX: grid[0] as u32,
            gridDimY: grid[1] as u32,
            gridDimZ: grid[2] as u32,
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.raw,
            attrs: attributes.as_ptr().cast_mut(),
            numAttrs: attributes.len() as u32,
        };
        let mut arguments = [ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the function takes one such struct by value, which the driver copies before it returns, as it does the attributes,
        // which it does not write; the pointers inside belong to the running call, which ORT keeps alive on this stream.
        let result = unsafe { cuLaunchKernelEx(&config, kernel.function, arguments.as_mut_ptr(), ptr::null_mut()) };
        match result {
            cudarc::driver::sys::CUresult::CUDA_SUCCESS => Ok(()),
            e => check(&format!("cuLaunchKernelEx({}, grid {grid:?})", kernel.name), e),
        }
    }

    fn pdl() -> CUlaunchAttribute {
        CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        }
    }

    fn clusters(blocks: usize) -> CUlaunchAttribute {
        let (x, y, z) = (blocks as u32, 1, 1);
        CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: CUlaunchAttributeValue {
                clusterDim: ClusterDim { x, y, z },
            },
        }
    }

    fn max_shared() -> CUlaunchAttribute {
        CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
            pad: [0; 4],
            value: CUlaunchAttributeValue { sharedMemCarveout: 100 },
        }
    }

    /// Copies a state tensor, unless past and present share their memory.
    pub fn copy(&self, to: &Tensor, from: &Tensor) -> Result<()> {
        let (target, source) = (to.address()?, from.address()?);
        if target == source {
            return Ok(());
        }
        // SAFETY: both are device tensors of one type and shape, alive for the call.
        check("cuMemcpyDtoDAsync", unsafe {
            cuMemcpyDtoDAsync_v2(target as u64, source as u64, from.bytes()?, self.raw)
        })
    }
}
