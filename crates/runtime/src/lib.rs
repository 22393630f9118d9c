//! What every program that runs models needs before it has one: ONNX Runtime and the operator's plugin, found and
//! loaded, and the device to run on.

#![warn(missing_docs)]

pub mod device;
mod error;
pub mod gpu;
mod library;
mod telemetry;

/// The result of this crate's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

pub use device::Device;
pub use error::{Error, OrtError, check, one_line};
pub use library::{PLUGIN, PLUGIN_VARIABLE, RUNTIME_VARIABLE, Runtime, alone, find_plugin};
pub use telemetry::{TELEMETRY_VARIABLE, disable_telemetry};
