//! The operator on the CPU as ORT runs it: tensors in, tensors out.

use std::ffi::CStr;
use std::marker::PhantomData;

use retro_contract::{input, output};

use super::{Call, Dense, Inputs, Pool, ScratchPool, Shared, State, run};
use crate::contract::{Attributes, Dims, Lengths, Phase, Plan};
use crate::delegate::Delegate;
use crate::host::{Context, Info, Operator, OwnedScalar, Port, Result, ShapeContext};
use crate::method::element::Element;
use crate::ports::{self, Operands, STATE};

/// `ai.retro::RetroAttention` on the CPU for element type `E`.
pub struct CpuOperator<E>(PhantomData<E>);

/// One node of one session.
pub struct CpuKernel {
    attributes: Attributes,
    delegate: Option<Delegate>,
    scratch: ScratchPool,
    width: usize,
}

struct OrtPool<'a> {
    context: &'a Context,
    width: usize,
}

impl Pool for OrtPool<'_> {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        self.context.parallel_for(count, task)
    }

    fn width(&self) -> usize {
        self.width
    }
}

impl<E: Element> Operator for CpuOperator<E> {
    const NAME: &'static CStr = c"RetroAttention";
    const INPUTS: &'static [Port] = &ports::inputs(E::DATA_TYPE);
    const OUTPUTS: &'static [Port] = &ports::outputs(E::DATA_TYPE);
    const IN_PLACE: &'static [(usize, usize)] = &STATE;
    type Kernel = CpuKernel;

    fn create(info: &Info) -> Result<CpuKernel> {
        let attributes = Attributes::read(info)?;
        let delegate = Delegate::new(info, &attributes, E::DATA_TYPE)?;
        let width = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(CpuKernel {
            attributes,
            delegate,
            scratch: ScratchPool::default(),
            width,
        })
    }

    fn compute(kernel: &CpuKernel, context: &Context) -> Result<()> {
        kernel.compute::<E>(context)
    }

    fn infer(shapes: &ShapeContext) -> Result<()> {
        ports::infer(shapes)
    }
}

/// Whether ORT's own operator computes what our contract asks for in this prefill: one sequence (it refuses several with a
/// past) or a batch of prompts of one length, no left padding, no head sink, D a multiple of 16 and its rotated half of 8.
fn delegate_applies(dims: &Dims, plan: &Plan, has_head_sink: bool) -> bool {
    let whole_prompts = plan.sequences.iter().all(|s| s.len == dims.tokens);
    let one = dims.batch == 1 && plan.sequences.iter().all(|s| s.fed == dims.tokens);
    let shapes = dims.head_size.is_multiple_of(16) && dims.rotary_half.is_multiple_of(8);
    !has_head_sink && shapes && (whole_prompts || one)
}

impl CpuKernel {
    fn compute<E: Element>(&self, context: &Context) -> Result<()> {
        let attributes = &self.attributes;
        let operands = Operands::read(context)?;
        let Operands { tensors, shapes } = &operands;
        let dims = Dims::read(attributes, shapes)?;
        let required = |slot: usize| operands.required(slot);
        // SAFETY: CPU tensors, which ORT does not write while the kernel runs.
        let plan = unsafe {
            let lengths = Lengths {
                seqlens_k: required(input::SEQLENS_K)?.slice()?,
                total_sequence_length: required(input::TOTAL_SEQUENCE_LENGTH)?.slice()?[0],
                retro_length: required(input::RETRO_LENGTH)?.slice()?,
                page_budget: tensors[input::PAGE_BUDGET].map(|t| t.slice()).transpose()?,
            };
            Plan::read(attributes, &dims, &lengths)?
        };

        // Everything is checked: from here on outputs are written.
        let width = (attributes.heads * dims.head_size) as i64;
        let result = context.output(output::OUTPUT, &[dims.batch as i64, dims.tokens as i64, width])?;
        let mut presents = [result; STATE.len()];
        for ((past, present), slot) in STATE.into_iter().zip(&mut presents) {
            let shape = shapes[past].as_deref().unwrap_or_default();
            *slot = context.output(present, shape)?;
            slot.copy_from(&required(past)?)?;
        }

        let has_sink = tensors[input::HEAD_SINK].is_some();
        let mut dense = Dense::Own;
        if plan.phase == Phase::Prefill
            && let Some(delegate) = &self.delegate
            && delegate_applies(&dims, &plan, has_sink)
        {
            // The caller's number may be an upper bound; GroupQueryAttention tells a prompt by the exact one.
            let longest = plan.sequences.iter().map(|s| s.len).max().unwrap_or(0);
            let total = OwnedScalar::new(longest as i32)?;
            delegate.run(context, &operands, total.tensor(), result, [presents[0], presents[1]])?;
            dense = Dense::Done;
        }

        let pool = OrtPool {
            context,
            width: self.width,
        };
        // SAFETY: CPU tensors; the inputs are not written while the kernel runs, and each output is a buffer of its own
        // (a past that shares it is not read again).
        let call = unsafe {
            let read = |slot: usize| tensors[slot].map_or(Ok(&[][..]), |t| t.slice::<E>());
            Call {
                attributes,
                dims: &dims,
                plan: &plan,
                inputs: Inputs {
                    query: read(input::QUERY)?,
                    key: read(input::KEY)?,
                    value: read(input::VALUE)?,
                    cos: read(input::COS_CACHE)?,
                    sin: read(input::SIN_CACHE)?,
                    head_sink: read(input::HEAD_SINK)?,
                },
                output: Shared::new(result.slice_mut()?),
                state: State {
                    key: Shared::new(presents[0].slice_mut()?),
                    value: Shared::new(presents[1].slice_mut()?),
                    summary: Shared::new(presents[2].slice_mut()?),
                    steps: Shared::new(presents[3].slice_mut()?),
                    outputs: Shared::new(presents[4].slice_mut()?),
                    lse: Shared::new(presents[5].slice_mut()?),
                },
                scratch: &self.scratch,
            }
        };
        run(&call, &pool, dense)
    }
}
