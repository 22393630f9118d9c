//! The kernels of `ai.retro::MatMulNBits`, and how wide a launch is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::abi::BLOCK_RESERVED;
use super::device::Device;
use super::kernel_set::{CudaElement, name};
use super::launch::Kernel;
use super::matmul_abi::{
    MATMUL_COLUMNS, MATMUL_PIECES, MATMUL_ROW_THREADS, MATMUL_ROWS, MATMUL_THREADS, MatmulParams, ZeroPoints,
    matmul_a_stride, matmul_chunk_depth, matmul_piece_depth, matmul_slot_bytes, matmul_sums_bytes,
};
use crate::matmul_nbits::Attributes;
use crate::ort::{Error, Result};

/// The kernels for one type, bits, block size and kind of zero points.
pub struct MatmulKernels {
    /// For up to 8 rows, and for up to 16 at once.
    pub few: [Kernel; 2],
    pub dequantise: Kernel,
    pub add_bias: Kernel,
}

/// The name in `kernels/retro.cu` of a kernel for few rows.
fn name_of_few(element: &str, bits: usize, halves: bool, zeros: bool, rows: usize) -> String {
    let halves = if halves { "_halves" } else { "" };
    let zeros = if zeros { "_zeros" } else { "" };
    format!("retro_matmul{bits}{halves}_{element}{zeros}_{rows}")
}

/// Rows of A that the two kernels take at once.
const ROWS: [usize; 2] = [MATMUL_ROWS / 2, MATMUL_ROWS];

/// Every kernel that some node looks up.
#[cfg(all(test, not(retro_fatbin)))]
pub(super) fn names() -> Vec<String> {
    let mut names = Vec::new();
    for element in ["f16", "bf16"] {
        names.extend(["dequantise_weights", "add_bias"].map(|stem| name::of_type(stem, element)));
        for (bits, halves) in [(4, false), (4, true), (8, false)] {
            for zeros in [false, true] {
                names.extend(ROWS.map(|rows| name_of_few(element, bits, halves, zeros, rows)));
            }
        }
    }
    names
}

/// Whether 16 bytes of a row of weights hold two blocks.
fn has_halves(attributes: &Attributes) -> bool {
    attributes.block_size < matmul_piece_depth(attributes.bits)
}

