//! The operator on the CPU as ORT runs it: tensors in, tensors out.

use std::ffi::CStr;
use std::marker::PhantomData;

use retro_contract::{STATE, input, output};

use super::call::{CpuCall, Dense, Inputs, LayerState};
use super::pool::Pool;
use super::run::run;
use super::scratch::ScratchPool;
use super::shared::Shared;
use crate::contract::{Attributes, CallLengths, CallPlan, Dims, Phase};
use crate::for_selector;
use crate::gqa_fallback::GqaFallback;
use crate::io_spec::{self, Operands};
use crate::method::element::Element;
use crate::ort::{
    AlignedWeights, Context, Elements, Info, Operator, OwnedScalar, Plain, Port, Result, ShapeContext, Tensor,
};
use crate::selector::PageSelector;

/// `ai.retro::RetroAttention` on the CPU for caches of element type `E` and selector state of type `S`.
pub struct CpuOperator<E, S = E>(PhantomData<(E, S)>);

/// One node of one session.
pub struct CpuKernel {
    attributes: Attributes,
    fallback: Option<GqaFallback>,
    weights: AlignedWeights,
    scratch: ScratchPool,
    width: usize,
}

/// The session's threads.
pub(crate) struct OrtPool<'a> {
    pub context: &'a Context,
    pub width: usize,
}

impl Pool for OrtPool<'_> {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        self.context.parallel_for(count, task)
    }

    fn width(&self) -> usize {
        self.width
    }
}

impl<E: Element, S: Plain> Operator for CpuOperator<E, S> {
    const NAME: &'static CStr = c"RetroAttention";
    const INPUTS: &'static [Port] = &io_spec::inputs(E::DATA_TYPE, S::DATA_TYPE);
    const OUTPUTS: &'static [Port] = &io_spec::outputs(E::DATA_TYPE, S::DATA_TYPE);
    const IN_PLACE: &'static [(usize, usize)] = &STATE;
    type Kernel = CpuKernel;

    fn create(info: &Info) -> Result<CpuKernel> {
        let attributes = Attributes::read(info)?;
        io_spec::check_state_type(attributes.selector, E::DATA_TYPE, S::DATA_TYPE)?;
        let fallback = GqaFallback::new(info, &attributes, E::DATA_TYPE)?;
        // SAFETY: a node on the CPU, whose kernel keeps them.
        let weights = unsafe { AlignedWeights::of(info, &[input::COS_CACHE, input::SIN_CACHE, input::HEAD_SINK])? };
        // The threads of the session's pool are not told through ONNX Runtime's C API: as many as the process may run
        // on. Finer parts than threads cost little; the pool runs what it can.
        let width = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(CpuKernel {
            attributes,
            fallback,
            weights,
            scratch: ScratchPool::default(),
            width,
        })
    }

    fn compute(kernel: &CpuKernel, context: &Context) -> Result<()> {
        kernel.compute::<E>(context)
    }

    fn infer(shapes: &ShapeContext) -> Result<()> {
        io_spec::infer(shapes)
    }
}

/// Whether ORT's own operator computes what our contract asks for in this prefill: one sequence (it refuses several
/// with a past) or a batch of prompts of one length, no left padding, no head sink, D a multiple of 16 and its rotated
/// half of 8.
fn fallback_applies(dims: &Dims, plan: &CallPlan, has_head_sink: bool) -> bool {
    let whole_prompts = plan.sequences.iter().all(|s| s.len == dims.tokens);
    let one = dims.batch == 1 && plan.sequences.iter().all(|s| s.fed == dims.tokens);
    let shapes = dims.head_size.is_multiple_of(16) && dims.rotary_half.is_multiple_of(8);
    !has_head_sink && shapes && (whole_prompts || one)
}

