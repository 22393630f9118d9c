//! Values as a report shows them.

use retro_onnx::{Dimension, graph::GraphView};

/// A name with its declared shape: "past.0 [batch, 8, past, 64]".
pub fn shown(view: &GraphView, name: &str) -> String {
    let dims = view.declared_dims(name).unwrap_or_default().iter();
    let size = |d: &Dimension| match (d.fixed(), d.symbol()) {
        (Some(n), _) => n.to_string(),
        (None, Some(name)) if !name.is_empty() => name.to_owned(),
        _ => "?".to_owned(),
    };
    format!("{name} [{}]", dims.map(size).collect::<Vec<_>>().join(", "))
}
