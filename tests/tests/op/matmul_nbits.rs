//! `ai.retro::MatMulNBits`: every form of packed weights against the product in f64, and what is refused.

use retro_contract::DOMAIN;
use retro_contract::matmul_nbits::{attribute, limits};
use retro_onnx::{AttributeProto, DataType, TensorProto};
use retro_tests::{
    host,
    matmul_nbits::{Form, Rounding, Weights, ZeroPoints, one_node, unit_roundoff},
    random::Random,
    tensor::{Dtype, Tens},
};

/// The activations' types on the device under test.
fn dtypes() -> &'static [Dtype] {
    match host::on_gpu() {
        true => &[Dtype::F16, Dtype::Bf16],
        false => &[Dtype::F32, Dtype::F16],
    }
}

/// Columns of A: whole blocks of every size, and a last block that is cut; the last two are dequantised on CUDA.
const COLUMNS: [usize; 6] = [640, 352, 1056, 96, 200, 67];

/// Every bits, block size, zero points and bias, of one type.
fn forms(dtype: Dtype) -> Vec<Form> {
    let mut forms = Vec::new();
    for bits in limits::BITS {
        for block_size in limits::BLOCK_SIZES {
            for zero_points in ZeroPoints::ALL {
                for bias in [false, true] {
                    forms.push(Form {
                        dtype,
                        bits,
                        block_size,
                        zero_points,
                        bias,
                        k: COLUMNS[forms.len() % COLUMNS.len()],
                        // Below 32 on CUDA: other kernels.
                        n: [24, 40, 33][(forms.len() / 6 + forms.len()) % 3],
                    });
                }
            }
        }
    }
    forms
}

fn rounding(dtype: Dtype) -> Rounding {
    let single = unit_roundoff(Dtype::F32);
    Rounding {
        accumulator: single,
        weights: if host::on_gpu() { unit_roundoff(dtype) } else { single },
    }
}

/// One call: the output of rows of activations in a tensor of shape `leading` x K.
fn run(session: &host::Opened, form: &Form, leading: &[usize], a: &[f32]) -> Result<Tens, String> {
    let shape = |last: usize| [leading, &[last]].concat();
    let a = Tens::floats(form.dtype, &shape(form.k), a);
    let mut y = Tens::poisoned(form.dtype, &shape(form.n));
    host::run(session, &[("A", &a)], &mut [("Y", &mut y)], &mut [])?;
    Ok(y)
}

fn check(what: &str, got: &Tens, (expected, tolerance): (Vec<f32>, Vec<f32>)) {
    let got = got.read();
    assert_eq!(got.len(), expected.len(), "{what}: lengths");
    for (i, ((&g, &e), &t)) in got.iter().zip(&expected).zip(&tolerance).enumerate() {
        assert!(
            (g - e).abs() <= t,
            "{what}: element {i} is {g}, expected {e} within {t}"
        );
    }
}

fn activations(form: &Form, random: &mut Random, rows: usize) -> Vec<f32> {
    let numbers = random.uniform(rows * form.k, -2.0, 2.0);
    numbers.into_iter().map(|x| form.dtype.round(x)).collect()
}

/// Rows that one pass of a kernel takes, one more, and a short prompt.
#[test]
fn every_form_is_the_product() {
    for &dtype in dtypes() {
        for (seed, form) in forms(dtype).into_iter().enumerate() {
            let mut random = Random::new(seed as u64);
            let weights = Weights::random(form, &mut random);
            let session = host::open(&weights.model(DOMAIN)).unwrap_or_else(|e| panic!("{form:?}: {e}"));
            for rows in (1..=limits::CUDA_MAX_ROWS + 1).chain([40]) {
                let a = activations(&form, &mut random, rows);
                let y = run(&session, &form, &[1, rows], &a).unwrap_or_else(|e| panic!("{form:?}: {e}"));
                check(
                    &format!("{form:?}, {rows} rows"),
                    &y,
                    weights.product(&a, rounding(dtype)),
                );
            }
        }
    }
}

