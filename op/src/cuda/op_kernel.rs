//! The operator on CUDA as ORT runs it.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use retro_contract::{STATE, input, output};
use smallvec::SmallVec;

use super::abi::{CallPhase, HEAD_SIZES, MAX_GROUP, MAX_RAGGED, Params, has_kernels};
use super::device::Device;
use super::kernel_set::{CudaElement, Kernels, find};
use super::launch_plan::{LaunchPlan, params};
use super::scratch::lock;
use super::staging::{Staging, Used, WRITTEN};
use crate::contract::{Attributes, Dims, Phase};
use crate::gqa_fallback::GqaFallback;
use crate::io_spec::{self, Operands};
use crate::ort::{Context, Elements, Error, Info, Operator, Plain, Port, Result, ShapeContext, Tensor, require};

/// `ai.retro::RetroAttention` on CUDA for caches of element type `E` and selector state of type `S`.
pub struct CudaOperator<E, S = E>(PhantomData<(E, S)>);

/// One node of one session.
pub struct CudaKernel {
    attributes: Attributes,
    fallback: Option<GqaFallback>,
    device: Arc<Device>,
    /// For head sizes up to 64, 128 and 256.
    kernels: [Arc<Kernels>; 3],
}

impl<E: CudaElement, S: Plain> Operator for CudaOperator<E, S> {
    const NAME: &'static CStr = c"RetroAttention";
    const PROVIDER: Option<&'static CStr> = Some(c"CUDAExecutionProvider");
    const INPUTS: &'static [Port] = &io_spec::inputs(E::DATA_TYPE, S::DATA_TYPE);
    const OUTPUTS: &'static [Port] = &io_spec::outputs(E::DATA_TYPE, S::DATA_TYPE);
    const IN_PLACE: &'static [(usize, usize)] = &STATE;
    type Kernel = CudaKernel;

