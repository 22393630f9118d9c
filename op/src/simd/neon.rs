//! NEON.

use std::arch::aarch64::*;

use half::f16;

use super::{ROOT, implement};

#[derive(Clone, Copy)]
pub(crate) struct Neon;

implement!(Neon, float32x4_t, 4, {
    fn splat(x: f32) -> float32x4_t = vdupq_n_f32(x);
    fn load(p: *const f32) -> float32x4_t = vld1q_f32(p);
    // The conversion of four halves at once is no stable intrinsic; `half` has it one by one.
    fn load_half(p: *const f16) -> float32x4_t = vld1q_f32(p.cast::<[f16; 4]>().read_unaligned().map(f16::to_f32).as_ptr());
    fn load_int(p: *const i32) -> float32x4_t = vcvtq_f32_s32(vld1q_s32(p));
    fn load_byte(p: *const u8) -> float32x4_t = {
        let bytes = vcreate_u8(u64::from(p.cast::<u32>().read_unaligned()));
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))))
    };
    fn decode_halves(p: *const u8, zero: float32x4_t, scale: float32x4_t) -> [float32x4_t; 2] = {
        let bytes = vcreate_u8(u64::from(p.cast::<u32>().read_unaligned()));
        let halves = [vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8::<4>(bytes)];
        halves.map(|half| {
            let numbers = vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(half))));
            Self::mul(Self::sub(numbers, zero), scale)
        })
    };
    fn store(p: *mut f32, v: float32x4_t) = vst1q_f32(p, v);
    fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t = vaddq_f32(a, b);
    fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t = vsubq_f32(a, b);
    fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t = vmulq_f32(a, b);
    fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t = vfmaq_f32(c, a, b);
    fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t = vbslq_f32(vcgtq_f32(a, b), a, b);
    fn unless_below(x: float32x4_t, limit: float32x4_t, v: float32x4_t) -> float32x4_t = vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(x, limit)));
    fn power_of_2(n: float32x4_t) -> float32x4_t = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127))));
    fn times_power_of_2(x: float32x4_t, n: float32x4_t) -> float32x4_t = Self::mul(x, Self::power_of_2(n));
    fn exponent(x: float32x4_t) -> float32x4_t = {
        let bits = vsubq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(ROOT as i32));
        vcvtq_f32_s32(vshrq_n_s32::<23>(bits))
    };
    fn sums(v: [float32x4_t; 4]) -> [f32; 4] = {
        let sum = vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]));
        let mut out = [0.0; 4];
        vst1q_f32(out.as_mut_ptr(), sum);
        out
    };
    fn largest(v: float32x4_t) -> f32 = vmaxvq_f32(v);
    fn prefetch(_p: *const u8) = ();
});
