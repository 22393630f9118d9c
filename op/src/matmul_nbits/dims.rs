//! The shapes of a call, checked.

use retro_contract::matmul_nbits::input;

use super::{Attributes, InputShapes};
use crate::contract::Shape;
use crate::ort::{Result, require};

/// What a call's activations ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputShape {
    /// Rows of the product.
    pub rows: usize,
    /// The output's shape, `[.., N]`.
    pub shape: Shape,
}

/// The product's rows and the output's shape, from the shape of A.
///
/// # Errors
/// When A has not K columns, or its shape overflows.
pub fn output_shape(attributes: &Attributes, a: &[i64]) -> Result<OutputShape> {
    let k = attributes.k;
    let Some((&columns, leading)) = a.split_last() else {
        return Err(crate::ort::Error::invalid(format!(
            "input A is a scalar, expected [.., {k}]"
        )));
    };
    require!(
        columns == k as i64,
        "input A has shape {a:?}, expected [.., {k}]: attribute K is {k}"
    );
    let rows = leading
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(usize::try_from(d).ok()?));
    require!(rows.is_some(), "input A has shape {a:?}, which is too large");
    let mut shape = Shape::from_slice(a);
    if let Some(last) = shape.last_mut() {
        *last = attributes.n as i64;
    }
    Ok(OutputShape {
        rows: rows.unwrap_or_default(),
        shape,
    })
}

/// Checks the shapes of everything but A. `packed_zero_points`: whether the zero points are uint8.
///
/// # Errors
/// When one is not what the attributes say.
pub fn check_weights(attributes: &Attributes, shapes: &InputShapes, packed_zero_points: bool) -> Result<()> {
    let (n, k, blocks) = (attributes.n, attributes.k, attributes.blocks());
    let zero_points = if packed_zero_points {
        attributes.zero_point_bytes()
    } else {
        blocks
    };
    check(shapes, input::B, &[&[n, blocks, attributes.block_bytes()]])?;
    check(shapes, input::SCALES, &[&[n, blocks], &[n * blocks]])?;
    check(shapes, input::ZERO_POINTS, &[&[n, zero_points], &[n * zero_points]])?;
    check(shapes, input::G_IDX, &[&[k], &[blocks * attributes.block_size]])?;
    check(shapes, input::BIAS, &[&[n]])
}

/// Checks that an input, if it is there, has one of the expected shapes.
fn check(shapes: &InputShapes, slot: usize, expected: &[&[usize]]) -> Result<()> {
    let Some(shape) = &shapes[slot] else { return Ok(()) };
    let same = |e: &&[usize]| e.len() == shape.len() && e.iter().zip(shape).all(|(&e, &d)| d == e as i64);
    require!(
        expected.iter().any(same),
        "input {} has shape {:?}, expected {}",
        input::NAMES[slot],
        &shape[..],
        expected
            .iter()
            .map(|e| format!("{e:?}"))
            .collect::<Vec<_>>()
            .join(" or ")
    );
    Ok(())
}
