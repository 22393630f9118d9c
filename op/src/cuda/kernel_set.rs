//! The kernels for one element type and head size, found by name in the loaded machine code.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};
use retro_contract::StateElement;

use super::abi::{
    APPEND_THREADS, ATTEND_F32, ATTEND_HALF, ATTEND_TILE, AttendShape, BLOCK_RESERVED, CLEAR_THREADS, F32_WARPS,
    MAX_CLUSTER, MAX_GROUP, MAX_STAGES, MERGE_THREADS, PAGES_THREADS, SCORE_F32, SCORE_HALF, SCORE_SKETCH,
    SCORE_THREADS, SELECT_THREADS, SELECT_VARIABLES, SKETCH_THREADS, f32_attend_bytes, sketch_bytes,
};
use super::device::Device;
use super::launch::Kernel;
use crate::contract::Attributes;
use crate::ort::{Error, Plain, Result};
use crate::selector::Selector;

/// Whether a selector's state is made and scored by blocks of rows, instead of page by page.
pub fn is_by_block(selector: Selector) -> bool {
    selector.state_element() == StateElement::Byte
}

/// Element types that have kernels.
pub trait CudaElement: Plain + Send + Sync {
    /// As in the kernels' names.
    const NAME: &'static str;
    /// Whether attention runs on tensor cores, and ORT has a GroupQueryAttention for the type.
    const HALF: bool;
}

impl CudaElement for f32 {
    const NAME: &'static str = "f32";
    const HALF: bool = false;
}
impl CudaElement for f16 {
    const NAME: &'static str = "f16";
    const HALF: bool = true;
}
impl CudaElement for bf16 {
    const NAME: &'static str = "bf16";
    const HALF: bool = true;
}

/// A scoring kernel.
#[derive(Clone, Copy)]
pub struct Score {
    /// For every head size up to the padded one.
    pub any: Kernel,
    /// For the padded head size alone, where there is one: sketches' codes come by way of shared memory.
    pub whole: Option<Kernel>,
    pub blocks_per_sm: usize,
}

/// The attention kernel for blocks of so many rows.
#[derive(Clone, Copy)]
pub struct Attend {
    pub kernel: Kernel,
    /// Query rows (token and head) of a block.
    pub rows: usize,
    /// Bytes of shared memory.
    pub shared: usize,
    /// Bytes that it may be launched with.
    pub max_shared: usize,
    pub blocks_per_sm: usize,
    /// Of its pipeline.
    pub stages: i32,
}

/// The selection kernels.
pub struct Select {
    /// For every case.
    pub any: Kernel,
    /// For a group score, with statistics of the scoring blocks and shared memory for all pages.
    pub max: Kernel,
    pub softmax: Kernel,
    /// Bytes of shared memory that they may be launched with.
    pub shared: usize,
    /// Blocks of a cluster at most, a power of two; 1: the device has no clusters.
    pub cluster: usize,
}

/// The kernels for one element type, head size and selector.
pub struct Kernels {
    pub score: Score,
    pub select: Select,
    pub merge: Kernel,
    pub append: Kernel,
    pub pages: Kernel,
    pub clear: Kernel,
    /// In ascending order of `rows`.
    pub attend: Vec<Attend>,
    /// float16 or bfloat16.
    pub half: bool,
    /// Bytes of an element.
    pub element: usize,
    /// Head size that the kernels are unrolled for: D rounded up.
    pub padded: usize,
}

/// Bytes of stages that keep the memory busy.
const BUSY_BYTES: usize = 64 * 1024;

/// Names of `kernels/retro.cu`.
pub(super) mod name {
    use super::AttendShape;
    use crate::cuda::abi::PAGES_SHAPES;
    use crate::selector::Selector;

    /// One of an element type alone: `merge`, `append`, `clear`.
    pub fn of_type(stem: &str, element: &str) -> String {
        format!("retro_{stem}_{element}")
    }

    pub fn score(element: &str, padded: usize, selector: Selector) -> String {
        format!("retro_score_{element}_{padded}_{selector}")
    }

