//! `ai.retro::MatMulNBits`: a product of activations and packed weights, with the interface of
//! `com.microsoft::MatMulNBits`.
//!
//! What every execution provider shares is here: the ports, the attributes, the checks of shapes. [`multiply`] is the
//! product on plain slices, which the CPU computes ([`CpuMatMulNBits`]); CUDA has kernels
//! ([`crate::cuda::CudaMatMulNBits`]).

mod attributes;
mod cpu;
mod dims;
mod product;
#[cfg(test)]
mod tests;
mod tiles;

pub use attributes::Attributes;
pub use cpu::{CpuKernel, CpuMatMulNBits};
pub use dims::{OutputShape, check_weights, output_shape};
pub use product::{Product, ZeroPoints, multiply};

use retro_contract::matmul_nbits::{input, output};

use crate::contract::Shape;
use crate::ort::{Context, DataType, Error, Info, Plain, Port, Result, ShapeContext, Tensor};

/// The operator's name to the host.
pub(crate) const NAME: &std::ffi::CStr = c"MatMulNBits";

/// The input slots for activations of type `t` and zero points of type `zero_points`, which is `t` or uint8.
///
/// ONNX Runtime chooses an operator by the types of the inputs that a node has. A node without zero points is taken by
/// any that has its `t`, so what an operator does there must not depend on `zero_points`.
pub(crate) const fn inputs(t: DataType, zero_points: DataType) -> [Port; input::COUNT] {
    [
        Port::required(t),
        Port::required(u8::DATA_TYPE),
        Port::required(t),
        Port::optional(zero_points),
        Port::optional(i32::DATA_TYPE),
        Port::optional(t),
    ]
}

/// The output slots for activations of type `t`.
pub(crate) const fn outputs(t: DataType) -> [Port; output::COUNT] {
    [Port::required(t)]
}

/// Shape of the output: the activations', with N columns.
pub(crate) fn infer(shapes: &ShapeContext) -> Result<()> {
    // A node without N is refused when its kernel is made, with a line that says so.
    match shapes.int_attribute(c"N") {
        Ok(n) => shapes.copy_with_last(input::A, output::Y, n, &[]),
        Err(_) => Ok(()),
    }
}

/// The shapes of a node's inputs, in slot order.
pub type InputShapes = [Option<Shape>; input::COUNT];

/// The inputs of one call, in slot order.
#[derive(Default)]
pub(crate) struct Operands {
    pub tensors: [Option<Tensor>; input::COUNT],
}

impl Operands {
    pub fn read(context: &Context) -> Result<Self> {
        let mut tensors = [None; input::COUNT];
        context.inputs(&mut tensors)?;
        Ok(Self { tensors })
    }

    pub fn required(&self, slot: usize) -> Result<Tensor> {
        self.tensors[slot].ok_or_else(|| Error::invalid(format!("input {} is missing", input::NAMES[slot])))
    }

    pub fn shapes(&self) -> Result<InputShapes> {
        let mut shapes = InputShapes::default();
        for (shape, tensor) in shapes.iter_mut().zip(&self.tensors) {
            *shape = tensor.as_ref().map(Tensor::shape).transpose()?;
        }
        Ok(shapes)
    }
}

/// Reads and checks a node's attributes; an error names the node.
pub(crate) fn read_attributes(info: &Info) -> Result<Attributes> {
    Attributes::read(info).map_err(|e| {
        let node = info.node_name().unwrap_or_default();
        Error::invalid(format!(
            "{}::{} node {node:?}: {e}",
            retro_contract::DOMAIN,
            NAME.to_string_lossy()
        ))
    })
}
