//! Random contents for buffers of many gigabytes: one chunk is made on the host and repeated on the device.

use anyhow::{Context, Result};
use half::{bf16, f16};
use rand::{SeedableRng, rngs::StdRng};
use retro_onnx::DataType;
use retro_run::{bench::synthetic_cache::normal, decoder::device_buffers::DeviceBuffer};

/// Length of the repeated chunk. A prime, so that repetitions are not aligned with rows or pages.
const CHUNK: usize = 8_388_593;

pub fn bytes_of(dtype: DataType) -> usize {
    if dtype == DataType::Float { 4 } else { 2 }
}

/// Numbers as little-endian elements of this type.
pub fn encode(dtype: DataType, numbers: &[f32]) -> Vec<u8> {
    match dtype {
        DataType::Float => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DataType::Bfloat16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
    }
}

fn chunk(seed: u64, count: usize) -> Vec<f32> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut numbers = vec![0.0f32; count];
    let part = count.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (i, numbers) in numbers.chunks_mut(part).enumerate() {
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(seed ^ (i as u64) << 32);
                numbers.fill_with(|| normal(&mut random));
            });
        }
    });
    numbers
}

/// Repeats `bytes` over `length` bytes from `offset` on.
pub fn tile(buffer: &DeviceBuffer, offset: usize, length: usize, bytes: &[u8]) -> Result<()> {
    let first = bytes.get(..length.min(bytes.len())).context("a chunk")?;
    buffer.write(offset, first)?;
    let mut at = first.len();
    while at < length {
        let count = bytes.len().min(length - at);
        buffer.copy(offset + at, offset, count)?;
        at += count;
    }
    Ok(())
}

/// Random keys, values and queries.
pub fn normals(buffer: &DeviceBuffer, offset: usize, length: usize, dtype: DataType) -> Result<()> {
    let count = CHUNK.min(length / bytes_of(dtype));
    tile(buffer, offset, length, &encode(dtype, &chunk(1, count)))
}
