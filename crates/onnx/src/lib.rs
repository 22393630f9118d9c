//! ONNX files and graphs, as [ONNX's specification](https://onnx.ai/onnx/repo-docs/IR.html) has them: the messages,
//! reading by mapping, writing by streaming, external data; an index of a graph ([`graph::GraphView`]) and a builder
//! ([`GraphBuilder`]).
//!
//! A model of any size is read and written with almost no heap: its weights are [`bytes::Bytes`] that point into the
//! mapped file, and go from there straight to the output.

#![warn(missing_docs)]

mod builder;
mod constructors;
mod direct_write;
mod error;
mod external_data;
mod fresh_names;
pub mod graph;
mod messages;
mod platform;
mod read;
mod stream;
mod temporary;
mod write;

pub use builder::{GraphBuilder, NodeBuilder};
pub use bytes::Bytes;
pub use error::{Error, ExtentError};
pub use external_data::{
    ExternalFile, external_files, for_each_tensor, inside, locations, rename_locations, stay_inside,
};
pub use messages::*;
pub use platform::{leave_to_umask, write_all_at};
pub use read::{LoadedModel, folder_of, map_file, read_bytes, read_model};
pub use stream::Sink;
pub use temporary::{NewFolder, Staged, is_temporary, new_file_beside, remove_abandoned};
pub use write::{Content, MAX_MODEL_BYTES, persist, sync_folder, write_model, write_placed};
