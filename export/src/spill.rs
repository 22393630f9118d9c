//! A model of more than 2 GiB: what protobuf can't hold in one file goes to another.

use prost::Message;
use retro_onnx::{Bytes, DataLocation, MAX_MODEL_BYTES, ModelProto, StringStringEntryProto};

/// Metadata that names the file, so that the way back knows it is no file of the original.
pub const SPILLED: &str = "retro.weights_moved_to";
/// Smaller tensors stay: they are shapes and scales that a loader wants to see at once.
const LEAST: usize = 1024;
/// Where tensors begin in the file, so that they can be mapped.
const ALIGNMENT: u64 = 4096;

/// Moves the weights of a model that is too large for one file. `room`: bytes that are still to be added to it. Gives what goes
/// to the file, and where; nothing for a model that fits.
pub fn spill(model: &mut ModelProto, name: &str, room: usize) -> Vec<(u64, Bytes)> {
    spill_above(model, name, MAX_MODEL_BYTES.saturating_sub(room))
}

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
