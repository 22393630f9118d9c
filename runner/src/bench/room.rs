//! Whether caches fit in the memory that is free, so that a benchmark says so before it begins.

use super::{Error, Result};
use crate::{Device, decoder::model::Model};

const GIB: f64 = (1u64 << 30) as f64;

/// Checks that there is room for so many bytes of caches on a model's device. Where nothing says how much is free, it is
/// believed.
///
/// # Errors
/// When there is not.
pub fn require_room(model: &Model, bytes: usize) -> Result<()> {
    let free = match model.device() {
        Device::Cpu => free_on_host(),
        Device::Cuda(_) => model.free_gpu_memory()?,
    };
    match free.filter(|free| bytes > *free) {
        Some(free) => Err(Error::Room {
            device: model.device(),
            needed: bytes as f64 / GIB,
            free: free as f64 / GIB,
        }),
        None => Ok(()),
    }
}

/// Bytes that the system can give without swapping.
fn free_on_host() -> Option<usize> {
    available(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_linux_says_is_read() {
        let text = "MemTotal:       16000 kB\nMemFree:  1 kB\nMemAvailable:    8000 kB\n";
        assert_eq!(available(text), Some(8_192_000));
        for other in ["", "MemAvailable:", "MemAvailable: x kB"] {
            assert_eq!(available(other), None, "{other}");
        }
    }
}