    /// Of the padded head size alone.
    pub fn score_sketch(element: &str, padded: usize, bits: usize) -> String {
        format!("retro_score_{element}_{padded}_sketch{bits}")
    }

    pub fn attend(element: &str, shape: &AttendShape) -> String {
        format!("retro_attend_{element}_{}_{}", shape.padded, shape.rows)
    }

    pub fn pages(element: &str, padded: usize, selector: Selector) -> String {
        let largest = PAGES_SHAPES.iter().map(|(parts, _)| 128 * parts);
        let largest = largest.into_iter().find(|&largest| padded <= largest).unwrap_or(padded);
        format!("retro_pages_{element}_{largest}_{selector}")
    }

    /// `variant` is empty, `_max` or `_softmax`.
    pub fn select(variant: &str) -> String {
        format!("retro_select{variant}")
    }
}

/// Every kernel that some node looks up.
#[cfg(all(test, not(retro_fatbin)))]
pub(super) fn names() -> Vec<String> {
    let mut names: Vec<String> = ["", "_max", "_softmax"].map(name::select).into();
    for (element, shapes) in [("f32", &ATTEND_F32[..]), ("f16", &ATTEND_HALF), ("bf16", &ATTEND_HALF)] {
        names.extend(["merge", "append", "clear"].map(|stem| name::of_type(stem, element)));
        names.extend(shapes.iter().map(|shape| name::attend(element, shape)));
        for &selector in Selector::ALL.iter().filter(|s| super::abi::has_kernels(**s)) {
            for padded in super::abi::HEAD_SIZES {
                names.extend([
                    name::score(element, padded, selector),
                    name::pages(element, padded, selector),
                ]);
            }
        }
        for padded in super::abi::HEAD_SIZES {
            names.extend([1, 2].map(|bits| name::score_sketch(element, padded, bits)));
        }
    }
    names.extend(super::matmul_kernels::names());
    names
}

/// Ordinal of the device, element type, head size, name of the selector and bits of a sketch.
type KernelsKey = (usize, &'static str, usize, &'static str, usize);

/// The kernels of `kernels/retro.cu` for a head size and selector. They are looked up for the first node that asks, and
/// stay for good, as devices do.
pub fn find<E: CudaElement>(device: &Device, padded: usize, attributes: &Attributes) -> Result<Arc<Kernels>> {
    static FOUND: Mutex<BTreeMap<KernelsKey, Arc<Kernels>>> = Mutex::new(BTreeMap::new());
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    let (selector, bits) = (attributes.selector, attributes.sketch_bits);
    let key = (device.ordinal, E::NAME, padded, selector.as_str(), bits);
    if let Some(kernels) = found.get(&key) {
        return Ok(kernels.clone());
    }
    let kernels = Arc::new(look_up::<E>(device, padded, selector, bits)?);
    found.insert(key, kernels.clone());
    Ok(kernels)
}

fn look_up<E: CudaElement>(device: &Device, padded: usize, selector: Selector, bits: usize) -> Result<Kernels> {
    let finder = Finder {
        device,
        element: E::NAME,
        padded,
    };
    let shapes = if E::HALF { &ATTEND_HALF[..] } else { &ATTEND_F32 };
    let attend = shapes.iter().filter(|shape| shape.padded == padded);
    let attend = attend.map(|shape| {
        if E::HALF {
            finder.attend(shape)
        } else {
            finder.attend_f32(shape)
        }
    });
    let shapes = match selector {
        Selector::Sketch => &SCORE_SKETCH,
        _ if E::HALF => &SCORE_HALF,
        _ => &SCORE_F32,
    };
    let blocks_per_sm = shapes
        .iter()
        .find(|s| s.padded == padded)
        .map_or(1, |s| s.blocks_per_sm);
    let of_type = |stem: &str, threads: usize| finder.kernel(name::of_type(stem, E::NAME), threads);
    Ok(Kernels {
        score: Score {
            any: finder.kernel(name::score(E::NAME, padded, selector), SCORE_THREADS)?,
            whole: match selector {
                Selector::Sketch => finder.score_sketch(bits)?,
                _ => None,
            },
            blocks_per_sm,
        },
        select: finder.select()?,
        merge: of_type("merge", MERGE_THREADS)?,
        append: of_type("append", APPEND_THREADS)?,
        pages: finder.kernel(
            name::pages(E::NAME, padded, selector),
            if is_by_block(selector) {
                SKETCH_THREADS
            } else {
                PAGES_THREADS
            },
        )?,
        clear: of_type("clear", CLEAR_THREADS)?,
        attend: attend.collect::<Result<_>>()?,
        half: E::HALF,
        element: size_of::<E>(),
        padded,
    })
}

