//! Temporary device memory of the kernels: one buffer a stream, kept and reused.
//!
//! Work on a stream is serial, so every call on it can use the same memory. It grows by doubling, and a buffer that was too
//! small is kept: kernels that were launched, or captured in a CUDA graph, still use it. So a step allocates nothing once
//! the longest one has run, and a CUDA graph can be captured after a warm-up run (ORT's arena refuses to grow in a capture).

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{cuMemAlloc_v2, cuMemsetD8Async};

use super::check;
use super::launch::Stream;
use crate::ort::Result;

/// Bytes of a stream's first buffer.
const LEAST: usize = 1 << 20;

#[derive(Default)]
pub struct Buffer {
    address: u64,
    bytes: usize,
    flags: u64,
    /// Numbers at `flags`.
    numbers: usize,
    /// Whether they are 0 when the stream's work is done.
    settled: bool,
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

/// Newly allocated memory, of zeros: selection reads some scores around the candidates', whose values do not matter.
fn zeros(bytes: usize, stream: Stream) -> Result<u64> {
    let mut address = 0;
    // SAFETY: the device's context is current; the address is ours to write.
    check(&format!("cuMemAlloc of {bytes} bytes"), unsafe {
        cuMemAlloc_v2(&mut address, bytes)
    })?;
    clear(address, bytes, stream)?;
    Ok(address)
}

/// Zeros in memory of ours, of so many bytes.
fn clear(address: u64, bytes: usize, stream: Stream) -> Result<()> {
    // SAFETY: the callers allocated so many bytes there, and whatever used them runs before on this stream.
    check("cuMemsetD8Async", unsafe {
        cuMemsetD8Async(address, 0, bytes, stream.raw)
    })
}

impl Buffer {
    /// Memory of at least `bytes` bytes.
    pub fn get(&mut self, bytes: usize, stream: Stream) -> Result<*mut c_void> {
        if bytes > self.bytes {
            let larger = bytes.max(2 * self.bytes).max(LEAST).next_multiple_of(256);
            (self.address, self.bytes) = (zeros(larger, stream)?, larger);
        }
        Ok(self.address as *mut c_void)
    }

    /// Memory of `count` numbers of 32 bits, which are 0 and which the kernels of a step leave at 0. A step that is not
    /// launched to its end may leave others; so they are cleared again unless [`Buffer::settle`] is called.
    pub fn flags(&mut self, count: usize, stream: Stream) -> Result<*mut c_void> {
        if count > self.numbers {
            let larger = count.max(2 * self.numbers).next_multiple_of(64);
            (self.flags, self.numbers) = (zeros(4 * larger, stream)?, larger);
        } else if !self.settled {
            clear(self.flags, 4 * self.numbers, stream)?;
        }
        self.settled = false;
        Ok(self.flags as *mut c_void)
    }

    /// All kernels of the step have been launched.
    pub fn settle(&mut self) {
        self.settled = true;
    }
}
