//! Products of matrices, sums of products, and convolutions.

use super::{OpCall, shape::matrix_transposed, size};
use crate::eval::{
    Error, Tensor,
    layout::{Layout, broadcast},
    tensor::{numel, storable},
};
use ndarray::{Array3, ArrayD, Axis, IxDyn};

/// Multiplications that are worth doing.
const MAX_WORK: usize = 1 << 25;
/// Products that an Einsum may add up.
const MAX_PRODUCTS: usize = 1 << 23;

/// Sizes of a product as [numpy.matmul](https://numpy.org/doc/stable/reference/generated/numpy.matmul.html) has them.
struct Product {
    /// The factors with two dimensions at least: a vector is a row on the left, a column on the right.
    left: Vec<usize>,
    right: Vec<usize>,
    batch: Vec<usize>,
    /// `[..batch, m, n]`, without the dimensions that a vector lacks.
    shape: Vec<usize>,
}

impl Product {
    fn new(a: &[usize], b: &[usize]) -> Result<Self, Error> {
        if a.is_empty() || b.is_empty() {
            return Err("a product of scalars".into());
        }
        let left = if a.len() == 1 { vec![1, a[0]] } else { a.to_vec() };
        let right = if b.len() == 1 { vec![b[0], 1] } else { b.to_vec() };
        let (outer_a, [m, k]) = matrix(&left)?;
        let (outer_b, [k_b, n]) = matrix(&right)?;
        if k != k_b {
            return Err(Error::MatMul {
                left: a.to_vec(),
                right: b.to_vec(),
            });
        }
        let batch = broadcast(outer_a, outer_b)?;
        let mut shape = batch.clone();
        shape.extend((a.len() > 1).then_some(m));
        shape.extend((b.len() > 1).then_some(n));
        numel(&shape)?;
        Ok(Self {
            left,
            right,
            batch,
            shape,
        })
    }
}

/// A shape's batch and its matrix.
fn matrix(shape: &[usize]) -> Result<(&[usize], [usize; 2]), Error> {
    match shape {
        [outer @ .., rows, columns] => Ok((outer, [*rows, *columns])),
        _ => Err("no matrices".into()),
    }
}

fn product(a: &Tensor, b: &Tensor, alpha: f64) -> Result<Tensor, Error> {
    let p = Product::new(&a.shape, &b.shape)?;
    let ([m, k], [_, n]) = (matrix(&p.left)?.1, matrix(&p.right)?.1);
    let full = [&p.batch[..], &[m, n]].concat();
    let work = numel(&full)?.saturating_mul(k);
    if a.data.is_none() || b.data.is_none() || work > MAX_WORK || storable(&full).is_err() {
        return Ok(Tensor::unknown(p.shape, a.data_type));
    }
    let batches = numel(&p.batch)?;
    // Each matrix of the batch, broadcast where there is one for several.
    let spread = |t: &Tensor, own: &[usize], [rows, columns]: [usize; 2]| -> Result<Array3<f64>, Error> {
        let layout = Layout::of(own).broadcast(&[&p.batch[..], &[rows, columns]].concat())?;
        let view = layout.view(t.data.as_deref().ok_or(Error::NumbersUnknown)?)?;
        let all = view.to_shape((batches, rows, columns));
        all.map(|a| a.into_owned())
            .map_err(|_| Error::Invalid("matrices of another size"))
    };
    for dims in [[m, k], [k, n]] {
        storable(&[&p.batch[..], &dims].concat())?;
    }
    let (left, right) = (spread(a, &p.left, [m, k])?, spread(b, &p.right, [k, n])?);
    let mut out = Vec::with_capacity(numel(&full)?);
    for (x, y) in left.axis_iter(Axis(0)).zip(right.axis_iter(Axis(0))) {
        out.extend(x.dot(&y).iter().map(|x| alpha * x));
    }
    Ok(Tensor::new(p.shape, a.data_type, out))
}

