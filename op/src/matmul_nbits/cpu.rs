//! The operator on the CPU as ORT runs it.

use std::ffi::CStr;
use std::marker::PhantomData;

use retro_contract::matmul_nbits::{input, output};

use super::{
    Attributes, NAME, Operands, Product, ZeroPoints, check_weights, infer, inputs, multiply, output_shape, outputs,
};
use crate::cpu::{OrtPool, Shared};
use crate::method::element::Element;
use crate::ort::{AlignedWeights, Context, Elements, Info, Operator, Plain, Port, Result, ShapeContext};
use crate::simd::Isa;

/// `ai.retro::MatMulNBits` on the CPU for activations of type `T` and zero points of type `Z`, which is `T` or uint8.
pub struct CpuMatMulNBits<T, Z>(PhantomData<(T, Z)>);

/// One node of one session.
pub struct CpuKernel {
    attributes: Attributes,
    weights: AlignedWeights,
}

impl<T: Element, Z: Plain> Operator for CpuMatMulNBits<T, Z> {
    const NAME: &'static CStr = NAME;
    const INPUTS: &'static [Port] = &inputs(T::DATA_TYPE, Z::DATA_TYPE);
    const OUTPUTS: &'static [Port] = &outputs(T::DATA_TYPE);
    const IN_PLACE: &'static [(usize, usize)] = &[];
    type Kernel = CpuKernel;

    fn create(info: &Info) -> Result<CpuKernel> {
        Ok(CpuKernel {
            attributes: super::read_attributes(info)?,
            // SAFETY: a node on the CPU, whose kernel keeps them.
            weights: unsafe {
                AlignedWeights::of(info, &[input::SCALES, input::ZERO_POINTS, input::G_IDX, input::BIAS])?
            },
        })
    }

    fn compute(kernel: &CpuKernel, context: &Context) -> Result<()> {
        kernel.compute::<T, Z>(context)
    }

    fn infer(shapes: &ShapeContext) -> Result<()> {
        infer(shapes)
    }
}

impl CpuKernel {
    fn compute<T: Element, Z: Plain>(&self, context: &Context) -> Result<()> {
        let operands = Operands::read(context)?;
        let packed = Z::DATA_TYPE == u8::DATA_TYPE;
        check_weights(&self.attributes, &operands.shapes()?, packed)?;
        let a = operands.required(input::A)?;
        let shape = output_shape(&self.attributes, &a.shape()?)?;
        let y = context.output(output::Y, &shape.shape)?;
        let tensors = &operands.tensors;
        let mut places: [Option<Elements>; 6] = Default::default();
        let [place_a, place_b, place_scales, place_zeros, place_index, place_bias] = &mut places;
        // SAFETY: CPU tensors; the inputs are not written while the kernel runs, and the output is a buffer of its own.
        unsafe {
            let zeros = tensors[input::ZERO_POINTS];
            let product = Product {
                attributes: &self.attributes,
                codes: self.weights.elements(tensors[input::B], place_b)?,
                scales: self.weights.elements::<T>(tensors[input::SCALES], place_scales)?,
                zero_points: match (zeros.is_some(), packed) {
                    (false, _) => ZeroPoints::Middle,
                    (true, true) => ZeroPoints::Packed(self.weights.elements(zeros, place_zeros)?),
                    (true, false) => ZeroPoints::Numbers(self.weights.elements(zeros, place_zeros)?),
                },
                g_idx: self.weights.elements(tensors[input::G_IDX], place_index)?,
                bias: self.weights.elements(tensors[input::BIAS], place_bias)?,
            };
            product.check_order()?;
            let a = self.weights.elements(Some(a), place_a)?;
            let mut written = Elements::of(&y)?;
            let out = Shared::new(written.slice_mut()?);
            // Columns are tasks enough for any number of threads.
            let pool = OrtPool { context, width: 1 };
            multiply(Isa::detect(), &product, a, &out, &pool)?;
            written.write_back()
        }
    }
}
