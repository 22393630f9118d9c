//! Tensors at addresses that the kernels cannot use: a host may hand over device memory at any address. For the call their data
//! stands elsewhere, and what is written is copied back.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::sys::cuMemcpyDtoDAsync_v2;

use super::check;
use super::launch::Stream;
use super::scratch::{Buffer, lock};
use crate::ort::{Result, Tensor};

/// Kernels read and write outputs, and most of the state, 16 bytes at a time.
pub const WRITTEN: usize = 16;
/// Places begin at multiples of this.
const PLACE: usize = 256;

/// A tensor of a call on the device.
#[derive(Clone, Copy)]
pub struct Used {
    pub tensor: Tensor,
    /// What the address must be a multiple of.
    pub multiple: usize,
    pub written: bool,
}

struct Moved {
    address: *mut c_void,
    place: *mut c_void,
    bytes: usize,
    written: bool,
}

/// Where the tensors of a call are.
pub struct Staging<'a> {
    moved: Vec<Moved>,
    stream: Stream,
    /// The places are this call's until its last copy is launched.
    _buffer: Option<MutexGuard<'a, Buffer>>,
}

impl<'a> Staging<'a> {
    /// Copies those of the tensors that need it to places of their own, in `buffer`.
    pub fn of(used: &[Used], buffer: &'a Arc<Mutex<Buffer>>, stream: Stream) -> Result<Self> {
        let mut moved: Vec<Moved> = Vec::new();
        let mut total = 0;
        for one in used {
            let address = one.tensor.address()?;
            if address.is_null() || address.addr().is_multiple_of(one.multiple) {
                continue;
            }
            let bytes = one.tensor.bytes()?;
            moved.push(Moved {
                address,
                place: total as *mut c_void,
                bytes,
                written: one.written,
            });
            total += bytes.next_multiple_of(PLACE);
        }
        if moved.is_empty() {
            return Ok(Self {
                moved,
                stream,
                _buffer: None,
            });
        }
        let mut buffer = lock(buffer);
        let places = buffer.get(total, stream)?;
        let staging = Self {
            moved: moved
                .into_iter()
                .map(|m| Moved {
                    place: places.cast::<u8>().wrapping_add(m.place.addr()).cast(),
                    ..m
                })
                .collect(),
            stream,
            _buffer: Some(buffer),
        };
        for m in &staging.moved {
            staging.copy(m.place, m.address, m.bytes)?;
        }
        Ok(staging)
    }

    fn copy(&self, to: *mut c_void, from: *mut c_void, bytes: usize) -> Result<()> {
        // SAFETY: both are device memory of so many bytes, the tensor's and its place's, alive for the call; copies may begin at any byte.
        check("cuMemcpyDtoDAsync", unsafe {
            cuMemcpyDtoDAsync_v2(to as u64, from as u64, bytes, self.stream.raw)
        })
    }

    /// Where the kernels find a tensor's data.
    pub fn address(&self, tensor: &Tensor) -> Result<*mut c_void> {
        let address = tensor.address()?;
        let moved = self.moved.iter().find(|m| m.address == address);
        Ok(moved.map_or(address, |m| m.place))
    }

    /// Whether every tensor is where the host has it.
    pub fn is_empty(&self) -> bool {
        self.moved.is_empty()
    }

    /// Copies what the kernels have written to where the host wants it.
    pub fn write_back(&self) -> Result<()> {
        let written = self.moved.iter().filter(|m| m.written);
        written
            .into_iter()
            .try_for_each(|m| self.copy(m.address, m.place, m.bytes))
    }
}