/// Shapes by which a product is cut in other ways than a small one: tasks of columns on the CPU; on CUDA chunks whose
/// scales are read at once, several chunks a warp, and several thread blocks a multiprocessor.
#[test]
fn large_products_are_the_product() {
    let shapes: &[(usize, usize, &[usize])] = match host::on_gpu() {
        true => &[
            (256, 64, &[1, 2, 9]),
            (8192, 64, &[1, 5, 16, 17, 32]),
            (512, 4256, &[5, 8]),
            (4096, 8480, &[2, 5, 16]),
        ],
        false => &[(1056, 1000, &[1, 3, 20])],
    };
    for &dtype in dtypes() {
        for &(k, n, rows) in shapes {
            let kinds = [(4, 32), (4, 16), (4, 128), (8, 32)];
            for (seed, (bits, block_size)) in kinds.into_iter().enumerate() {
                for zero_points in ZeroPoints::ALL {
                    // All zero points with the commonest blocks, one of them with others.
                    if (bits, block_size) != (4, 32) && zero_points != ZeroPoints::ALL[seed % 3] {
                        continue;
                    }
                    let form = Form {
                        dtype,
                        bits,
                        block_size,
                        zero_points,
                        bias: seed % 2 == 0,
                        k,
                        n,
                    };
                    let mut random = Random::new(seed as u64);
                    let weights = Weights::random(form, &mut random);
                    let session = host::open(&weights.model(DOMAIN)).unwrap_or_else(|e| panic!("{form:?}: {e}"));
                    for &rows in rows {
                        let a = activations(&form, &mut random, rows);
                        let y = run(&session, &form, &[rows], &a).unwrap_or_else(|e| panic!("{form:?}: {e}"));
                        let what = format!("{form:?}, {rows} rows");
                        check(&what, &y, weights.product(&a, rounding(dtype)));
                    }
                }
            }
        }
    }
}

/// What a decoding step of several sequences has: rows are those of all leading dimensions; none is a call, too.
#[test]
fn leading_dimensions_are_rows() {
    for &dtype in dtypes() {
        let form = any(dtype);
        let mut random = Random::new(3);
        let weights = Weights::random(form, &mut random);
        let session = host::open(&weights.model(DOMAIN)).expect("a session");
        for leading in [&[3][..], &[2, 3], &[2, 1, 4], &[5, 5], &[0], &[2, 0]] {
            let a = activations(&form, &mut random, leading.iter().product());
            let y = run(&session, &form, leading, &a).unwrap_or_else(|e| panic!("{leading:?}: {e}"));
            check(&format!("{leading:?}"), &y, weights.product(&a, rounding(dtype)));
        }
    }
}

/// A host may hand over memory at any address; on CUDA, at any that serves the elements.
#[test]
fn at_misaligned_addresses() {
    for &dtype in dtypes() {
        let form = any(dtype);
        let mut random = Random::new(5);
        let weights = Weights::random(form, &mut random);
        let session = host::open(&weights.model(DOMAIN)).expect("a session");
        let numbers = activations(&form, &mut random, 3);
        let a = Tens::floats(dtype, &[3, form.k], &numbers);
        for offset in [2, 6].into_iter().chain((!host::on_gpu()).then_some(1)) {
            let mut y = Tens::poisoned(dtype, &[3, form.n]);
            host::run_at(offset, &session, &[("A", &a)], &mut [("Y", &mut y)], &mut []).expect("a call");
            check(
                &format!("{offset} bytes"),
                &y,
                weights.product(&numbers, rounding(dtype)),
            );
        }
    }
}

fn any(dtype: Dtype) -> Form {
    Form {
        dtype,
        bits: 4,
        block_size: 32,
        zero_points: ZeroPoints::Packed,
        bias: true,
        k: 96,
        n: 40,
    }
}

/// What ONNX Runtime's own operator on the CPU computes.
fn original_has(form: &Form) -> bool {
    form.bits == 4 || form.zero_points != ZeroPoints::Float
}

