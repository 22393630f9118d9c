//! Shape inference: what the host may know about the outputs before it runs.

use std::ffi::CStr;
use std::ptr;

use ort_sys::OrtShapeInferContext;

use super::Result;
use super::api::{api, ort};

pub struct ShapeContext(pub(super) *mut OrtShapeInferContext);

impl ShapeContext {
    /// Gives an output the element type and shape (symbolic dimensions kept) of an input.
    pub fn copy(&self, input: usize, output: usize) -> Result<()> {
        let mut info = ptr::null_mut();
        ort!(ShapeInferContext_GetInputTypeShape(self.0, input, &mut info))?;
        // `info` is borrowed from the host: it is not ours to release.
        if info.is_null() {
            return Ok(());
        }
        ort!(ShapeInferContext_SetOutputTypeShape(self.0, output, info))
    }

    /// As [`Self::copy`], with the last dimension replaced; -1 means that it is not known, and gives it a symbol.
    /// `names` are symbols for leading dimensions that are neither known nor named; where they do not reach, the output
    /// is left without a shape.
    pub fn copy_with_last(&self, input: usize, output: usize, last: i64, names: &[&CStr]) -> Result<()> {
        let mut info = ptr::null_mut();
        ort!(ShapeInferContext_GetInputTypeShape(self.0, input, &mut info))?;
        let mut dims = dims(info)?;
        let rank = dims.len();
        let Some(d) = dims.last_mut() else { return Ok(()) };
        *d = last;
        let mut symbols = vec![ptr::null(); rank];
        ort!(GetSymbolicDimensions(info, symbols.as_mut_ptr(), rank))?;
        let mut element = ort_sys::ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        ort!(GetTensorElementType(info, &mut element))?;
        if let Some(s) = symbols.last_mut() {
            *s = if last < 0 {
                c"RetroAttention_width".as_ptr()
            } else {
                c"".as_ptr()
            };
        }
        // A dimension that is neither known nor named would be written as the number -1, which shape inference of a
        // later Reshape takes for a second "whatever is left".
        for axis in 0..rank - 1 {
            // SAFETY: the host gave a null pointer or a string of its own that lives as long as `info`.
            let named = !symbols[axis].is_null() && unsafe { *symbols[axis] } != 0;
            if dims[axis] < 0 && !named {
                let Some(name) = names.get(axis) else { return Ok(()) };
                symbols[axis] = name.as_ptr();
            }
        }
        let mut made = ptr::null_mut();
        ort!(CreateTensorTypeAndShapeInfo(&mut made))?;
        let result = ort!(SetTensorElementType(made, element))
            .and_then(|()| ort!(SetDimensions(made, dims.as_ptr(), rank)))
            .and_then(|()| ort!(SetSymbolicDimensions(made, symbols.as_mut_ptr(), rank)))
            .and_then(|()| ort!(ShapeInferContext_SetOutputTypeShape(self.0, output, made)));
        // SAFETY: `made` came from CreateTensorTypeAndShapeInfo and is released once; the host copied it.
        unsafe { ((*api()).ReleaseTensorTypeAndShapeInfo)(made) };
        result
    }

    /// An integer attribute of the node.
    pub fn int_attribute(&self, name: &CStr) -> Result<i64> {
        let mut attribute = ptr::null();
        ort!(ShapeInferContext_GetAttribute(self.0, name.as_ptr(), &mut attribute))?;
        let (mut value, mut size) = (0i64, 0);
        ort!(ReadOpAttr(
            attribute,
            ort_sys::OrtOpAttrType::ORT_OP_ATTR_INT,
            (&raw mut value).cast(),
            size_of::<i64>(),
            &mut size
        ))?;
        Ok(value)
    }

    /// Dimensions of an input, -1 where symbolic; empty when unknown.
    pub fn dims(&self, input: usize) -> Result<Vec<i64>> {
        let mut info = ptr::null_mut();
        ort!(ShapeInferContext_GetInputTypeShape(self.0, input, &mut info))?;
        dims(info)
    }
}

fn dims(info: *const ort_sys::OrtTensorTypeAndShapeInfo) -> Result<Vec<i64>> {
    if info.is_null() {
        return Ok(Vec::new());
    }
    let mut rank = 0;
    ort!(GetDimensionsCount(info, &mut rank))?;
    let mut dims = vec![0; rank];
    ort!(GetDimensions(info, dims.as_mut_ptr(), rank))?;
    Ok(dims)
}
