//! Safe wrapper over the ONNX Runtime C API: calls into the host, and its callbacks.

mod aligned_weights;
mod api;
mod context;
mod custom_op;
mod error;
mod info;
mod invoked_op;
mod shape;
mod tensor;

pub use aligned_weights::AlignedWeights;
pub use api::host_version;
pub use context::Context;
pub use custom_op::{Operator, Port, Registry, register};
pub(crate) use error::require;
pub use error::{Error, Result};
pub use info::Info;
pub use invoked_op::{Attribute, InvokedOp};
pub use ort_sys::ONNXTensorElementDataType as DataType;
pub use shape::ShapeContext;
pub use tensor::{DeviceTensor, Elements, OwnedScalar, Plain, Tensor};

/// Entry for [`crate::RegisterCustomOps`]: takes the host's table, then runs `body`.
///
/// # Safety
/// `base` is the `OrtApiBase` that ONNX Runtime passes to `RegisterCustomOps`.
pub(crate) unsafe fn enter(
    base: *const ort_sys::OrtApiBase,
    body: impl FnOnce() -> Result<()>,
) -> ort_sys::OrtStatusPtr {
    // SAFETY: by this function's contract.
    match unsafe { api::negotiate(base) } {
        Ok(()) => api::guard(body),
        Err(status) => status,
    }
}