struct Finder<'a> {
    device: &'a Device,
    element: &'static str,
    padded: usize,
}

impl Finder<'_> {
    fn kernel(&self, name: String, threads: usize) -> Result<Kernel> {
        self.device.kernel(name, threads)
    }

    /// The scoring kernel for sketches of one head size, where a multiprocessor has the shared memory that it needs.
    fn score_sketch(&self, bits: usize) -> Result<Option<Kernel>> {
        let bytes = sketch_bytes(MAX_GROUP, self.padded, bits);
        if bytes + BLOCK_RESERVED > self.device.shared_per_sm {
            return Ok(None);
        }
        let kernel = self.kernel(name::score_sketch(self.element, self.padded, bits), SCORE_THREADS)?;
        self.device.allow_shared(&kernel, bytes)?;
        Ok(Some(kernel))
    }

    fn attend_kernel(&self, shape: &AttendShape, threads: usize) -> Result<Kernel> {
        self.kernel(name::attend(self.element, shape), threads)
    }

    fn attend_f32(&self, shape: &AttendShape) -> Result<Attend> {
        let shared = f32_attend_bytes(shape.rows, shape.padded, F32_WARPS, ATTEND_TILE);
        Ok(Attend {
            kernel: self.attend_kernel(shape, 32 * F32_WARPS)?,
            rows: shape.rows,
            shared,
            max_shared: shared,
            blocks_per_sm: shape.blocks_per_sm,
            stages: 0,
        })
    }

    /// Two blocks a multiprocessor, so that one works while the other waits. Not more of the ring than keeps the memory busy:
    /// whatever else is read then, by a block that starts late, waits behind it.
    fn attend(&self, shape: &AttendShape) -> Result<Attend> {
        let device = self.device;
        let (stage, beside) = (shape.stage_bytes(), shape.beside_bytes());
        let fit = |stages: usize| {
            let shared = stages * stage + beside;
            let blocks = (device.shared_per_sm / (shared + BLOCK_RESERVED)).min(shape.blocks_per_sm);
            (stages, shared, blocks)
        };
        let deepest = (BUSY_BYTES / stage).clamp(2, MAX_STAGES);
        let fits: Vec<_> = (2..=deepest).rev().map(fit).collect();
        let best = fits.iter().find(|f| f.2 >= 2).or(fits.iter().find(|f| f.2 >= 1));
        let &(stages, shared, blocks_per_sm) = best.ok_or_else(|| {
            Error::runtime(format!(
                "the CUDA device has {} bytes of shared memory, head size {} needs {}",
                device.shared_per_sm,
                self.padded,
                2 * stage + beside
            ))
        })?;
        let kernel = self.attend_kernel(shape, shape.threads())?;
        let max_shared = shared.max(device.shared_per_sm / 2 - BLOCK_RESERVED);
        device.allow_shared(&kernel, max_shared)?;
        Ok(Attend {
            kernel,
            rows: shape.rows,
            shared,
            max_shared,
            blocks_per_sm,
            stages: stages as i32,
        })
    }

    fn select(&self) -> Result<Select> {
        let shared = self.device.shared_per_sm.saturating_sub(SELECT_VARIABLES);
        let variant = |suffix: &str| {
            let kernel = self.kernel(name::select(suffix), SELECT_THREADS)?;
            self.device.allow_shared(&kernel, shared)?;
            Ok(kernel)
        };
        let any = variant("")?;
        Ok(Select {
            any,
            max: variant("_max")?,
            softmax: variant("_softmax")?,
            shared,
            cluster: self.device.largest_cluster(&any, shared)?.min(MAX_CLUSTER),
        })
    }
}
