//! The operator on CUDA as ORT runs it.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use half::{bf16, f16};
use retro_contract::{input, output};

use super::abi::{MAX_RAGGED, Params};
use super::device::Device;
use super::launch::{Kernel, Stream};
use super::launch_plan::{Attend, Call, Kernels, Score, Select, params};
use super::scratch::lock;
use super::staging::{Staging, Used, WRITTEN};
use crate::contract::{Attributes, Dims, Phase};
use crate::gqa_fallback::GqaFallback;
use crate::io_spec::{self, Operands, STATE};
use crate::ort::{Context, Elements, Error, Info, Operator, Plain, Port, Result, ShapeContext, Tensor, require};

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

/// `ai.retro::RetroAttention` on CUDA for element type `E`.
pub struct CudaOperator<E>(PhantomData<E>);

/// One node of one session.
pub struct CudaKernel {
    attributes: Attributes,
    fallback: Option<GqaFallback>,
    device: Arc<Device>,
    /// For head sizes up to 64, 128 and 256.
    kernels: [Arc<Kernels>; 3],
}

/// Query heads a KV head that the kernels take.
const MAX_GROUP: usize = 16;
/// Head sizes that the kernels are unrolled for.
const HEAD_SIZES: [usize; 3] = [64, 128, 256];

/// Finds the kernels of `kernels/retro.cu` for a head size: once a device, so that their names may stay for good.
fn find<E: CudaElement>(device: &Device, padded: usize) -> Result<Kernels> {
    let find = |name: String, threads: u32| -> Result<Kernel> {
        let function = device.function(&name)?;
        Ok(Kernel {
            name: name.leak(),
            function,
            threads,
        })
    };
    let of = |stem: &str| format!("retro_{stem}_{}", E::NAME);
    // Rows of a block, and how many blocks of it a multiprocessor's registers hold: retro.cu.
    let variants: &[(usize, usize)] = match (E::HALF, padded) {
        (false, 256) => &[(8, 2)],
        (false, _) => &[(8, 3)],
        (true, 64) => &[(8, 4), (16, 3), (32, 3)],
        (true, 128) => &[(16, 2), (32, 2)],
        (true, _) => &[(16, 2), (32, 1)],
    };
    let attend = variants.iter().map(|&(rows, blocks_per_sm)| {
        // struct Shape of attend.cuh: 8 rows a warp, one, two or four times over.
        let token_groups = if rows == 32 { 2 } else { 4 } / if padded > 128 { 2 } else { 1 };
        let threads = if E::HALF { 32 * rows / 8 * token_groups } else { 128 };
        let kernel = find(format!("{}_{padded}_{rows}", of("attend")), threads as u32)?;
        if !E::HALF {
            // struct Shared of attend_f32.
            let block = 4 * rows * 2 * 4 + 4 * rows * (padded + 4) * 4;
            let shared = rows * padded * 4 + 4 * 16 * rows * 4 + block;
            return Ok(Attend {
                kernel,
                rows,
                shared,
                max_shared: shared,
                blocks_per_sm,
                stages: 0,
            });
        }
        // Its struct Shared. Two blocks a multiprocessor, so that one works while the other waits. Not more of the ring than keeps the
        // memory busy: whatever else is read then, by a block that starts late, waits behind it.
        let tokens = if padded > 128 { 32 } else { 64 };
        let stage = 2 * tokens * padded * 2;
        let beside = 5 * (tokens / 8) * 8 + rows * (padded + 8) * 2;
        let fit = |stages: usize| {
            let shared = stages * stage + beside;
            let blocks = (device.shared_per_sm / (shared + 1024)).min(blocks_per_sm);
            (stages, shared, blocks)
        };
        let deepest = (64 * 1024 / stage).clamp(2, 4);
        let fits: Vec<_> = (2..=deepest).rev().map(fit).collect();
        let best = fits.iter().find(|f| f.2 >= 2).or(fits.iter().find(|f| f.2 >= 1));
        let &(stages, shared, blocks_per_sm) = best.ok_or_else(|| {
            Error::runtime(format!(
                "the CUDA device has {} bytes of shared memory, head size {padded} needs {}",
                device.shared_per_sm,
                2 * stage + beside
            ))
        })?;
        let max_shared = shared.max(device.shared_per_sm / 2 - 1024);
        device.allow_shared(&kernel, max_shared)?;
        Ok(Attend {
            kernel,
            rows,
            shared,
            max_shared,
            blocks_per_sm,
            stages: stages as i32,
        })
    });
    // Blocks that a multiprocessor holds: the kernels' launch bounds, in retro.cu.
    let score = |selector: &str| {
        let suffix = if E::HALF { format!("_{selector}") } else { String::new() };
        let blocks_per_sm = match (E::HALF, padded) {
            (true, 64) => 3,
            (_, 256) => 1,
            _ => 2,
        };
        Ok(Score {
            kernel: find(format!("{}_{padded}{suffix}", of("score")), 256)?,
            blocks_per_sm,
        })
    };
    // Beside its variables and what every block takes.
    let shared = device.shared_per_sm.saturating_sub(24 * 1024);
    let select = |suffix: &str| {
        let kernel = find(format!("retro_select{suffix}"), 512)?;
        device.allow_shared(&kernel, shared)?;
        Ok(kernel)
    };
    Ok(Kernels {
        score: [score("bounds")?, score("moments")?],
        select: Select {
            any: select("")?,
            max: select("_max")?,
            softmax: select("_softmax")?,
            shared,
        },
        merge: find(of("merge"), 256)?,
        append: find(of("append"), 128)?,
        pages: find(format!("{}_{}", of("pages"), padded.max(128)), 128)?,
        clear: find(of("clear"), 128)?,
        attend: attend.collect::<Result<_>>()?,
        half: E::HALF,
        element: size_of::<E>(),
        padded,
    })
}

