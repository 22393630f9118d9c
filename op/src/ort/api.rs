//! The host's function table. The plugin links no ONNX Runtime: whoever loads it hands over its own `OrtApi`.

use std::ffi::{CStr, CString};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use ort_sys::{OrtApi, OrtApiBase, OrtErrorCode, OrtStatusPtr};

use super::{Error, Result};

static API: AtomicPtr<OrtApi> = AtomicPtr::new(ptr::null_mut());
static API_VERSION: AtomicU32 = AtomicU32::new(0);
static HOST_VERSION: AtomicU32 = AtomicU32::new(0);

/// The oldest host on which the plugin is tested, as an API version (the minor version of ONNX Runtime).
const MIN_API: u32 = 22;

/// The host's function table: a raw pointer, never a reference, because an older host's table is shorter than our struct.
/// Every slot that the plugin reads exists since [`MIN_API`].
pub(super) fn api() -> *const OrtApi {
    API.load(Ordering::Acquire)
}

/// Version of the table in use: the host's or ours, whichever is older.
pub(super) fn api_version() -> u32 {
    API_VERSION.load(Ordering::Acquire)
}

/// The host's own version: the minor version of ONNX Runtime 1.x.
pub fn host_version() -> u32 {
    HOST_VERSION.load(Ordering::Acquire)
}

/// Where the table of [`MIN_API`] ends: a slot from here on is not there in every host.
pub(super) const TABLE_END: usize = std::mem::offset_of!(OrtApi, GetTensorSizeInBytes);

/// Calls a function of the host's table that returns a status. A slot newer than [`MIN_API`] does not compile.
macro_rules! ort {
    ($function:ident($($arg:expr),* $(,)?)) => {{
        const {
            assert!(
                std::mem::offset_of!(ort_sys::OrtApi, $function) < $crate::ort::api::TABLE_END,
                "this function is newer than the oldest host"
            )
        };
        // SAFETY: the table was checked by `negotiate` before any callback can run, and the slot exists since MIN_API;
        // the arguments are valid for the call by the contract of the wrapper that makes it.
        $crate::ort::api::check(unsafe { ((*$crate::ort::api::api()).$function)($($arg),*) })
    }};
}
pub(super) use ort;

/// Takes the host's table at the version that both sides know.
///
/// # Safety
/// `base` is the `OrtApiBase` that ONNX Runtime passes to `RegisterCustomOps`.
pub(super) unsafe fn negotiate(base: *const OrtApiBase) -> std::result::Result<(), OrtStatusPtr> {
    // SAFETY: `base` is valid by the function's contract, and its two functions exist in every version.
    let (version, minor) = unsafe {
        let version = CStr::from_ptr(((*base).GetVersionString)())
            .to_string_lossy()
            .into_owned();
        let minor = version
            .split('.')
            .nth(1)
            .and_then(|s| s.parse::<u32>().ok())
            .unwrap_or(0);
        (version, minor)
    };
    if minor < MIN_API {
        let message = format!("RetroAttention needs ONNX Runtime 1.{MIN_API} or newer, this is {version}");
        let message = CString::new(message).unwrap_or_default();
        // SAFETY: version 1 of the table exists in every host, and CreateStatus is its first slot.
        return Err(unsafe {
            let oldest = ((*base).GetApi)(1);
            (*ptr::addr_of!((*oldest).CreateStatus))(OrtErrorCode::ORT_FAIL, message.as_ptr())
        });
    }
    let version = minor.min(ort_sys::ORT_API_VERSION);
    // SAFETY: a host returns its table for every version up to its own.
    let table = unsafe { ((*base).GetApi)(version) };
    API.store(table.cast_mut(), Ordering::Release);
    API_VERSION.store(version, Ordering::Release);
    HOST_VERSION.store(minor, Ordering::Release);
    Ok(())
}

/// Takes a status over: null is success, anything else becomes an [`Error`] and is released.
pub(super) fn check(status: OrtStatusPtr) -> Result<()> {
    if status.0.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null status is valid until released, which happens once, here.
    unsafe {
        let message = CStr::from_ptr(((*api()).GetErrorMessage)(status.0))
            .to_string_lossy()
            .into_owned();
        let code = ((*api()).GetErrorCode)(status.0);
        ((*api()).ReleaseStatus)(status.0);
        Err(Error::with_code(code, message))
    }
}

/// Runs the body of a callback: neither an error nor a panic crosses the C boundary.
pub(super) fn guard(body: impl FnOnce() -> Result<()>) -> OrtStatusPtr {
    let error = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return OrtStatusPtr(ptr::null_mut()),
        Ok(Err(error)) => error,
        Err(panic) => {
            let what = panic
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            Error::runtime(format!("internal error in RetroAttention, please report it: {what}"))
        }
    };
    let message = CString::new(error.message().replace('\0', "\\0")).unwrap_or_default();
    // SAFETY: the table is in place (`negotiate`), and the message lives through the call.
    unsafe { ((*api()).CreateStatus)(error.code(), message.as_ptr()) }
}
