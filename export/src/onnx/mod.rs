//! ONNX files: the messages, reading by mapping, writing by streaming, external data.
//!
//! A model of any size is read and written with almost no heap: its weights are [`bytes::Bytes`] that point into the
//! mapped file, and go from there straight to the output.

mod build;
mod external;
mod messages;
mod past_cache;
mod read;
mod stream;
mod temporary;
mod write;

pub use bytes::Bytes;
pub use external::{ExternalFile, external_files};
pub(crate) use external::{for_each_tensor, inside, locations, rename_locations, stay_inside};
pub use messages::*;
pub(crate) use read::map_file;
pub use read::{LoadedModel, folder_of, read_bytes, read_model};
pub(crate) use stream::Sink;
pub(crate) use temporary::{NewFolder, Staged, is_temporary, new_file_beside, remove_abandoned};
pub(crate) use write::{Content, persist, sync_folder, write_placed};
pub use write::{MAX_MODEL_BYTES, write_model};