impl<E: CudaElement> Operator for CudaOperator<E> {
    const NAME: &'static CStr = c"RetroAttention";
    const PROVIDER: Option<&'static CStr> = Some(c"CUDAExecutionProvider");
    const INPUTS: &'static [Port] = &io_spec::inputs(E::DATA_TYPE);
    const OUTPUTS: &'static [Port] = &io_spec::outputs(E::DATA_TYPE);
    const IN_PLACE: &'static [(usize, usize)] = &STATE;
    type Kernel = CudaKernel;

    fn create(info: &Info) -> Result<CudaKernel> {
        let attributes = Attributes::read(info)?;
        let group = attributes.heads / attributes.kv_heads;
        require!(
            group <= MAX_GROUP,
            "attributes num_heads and kv_num_heads give {group} query heads a KV head, on CUDA at most {MAX_GROUP}"
        );
        let device = Device::get(info.device()?)?;
        let fallback = if E::HALF {
            GqaFallback::new(info, &attributes, E::DATA_TYPE)?
        } else {
            None
        };
        let [small, middle, large] = HEAD_SIZES;
        Ok(CudaKernel {
            attributes,
            fallback,
            kernels: [
                device.kernels(E::NAME, small, || find::<E>(&device, small))?,
                device.kernels(E::NAME, middle, || find::<E>(&device, middle))?,
                device.kernels(E::NAME, large, || find::<E>(&device, large))?,
            ],
            device,
        })
    }

    fn compute(kernel: &CudaKernel, context: &Context) -> Result<()> {
        kernel.compute::<E>(context)
    }

    fn infer(shapes: &ShapeContext) -> Result<()> {
        io_spec::infer(shapes)
    }
}

fn in_sixteens(address: *const c_void) -> bool {
    address.addr().is_multiple_of(16)
}