/// The same numbers come from the operator that it stands in for.
#[test]
fn the_original_agrees() {
    for &dtype in dtypes().iter().filter(|_| !host::on_gpu()) {
        for (seed, form) in forms(dtype)
            .into_iter()
            .enumerate()
            .filter(|(_, form)| original_has(form))
        {
            let mut random = Random::new(seed as u64);
            let weights = Weights::random(form, &mut random);
            let ours = host::open(&weights.model(DOMAIN)).expect("a session");
            let original = host::open_on_cpu(&weights.model("com.microsoft")).expect("a session");
            let a = activations(&form, &mut random, 2);
            let [ours, original] = [&ours, &original].map(|s| run(s, &form, &[1, 2], &a).expect("a call"));
            let (_, tolerance) = weights.product(&a, rounding(dtype));
            let tolerance = tolerance.into_iter().map(|t| 2.0 * t).collect();
            check(&format!("{form:?}"), &ours, (original.read(), tolerance));
        }
    }
}

/// Columns whose blocks are named, as GPTQ's. The original on the CPU has them for 4 bits, but reads packed zero points
/// beside them as bytes.
#[test]
fn an_order_of_columns_is_the_originals() {
    use retro_contract::matmul_nbits::input;
    for &dtype in dtypes().iter().filter(|&&dtype| dtype != Dtype::Bf16) {
        let form = Form {
            zero_points: ZeroPoints::Float,
            ..any(dtype)
        };
        let mut random = Random::new(8);
        let weights = Weights::random(form, &mut random);
        let model = |domain: &str| {
            let order: Vec<i32> = (0..form.k).map(|i| (i * 7 % form.blocks()) as i32).collect();
            let mut tensors = weights.tensors();
            tensors[input::G_IDX - 1] = Some(TensorProto::int32s("g_idx", &[form.k as i64], &order));
            one_node(domain, &form, form.attributes(), tensors)
        };
        let ours = host::open(&model(DOMAIN)).expect("a session");
        let original = host::open_on_cpu(&model("com.microsoft")).expect("a session");
        let a = activations(&form, &mut random, 3);
        let [ours, original] = [&ours, &original].map(|s| run(s, &form, &[3], &a).expect("a call"));
        let (plain, tolerance) = weights.product(&a, rounding(dtype));
        assert!(
            plain.iter().zip(ours.read()).any(|(p, o)| (p - o).abs() > 0.1),
            "the order counts"
        );
        let tolerance = tolerance.into_iter().map(|t| 2.0 * t).collect();
        check("g_idx", &ours, (original.read(), tolerance));
    }
}

/// The error of a node with other attributes: `None` takes one away.
fn attribute_error(changes: &[(&str, Option<i64>)]) -> String {
    let form = any(dtypes()[0]);
    let weights = Weights::random(form, &mut Random::new(1));
    let mut attributes = form.attributes();
    for (name, value) in changes {
        attributes.retain(|a| a.name() != *name);
        attributes.extend(value.map(|v| AttributeProto::int(name, v)));
    }
    let model = one_node(DOMAIN, &form, attributes, weights.tensors());
    host::open(&model)
        .err()
        .unwrap_or_else(|| panic!("{changes:?} is refused"))
}

#[test]
fn wrong_attributes_are_named() {
    for (name, value, expected) in [
        (attribute::K, None, "attribute K is missing"),
        (attribute::N, None, "attribute N is missing"),
        (attribute::BLOCK_SIZE, None, "attribute block_size is missing"),
        (attribute::K, Some(0), "attribute K is 0"),
        (attribute::N, Some(-4), "attribute N is -4"),
        (attribute::BITS, Some(2), "attribute bits is 2, expected one of 4, 8"),
        (attribute::BITS, Some(16), "attribute bits is 16"),
        (
            attribute::BLOCK_SIZE,
            Some(8),
            "attribute block_size is 8, expected one of 16, 32, 64, 128",
        ),
        (attribute::BLOCK_SIZE, Some(48), "attribute block_size is 48"),
        (attribute::BLOCK_SIZE, Some(256), "attribute block_size is 256"),
        (
            attribute::ACCURACY_LEVEL,
            Some(5),
            "attribute accuracy_level is 5, expected 0..4",
        ),
        (
            attribute::WEIGHT_PREPACKED,
            Some(1),
            "attribute weight_prepacked is 1, expected 0",
        ),
        (
            "group_size",
            Some(32),
            "attribute group_size is not one of ai.retro::MatMulNBits's",
        ),
        ("block_sizes", Some(32), "is block_size meant?"),
    ] {
        let error = attribute_error(&[(name, value)]);
        assert!(error.contains(expected), "{name} {value:?}: {error}");
        assert!(error.contains("\"node\""), "the node is named: {error}");
    }
}

