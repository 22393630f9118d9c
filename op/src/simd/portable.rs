//! Arrays that the compiler turns into whatever vectors the baseline has.

use half::f16;

use super::{ROOT, implement};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 8;
type V = [f32; LANES];

#[inline(always)]
fn map(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

implement!(Portable, V, 8, {
    fn splat(x: f32) -> V = [x; LANES];
    fn load(p: *const f32) -> V = p.cast::<V>().read_unaligned();
    fn load_half(p: *const f16) -> V = p.cast::<[f16; LANES]>().read_unaligned().map(f16::to_f32);
    fn load_int(p: *const i32) -> V = p.cast::<[i32; LANES]>().read_unaligned().map(|n| n as f32);
    fn load_byte(p: *const u8) -> V = p.cast::<[u8; LANES]>().read_unaligned().map(f32::from);
    fn decode_halves(p: *const u8, zero: V, scale: V) -> [V; 2] = {
        let bytes = p.cast::<[u8; LANES]>().read_unaligned();
        [bytes.map(|b| b & 15), bytes.map(|b| b >> 4)].map(|half| Self::mul(Self::sub(half.map(f32::from), zero), scale))
    };
    fn store(p: *mut f32, v: V) = p.cast::<V>().write_unaligned(v);
    fn add(a: V, b: V) -> V = map(a, b, |x, y| x + y);
    fn sub(a: V, b: V) -> V = map(a, b, |x, y| x - y);
    fn mul(a: V, b: V) -> V = map(a, b, |x, y| x * y);
    fn fma(a: V, b: V, c: V) -> V = map(map(a, b, |x, y| x * y), c, |x, y| x + y);
    fn max(a: V, b: V) -> V = map(a, b, |x, y| if x > y { x } else { y });
    fn unless_below(x: V, limit: V, v: V) -> V = std::array::from_fn(|i| if x[i] < limit[i] { 0.0 } else { v[i] });
    fn power_of_2(n: V) -> V = n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) << 23) as u32));
    fn times_power_of_2(x: V, n: V) -> V = Self::mul(x, Self::power_of_2(n));
    fn exponent(x: V) -> V = x.map(|x| ((x.to_bits().wrapping_sub(ROOT) as i32) >> 23) as f32);
    fn sums(v: [V; 4]) -> [f32; 4] = v.map(|v| {
        let half: [f32; 4] = std::array::from_fn(|i| v[i] + v[i + 4]);
        (half[0] + half[1]) + (half[2] + half[3])
    });
    fn largest(v: V) -> f32 = v.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    fn prefetch(_p: *const u8) = ();
});
