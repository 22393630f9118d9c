//! A running kernel's view of the host: its inputs, its outputs, the thread pool.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use ort_sys::OrtKernelContext;

use super::api::ort;
use super::{Error, Result, Tensor};

/// One kernel call.
pub struct Context(pub(super) *mut OrtKernelContext);

impl Context {
    /// Fills `tensors` with the inputs in slot order; `None` where the node leaves an optional one out.
    pub fn inputs(&self, tensors: &mut [Option<Tensor>]) -> Result<()> {
        let mut count = 0;
        ort!(KernelContext_GetInputCount(self.0, &mut count))?;
        for (index, tensor) in tensors.iter_mut().enumerate().take(count) {
            let mut value = ptr::null();
            ort!(KernelContext_GetInput(self.0, index, &mut value))?;
            *tensor = (!value.is_null()).then_some(Tensor(value.cast_mut()));
        }
        Ok(())
    }

    /// Output `index`, allocated by the host (or bound by its caller) with the given shape.
    pub fn output(&self, index: usize, shape: &[i64]) -> Result<Tensor> {
        let mut value = ptr::null_mut();
        ort!(KernelContext_GetOutput(
            self.0,
            index,
            shape.as_ptr(),
            shape.len(),
            &mut value
        ))?;
        if value.is_null() {
            return Err(Error::invalid(format!(
                "output {index} is missing: the node must name all its outputs"
            )));
        }
        Ok(Tensor(value))
    }

    /// The stream that the execution provider runs this call's work on (CUDA: a `CUstream`).
    pub fn stream(&self) -> Result<*mut c_void> {
        let mut stream = ptr::null_mut();
        ort!(KernelContext_GetGPUComputeStream(self.0, &mut stream))?;
        Ok(stream)
    }

    /// Runs `task(0..count)` on the session's intra-op thread pool and waits for all. A panic in a task becomes an
    /// error once every task has ended.
    pub fn parallel_for(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        struct Shared<'a> {
            task: &'a (dyn Fn(usize) + Sync),
            panicked: AtomicBool,
        }
        unsafe extern "C" fn call(shared: *mut c_void, index: usize) {
            // SAFETY: ORT passes back the pointer given to ParallelFor, which returns only after the last call.
            let shared = unsafe { &*shared.cast::<Shared<'_>>() };
            if catch_unwind(AssertUnwindSafe(|| (shared.task)(index))).is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
            }
        }
        match count {
            0 => return Ok(()),
            1 => {
                task(0);
                return Ok(());
            }
            _ => {}
        }
        let shared = Shared {
            task,
            panicked: AtomicBool::new(false),
        };
        ort!(KernelContext_ParallelFor(
            self.0,
            call,
            count,
            0,
            (&raw const shared).cast_mut().cast()
        ))?;
        if shared.panicked.load(Ordering::Relaxed) {
            return Err(Error::runtime(
                "internal error in RetroAttention, please report it: a parallel task panicked",
            ));
        }
        Ok(())
    }
}
