//! Where a converted model goes: a file with its weights, or a folder with all that lies beside the model.
//!
//! [`Output::plan`] checks the place before the work starts. [`write()`] puts everything under temporary names and then in
//! place, so that at every moment there is the old model with its weights or the new one with its own.

mod copied_weights;
mod error;
mod external;
mod parts;
mod paths;
mod plan;
mod stage;
mod stale;
mod write;
mod write_file;
mod write_folder;

pub use copied_weights::{copied_weights, record_copied_weights};
pub use error::Error;
pub use external::ExternalMode;
pub use parts::{FolderFiles, Parts};
pub use plan::Output;
pub use write::write;