/// [MatMul](https://onnx.ai/onnx/operators/onnx__MatMul.html), and
/// [MatMulInteger](https://onnx.ai/onnx/operators/onnx__MatMulInteger.html) without zero points.
pub(super) fn matmul(call: &OpCall) -> Result<Tensor, Error> {
    product(call.need(0)?, call.need(1)?, 1.0)
}

/// The shape of a product of two inputs, for products of which the numbers are not computed.
pub(super) fn product_shape(a: &Tensor, b: &Tensor) -> Result<Vec<usize>, Error> {
    Ok(Product::new(&a.shape, &b.shape)?.shape)
}

fn factor(call: &OpCall, slot: usize, transposed: &str) -> Result<Tensor, Error> {
    let t = call.need(slot)?;
    if call.int(transposed, 0) != 0 {
        matrix_transposed(t)
    } else {
        Ok(t.clone())
    }
}

/// [com.microsoft.FusedMatMul](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.FusedMatMul)
pub(super) fn fused_matmul(call: &OpCall) -> Result<Tensor, Error> {
    if call.int("transBatchA", 0) != 0 || call.int("transBatchB", 0) != 0 {
        return Err("a product with batches moved".into());
    }
    let alpha = call.float("alpha").unwrap_or(1.0);
    product(&factor(call, 0, "transA")?, &factor(call, 1, "transB")?, alpha)
}

/// [Gemm](https://onnx.ai/onnx/operators/onnx__Gemm.html): the shape.
pub(super) fn gemm(call: &OpCall) -> Result<Tensor, Error> {
    let sides = [(0, "transA"), (1, "transB")].map(|(slot, name)| -> Result<Tensor, Error> {
        let t = call.need(slot)?;
        let mut shape = t.shape.clone();
        match shape.as_mut_slice() {
            [.., rows, columns] if call.int(name, 0) != 0 => std::mem::swap(rows, columns),
            _ if call.int(name, 0) != 0 => return Err("no matrix".into()),
            _ => {}
        }
        Ok(Tensor::unknown(shape, t.data_type))
    });
    let [a, b] = sides;
    let (a, b) = (a?, b?);
    Ok(Tensor::unknown(product_shape(&a, &b)?, a.data_type))
}

/// An Einsum's equation, and the size of each label.
struct Equation {
    terms: Vec<Vec<u8>>,
    wanted: Vec<u8>,
    sizes: Vec<(u8, usize)>,
}

impl Equation {
    fn read(call: &OpCall) -> Result<Self, Error> {
        let equation = call.node.attribute("equation").ok_or("no equation")?;
        let equation = String::from_utf8_lossy(equation.s()).replace(' ', "");
        let (left, right) = equation.split_once("->").ok_or("an equation without an arrow")?;
        let terms: Vec<Vec<u8>> = left.split(',').map(|t| t.bytes().collect()).collect();
        let mut sizes: Vec<(u8, usize)> = Vec::new();
        for (slot, term) in terms.iter().enumerate() {
            let t = call.need(slot)?;
            if term.len() != t.shape.len() || term.contains(&b'.') {
                return Err(Error::NotComputed(format!("the equation {equation} is not supported")));
            }
            for (label, d) in term.iter().zip(&t.shape) {
                match sizes.iter().find(|(l, _)| l == label) {
                    Some((_, size)) if size != d => {
                        return Err(Error::Sizes(format!("{equation} has two sizes for a label")));
                    }
                    Some(_) => {}
                    None => sizes.push((*label, *d)),
                }
            }
        }
        Ok(Self {
            terms,
            wanted: right.bytes().collect(),
            sizes,
        })
    }

    fn size(&self, label: u8) -> Option<usize> {
        self.sizes.iter().find(|(l, _)| *l == label).map(|(_, d)| *d)
    }
}

