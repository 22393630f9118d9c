//! ONNX Runtime's telemetry. Builds of Microsoft's (the wheels on PyPI: 1.24 doesn't, 1.31 does) write a device id and
//! a database of events into the user's cache folder when they start, unless a variable forbids it.

use std::env;

/// With the value 1, ONNX Runtime records nothing. It knows no other value.
pub const TELEMETRY_VARIABLE: &str = "ORT_DISABLE_TELEMETRY";

/// Forbids telemetry to the ONNX Runtime that this process loads, and to the programs that it starts. A value that the
/// user has set stays.
///
/// # Safety
/// No other thread runs yet: changing the environment while another thread reads it is undefined behaviour. Make it the
/// first statement of `main`.
pub unsafe fn disable_telemetry() {
    if env::var_os(TELEMETRY_VARIABLE).is_none_or(|value| value.is_empty()) {
        // SAFETY: as this function asks, this is the only thread.
        unsafe { env::set_var(TELEMETRY_VARIABLE, "1") };
    }
}
