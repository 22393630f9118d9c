//! Joining attention over disjoint sets of tokens through their log-sum-exps.

/// Weights of two partial attentions with log-sum-exps `a` and `b`, and the log-sum-exp of their union:
/// `O = wa * Oa + wb * Ob`. A side with -inf has seen nothing and weighs 0. A NaN on either side makes all three NaN.
pub fn weights(a: f32, b: f32) -> (f32, f32, f32) {
    if a == f32::NEG_INFINITY && b == f32::NEG_INFINITY {
        return (0.0, 0.0, a);
    }
    let m = a.max(b);
    let (ea, eb) = ((a - m).exp(), (b - m).exp());
    let sum = ea + eb;
    (ea / sum, eb / sum, m + sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_add_up_and_empty_sides_weigh_nothing() {
        let (a, b, l) = weights(2.0, 2.0);
        assert_eq!((a, b), (0.5, 0.5));
        assert!((l - (2.0 + 2f32.ln())).abs() < 1e-6);
        assert_eq!(weights(3.0, f32::NEG_INFINITY), (1.0, 0.0, 3.0));
        assert_eq!(
            weights(f32::NEG_INFINITY, f32::NEG_INFINITY),
            (0.0, 0.0, f32::NEG_INFINITY)
        );
        let (a, b, l) = weights(900.0, -900.0);
        assert_eq!((a, b, l), (1.0, 0.0, 900.0));
        for (a, b) in [
            (f32::NAN, f32::NEG_INFINITY),
            (f32::NEG_INFINITY, f32::NAN),
            (f32::NAN, 1.0),
            (1.0, f32::NAN),
        ] {
            let (wa, wb, l) = weights(a, b);
            assert!(wa.is_nan() && wb.is_nan() && l.is_nan(), "{a} {b}: {wa} {wb} {l}");
        }
    }
}