impl CpuKernel {
    fn compute<E: Element>(&self, context: &Context) -> Result<()> {
        let operands = Operands::read(context)?;
        let dims = Dims::read(&self.attributes, &operands.shapes, size_of::<E>())?;
        let plan = self.plan(&operands, &dims)?;

        // Everything is checked: from here on outputs are written.
        let width = (self.attributes.heads * dims.head_size) as i64;
        let result = context.output(output::OUTPUT, &[dims.batch as i64, dims.tokens as i64, width])?;
        let mut presents = [result; STATE.len()];
        for ((past, present), slot) in STATE.into_iter().zip(&mut presents) {
            let shape = operands.shapes[past].as_deref().unwrap_or_default();
            *slot = context.output(present, shape)?;
            slot.copy_from(&operands.required(past)?)?;
        }

        let has_sink = operands.tensors[input::HEAD_SINK].is_some();
        let mut dense = Dense::Own;
        if plan.phase == Phase::Prefill
            && let Some(fallback) = &self.fallback
            && fallback_applies(&dims, &plan, has_sink)
        {
            // The caller's number may be an upper bound; GroupQueryAttention tells a prompt by the exact one.
            let longest = plan.sequences.iter().map(|s| s.len).max().unwrap_or(0);
            let total = OwnedScalar::new(longest as i32)?;
            fallback.run(context, &operands, total.tensor(), result, [presents[0], presents[1]])?;
            dense = Dense::Done;
        }
        for_selector!(self.attributes.selector, P => {
            self.run::<E, P>(context, &operands, (&dims, &plan), result, presents, dense)
        })
    }

    /// What the call is, after checking its lengths.
    fn plan(&self, operands: &Operands, dims: &Dims) -> Result<CallPlan> {
        // SAFETY: CPU tensors, which ORT does not write while the kernel runs.
        unsafe {
            let [last, total, retro] = [input::SEQLENS_K, input::TOTAL_SEQUENCE_LENGTH, input::RETRO_LENGTH];
            let [last, total, retro] = [
                Elements::of(&operands.required(last)?)?,
                Elements::of(&operands.required(total)?)?,
                Elements::of(&operands.required(retro)?)?,
            ];
            let budget = operands.tensors[input::PAGE_BUDGET];
            let budget = budget.map(|t| Elements::of(&t)).transpose()?;
            let count = operands.tensors[input::RETRO_COUNT];
            let count = count.map(|t| Elements::of(&t)).transpose()?;
            let lengths = CallLengths {
                seqlens_k: last.slice()?,
                total_sequence_length: total.slice()?[0],
                retro_length: retro.slice()?,
                page_budget: budget.as_ref().map(|b| b.slice()).transpose()?,
                retro_count: count.as_ref().map(|c| c.slice()).transpose()?,
            };
            CallPlan::read(&self.attributes, dims, &lengths)
        }
    }

    /// The call itself, on the tensors' memory.
    fn run<E: Element, P: PageSelector>(
        &self,
        context: &Context,
        operands: &Operands,
        (dims, plan): (&Dims, &CallPlan),
        result: Tensor,
        presents: [Tensor; STATE.len()],
        dense: Dense,
    ) -> Result<()> {
        let tensors = &operands.tensors;
        let pool = OrtPool {
            context,
            width: self.width,
        };
        let mut places: [Option<Elements>; 6] = Default::default();
        let [query, key, value, cos, sin, head_sink] = &mut places;
        // SAFETY: CPU tensors; the inputs are not written while the kernel runs, and each output is a buffer of its own
        // (a past that shares it is not read again).
        unsafe {
            let mut output = Elements::of(&result)?;
            let [mut keys, mut values, mut pages, mut steps, mut outputs, mut lse] = [
                Elements::of(&presents[0])?,
                Elements::of(&presents[1])?,
                Elements::of(&presents[2])?,
                Elements::of(&presents[3])?,
                Elements::of(&presents[4])?,
                Elements::of(&presents[5])?,
            ];
            let call = CpuCall::<E, P> {
                attributes: &self.attributes,
                dims,
                plan,
                inputs: Inputs {
                    query: self.weights.elements(tensors[input::QUERY], query)?,
                    key: self.weights.elements(tensors[input::KEY], key)?,
                    value: self.weights.elements(tensors[input::VALUE], value)?,
                    cos: self.weights.elements(tensors[input::COS_CACHE], cos)?,
                    sin: self.weights.elements(tensors[input::SIN_CACHE], sin)?,
                    head_sink: self.weights.elements(tensors[input::HEAD_SINK], head_sink)?,
                },
                output: Shared::new(output.slice_mut::<E>()?),
                state: LayerState {
                    key: Shared::new(keys.slice_mut()?),
                    value: Shared::new(values.slice_mut()?),
                    pages: Shared::new(pages.slice_mut()?),
                    steps: Shared::new(steps.slice_mut()?),
                    outputs: Shared::new(outputs.slice_mut()?),
                    lse: Shared::new(lse.slice_mut()?),
                },
                scratch: &self.scratch,
            };
            run(&call, &pool, dense)?;
            for written in [&output, &keys, &values, &pages, &steps, &outputs, &lse] {
                written.write_back()?;
            }
        }
        Ok(())
    }
}
