//! Temporary device memory of the kernels: one buffer a stream, kept and reused.
//!
//! Work on a stream is serial, so every call on it can use the same memory. It grows by doubling, and a buffer that was too
//! small is kept: kernels that were launched, or captured in a CUDA graph, still use it. So a step allocates nothing once
//! the longest one has run, and a CUDA graph can be captured after a warm-up run (ORT's arena refuses to grow in a capture).

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::cuMemAlloc_v2;

use super::check;
use crate::host::Result;

/// Bytes of a stream's first buffer.
const LEAST: usize = 1 << 20;

#[derive(Default)]
pub struct Buffer {
    address: u64,
    bytes: usize,
}

/// The buffers of a device's streams. They live as long as the process: at most twice what the largest calls needed.
#[derive(Default)]
pub struct Scratch(Mutex<BTreeMap<usize, Arc<Mutex<Buffer>>>>);

impl Scratch {
    /// The buffer of a stream, by the stream's handle.
    pub fn of_stream(&self, stream: usize) -> Arc<Mutex<Buffer>> {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.entry(stream).or_default().clone()
    }
}

/// Takes a stream's buffer for the launches of one call: threads that share a stream take turns.
pub fn lock(buffer: &Mutex<Buffer>) -> MutexGuard<'_, Buffer> {
    buffer.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Buffer {
    /// Memory of at least `bytes` bytes.
    pub fn get(&mut self, bytes: usize) -> Result<*mut c_void> {
        if bytes > self.bytes {
            let larger = bytes.max(2 * self.bytes).max(LEAST).next_multiple_of(256);
            let mut address = 0;
            // SAFETY: the device's context is current; the address is ours to write.
            check(&format!("cuMemAlloc of {larger} bytes"), unsafe {
                cuMemAlloc_v2(&mut address, larger)
            })?;
            (self.address, self.bytes) = (address, larger);
        }
        Ok(self.address as *mut c_void)
    }
}
