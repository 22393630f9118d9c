//! The fixed rotation of keys and queries: random signs, then Hadamard matrices.

/// Signs come from the fraction of pi, in this many words of 64 bits; they repeat behind.
const SIGN_WORDS: [u64; 4] = [
    0x243F_6A88_85A3_08D3,
    0x1319_8A2E_0370_7344,
    0xA409_3822_299F_31D0,
    0x082E_FA98_EC4E_6C89,
];
const SIGN_PERIOD: usize = 64 * SIGN_WORDS.len();

const SIGNS: [f32; SIGN_PERIOD] = {
    let mut signs = [1.0; SIGN_PERIOD];
    let mut d = 0;
    while d < SIGN_PERIOD {
        if SIGN_WORDS[d / 64] >> (63 - d % 64) & 1 == 1 {
            signs[d] = -1.0;
        }
        d += 1;
    }
    signs
};

/// Rotates a head: signs, and in each of the descending powers of two that its size is split into a Hadamard matrix in
/// Sylvester's order, scaled to be orthogonal.
#[inline(always)]
pub(super) fn rotate(head: &mut [f32]) {
    for part in head.chunks_mut(SIGN_PERIOD) {
        part.iter_mut().zip(&SIGNS).for_each(|(x, sign)| *x *= sign);
    }
    let mut rest = head;
    while !rest.is_empty() {
        let size = 1 << rest.len().ilog2();
        let (part, behind) = rest.split_at_mut(size);
        hadamard(part);
        let scale = 1.0 / (size as f32).sqrt();
        part.iter_mut().for_each(|x| *x *= scale);
        rest = behind;
    }
}

/// The fast Walsh-Hadamard transform of a power of two of elements, in place.
#[inline(always)]
fn hadamard(part: &mut [f32]) {
    let mut half = 1;
    let (eights, rest) = part.as_chunks_mut::<8>();
    if rest.is_empty() {
        // The first three rounds stay within eight neighbours.
        for x in eights {
            *x = round_of_eight::<1>(x);
            *x = round_of_eight::<2>(x);
            *x = round_of_eight::<4>(x);
        }
        half = 8;
    }
    while half < part.len() {
        for pair in part.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// Sums at the places whose bit `H` is 0, differences at the others.
#[inline(always)]
fn round_of_eight<const H: usize>(x: &[f32; 8]) -> [f32; 8] {
    std::array::from_fn(|i| x[i ^ H] + if i & H == 0 { x[i] } else { -x[i] })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The matrix of docs/method.md, applied as it is written there.
    fn by_definition(head: &[f32]) -> Vec<f64> {
        let sign = |d: usize| {
            if SIGN_WORDS[d / 64 % 4] >> (63 - d % 64) & 1 == 1 {
                -1.0
            } else {
                1.0
            }
        };
        let (mut out, mut start) = (Vec::new(), 0);
        while start < head.len() {
            let size = 1usize << (head.len() - start).ilog2();
            for a in 0..size {
                let terms = (0..size).map(|b| {
                    let odd = (a & b).count_ones() % 2 == 1;
                    let x = sign(start + b) * f64::from(head[start + b]);
                    if odd { -x } else { x }
                });
                out.push(terms.sum::<f64>() / (size as f64).sqrt());
            }
            start += size;
        }
        out
    }

    #[test]
    fn fast_is_the_definition_for_every_kind_of_size() {
        for d in [4, 8, 33, 64, 80, 96, 112, 128, 256, 320] {
            let head: Vec<f32> = (0..d).map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.0 - 1.0).collect();
            let mut fast = head.clone();
            rotate(&mut fast);
            for (got, want) in fast.iter().zip(by_definition(&head)) {
                assert!((f64::from(*got) - want).abs() < 2e-6, "{d}: {got} {want}");
            }
        }
    }

    #[test]
    fn signs_are_the_bits_of_pi_from_the_highest_on() {
        // 0x24 is 00100100.
        assert_eq!(SIGNS[..8], [1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]);
        let mut unit = [0.0f32; 8];
        unit[2] = 1.0;
        rotate(&mut unit);
        let r = -1.0 / 8f32.sqrt();
        assert_eq!(unit, [r, r, -r, -r, r, r, -r, -r]);
    }
}
