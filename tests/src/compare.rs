//! Comparisons that say where and by how much.

/// Largest absolute difference; a NaN on either side alone counts as infinite.
pub fn max_difference(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len(), "different lengths");
    got.iter().zip(expected).fold(0.0, |worst, (&g, &e)| {
        let difference = if g.to_bits() == e.to_bits() { 0.0 } else { (g - e).abs() };
        if difference.is_nan() {
            f32::INFINITY
        } else {
            worst.max(difference)
        }
    })
}

/// Every element within `tolerance(expected)`.
#[track_caller]
pub fn assert_within(what: &str, got: &[f32], expected: &[f32], tolerance: impl Fn(f32) -> f32) {
    assert_eq!(got.len(), expected.len(), "{what}: different lengths");
    for (at, (&g, &e)) in got.iter().zip(expected).enumerate() {
        let fine = g.to_bits() == e.to_bits() || (g - e).abs() <= tolerance(e);
        assert!(
            fine,
            "{what}: element {at} is {g}, expected {e} within {} (largest difference of all: {})",
            tolerance(e),
            max_difference(got, expected)
        );
    }
}

#[track_caller]
pub fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_within(what, got, expected, |_| tolerance);
}

/// Bit for bit, so that NaN equals itself.
#[track_caller]
pub fn assert_same_bytes(what: &str, got: &[u8], expected: &[u8]) {
    assert_eq!(got.len(), expected.len(), "{what}: different sizes");
    if let Some(at) = got.iter().zip(expected).position(|(g, e)| g != e) {
        panic!("{what}: byte {at} of {} differs", got.len());
    }
}
