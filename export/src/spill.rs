//! A converted model of more than 2 GiB: what protobuf can't hold in one file becomes external data.

use prost::Message;
use retro_onnx::{Bytes, DataLocation, MAX_MODEL_BYTES, ModelProto, StringStringEntryProto};

/// Metadata that names the file, so that reverting knows it is no file of the original.
pub const SPILLED: &str = "retro.weights_moved_to";
/// Tensors of fewer bytes stay in the model: they are shapes and scales that a loader wants to see at once.
const LEAST: usize = 1024;
/// What offsets in the file are multiples of, in bytes, so that tensors can be mapped.
const ALIGNMENT: u64 = 4096;

/// Makes the weights of a model that is too large for one file external data, in the file `name` beside it. `room`: bytes that are
/// still to be added to the model. Returns offsets in that file and what goes there, in order; nothing for a model that fits.
pub fn spill(model: &mut ModelProto, name: &str, room: usize) -> Vec<(u64, Bytes)> {
    spill_above(model, name, MAX_MODEL_BYTES.saturating_sub(room))
}

/// The same, for models of more than `most` bytes.
pub(crate) fn spill_above(model: &mut ModelProto, name: &str, most: usize) -> Vec<(u64, Bytes)> {
    if model.encoded_len() <= most {
        return Vec::new();
    }
    let mut moved = Vec::new();
    let mut at = 0u64;
    for tensor in model.graph.iter_mut().flat_map(|g| &mut g.initializer) {
        let Some(raw) = tensor.raw_data.take_if(|r| r.len() >= LEAST) else {
            continue;
        };
        tensor.external_data = [
            ("location", name.to_owned()),
            ("offset", at.to_string()),
            ("length", raw.len().to_string()),
        ]
        .into_iter()
        .map(|(key, value)| StringStringEntryProto::new(key, value))
        .collect();
        tensor.data_location = Some(DataLocation::External.into());
        let end = at + raw.len() as u64;
        moved.push((at, raw));
        at = end.next_multiple_of(ALIGNMENT);
    }
    model.set_metadata(SPILLED, name);
    moved
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gqa_model;

    #[test]
    fn weights_move_only_when_they_must() {
        let mut model = gqa_model(1);
        assert!(spill(&mut model, "m.data", 0).is_empty());
        assert_eq!(model, gqa_model(1));
        let moved = spill_above(&mut model, "m.data", 9000);
        assert_eq!(
            moved.iter().map(|(at, b)| (*at, b.len())).collect::<Vec<_>>(),
            [(0, 1280), (4096, 8192)]
        );
        assert!(model.encoded_len() < 4000);
        let tensor = &model.graph.as_ref().unwrap().initializer[3];
        assert!(tensor.is_external() && tensor.raw_data.is_none());
        assert_eq!(tensor.external_data[1].value(), "4096");
    }
}