impl CudaKernel {
    fn compute<E: CudaElement>(&self, context: &Context) -> Result<()> {
        let attributes = &self.attributes;
        let operands = Operands::read(context)?;
        let Operands { tensors, shapes } = &operands;
        let dims = Dims::read(attributes, shapes)?;
        let d = dims.head_size;
        let [_, _, largest] = HEAD_SIZES;
        require!(
            d.is_multiple_of(8) && d <= largest,
            "input past_key has head size {d}, on CUDA a multiple of 8 up to {largest} is expected"
        );
        let kernels = HEAD_SIZES
            .iter()
            .position(|&size| d <= size)
            .and_then(|i| self.kernels.get(i))
            .ok_or_else(|| Error::runtime("no kernel for this head size"))?;
        let required = |slot: usize| operands.required(slot);

        // SAFETY: these two inputs are declared to lie in host memory, and ORT does not write them while the kernel runs.
        let (retro, total) = unsafe {
            (
                Elements::of(&required(input::RETRO_LENGTH)?)?,
                Elements::of(&required(input::TOTAL_SEQUENCE_LENGTH)?)?,
            )
        };
        // SAFETY: as above.
        let (retro, total) = unsafe { (retro.slice::<i32>()?, total.slice::<i32>()?[0]) };
        require!(
            total >= 1,
            "input total_sequence_length is {total}, expected at least 1"
        );
        let phase = Phase::of_call(attributes.window, dims.tokens, retro, total == 1)?;
        let total = (total as usize).min(dims.capacity);
        if phase == Phase::Decode {
            require!(
                dims.tokens <= total,
                "input retro_length is {}, but total_sequence_length is {total}",
                dims.tokens - 1
            );
        }
        let mut p = params(attributes, &dims, phase, total);
        if retro.len() > 1 {
            require!(
                retro.len() <= MAX_RAGGED,
                "input retro_length has one number for each of {} sequences, on CUDA at most {MAX_RAGGED} is expected",
                retro.len()
            );
            p.ragged = 1;
        }
        for (r, &given) in p.retro.iter_mut().zip(retro) {
            *r = given.max(0) as u8;
        }

        p.budget_stride = i32::from(
            shapes[input::PAGE_BUDGET]
                .as_ref()
                .is_some_and(|s| *s == [dims.batch as i64]),
        );

        // Everything that the host can see is checked: from here on outputs are written.
        self.device.make_current()?;
        let stream = Stream {
            raw: context.stream()?.cast(),
            overlaps: self.device.overlaps,
            sets_carveout: self.device.sets_carveout,
        };
        let width = (attributes.heads * d) as i64;
        let result = context.output(output::OUTPUT, &[dims.batch as i64, dims.tokens as i64, width])?;
        let mut presents = [result; STATE.len()];
        for ((past, present), slot) in STATE.into_iter().zip(&mut presents) {
            *slot = context.output(present, shapes[past].as_deref().unwrap_or_default())?;
            stream.copy(slot, &required(past)?)?;
        }
        let staged = self.device.staged.of_stream(stream.raw.addr());
        let staging = Staging::of(&self.used::<E>(&operands, result, presents), &staged, stream)?;
        self.set_addresses::<E>(&mut p, &operands, &dims, &staging)?;
        p.output = staging.address(&result)?;
        let state = |i: usize| staging.address(&presents[i]);
        p.key_cache = state(0)?;
        p.value_cache = state(1)?;
        p.summary = state(2)?;
        p.page_steps = state(3)?;
        p.cached_outputs = state(4)?;
        p.cached_lse = state(5)?;

        let call = Call {
            stream,
            kernels,
            multiprocessors: self.device.multiprocessors,
            shared_per_sm: self.device.shared_per_sm,
            attributes,
            dims: &dims,
            has_page_budget: tensors[input::PAGE_BUDGET].is_some(),
        };
        let buffer = self.device.scratch.of_stream(stream.raw.addr());
        if phase == Phase::Decode {
            call.decode(&mut p, &mut lock(&buffer))?;
            return staging.write_back();
        }
        // ORT's kernels read 16 bytes at a time, too.
        let rows = [p.query, p.key, p.value, p.cos, p.sin];
        let aligned = staging.is_empty() && rows.into_iter().all(in_sixteens);
        let fallback = self
            .fallback
            .as_ref()
            .filter(|_| aligned && fallback_applies(&dims, total, tensors[input::HEAD_SINK].is_some()));
        if let Some(fallback) = fallback {
            call.before_fallback(&p)?;
            let total = required(input::TOTAL_SEQUENCE_LENGTH)?;
            fallback.run(context, &operands, total, result, [presents[0], presents[1]])?;
        }
        call.prefill(&mut p, &mut lock(&buffer), fallback.is_some())?;
        staging.write_back()
    }