/// Ordinal of the device, element type, bits, whether blocks are halves and whether there are zero points.
type KernelsKey = (usize, &'static str, usize, bool, bool);

/// The kernels for a node. They are looked up for the first node that asks, and stay for good, as devices do.
pub fn find<E: CudaElement>(device: &Device, attributes: &Attributes, zeros: bool) -> Result<Arc<MatmulKernels>> {
    static FOUND: Mutex<BTreeMap<KernelsKey, Arc<MatmulKernels>>> = Mutex::new(BTreeMap::new());
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    let (bits, halves) = (attributes.bits, has_halves(attributes));
    let key = (device.ordinal, E::NAME, bits, halves, zeros);
    if let Some(kernels) = found.get(&key) {
        return Ok(kernels.clone());
    }
    let few = |rows: usize| -> Result<Kernel> {
        let kernel = device.kernel(name_of_few(E::NAME, bits, halves, zeros, rows), MATMUL_THREADS)?;
        device.allow_shared(&kernel, block_bytes(device))?;
        Ok(kernel)
    };
    let [eight, sixteen] = ROWS;
    let kernels = Arc::new(MatmulKernels {
        few: [few(eight)?, few(sixteen)?],
        dequantise: device.kernel(name::of_type("dequantise_weights", E::NAME), MATMUL_ROW_THREADS)?,
        add_bias: device.kernel(name::of_type("add_bias", E::NAME), MATMUL_ROW_THREADS)?,
    });
    found.insert(key, kernels.clone());
    Ok(kernels)
}

/// Shared memory that a block may have.
fn block_bytes(device: &Device) -> usize {
    device.shared_per_sm.saturating_sub(BLOCK_RESERVED)
}

/// Copies of 16 bytes that hold any chunk's `bytes` of a row, where rows are `stride` bytes apart.
fn copies(stride: usize, bytes: usize) -> usize {
    let in_place = stride.is_multiple_of(16) && (bytes.is_multiple_of(16) || 16usize.is_multiple_of(bytes));
    if in_place {
        bytes.div_ceil(16)
    } else {
        // Elements of a byte may begin at the last of 16.
        (bytes + 14) / 16 + 1
    }
}

/// Whether the kernels for few rows can read a node's weights.
pub fn reads_packed(attributes: &Attributes) -> bool {
    let a = attributes;
    // Rows of weights and of A are read 16 bytes at a time; offsets of scales have 32 bits.
    let offsets = 2 * a.n as u64 * a.blocks() as u64;
    a.k.is_multiple_of(matmul_piece_depth(a.bits)) && a.n >= MATMUL_COLUMNS && i32::try_from(offsets).is_ok()
}

/// What the parameters of a node's products have in common: all but addresses, rows, and what a launch needs.
pub fn node_params(attributes: &Attributes, zero_points: ZeroPoints) -> Result<MatmulParams> {
    let a = attributes;
    let blocks = a.blocks();
    let (piece, chunk) = (matmul_piece_depth(a.bits), matmul_chunk_depth(a.bits));
    let chunk_blocks = (chunk / a.block_size).max(1);
    let (zero_stride, zero_copies) = match zero_points {
        ZeroPoints::None => (0, 0),
        ZeroPoints::Packed => {
            let stride = a.zero_point_bytes();
            (stride, copies(stride, (chunk_blocks * a.bits).div_ceil(8)))
        }
        ZeroPoints::Float => (2 * blocks, copies(2 * blocks, 2 * chunk_blocks)),
    };
    let number =
        |x: usize| i32::try_from(x).map_err(|_| Error::invalid(format!("a size of the weights is {x}, too large")));
    Ok(MatmulParams {
        scale_bytes: (2 * a.n * blocks) as u32,
        zero_bytes: (a.n * zero_stride) as u32,
        k: number(a.k)?,
        n: number(a.n)?,
        bits: number(a.bits)?,
        block_size: number(a.block_size)?,
        blocks: number(blocks)?,
        b_stride: number(blocks * a.block_bytes())?,
        zero_stride: number(zero_stride)?,
        zero_points,
        block_shift: (a.block_size / piece).max(1).ilog2() as i32,
        scale_copies: number(copies(2 * blocks, 2 * chunk_blocks))?,
        zero_copies: number(zero_copies)?,
        chunks: number(a.k.div_ceil(chunk))?,
        regular: i32::from(a.block_size == piece && a.k.is_multiple_of(chunk) && chunk_blocks == MATMUL_PIECES),
        ..MatmulParams::default()
    })
}

/// A launch: the kernel with its threads, the grid, and bytes of shared memory.
pub struct MatmulLaunch {
    pub kernel: Kernel,
    pub grid: [usize; 3],
    pub shared: usize,
}

/// Rows up to which a warp has room for two chunks of A. Beyond, where every multiprocessor has several thread blocks, one
/// more of them is worth more than the copy that a second chunk hides.
const TWO_SLOTS_ROWS: usize = 4;

/// How `rows` rows are multiplied; sets what it needs of the parameters.
pub fn launch(device: &Device, kernels: &MatmulKernels, rows: usize, p: &mut MatmulParams) -> MatmulLaunch {
    let (bits, columns) = (p.bits as usize, (p.n as usize).div_ceil(MATMUL_COLUMNS));
    let at_once = rows.min(MATMUL_ROWS);
    let [few, more] = kernels.few;
    let [eight, sixteen] = ROWS;
    let (kernel, tile_rows) = if at_once <= eight {
        (few, eight)
    } else {
        (more, sixteen)
    };
    let slot = matmul_slot_bytes((p.scale_copies + p.zero_copies) as usize);
    let a_bytes = at_once * matmul_a_stride(bits);
    let blocks_a_multiprocessor = columns.div_ceil(device.multiprocessors);
    let a_slots = if at_once <= TWO_SLOTS_ROWS || blocks_a_multiprocessor == 1 {
        2
    } else {
        1
    };
    let warp = (2 * slot + a_slots * a_bytes).max(matmul_sums_bytes(tile_rows));
    // Enough warps to keep the memory busy on every multiprocessor, in one wave of thread blocks where that is possible.
    let mut warps = match blocks_a_multiprocessor {
        0 | 1 => MATMUL_THREADS / 32,
        2 => MATMUL_THREADS / 64,
        _ => MATMUL_THREADS / 128,
    };
    while warps > 1 && warps * warp > block_bytes(device) {
        warps /= 2;
    }
    let warps = warps.min(p.chunks as usize).max(1);
    p.rows = rows as i32;
    p.warp_bytes = warp as i32;
    p.slot_bytes = slot as i32;
    p.a_bytes = a_bytes as i32;
    p.a_slots = a_slots as i32;
    MatmulLaunch {
        kernel: Kernel {
            threads: 32 * warps as u32,
            ..kernel
        },
        grid: [columns, rows.div_ceil(MATMUL_ROWS), 1],
        shared: warps * warp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows begin where the one before ends, chunks where the one before ends: what a row has of any of them lies within so
    /// many 16 bytes, from those in which it begins.
    #[test]
    fn copies_hold_what_a_row_has_of_a_chunk() {
        for stride in 1..100 {
            for bytes in [1, 2, 4, 8, 16, 32] {
                let most = (0..20usize).flat_map(|row| (0..stride).step_by(bytes).map(move |at| row * stride + at));
                let most = most
                    .map(|start| (start % 16 + bytes.min(stride)).div_ceil(16))
                    .max()
                    .unwrap();
                let copies = copies(stride, bytes);
                assert!(
                    copies >= most && copies <= bytes.div_ceil(16) + 1,
                    "{stride} {bytes}: {copies} for {most}"
                );
            }
        }
    }

    #[test]
    fn regular_are_blocks_of_a_piece_in_whole_chunks() {
        let regular = |k, bits, block_size| {
            let attributes = Attributes {
                k,
                n: 64,
                bits,
                block_size,
                accuracy_level: 0,
            };
            node_params(&attributes, ZeroPoints::None).unwrap().regular == 1
        };
        assert!(regular(4096, 4, 32) && regular(256, 4, 32) && regular(4096, 8, 16));
        for (k, bits, block_size) in [(4096 + 32, 4, 32), (4096, 4, 16), (4096, 4, 64), (4096, 8, 32)] {
            assert!(!regular(k, bits, block_size), "{k} {bits} {block_size}");
        }
    }
}
