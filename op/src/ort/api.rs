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

/// The host's function table: a raw pointer, never a reference, because an older host's table is shorter than our
/// struct. Every slot that the plugin reads exists since [`MIN_API`].
pub(super) fn api() -> *const OrtApi {
    API.load(Ordering::Acquire)
}

/// Version of the table in use: the host's or ours, whichever is older.
pub(super) fn api_version() -> u32 {
    API_VERSION.load(Ordering::Acquire)
}

/// The host's own version: the minor version of ONNX Runtime 1.x; the largest number for later major versions.
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

/// The version of ONNX Runtime in its text, `1.22.0` or `1.25.0-dev`: major and minor number.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split('.').map(|s| s.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// The API version to ask a host for, or what is wrong with its own version. The API version is the minor version of
/// ONNX Runtime 1.x; a later major version keeps offering the older tables as long as its `GetApi` returns them.
fn usable_version(text: &str) -> std::result::Result<(u32, u32), String> {
    match parse_version(text) {
        Some((1, minor)) if minor >= MIN_API => Ok((minor, minor.min(ort_sys::ORT_API_VERSION))),
        Some((major, _)) if major > 1 => Ok((u32::MAX, ort_sys::ORT_API_VERSION)),
        _ => Err(format!(
            "RetroAttention needs ONNX Runtime 1.{MIN_API} or newer, this is {text}"
        )),
    }
}

/// Takes the host's table at the version that both sides know.
///
/// # Safety
/// `base` is the `OrtApiBase` that ONNX Runtime passes to `RegisterCustomOps`.
pub(super) unsafe fn negotiate(base: *const OrtApiBase) -> std::result::Result<(), OrtStatusPtr> {
    // SAFETY: `base` is valid by the function's contract, and its two functions exist in every version.
    let text = unsafe { CStr::from_ptr(((*base).GetVersionString)()) }.to_string_lossy();
    let usable = usable_version(&text).and_then(|(host, version)| {
        // SAFETY: as above.
        let table = unsafe { ((*base).GetApi)(version) };
        if table.is_null() {
            return Err(format!(
                "RetroAttention needs version {version} of ONNX Runtime's C API, which this host ({text}) does not have"
            ));
        }
        Ok((host, version, table))
    });
    match usable {
        Ok((host, version, table)) => {
            API.store(table.cast_mut(), Ordering::Release);
            API_VERSION.store(version, Ordering::Release);
            HOST_VERSION.store(host, Ordering::Release);
            Ok(())
        }
        // SAFETY: by this function's contract.
        Err(message) => Err(unsafe { refusal(base, &message) }),
    }
}

/// A status with this message, from the oldest table that the host has; null, which ONNX Runtime takes for success with
/// no operator registered, where it has none at all.
///
/// # Safety
/// As [`negotiate`].
unsafe fn refusal(base: *const OrtApiBase, message: &str) -> OrtStatusPtr {
    let message = CString::new(message).unwrap_or_default();
    for version in [1, MIN_API, ort_sys::ORT_API_VERSION] {
        // SAFETY: `GetApi` exists in every version, and CreateStatus is the first slot of every table.
        unsafe {
            let table = ((*base).GetApi)(version);
            if !table.is_null() {
                return (*ptr::addr_of!((*table).CreateStatus))(OrtErrorCode::ORT_FAIL, message.as_ptr());
            }
        }
    }
    eprintln!("{}", message.to_string_lossy());
    OrtStatusPtr(ptr::null_mut())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_whole() {
        let ours = ort_sys::ORT_API_VERSION;
        assert_eq!(usable_version("1.22.0"), Ok((22, 22)));
        assert_eq!(usable_version("1.99.0-dev+cuda"), Ok((99, ours)));
        // The minor version says nothing about another major one.
        assert_eq!(usable_version("2.0.0"), Ok((u32::MAX, ours)));
        for old in ["1.21.9", "0.30.0", "", "one.22", "1"] {
            let error = usable_version(old).unwrap_err();
            assert!(error.contains("1.22") && error.ends_with(old), "{error}");
        }
    }

    unsafe extern "system" fn no_api(_: u32) -> *const OrtApi {
        ptr::null()
    }
    unsafe extern "system" fn version() -> *const std::ffi::c_char {
        c"2.0.0".as_ptr()
    }

    /// A host that has no table of ours is refused without reading through the null that it gives.
    #[test]
    fn a_host_without_our_table_is_refused() {
        let base = OrtApiBase {
            GetApi: no_api,
            GetVersionString: version,
        };
        // SAFETY: a whole OrtApiBase.
        assert!(unsafe { negotiate(&base) }.is_err());
    }
}
