//! The original with another last bit: what comes out of its attention is moved by about a unit in the last place, as another
//! order of additions moves it. Where activations are quantised, that decides now and then which of two steps a number falls on,
//! and how far logits move then is a property of the model.

use super::graph_facts::DYNAMIC;
use retro_onnx::{AttributeProto, DataType, ModelProto, NodeProto, TensorProto, graph::GraphView};

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
    let mut moved = false;
    for (value, data_type) in values {
        let place = graph.node.iter().position(|n| n.output.contains(value));
        let Some((place, by)) = place.zip(last_place(*data_type)) else {
            continue;
        };
        let name = |what: &str| format!("{value}_perturbed_{what}");
        let result = name("result");
        for input in graph.node.iter_mut().flat_map(|n| &mut n.input).filter(|i| *i == value) {
            input.clone_from(&result);
        }
        let numbers = [("frequency", FREQUENCY), ("place", by)];
        let numbers = numbers.map(|(what, number)| TensorProto::floats(&name(what), &[], &[number]));
        graph.initializer.extend(numbers);
        let cast = |from: &str, to: &str, data_type: DataType| {
            NodeProto::new("", "Cast", to, &[from], &[to])
                .with(AttributeProto::int("to", i64::from(i32::from(data_type))))
        };
        let step = |op: &str, inputs: &[&str], to: &str| {
            let inputs: Vec<String> = inputs.iter().map(|what| name(what)).collect();
            let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
            NodeProto::new("", op, &name(to), &inputs, &[&name(to)])
        };
        let nodes = [
            cast(value, &name("float"), DataType::Float),
            step("Mul", &["float", "frequency"], "turned"),
            step("Cos", &["turned"], "sign"),
            step("Mul", &["sign", "place"], "share"),
            step("Mul", &["share", "float"], "step"),
            step("Add", &["float", "step"], "sum"),
            cast(&name("sum"), &result, *data_type),
        ];
        graph.node.splice(place + 1..=place, nodes);
        moved = true;
    }
    moved
}
