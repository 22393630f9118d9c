//! What keeps a program from running models, and ONNX Runtime's errors among it.

use std::{
    ffi::CStr,
    fmt::{self, Display},
    io,
    path::PathBuf,
};

use ort::ErrorCode;

use crate::library::{ONNX_RUNTIME, RUNTIME_VARIABLE};

/// An error of ONNX Runtime: its code, and its message in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrtError {
    /// What kind of failure it is.
    pub code: ErrorCode,
    /// For people alone: its words change with the version.
    pub message: String,
}

impl Display for OrtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for OrtError {}

/// The builder that some errors carry cannot leave the thread; it is dropped.
impl<R> From<ort::Error<R>> for OrtError {
    fn from(error: ort::Error<R>) -> Self {
        Self {
            code: error.code(),
            message: one_line(&error.message()),
        }
    }
}

/// What keeps a program from running models. Each is one line that says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Error {
    /// A call of ONNX Runtime failed.
    #[error("{0}")]
    Ort(#[from] OrtError),

    #[error("{option} names no file: {path}")]
    NoFile { option: &'static str, path: PathBuf },

    #[error("cannot open {path}: {error}")]
    Open { path: PathBuf, error: io::Error },

    #[error("no ONNX Runtime is found ({0}); {hint}", hint = hint())]
    NoRuntime(String),

    #[error("cannot use ONNX Runtime {path}: {reason}; {hint}", hint = hint())]
    UnusableRuntime { path: PathBuf, reason: String },

    #[error("cannot start ONNX Runtime {path}: {error}")]
    Start { path: PathBuf, error: OrtError },

    #[error(
        "this ONNX Runtime has no CUDA execution provider: set {RUNTIME_VARIABLE} to one that has (libonnxruntime.so of the \
         package onnxruntime-gpu), or use --device cpu"
    )]
    NoCuda,

    #[error("--device cuda is for Linux; on this system use --device cpu")]
    NotLinux,

    #[error("the CUDA execution provider does not load: {0}")]
    Provider(OrtError),

    #[error("no device of number {0}")]
    DeviceNumber(usize),

    #[error("ONNX Runtime does not say where nodes run: {0}")]
    Placement(OrtError),

    /// A node that does the work would run on the CPU.
    #[error("node {name:?} ({op_type}) has no CUDA kernel for its types and would run on {provider}: {advice}")]
    NotOnGpu {
        name: String,
        op_type: String,
        provider: String,
        advice: &'static str,
    },

    #[error("there is no NVIDIA driver on this machine (libcuda.so.1 is not found); use --device cpu")]
    NoDriver,

    #[error("no GPU {id}: the driver knows {count}; {reason}")]
    NoSuchGpu { id: usize, count: i32, reason: String },

    #[error("the NVIDIA driver gives no GPU {id} ({reason}); use --device cpu")]
    NoGpu { id: usize, reason: String },

    /// A call of the driver failed.
    #[error("{call} failed: {reason}")]
    Driver { call: &'static str, reason: String },

    #[error("no {bytes} bytes on GPU {id}: {reason}")]
    GpuMemory { id: usize, bytes: usize, reason: String },

    #[error("no {bytes} bytes of page-locked memory: {reason}")]
    PinnedMemory { bytes: usize, reason: String },

    #[error("the tensor lies on {device} {number}, not on GPU {expected}")]
    OtherDevice {
        device: String,
        number: i32,
        expected: usize,
    },

    #[error("a tensor of strings has no memory on a GPU")]
    Strings,

    /// A range of bytes that a buffer does not have.
    #[error("{bytes} bytes from {offset} on exceed a buffer of {size}")]
    OutOfRange { offset: usize, bytes: usize, size: usize },

    #[error("a copy between GPUs")]
    TwoGpus,

    #[error("a copy between places that overlap")]
    Overlap,
}

impl<R> From<ort::Error<R>> for Error {
    fn from(error: ort::Error<R>) -> Self {
        Self::Ort(error.into())
    }
}

fn hint() -> String {
    format!(
        "set {RUNTIME_VARIABLE}=PATH/{ONNX_RUNTIME} (of pip's onnxruntime, or what scripts/onnxruntime finds or fetches)"
    )
}

/// ONNX Runtime's messages run over several lines; ours are one line.
pub fn one_line(error: &dyn Display) -> String {
    let text = error.to_string();
    let lines: Vec<&str> = text
        .split(['\n', '\r'])
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    lines.join(" ")
}

/// A status of ONNX Runtime's C API, just returned to the caller, as a result. It is released.
///
/// # Errors
/// When the status is one of a failure.
pub fn check(status: ort_sys::OrtStatusPtr) -> Result<(), OrtError> {
    if status.0.is_null() {
        return Ok(());
    }
    let api = ort::api();
    // SAFETY: a status that is not null is ours; its message lives until it is released, which is done once, here.
    let (code, message) = unsafe {
        let code = (api.GetErrorCode)(status.0);
        let text = CStr::from_ptr((api.GetErrorMessage)(status.0))
            .to_string_lossy()
            .into_owned();
        (api.ReleaseStatus)(status.0);
        (code, text)
    };
    Err(OrtError {
        code: code.into(),
        message: one_line(&message),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_one_line() {
        assert_eq!(one_line(&"a\n  b\r\n\nc"), "a b c");
    }
}
