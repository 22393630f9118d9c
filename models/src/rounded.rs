//! What was not kept as the file has it.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    initializer::{Content, Initializer},
    quantised::Packed,
    source::Source,
};

/// Tensors of a type that were rounded to codes, or not kept as codes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rounded {
    /// Their type in the file.
    pub from: String,
    /// Bits of a code; `None`: they became f32.
    pub bits: Option<i64>,
    /// How many.
    pub tensors: usize,
}

/// Those of a graph, by type.
pub fn rounded(source: &Source, initializers: &[Initializer]) -> Vec<Rounded> {
    let mut found: BTreeMap<(String, Option<i64>), BTreeSet<&str>> = BTreeMap::new();
    let mut add = |tensor, bits| {
        if let Some(from) = source.type_name(tensor) {
            found.entry((from, bits)).or_default().insert(tensor);
        }
    };
    for init in initializers {
        match &init.content {
            Content::Packed(Packed { parts, format, .. }) => {
                let parts = parts.iter().map(|part| part.tensor.as_str());
                parts
                    .filter(|tensor| source.code_layout(tensor).is_none())
                    .for_each(|tensor| add(tensor, Some(format.bits())));
            }
            Content::Copy(tensor) if source.code_layout(tensor).is_some() => add(tensor, None),
            _ => {}
        }
    }
    let found = found.into_iter();
    found
        .map(|((from, bits), tensors)| Rounded {
            from,
            bits,
            tensors: tensors.len(),
        })
        .collect()
}