/// [Einsum](https://onnx.ai/onnx/operators/onnx__Einsum.html), without an ellipsis.
pub(super) fn einsum(call: &OpCall) -> Result<Tensor, Error> {
    let equation = Equation::read(call)?;
    let wanted = &equation.wanted;
    let shape: Option<Vec<usize>> = wanted.iter().map(|l| equation.size(*l)).collect();
    let shape = shape.ok_or("an output label without an input")?;
    let first = call.need(0)?;
    let summed = equation.sizes.iter().filter(|(l, _)| !wanted.contains(l));
    let full: Vec<(u8, usize)> = wanted
        .iter()
        .copied()
        .zip(shape.iter().copied())
        .chain(summed.copied())
        .collect();
    let dims: Vec<usize> = full.iter().map(|(_, d)| *d).collect();
    let stored = (0..equation.terms.len()).all(|slot| call.get(slot).is_some_and(|t| t.data.is_some()));
    if !stored || numel(&dims)? > MAX_PRODUCTS {
        return Ok(Tensor::unknown(shape, first.data_type));
    }
    let mut products = ArrayD::from_elem(IxDyn(&dims), 1.0);
    for (slot, term) in equation.terms.iter().enumerate() {
        let t = call.need(slot)?;
        // A label moves along all axes that it names; a term without it repeats.
        let axes = full.iter().map(|(label, d)| {
            let named = term.iter().enumerate().filter(|(_, l)| *l == label);
            (*d, named.map(|(axis, _)| axis).collect())
        });
        let layout = Layout::of(&t.shape).gathered(axes);
        products *= &layout.view(t.data.as_deref().ok_or(Error::NumbersUnknown)?)?;
    }
    for axis in (wanted.len()..dims.len()).rev() {
        products = products.sum_axis(Axis(axis));
    }
    Tensor::of_array(products, first.data_type).reshaped(shape)
}

/// [Conv](https://onnx.ai/onnx/operators/onnx__Conv.html): the shape, `[N, C, ..] by [M, C / group, ..] -> [N, M, ..]`.
pub(super) fn conv(call: &OpCall) -> Result<Tensor, Error> {
    let (x, w) = (call.need(0)?, call.need(1)?);
    let (&[n, _, ref space @ ..], &[m, _, ref kernel @ ..]) = (x.shape.as_slice(), w.shape.as_slice()) else {
        return Err("a convolution of no channels".into());
    };
    let spatial = space.len();
    let read = |name: &str, len: usize, default: i64| -> Result<Vec<usize>, Error> {
        let values = call.ints_attribute(name).unwrap_or_else(|| vec![default; len]);
        if values.len() != len {
            return Err(Error::Sizes(format!("{} {name} for {len} axes", values.len())));
        }
        values.iter().map(|v| size(*v)).collect()
    };
    let (strides, dilations) = (read("strides", spatial, 1)?, read("dilations", spatial, 1)?);
    let pads = read("pads", 2 * spatial, 0)?;
    if kernel.len() != spatial {
        return Err("a kernel of another rank".into());
    }
    let auto = call.node.attribute("auto_pad").map_or(&b"NOTSET"[..], |a| a.s());
    let mut shape = vec![n, m];
    for axis in 0..spatial {
        let stride = strides[axis].max(1);
        let reach = dilations[axis]
            .saturating_mul(kernel[axis].saturating_sub(1))
            .saturating_add(1);
        let (before, after) = match auto {
            b"NOTSET" => (pads[axis], pads[spatial + axis]),
            b"VALID" => (0, 0),
            b"SAME_UPPER" | b"SAME_LOWER" => {
                shape.push(space[axis].div_ceil(stride));
                continue;
            }
            _ => return Err("an auto_pad that is not supported".into()),
        };
        let wide = space[axis].saturating_add(before).saturating_add(after);
        let steps = wide.checked_sub(reach).ok_or("a kernel wider than its input")?;
        shape.push(steps / stride + 1);
    }
    numel(&shape)?;
    Ok(Tensor::unknown(shape, x.data_type))
}