    /// The tensors that the kernels read and write, and the addresses that they need.
    fn used<E: CudaElement>(&self, operands: &Operands, result: Tensor, presents: [Tensor; STATE.len()]) -> Vec<Used> {
        let read = |slot: usize, multiple: usize| {
            operands.tensors[slot].map(|tensor| Used {
                tensor,
                multiple,
                written: false,
            })
        };
        let elements = [
            input::QUERY,
            input::KEY,
            input::VALUE,
            input::COS_CACHE,
            input::SIN_CACHE,
            input::HEAD_SINK,
        ];
        let elements = elements.iter().filter_map(|&slot| read(slot, size_of::<E>()));
        let numbers = [input::SEQLENS_K, input::PAGE_BUDGET];
        let numbers = numbers.iter().filter_map(|&slot| read(slot, size_of::<i32>()));
        let written = [result].into_iter().chain(presents).map(|tensor| Used {
            tensor,
            multiple: WRITTEN,
            written: true,
        });
        elements.chain(numbers).chain(written).collect()
    }

    /// Where the inputs that are no state are, and whether their rows can be read 16 bytes at a time.
    fn set_addresses<E: CudaElement>(
        &self,
        p: &mut Params,
        operands: &Operands,
        dims: &Dims,
        staging: &Staging<'_>,
    ) -> Result<()> {
        let (attributes, d) = (&self.attributes, dims.head_size);
        let address = |slot: usize| operands.tensors[slot].map_or(Ok(std::ptr::null_mut()), |t| staging.address(&t));
        p.query = address(input::QUERY)?;
        if dims.packed {
            let size = size_of::<E>();
            let behind = |heads: usize| p.query.cast::<u8>().wrapping_add(heads * d * size).cast();
            p.key = behind(attributes.heads);
            p.value = behind(attributes.heads + attributes.kv_heads);
        } else {
            p.key = address(input::KEY)?;
            p.value = address(input::VALUE)?;
        }
        p.seqlens_k = address(input::SEQLENS_K)?;
        p.page_budget = address(input::PAGE_BUDGET)?;
        if attributes.do_rotary {
            p.cos = address(input::COS_CACHE)?;
            p.sin = address(input::SIN_CACHE)?;
        }
        p.head_sink = address(input::HEAD_SINK)?;
        let rotates_halves = !attributes.rotary_interleaved && dims.rotary_half.is_multiple_of(8);
        let vec8 = [p.query, p.key, p.value].into_iter().all(in_sixteens)
            && (!attributes.do_rotary || (rotates_halves && in_sixteens(p.cos) && in_sixteens(p.sin)));
        p.vec8 = i32::from(vec8);
        Ok(())
    }
}

/// Whether ORT's own operator computes what our contract asks for in this prefill. The lengths are on the device, so a batch
/// of several sequences, which may be ragged, is ours; as is a head sink.
fn fallback_applies(dims: &Dims, total: usize, has_head_sink: bool) -> bool {
    let shapes = dims.head_size.is_multiple_of(16) && dims.rotary_half.is_multiple_of(8);
    dims.batch == 1 && dims.tokens <= total && !has_head_sink && shapes
}
