//! The CUDA execution provider: [`CudaOperator`] launches the kernels of `kernels/` on the session's stream.
//!
//! A decoding step is four launches: append and score (`score_kernel.cuh`), select (`select.cuh`; not where every page
//! is read), attend (`attend.cuh`), merge (`merge.cuh`). No step waits for the device, copies to the host or allocates
//! outside the provider's arena, so it can be captured in a CUDA graph. Lengths and budgets are read where the kernels
//! run: a sequence whose `seqlens_k` or `page_budget` breaks the contract gets NaN outputs and keeps its state, because
//! the host cannot see the numbers.
//!
//! [`CudaMatMulNBits`] multiplies packed weights (`matmul_nbits.cuh`).
//!
//! Nothing of CUDA is linked: the driver is loaded when the first node is placed on a CUDA device.

pub mod abi;
mod cubin;
mod device;
mod kernel_set;
mod launch;
mod launch_plan;
pub mod matmul_abi;
mod matmul_kernels;
mod matmul_nbits;
mod op_kernel;
mod scratch;
mod staging;

pub use kernel_set::CudaElement;
pub use matmul_nbits::{CudaMatMulNBits, MatMulKernel};
pub use op_kernel::{CudaKernel, CudaOperator};

use cudarc::driver::sys::CUresult;

use crate::ort::{Error, Result};

/// `Ok` for CUDA_SUCCESS; otherwise an error that names the call.
fn check(call: &str, result: CUresult) -> Result<()> {
    result
        .result()
        .map_err(|e| Error::runtime(format!("{call} failed: {e}")))
}
