//! The operator's inputs and outputs as the host must know them, the same for every execution provider.

use retro_contract::{input, output};

use crate::host::{DataType, Plain, Port, Result, ShapeContext};

/// Pairs (past, present) of the state.
pub const STATE: [(usize, usize); 6] = [
    (input::PAST_KEY, output::PRESENT_KEY),
    (input::PAST_VALUE, output::PRESENT_VALUE),
    (input::PAST_PAGE_SUMMARY, output::PRESENT_PAGE_SUMMARY),
    (input::PAST_PAGE_STEPS, output::PRESENT_PAGE_STEPS),
    (input::PAST_OUTPUTS, output::PRESENT_OUTPUTS),
    (input::PAST_LSE, output::PRESENT_LSE),
];

/// The input slots for element type `t`.
pub const fn inputs(t: DataType) -> [Port; input::COUNT] {
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
        Port::required(t),
        Port::required(i32::DATA_TYPE),
        Port::required(f32::DATA_TYPE),
        Port::required(f32::DATA_TYPE),
        Port::optional(i32::DATA_TYPE),
        Port::optional(t),
    ]
}

/// The output slots for element type `t`.
pub const fn outputs(t: DataType) -> [Port; output::COUNT] {
    [
        Port::required(t),
        Port::required(t),
        Port::required(t),
        Port::required(t),
        Port::required(i32::DATA_TYPE),
        Port::required(f32::DATA_TYPE),
        Port::required(f32::DATA_TYPE),
    ]
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
    shapes.copy_with_last(input::QUERY, output::OUTPUT, width)
}
