//! ONNX files: the messages, reading by mapping, writing by streaming, external data.
//!
//! A model of any size is read and written with almost no heap: its weights are [`bytes::Bytes`] that point into the
//! mapped file, and go from there straight to the output.

mod constructors;
mod direct_write;
mod external_data;
pub mod graph;
mod messages;
mod names;
mod read;
mod stream;
mod temporary;
mod write;

pub use bytes::Bytes;
pub use external_data::{
    ExternalFile, external_files, for_each_tensor, inside, locations, rename_locations, stay_inside,
};
pub use messages::*;
pub use names::FreshNames;
pub use read::{LoadedModel, folder_of, map_file, read_bytes, read_model};
pub use stream::Sink;
pub use temporary::{NewFolder, Staged, is_temporary, new_file_beside, remove_abandoned};
pub use write::{Content, MAX_MODEL_BYTES, persist, sync_folder, write_model, write_placed};
