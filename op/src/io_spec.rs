//! The operator's inputs and outputs as the host must know them, the same for every execution provider.

use retro_contract::{STATE, Selector, StateElement, input, output};

use crate::contract::InputShapes;
use crate::ort::{Context, DataType, Error, Plain, Port, Result, ShapeContext, Tensor, require};

/// The input slots for caches of element type `t` and selector state of type `state`.
pub const fn inputs(t: DataType, state: DataType) -> [Port; input::COUNT] {
    [
        Port::required(t),
        Port::optional(t),
        Port::optional(t),
        Port::required(t),
        Port::required(t),
        Port::required(i32::DATA_TYPE),
        Port::required(i32::DATA_TYPE).on_cpu(),
        Port::optional(t),
        Port::optional(t),
        Port::required(i32::DATA_TYPE).on_cpu(),
        Port::required(state),
        Port::required(i32::DATA_TYPE),
        Port::required(f32::DATA_TYPE),
        Port::required(f32::DATA_TYPE),
        Port::optional(i32::DATA_TYPE),
        Port::optional(t),
        Port::optional(i32::DATA_TYPE),
    ]
}

/// The output slots for caches of element type `t` and selector state of type `state`.
pub const fn outputs(t: DataType, state: DataType) -> [Port; output::COUNT] {
    [
        Port::required(t),
        Port::required(t),
        Port::required(t),
        Port::required(state),
        Port::required(i32::DATA_TYPE),
        Port::required(f32::DATA_TYPE),
        Port::required(f32::DATA_TYPE),
    ]
}

/// Whether a node's state of type `state` is its selector's, for caches of type `t`: ONNX Runtime chooses an operator
/// by the types of its inputs, whatever its attributes.
pub fn check_state_type(selector: Selector, t: DataType, state: DataType) -> Result<()> {
    let expected = match selector.state_element() {
        StateElement::Cache => t,
        StateElement::Byte => u8::DATA_TYPE,
    };
    let name = |t: DataType| match t {
        DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT => "float".to_owned(),
        DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 => "float16".to_owned(),
        DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 => "bfloat16".to_owned(),
        DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 => "uint8".to_owned(),
        other => format!("{other:?}"),
    };
    require!(
        state == expected,
        "input {} is {}, expected {}: attribute selector is {selector}",
        input::NAMES[input::PAST_PAGE_SUMMARY],
        name(state),
        name(expected)
    );
    Ok(())
}

/// The inputs of one call, in slot order, with their shapes.
pub struct Operands {
    pub tensors: [Option<Tensor>; input::COUNT],
    pub shapes: InputShapes,
}

impl Operands {
    pub fn read(context: &Context) -> Result<Self> {
        let mut tensors: [Option<Tensor>; input::COUNT] = [None; input::COUNT];
        let mut shapes: InputShapes = Default::default();
        context.inputs(&mut tensors)?;
        for (tensor, shape) in tensors.iter().zip(&mut shapes) {
            *shape = tensor.as_ref().map(Tensor::shape).transpose()?;
        }
        Ok(Self { tensors, shapes })
    }

    pub fn required(&self, slot: usize) -> Result<Tensor> {
        self.tensors[slot].ok_or_else(|| Error::invalid(format!("input {} is missing", input::NAMES[slot])))
    }
}

/// Shapes of the outputs: the state's are those of the past, the output's width is Hq * D where the model says both.
pub fn infer(shapes: &ShapeContext) -> Result<()> {
    for (past, present) in STATE {
        shapes.copy(past, present)?;
    }
    // D is the cache's last dimension.
    let head_size = shapes.dims(input::PAST_KEY)?.get(3).copied().unwrap_or(-1);
    let heads = shapes.int_attribute(c"num_heads")?;
    let width = if head_size > 0 {
        heads.saturating_mul(head_size)
    } else {
        -1
    };
    // Batch and tokens are the same for every node of a model.
    let names = [c"RetroAttention_batch", c"RetroAttention_tokens"];
    shapes.copy_with_last(input::QUERY, output::OUTPUT, width, &names)
}
