//! What a graph tells beyond its attention, so that it can be fed: sizes, caches of layers that stay as they are, inputs that
//! nothing depends on.

use super::comparison::CacheFacts;
use crate::rules::{AttentionMatch, HeadLayout, INPUT_IDS, INPUTS_EMBEDS, width};
use retro_model_io::exporters_present_names;
use retro_onnx::{DataType, ValueInfoProto, graph::GraphView};

/// Operators that quantise activations by a range over all tokens fed together.
pub const DYNAMIC: [&str; 3] = ["DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"];

/// The head size, from the weights around an attention that takes and gives heads side by side, else from its angles.
pub fn head_size(view: &GraphView, matched: &AttentionMatch) -> Option<usize> {
    // Where angles are for a part of each head only, they tell less than its size.
    let angles = || usize::try_from(2 * *view.tensor_dims(&matched.cos_cache)?.last()?).ok();
    weighed_head_size(view, matched)
        .and_then(|d| usize::try_from(d).ok())
        .or_else(angles)
}

/// The head size, from the weights around an attention that takes and gives heads side by side.
pub fn weighed_head_size(view: &GraphView, matched: &AttentionMatch) -> Option<i64> {
    let share = |width: i64, heads: i64| (heads > 0 && width > 0 && width % heads == 0).then(|| width / heads);
    let flat = matched.output_layout == HeadLayout::Flat;
    let rows = width(view, &matched.output)
        .filter(|_| flat)
        .and_then(|n| i64::try_from(n).ok());
    let columns = view.producer(&matched.query).and_then(|n| match n.op_type() {
        "MatMul" | "Add" => n.input.iter().find_map(|i| view.tensor_dims(i)?.last().copied()),
        "MatMulNBits" => n.attribute("N")?.i,
        _ => None,
    });
    let of_query = if matched.key.is_empty() {
        matched.q_heads + 2 * matched.kv_heads
    } else {
        matched.q_heads
    };
    rows.and_then(|n| share(n, matched.q_heads))
        .or_else(|| columns.and_then(|n| share(n, of_query)))
}

/// Caches that no attention names: of layers that stay as they are. `grows`: they are fed as long as they are.
pub fn other_caches(view: &GraphView, known: &[CacheFacts], grows: bool) -> Vec<CacheFacts> {
    let inputs = view.graph.input.iter().map(ValueInfoProto::name);
    let others = inputs.filter(|name| view.initializer(name).is_none() && known.iter().all(|c| c.past != *name));
    others
        .filter_map(|past| {
            let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16];
            let rank = view.declared_dims(past)?.len();
            let size = |from_end| usize::try_from(view.declared_from_end(past, from_end)?).ok();
            (rank == 4 && floats.contains(&view.data_type(past)?)).then_some(())?;
            // State of other kinds, and caches of one size: they are as large as they are declared from the beginning.
            let fixed = view.declared_from_end(past, 2).is_some();
            Some(CacheFacts {
                past: past.to_owned(),
                present: exporters_present_names(past)
                    .into_iter()
                    .find(|name| view.is_output(name))?,
                heads: size(3)?,
                head_size: size(1)?,
                sliding: fixed,
                grows: grows && !fixed,
            })
        })
        .collect()
}

/// Inputs that are only handed on to outputs: whatever they are, nothing else changes.
pub fn handed_on(view: &GraphView) -> Vec<String> {
    let idle = |name: &str| {
        let mut readers = view.readers(name).peekable();
        // One that nothing reads may have chosen a branch that is the graph now.
        if readers.peek().is_none() {
            return false;
        }
        readers
            .all(|n| n.is("", "Identity") && view.is_output(n.output(0)) && view.readers(n.output(0)).next().is_none())
    };
    let inputs = view.graph.input.iter().map(ValueInfoProto::name);
    inputs.filter(|name| idle(name)).map(str::to_owned).collect()
}

/// How many tokens a graph takes at once, where it is made for one number only.
pub fn tokens_at_once(view: &GraphView) -> Option<i64> {
    let embeds = || view.declared_from_end(INPUTS_EMBEDS, 2);
    view.declared_from_end(INPUT_IDS, 1).or_else(embeds).filter(|n| *n > 0)
}
