//! Rotary position embedding, as ORT's GroupQueryAttention applies it.

/// Cosines and sines of one position, `half` of each.
#[derive(Clone, Copy)]
pub struct Angles<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    /// Pairs are neighbours (2i, 2i+1) instead of halves (i, i + half).
    pub interleaved: bool,
}

/// Rotates the first `2 * half` elements of a head in place; the others pass (partial rotary).
pub fn rotate(head: &mut [f32], angles: Angles<'_>) {
    let half = angles.cos.len();
    for (i, (&c, &s)) in angles.cos.iter().zip(angles.sin).enumerate() {
        let (a, b) = if angles.interleaved {
            (2 * i, 2 * i + 1)
        } else {
            (i, i + half)
        };
        let (x, y) = (head[a], head[b]);
        head[a] = x * c - y * s;
        head[b] = y * c + x * s;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_interleaved_and_partial() {
        let (cos, sin) = ([0.0, 0.6], [1.0, 0.8]);
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0];
        rotate(
            &mut x,
            Angles {
                cos: &cos,
                sin: &sin,
                interleaved: false,
            },
        );
        assert_eq!(x.map(|v| (v * 1e4f32).round() / 1e4), [-3.0, -2.0, 1.0, 4.0, 5.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0];
        rotate(
            &mut x,
            Angles {
                cos: &cos,
                sin: &sin,
                interleaved: true,
            },
        );
        assert_eq!(x.map(|v| (v * 1e4f32).round() / 1e4), [-2.0, 1.0, -1.4, 4.8, 5.0]);
    }
}
