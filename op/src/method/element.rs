//! Element types of caches and activations. All arithmetic is in f32.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::simd::Simd;

pub trait Element: crate::ort::Plain + Copy + Default + PartialEq + Send + Sync {
    fn to_f32(self) -> f32;
    fn from_f32(v: f32) -> Self;
    /// A vector of elements in f32.
    ///
    /// # Safety
    /// `p` points to `S::LANES` elements, and the machine has the instruction set of `S`.
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    /// `source` in f32: itself, or converted into the head of `buffer`, which is at least as long.
    fn widen<'a>(source: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32];
    /// `source` in f32 into `target`, of the same length.
    fn widen_into(source: &[Self], target: &mut [f32]);
    /// Rounds `source` into `target`, of the same length.
    fn narrow(source: &[f32], target: &mut [Self]);
}

impl Element for f32 {
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(v: f32) -> Self {
        v
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: passed on.
        unsafe { S::load(p) }
    }
    #[inline]
    fn widen<'a>(source: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        source
    }
    fn widen_into(source: &[Self], target: &mut [f32]) {
        target.copy_from_slice(source);
    }
    fn narrow(source: &[f32], target: &mut [Self]) {
        target.copy_from_slice(source);
    }
}

impl Element for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(v: f32) -> Self {
        f16::from_f32(v)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: passed on.
        unsafe { S::load_half(p) }
    }
    #[inline]
    fn widen<'a>(source: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32] {
        let target = &mut buffer[..source.len()];
        source.convert_to_f32_slice(target);
        target
    }
    fn widen_into(source: &[Self], target: &mut [f32]) {
        source.convert_to_f32_slice(target);
    }
    fn narrow(source: &[f32], target: &mut [Self]) {
        target.convert_from_f32_slice(source);
    }
}