/// What exporters may leave out or write.
#[test]
fn defaults_are_the_originals() {
    let form = any(dtypes()[0]);
    let weights = Weights::random(form, &mut Random::new(1));
    let mut attributes = form.attributes();
    attributes.retain(|a| a.name() != attribute::BITS);
    attributes.push(AttributeProto::int(attribute::WEIGHT_PREPACKED, 0));
    attributes.push(AttributeProto::int(attribute::ACCURACY_LEVEL, 4));
    let model = one_node(DOMAIN, &form, attributes, weights.tensors());
    let session = host::open(&model).expect("4 bits, weights as they are");
    let a = activations(&form, &mut Random::new(2), 2);
    let y = run(&session, &form, &[2], &a).expect("a call");
    check("defaults", &y, weights.product(&a, rounding(form.dtype)));
}

/// The error of a call with other weights in one slot, or of making its session.
fn weight_error(slot: usize, tensor: TensorProto) -> String {
    let form = any(dtypes()[0]);
    let weights = Weights::random(form, &mut Random::new(1));
    let mut tensors = weights.tensors();
    tensors[slot - 1] = Some(tensor);
    let a = vec![0.0; form.k];
    let result = host::open(&one_node(DOMAIN, &form, form.attributes(), tensors))
        .and_then(|session| run(&session, &form, &[1], &a).map(drop));
    result.err().unwrap_or_else(|| panic!("slot {slot} is refused"))
}

#[test]
fn wrong_shapes_are_named() {
    use retro_contract::matmul_nbits::input;
    let form = any(dtypes()[0]);
    let zeros = |dims: &[i64], bytes: usize| vec![0u8; dims.iter().product::<i64>() as usize * bytes];
    let codes = |name: &str, dims: &[i64]| TensorProto::raw(name, DataType::Uint8, dims, zeros(dims, 1).into());
    let numbers = |name: &str, dims: &[i64]| {
        let dtype = retro_tests::node::data_type(form.dtype);
        TensorProto::raw(name, dtype, dims, zeros(dims, form.dtype.bytes()).into())
    };
    for (slot, tensor, expected) in [
        (
            input::B,
            codes("B", &[40, 3, 8]),
            "input B has shape [40, 3, 8], expected [40, 3, 16]",
        ),
        (input::B, codes("B", &[39, 3, 16]), "input B has shape [39, 3, 16]"),
        (
            input::SCALES,
            numbers("scales", &[40, 2]),
            "input scales has shape [40, 2], expected [40, 3] or [120]",
        ),
        (
            input::ZERO_POINTS,
            codes("zero_points", &[40, 3]),
            "input zero_points has shape [40, 3], expected [40, 2] or [80]",
        ),
        (
            input::BIAS,
            numbers("bias", &[1]),
            "input bias has shape [1], expected [40]",
        ),
    ] {
        let error = weight_error(slot, tensor);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn activations_of_another_width_are_refused() {
    let form = any(dtypes()[0]);
    let weights = Weights::random(form, &mut Random::new(1));
    let session = host::open(&weights.model(DOMAIN)).expect("a session");
    let wrong = Form { k: 95, ..form };
    let error = run(&session, &wrong, &[1], &[0.0; 95])
        .err()
        .expect("95 columns are refused");
    assert!(
        error.contains("input A has shape [1, 95], expected [.., 96]"),
        "{error}"
    );
}
