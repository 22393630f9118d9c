//! The host's own operators, called from inside ours (`CreateOp` / `InvokeOp`).

use std::ffi::{CStr, c_int};
use std::ptr;

use super::api::{api, ort};
use super::{Context, DataType, Info, Result, Tensor};

/// An attribute of an operator that we create.
pub enum Attribute<'a> {
    Int(&'a CStr, i64),
    Float(&'a CStr, f32),
}

/// An operator of the host, bound to the execution provider of the kernel that created it.
pub struct InvokedOp(*mut ort_sys::OrtOp);

// SAFETY: ORT's kernels are stateless between calls and are run from many threads by ORT itself.
unsafe impl Send for InvokedOp {}
// SAFETY: as above.
unsafe impl Sync for InvokedOp {}

impl InvokedOp {
    /// Counts of inputs and outputs are fixed here; trailing optional inputs are passed as `None` to [`Self::invoke`].
    pub fn new(
        info: &Info,
        domain: &CStr,
        name: &CStr,
        types: &[(&CStr, DataType)],
        attributes: &[Attribute<'_>],
        inputs: c_int,
        outputs: c_int,
    ) -> Result<Self> {
        use ort_sys::OrtOpAttrType::{ORT_OP_ATTR_FLOAT, ORT_OP_ATTR_INT};
        let mut made = OwnedAttributes(Vec::new());
        for a in attributes {
            let mut p = ptr::null_mut();
            match a {
                Attribute::Int(n, v) => {
                    ort!(CreateOpAttr(
                        n.as_ptr(),
                        (&raw const *v).cast(),
                        1,
                        ORT_OP_ATTR_INT,
                        &mut p
                    ))?;
                }
                Attribute::Float(n, v) => {
                    ort!(CreateOpAttr(
                        n.as_ptr(),
                        (&raw const *v).cast(),
                        1,
                        ORT_OP_ATTR_FLOAT,
                        &mut p
                    ))?;
                }
            }
            made.0.push(p.cast_const());
        }
        let mut names: Vec<_> = types.iter().map(|t| t.0.as_ptr()).collect();
        let values: Vec<_> = types.iter().map(|t| t.1).collect();
        let mut op = ptr::null_mut();
        ort!(CreateOp(
            info.0,
            name.as_ptr(),
            domain.as_ptr(),
            1,
            names.as_mut_ptr(),
            values.as_ptr(),
            types.len() as c_int,
            made.0.as_ptr(),
            made.0.len() as c_int,
            inputs,
            outputs,
            &mut op
        ))?;
        Ok(Self(op))
    }

    /// Runs the operator. Required inputs and all outputs must be there: ORT crashes on a null one.
    pub fn invoke(&self, context: &Context, inputs: &[Option<Tensor>], outputs: &[Tensor]) -> Result<()> {
        let i: Vec<*const ort_sys::OrtValue> = inputs
            .iter()
            .map(|t| t.map_or(ptr::null(), |t| t.0.cast_const()))
            .collect();
        let o: Vec<*mut ort_sys::OrtValue> = outputs.iter().map(|t| t.0).collect();
        ort!(InvokeOp(
            context.0,
            self.0,
            i.as_ptr(),
            i.len() as c_int,
            o.as_ptr(),
            o.len() as c_int
        ))
    }
}

impl Drop for InvokedOp {
    fn drop(&mut self) {
        // SAFETY: the operator came from CreateOp and is released once.
        unsafe { ((*api()).ReleaseOp)(self.0) }
    }
}

struct OwnedAttributes(Vec<*const ort_sys::OrtOpAttr>);

impl Drop for OwnedAttributes {
    fn drop(&mut self) {
        for a in &self.0 {
            // SAFETY: each came from CreateOpAttr and is released once; CreateOp copied it.
            unsafe { ((*api()).ReleaseOpAttr)(a.cast_mut()) }
        }
    }
}