    fn create(info: &Info) -> Result<CudaKernel> {
        let attributes = Attributes::read(info)?;
        let selector = attributes.selector;
        io_spec::check_state_type(selector, E::DATA_TYPE, S::DATA_TYPE)?;
        require!(
            has_kernels(selector),
            "attribute selector is {selector}, which CUDA does not have: run the model on the CPU, or convert it with another \
             selector, as signed_moments"
        );
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
        let kernels = HEAD_SIZES.map(|padded| find::<E>(&device, padded, &attributes));
        let [small, middle, large] = kernels;
        Ok(CudaKernel {
            attributes,
            fallback,
            kernels: [small?, middle?, large?],
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

/// As many as a call has, without an allocation.
type UsedTensors = SmallVec<[Used; 18]>;

fn in_sixteens(address: *const c_void) -> bool {
    address.addr().is_multiple_of(16)
}

impl CudaKernel {
    fn compute<E: CudaElement>(&self, context: &Context) -> Result<()> {
        let attributes = &self.attributes;
        let operands = Operands::read(context)?;
        let dims = Dims::read(attributes, &operands.shapes, size_of::<E>())?;
        let kernels = self.kernels_for(dims.head_size)?;
        let (phase, mut p) = self.params(&operands, &dims)?;

        // Everything that the host can see is checked: from here on outputs are written.
        self.device.make_current()?;
        let stream = self.device.stream(context)?;
        let width = (attributes.heads * dims.head_size) as i64;
        let result = context.output(output::OUTPUT, &[dims.batch as i64, dims.tokens as i64, width])?;
        let mut presents = [result; STATE.len()];
        for ((past, present), slot) in STATE.into_iter().zip(&mut presents) {
            *slot = context.output(present, operands.shapes[past].as_deref().unwrap_or_default())?;
            stream.copy(slot, &operands.required(past)?)?;
        }
        let staged = self.device.staged.of_stream(stream.raw.addr());
        let staging = Staging::of(&self.used::<E>(&operands, result, presents), &staged, stream)?;
        self.set_addresses::<E>(&mut p, &operands, &dims, &staging)?;
        p.output = staging.address(&result)?;
        let state = |i: usize| staging.address(&presents[i]);
        p.key_cache = state(0)?;
        p.value_cache = state(1)?;
        p.page_state = state(2)?;
        p.page_steps = state(3)?.cast();
        p.cached_outputs = state(4)?.cast();
        p.cached_lse = state(5)?.cast();

        let plan = LaunchPlan {
            stream,
            kernels,
            multiprocessors: self.device.multiprocessors,
            shared_per_sm: self.device.shared_per_sm,
            attributes,
            dims: &dims,
            has_page_budget: operands.tensors[input::PAGE_BUDGET].is_some(),
        };
        let buffer = self.device.scratch.of_stream(stream.raw.addr());
        if phase == Phase::Decode {
            plan.decode(&mut p, &mut lock(&buffer))?;
            return staging.write_back();
        }
        // ORT's kernels read 16 bytes at a time, too.
        let rows = [p.query, p.key, p.value, p.cos, p.sin];
        let aligned = staging.is_empty() && rows.into_iter().all(in_sixteens);
        let has_sink = operands.tensors[input::HEAD_SINK].is_some();
        let fallback = self
            .fallback
            .as_ref()
            .filter(|_| aligned && fallback_applies(&dims, p.total as usize, has_sink));
        if let Some(fallback) = fallback {
            plan.before_fallback(&p)?;
            let total = operands.required(input::TOTAL_SEQUENCE_LENGTH)?;
            fallback.run(context, &operands, total, result, [presents[0], presents[1]])?;
        }
        plan.prefill(&mut p, &mut lock(&buffer), fallback.is_some())?;
        staging.write_back()
    }

    /// The kernels for a head size.
    fn kernels_for(&self, d: usize) -> Result<&Kernels> {
        let [_, _, largest] = HEAD_SIZES;
        require!(
            d.is_multiple_of(8) && d <= largest,
            "input past_key has head size {d}, on CUDA a multiple of 8 up to {largest} is expected"
        );
        let place = HEAD_SIZES.iter().position(|&size| d <= size);
        place
            .and_then(|i| self.kernels.get(i))
            .map(Arc::as_ref)
            .ok_or_else(|| Error::runtime("no kernel for this head size"))
    }

    /// What the call is, and its parameters but for addresses, after checking the numbers that the host can see.
    fn params(&self, operands: &Operands, dims: &Dims) -> Result<(Phase, Params)> {
        // SAFETY: these two inputs are declared to lie in host memory, and ORT does not write them while the kernel runs.
        let (retro, total) = unsafe {
            (
                Elements::of(&operands.required(input::RETRO_LENGTH)?)?,
                Elements::of(&operands.required(input::TOTAL_SEQUENCE_LENGTH)?)?,
            )
        };
        // SAFETY: as above.
        let (retro, total) = unsafe { (retro.slice::<i32>()?, total.slice::<i32>()?[0]) };
        require!(
            total >= 1,
            "input total_sequence_length is {total}, expected at least 1"
        );
        let phase = Phase::of_call(&self.attributes, dims.tokens, retro, total == 1)?;
        let total = (total as usize).min(dims.capacity);
        if phase == Phase::Decode {
            require!(
                dims.tokens <= total,
                "input query has {} tokens for a step, but total_sequence_length is {total}",
                dims.tokens
            );
        }
        let mut p = params(&self.attributes, dims, phase, total);
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
        let one_a_sequence = |slot: usize| {
            let shape = &operands.shapes[slot];
            i32::from(shape.as_ref().is_some_and(|s| s[..] == [dims.batch as i64]))
        };
        p.budget_stride = one_a_sequence(input::PAGE_BUDGET);
        p.count_stride = one_a_sequence(input::RETRO_COUNT);
        Ok((phase, p))
    }

    /// The tensors that the kernels read and write, and the addresses that they need.
    fn used<E: CudaElement>(
        &self,
        operands: &Operands,
        result: Tensor,
        presents: [Tensor; STATE.len()],
    ) -> UsedTensors {
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
        let numbers = [input::SEQLENS_K, input::PAGE_BUDGET, input::RETRO_COUNT];
        let numbers = numbers.iter().filter_map(|&slot| read(slot, size_of::<i32>()));
        // Page steps and log-sum-exps are numbers of four bytes that the kernels take one at a time.
        let state = presents.into_iter().zip(STATE).map(|(tensor, (_, present))| {
            let by_number = [output::PRESENT_PAGE_STEPS, output::PRESENT_LSE].contains(&present);
            (tensor, if by_number { size_of::<i32>() } else { WRITTEN })
        });
        let written = [(result, WRITTEN)].into_iter().chain(state);
        let written = written.map(|(tensor, multiple)| Used {
            tensor,
            multiple,
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
        p.seqlens_k = address(input::SEQLENS_K)?.cast();
        p.page_budget = address(input::PAGE_BUDGET)?.cast();
        // A prefill has no retrospective tokens, whatever is counted.
        if matches!(p.phase, CallPhase::Decode) {
            p.retro_count = address(input::RETRO_COUNT)?.cast();
        }
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
