//! Round to nearest: codes of weights that have none.

use retro_gguf::Codes;

/// Adds a group's codes of 4 bits. As in llama.cpp's Q4_0 and ONNX Runtime's quantiser, the element that is farthest from
/// 0 gets the code -8, and is exact but for the rounding of the scale.
pub fn four_bits(values: &[f32], out: &mut Codes) {
    let far = farthest(values);
    group(values, far / -8.0, (-8.0, 7.0), out);
}

/// Adds a group's codes of 8 bits, from -127 to 127, as llama.cpp's Q8_0.
pub fn eight_bits(values: &[f32], out: &mut Codes) {
    let far = farthest(values);
    group(values, far.abs() / 127.0, (-127.0, 127.0), out);
}

/// The first of the elements that are farthest from 0.
fn farthest(values: &[f32]) -> f32 {
    let farther = |far: f32, &x: &f32| if x.abs() > far.abs() { x } else { far };
    values.iter().fold(0.0, farther)
}

fn group(values: &[f32], scale: f32, (least, most): (f32, f32), out: &mut Codes) {
    let by = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let code = |x: &f32| (x * by).round_ties_even().clamp(least, most) as i8;
    out.codes.extend(values.iter().map(code));
    out.scales.push(scale);
    out.mins.push(0.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_farthest_element_sets_the_scale() {
        let mut out = Codes::default();
        four_bits(&[0.0, 4.0, -2.0, 0.26, -3.9], &mut out);
        assert_eq!((out.codes, out.scales), (vec![0, -8, 4, -1, 7], vec![-0.5]));
        let mut out = Codes::default();
        eight_bits(&[0.0, 12.7, -12.7, 0.26], &mut out);
        assert_eq!(out.codes, [0, 127, -127, 3]);
        let mut out = Codes::default();
        four_bits(&[0.0; 32], &mut out);
        assert_eq!((out.codes, out.scales), (vec![0; 32], vec![0.0]));
    }

    /// A scale too small for its inverse: codes stay in their range, and nothing is infinite.
    #[test]
    fn tiny_elements_are_numbers() {
        let mut out = Codes::default();
        four_bits(&[f32::from_bits(1), 0.0, -f32::from_bits(3)], &mut out);
        let value = |i: usize| f32::from(out.codes[i]) * out.scales[0];
        assert!((0..3).all(|i| value(i).is_finite()));
    }
}
