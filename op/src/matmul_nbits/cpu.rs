//! The operator on the CPU, by the host's own MatMulNBits: a model that was made for CUDA runs here as well.

use std::ffi::CStr;
use std::marker::PhantomData;

use retro_contract::matmul_nbits::{input, output};

use super::{ATTRIBUTE_NAMES, Attributes, NAME, Operands, check_weights, infer, inputs, output_shape, outputs};
use crate::ort::{Attribute, Context, Error, Info, InvokedOp, Operator, Plain, Port, Result, ShapeContext};

/// `ai.retro::MatMulNBits` on the CPU for activations of type `T` and zero points of type `Z`, which is `T` or uint8.
pub struct CpuMatMulNBits<T, Z>(PhantomData<(T, Z)>);

/// One node of one session.
pub struct CpuKernel {
    attributes: Attributes,
    host: InvokedOp,
}

impl<T: Plain, Z: Plain> Operator for CpuMatMulNBits<T, Z> {
    const NAME: &'static CStr = NAME;
    const INPUTS: &'static [Port] = &inputs(T::DATA_TYPE, Z::DATA_TYPE);
    const OUTPUTS: &'static [Port] = &outputs(T::DATA_TYPE);
    const IN_PLACE: &'static [(usize, usize)] = &[];
    type Kernel = CpuKernel;

    fn create(info: &Info) -> Result<CpuKernel> {
        let attributes = super::read_attributes(info)?;
        let host = host_operator::<T, Z>(info, &attributes)?;
        Ok(CpuKernel { attributes, host })
    }

    fn compute(kernel: &CpuKernel, context: &Context) -> Result<()> {
        let operands = Operands::read(context)?;
        let a = operands.required(input::A)?;
        check_weights(&kernel.attributes, &operands.shapes()?, Z::DATA_TYPE == u8::DATA_TYPE)?;
        let out = output_shape(&kernel.attributes, &a.shape()?)?;
        let y = context.output(output::Y, &out.shape)?;
        kernel.host.invoke(context, &operands.tensors, &[y]).map_err(|e| {
            Error::runtime(format!(
                "ONNX Runtime's own MatMulNBits, which computes this on the CPU, failed: {e}"
            ))
        })
    }

    fn infer(shapes: &ShapeContext) -> Result<()> {
        infer(shapes)
    }
}

/// The host's MatMulNBits with a node's attributes. An operator that is invoked is never shown its weights beforehand,
/// so the host packs nothing: every call widens all weights and multiplies them as float32.
fn host_operator<T: Plain, Z: Plain>(info: &Info, attributes: &Attributes) -> Result<InvokedOp> {
    let values = [
        attributes.k,
        attributes.n,
        attributes.bits,
        attributes.block_size,
        attributes.accuracy_level,
    ];
    let list: Vec<Attribute<'_>> = ATTRIBUTE_NAMES
        .into_iter()
        .zip(values)
        .map(|(name, value)| Attribute::Int(name, value as i64))
        .collect();
    let types = [
        (c"T1", T::DATA_TYPE),
        (c"T2", u8::DATA_TYPE),
        (c"T3", Z::DATA_TYPE),
        (c"T4", i32::DATA_TYPE),
    ];
    InvokedOp::new(
        info,
        c"com.microsoft",
        NAME,
        &types,
        &list,
        input::COUNT as i32,
        output::COUNT as i32,
    )
}
