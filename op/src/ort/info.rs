//! What a kernel may ask when it is created: the node's attributes.

use std::ffi::{CStr, CString};
use std::ptr;

use ort_sys::{OrtKernelInfo, OrtLoggingLevel};

use super::api::{api, ort};
use super::{Error, Result, Tensor};

/// A node's kernel info, valid during kernel creation.
pub struct Info(pub(super) *const OrtKernelInfo);

fn c_name(name: &str) -> Result<CString> {
    CString::new(name).map_err(|_| Error::runtime(format!("attribute name {name:?} has a NUL byte")))
}

/// ORT answers the same code for an absent attribute and for one of another type; only its text tells them apart.
fn absent(error: &Error) -> bool {
    let m = error.message();
    m.contains("No attribute with name") || m.contains("No attribute with this name") || m.contains("not found")
}

fn optional<T>(name: &str, kind: &str, value: Result<T>) -> Result<Option<T>> {
    match value {
        Ok(v) => Ok(Some(v)),
        Err(e) if absent(&e) => Ok(None),
        Err(e) => Err(Error::invalid(format!("attribute {name} must be {kind}: {e}"))),
    }
}

impl Info {
    /// An integer attribute; `None` when the node lacks it.
    pub fn int(&self, name: &str) -> Result<Option<i64>> {
        let c = c_name(name)?;
        let mut v = 0;
        optional(
            name,
            "an integer",
            ort!(KernelInfoGetAttribute_int64(self.0, c.as_ptr(), &mut v)).map(|()| v),
        )
    }

    /// A float attribute; `None` when the node lacks it.
    pub fn float(&self, name: &str) -> Result<Option<f32>> {
        let c = c_name(name)?;
        let mut v = 0.0;
        optional(
            name,
            "a float",
            ort!(KernelInfoGetAttribute_float(self.0, c.as_ptr(), &mut v)).map(|()| v),
        )
    }

    /// A string attribute; `None` when the node lacks it.
    pub fn string(&self, name: &str) -> Result<Option<String>> {
        let c = c_name(name)?;
        let mut len = 0;
        let size = ort!(KernelInfoGetAttribute_string(
            self.0,
            c.as_ptr(),
            ptr::null_mut(),
            &mut len
        ));
        let Some(()) = optional(name, "a string", size)? else {
            return Ok(None);
        };
        let mut bytes = vec![0u8; len];
        ort!(KernelInfoGetAttribute_string(
            self.0,
            c.as_ptr(),
            bytes.as_mut_ptr().cast(),
            &mut len
        ))?;
        // The host's terminator.
        bytes.pop();
        if bytes.contains(&0) {
            return Err(Error::invalid(format!(
                "attribute {name} has a NUL byte inside its text"
            )));
        }
        String::from_utf8(bytes)
            .map(Some)
            .map_err(|_| Error::invalid(format!("attribute {name} is not UTF-8 text")))
    }

    /// Whether the node has an attribute of this name, whatever its type. A host names no attributes: it can only be
    /// asked.
    pub fn has_attribute(&self, name: &str) -> Result<bool> {
        let c = c_name(name)?;
        let mut v = 0;
        match ort!(KernelInfoGetAttribute_int64(self.0, c.as_ptr(), &mut v)) {
            Ok(()) => Ok(true),
            Err(e) => Ok(!absent(&e)),
        }
    }

    /// Input slots of the node.
    fn input_count(&self) -> Result<usize> {
        let mut count = 0;
        ort!(KernelInfo_GetInputCount(self.0, &mut count))?;
        Ok(count)
    }

    /// An input whose value is the same in every call, a weight; `None` for others, and for slots that the node does not
    /// have. It lives as long as the kernel.
    pub fn constant_input(&self, index: usize) -> Result<Option<Tensor>> {
        if index >= self.input_count()? {
            return Ok(None);
        }
        let (mut constant, mut value) = (0, ptr::null());
        ort!(KernelInfoGetConstantInput_tensor(
            self.0,
            index,
            &mut constant,
            &mut value
        ))?;
        Ok((constant != 0 && !value.is_null()).then_some(Tensor(value.cast_mut())))
    }

    /// Whether the node names an input in this slot.
    pub fn has_input(&self, index: usize) -> Result<bool> {
        if index >= self.input_count()? {
            return Ok(false);
        }
        let mut len = 0;
        ort!(KernelInfo_GetInputName(self.0, index, ptr::null_mut(), &mut len))?;
        // The terminator alone is the empty name of what is left out.
        Ok(len > 1)
    }

    /// Name of the node, for messages; empty when the model gives none.
    pub fn node_name(&self) -> Result<String> {
        let mut len = 0;
        ort!(KernelInfo_GetNodeName(self.0, ptr::null_mut(), &mut len))?;
        let mut bytes = vec![0u8; len];
        ort!(KernelInfo_GetNodeName(self.0, bytes.as_mut_ptr().cast(), &mut len))?;
        Ok(CStr::from_bytes_until_nul(&bytes)
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default())
    }

    /// Number of the device that the kernel's memory is on.
    pub fn device(&self) -> Result<usize> {
        let (mut allocator, mut memory, mut id) = (ptr::null_mut(), ptr::null(), 0);
        ort!(KernelInfoGetAllocator(
            self.0,
            ort_sys::OrtMemType::OrtMemTypeDefault,
            &mut allocator
        ))?;
        let named =
            ort!(AllocatorGetInfo(allocator, &mut memory)).and_then(|()| ort!(MemoryInfoGetId(memory, &mut id)));
        // SAFETY: the allocator came from KernelInfoGetAllocator and is released once; the arena behind it lives on.
        unsafe { ((*api()).ReleaseAllocator)(allocator) };
        named?;
        usize::try_from(id).map_err(|_| Error::runtime(format!("the host names device {id}")))
    }

    /// Writes a warning to the host's log.
    pub fn warn(&self, message: &str) -> Result<()> {
        let mut logger = ptr::null();
        ort!(KernelInfo_GetLogger(self.0, &mut logger))?;
        let message = CString::new(message.replace('\0', "\\0")).unwrap_or_default();
        ort!(Logger_LogMessage(
            logger,
            OrtLoggingLevel::ORT_LOGGING_LEVEL_WARNING,
            message.as_ptr(),
            c"op/src".as_ptr().cast(),
            0,
            c"RetroAttention".as_ptr(),
        ))
    }
}
