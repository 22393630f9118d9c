//! float16 to float32, a vocabulary at a time.
//!
//! `half` calls a function for every eight numbers where the processor's instruction for them is found at run time only: 48 to 75 us for
//! 128,256 scores, a hundredth of a step, where a loop in that function takes 8.

use half::{f16, slice::HalfFloatSliceExt};

/// Numbers that are converted at once without that instruction.
const AT_ONCE: usize = 1024;

/// Little-endian numbers, as many as `to` has room for.
pub(crate) fn upcast_f16(from: &[[u8; 2]], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the processor has the instructions.
        return unsafe { with_f16c(from, to) };
    }
    by_half(from, to);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn with_f16c(from: &[[u8; 2]], to: &mut [f32]) {
    use std::arch::x86_64::{_mm_set_epi64x, _mm256_cvtph_ps, _mm256_storeu_ps};

    let (octets, rest) = from.as_chunks::<8>();
    let (wide, wide_rest) = to.as_chunks_mut::<8>();
    for (octet, to) in octets.iter().zip(wide) {
        let word = |i: usize| {
            let [a, b, c, d] = [octet[i], octet[i + 1], octet[i + 2], octet[i + 3]];
            i64::from_le_bytes([a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]])
        };
        // SAFETY: room for eight numbers.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(_mm_set_epi64x(word(4), word(0)))) };
    }
    by_half(rest, wide_rest);
}

fn by_half(from: &[[u8; 2]], to: &mut [f32]) {
    let mut part = [f16::ZERO; AT_ONCE];
    for (from, to) in from.chunks(AT_ONCE).zip(to.chunks_mut(AT_ONCE)) {
        part.iter_mut()
            .zip(from)
            .for_each(|(to, b)| *to = f16::from_le_bytes(*b));
        part[..from.len()].convert_to_f32_slice(to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_becomes_itself() {
        let all: Vec<[u8; 2]> = (0..=u16::MAX).map(u16::to_le_bytes).collect();
        // Lengths that are no multiples of eight, too.
        for count in [all.len(), all.len() - 3, 5, 0] {
            let mut wide = vec![1.0; count];
            upcast_f16(&all[..count], &mut wide);
            for (bytes, wide) in all.iter().zip(wide) {
                let expected = f16::from_le_bytes(*bytes).to_f32();
                assert!(wide.to_bits() == expected.to_bits() || (wide.is_nan() && expected.is_nan()));
            }
        }
    }
}
