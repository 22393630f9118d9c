//! What was not kept as the file has it.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    initializer::{Content, Initializer},
    source::Source,
};

/// Tensors of a type that were rounded to codes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rounded {
    /// Their type in the file.
    pub from: String,
    /// Bits of a code.
    pub bits: i64,
    /// How many.
    pub tensors: usize,
}

/// Those of a graph, by type.
pub fn rounded(source: &Source, initializers: &[Initializer]) -> Vec<Rounded> {
    let mut found: BTreeMap<(String, i64), BTreeSet<&str>> = BTreeMap::new();
    for init in initializers {
        let Content::Packed(packed) = &init.content else {
            continue;
        };
        let parts = packed.parts.iter().map(|part| part.tensor.as_str());
        for tensor in parts.filter(|tensor| source.code_layout(tensor).is_none()) {
            if let Some(from) = source.type_name(tensor) {
                found.entry((from, packed.format.bits())).or_default().insert(tensor);
            }
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
