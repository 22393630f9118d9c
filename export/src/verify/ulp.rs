//! The original with another last bit: what comes out of its attention is moved by about a unit in the last place, as another
//! order of additions moves it. Where activations are quantised, that decides now and then which of two steps a number falls on,
//! and how far logits move then is a property of the model.

use super::graph_facts::DYNAMIC;
use retro_onnx::{DataType, GraphBuilder, ModelProto, graph::GraphView};

/// Numbers next to each other get different signs.
const FREQUENCY: f32 = 9973.0;

/// The last place of a type, of a number as large as 1; none where there is nothing to move.
fn last_place(data_type: DataType) -> Option<f32> {
    match data_type {
        // Sums of hundreds of terms differ by some of them.
        DataType::Float => Some(4.0 * f32::EPSILON),
        DataType::Float16 => Some(1.0 / 1024.0),
        DataType::Bfloat16 => Some(1.0 / 128.0),
        _ => None,
    }
}

/// Whether a graph has activations rounded to integers, so that it may move by more than rounding where rounding differs.
pub(crate) fn quantizes_activations(view: &GraphView) -> bool {
    // accuracy_level 4: int8.
    const INT8: i64 = 4;
    view.graph.node.iter().any(|n| match n.op_type() {
        "MatMulNBits" => n.attribute("accuracy_level").is_some_and(|a| a.i == Some(INT8)),
        "QuantizeLinear" => !view.is_constant(n.input(0)),
        op => DYNAMIC.contains(&op),
    })
}

/// Moves the values named, which are of these types. Whether there was one.
pub fn perturb(model: &mut ModelProto, values: &[(String, DataType)]) -> bool {
    let Some(graph) = model.graph.as_mut() else {
        return false;
    };
    let mut builder = GraphBuilder::part_of(graph);
    let mut moved = false;
    for (value, data_type) in values {
        let index = graph.node.iter().position(|n| n.output.contains(value));
        let Some((index, by)) = index.zip(last_place(*data_type)) else {
            continue;
        };
        builder.set_prefix(format!("{value}_perturbed_"));
        let result = perturbed(&mut builder, value, *data_type, by);
        for input in graph.node.iter_mut().flat_map(|n| &mut n.input).filter(|i| *i == value) {
            input.clone_from(&result);
        }
        graph.node.splice(index + 1..=index, builder.take_nodes());
        moved = true;
    }
    graph.initializer.extend(builder.take_initializers());
    moved
}

/// Builds x + x * `by` * cos(x * [`FREQUENCY`]), computed in float32; returns its name.
fn perturbed(builder: &mut GraphBuilder, x: &str, data_type: DataType, by: f32) -> String {
    let frequency = builder.floats("frequency", &[], &[FREQUENCY]);
    let place = builder.floats("place", &[], &[by]);
    let float = builder.cast(x, DataType::Float, "float");
    let turned = builder.node("Mul", &[&float, &frequency]).output("turned");
    let sign = builder.node("Cos", &[&turned]).output("sign");
    let share = builder.node("Mul", &[&sign, &place]).output("share");
    let step = builder.node("Mul", &[&share, &float]).output("step");
    let sum = builder.node("Add", &[&float, &step]).output("sum");
    builder.cast(&sum, data_type, "result")
}
