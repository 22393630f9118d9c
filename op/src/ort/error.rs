//! One error type: a code that hosts can act on and one line that says what is wrong.

use std::fmt;

use ort_sys::OrtErrorCode;

#[derive(Debug)]
pub struct Error {
    code: OrtErrorCode,
    message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The caller broke the operator's contract (reported as `ORT_INVALID_ARGUMENT`).
    pub fn invalid(message: impl Into<String>) -> Self {
        Self {
            code: OrtErrorCode::ORT_INVALID_ARGUMENT,
            message: message.into(),
        }
    }

    /// The host or the machine failed (reported as `ORT_RUNTIME_EXCEPTION`).
    pub fn runtime(message: impl Into<String>) -> Self {
        Self {
            code: OrtErrorCode::ORT_RUNTIME_EXCEPTION,
            message: message.into(),
        }
    }

    pub(crate) fn with_code(code: OrtErrorCode, message: String) -> Self {
        Self { code, message }
    }

    pub fn code(&self) -> OrtErrorCode {
        self.code
    }

    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// `Err(Error::invalid(format!(...)))` unless the condition holds.
macro_rules! require {
    ($cond:expr, $($message:tt)+) => {
        match $cond {
            true => {}
            // An unordered comparison (a NaN) is false as well.
            false => return Err($crate::ort::Error::invalid(format!($($message)+))),
        }
    };
}
pub(crate) use require;
