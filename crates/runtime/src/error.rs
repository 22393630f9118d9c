//! ONNX Runtime's errors as ours.

use std::{ffi::CStr, fmt::Display};

use anyhow::{Result, anyhow};

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
pub fn check(status: ort_sys::OrtStatusPtr) -> Result<()> {
    if status.0.is_null() {
        return Ok(());
    }
    let api = ort::api();
    // SAFETY: a status that is not null is ours; its message lives until it is released, which is done once, here.
    let message = unsafe {
        let text = CStr::from_ptr((api.GetErrorMessage)(status.0))
            .to_string_lossy()
            .into_owned();
        (api.ReleaseStatus)(status.0);
        text
    };
    Err(anyhow!("{}", one_line(&message)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_one_line() {
        assert_eq!(one_line(&"a\n  b\r\n\nc"), "a b c");
    }
}
