//! Operators, one call each.

use super::*;
use retro_onnx::DataType;
use retro_onnx::{AttributeProto, TensorProto};

fn node(op: &str, attributes: &[AttributeProto]) -> NodeProto {
    let mut node = NodeProto::new("", op, op, &["a", "b", "c", "d"], &["y"]);
    node.attribute = attributes.to_vec();
    node
}

fn ints(shape: &[usize], values: &[f64]) -> Tensor {
    Tensor::new(shape.to_vec(), DataType::Int64, values.to_vec())
}

fn floats(shape: &[usize], values: &[f64]) -> Tensor {
    Tensor::new(shape.to_vec(), DataType::Float, values.to_vec())
}

fn counted(shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    floats(shape, &(0..n).map(|i| i as f64 - 3.0).collect::<Vec<_>>())
}

fn result(node: &NodeProto, inputs: &[Tensor]) -> Result<Tensor, Error> {
    let inputs: Vec<_> = inputs.iter().cloned().map(Rc::new).map(Some).collect();
    Ok(evaluate(node, &inputs, 23)?.remove(0).expect("an output"))
}

/// The numbers of a tensor on demand only.
fn on_demand(t: &Tensor) -> Tensor {
    Tensor {
        lazy: t.numbers(),
        ..Tensor::unknown(t.shape.clone(), t.data_type)
    }
}

#[test]
fn numbers_on_demand_are_those_that_are_held() {
    let (t, m) = (counted(&[2, 3, 4]), counted(&[3, 4]));
    let int = AttributeProto::int;
    type Case<'c> = (&'c str, &'c [AttributeProto], &'c [Tensor], &'c [usize]);
    let cases: &[Case] = &[
        ("Cast", &[int("to", 7)], std::slice::from_ref(&t), &[0]),
        ("Neg", &[], std::slice::from_ref(&t), &[0]),
        ("Reshape", &[], &[t.clone(), ints(&[2], &[4.0, 6.0])], &[0]),
        (
            "Transpose",
            &[AttributeProto::ints("perm", &[2, 0, 1])],
            std::slice::from_ref(&t),
            &[0],
        ),
        ("Expand", &[], &[m.clone(), ints(&[3], &[2.0, 1.0, 1.0])], &[0]),
        ("Tile", &[], &[m.clone(), ints(&[2], &[2.0, 3.0])], &[0]),
        (
            "Concat",
            &[int("axis", 1)],
            &[t.clone(), counted(&[2, 1, 4]), t.clone()],
            &[0, 1, 2],
        ),
        (
            "Slice",
            &[],
            &[t.clone(), ints(&[1], &[-1.0]), ints(&[1], &[-4.0]), ints(&[1], &[2.0])],
            &[0],
        ),
        (
            "Gather",
            &[int("axis", 1)],
            &[t.clone(), ints(&[2], &[-1.0, 1.0])],
            &[0, 1],
        ),
        (
            "GatherND",
            &[],
            &[t.clone(), ints(&[2, 2], &[1.0, 2.0, 0.0, -3.0])],
            &[0, 1],
        ),
        ("Where", &[], &[counted(&[4]), t.clone(), m.clone()], &[0, 1, 2]),
        ("Add", &[], &[t.clone(), m.clone()], &[0, 1]),
        ("Less", &[], &[m.clone(), t.clone()], &[0, 1]),
        ("Trilu", &[int("upper", 0)], &[t.clone(), ints(&[], &[1.0])], &[0]),
        ("ReduceMax", &[], &[t.clone(), ints(&[1], &[1.0])], &[0]),
        (
            "ReduceMin",
            &[int("keepdims", 0)],
            &[t.clone(), ints(&[1], &[-1.0])],
            &[0],
        ),
        (
            "Pad",
            &[],
            &[m.clone(), ints(&[4], &[1.0, 0.0, -1.0, 2.0]), floats(&[], &[7.0])],
            &[0],
        ),
        ("CumSum", &[], &[m.clone(), ints(&[], &[1.0])], &[0]),
        (
            "ScatterND",
            &[],
            &[
                m.clone(),
                ints(&[2, 2, 2], &[0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]),
                counted(&[2, 2]),
            ],
            &[0, 1, 2],
        ),
    ];
    for (op, attributes, inputs, large) in cases {
        let node = node(op, attributes);
        let held = result(&node, inputs).unwrap();
        assert!(held.data.is_some(), "{op}");
        for slots in (0..large.len()).map(|i| vec![large[i]]).chain([large.to_vec()]) {
            let mut inputs = inputs.to_vec();
            slots.iter().for_each(|slot| inputs[*slot] = on_demand(&inputs[*slot]));
            let other = result(&node, &inputs).unwrap();
            let other = other.stored();
            assert_eq!((&other.shape, &other.data), (&held.shape, &held.data), "{op} {slots:?}");
        }
    }
}

#[test]
fn scatters_on_demand_are_blocks_in_order_only() {
    let m = counted(&[3, 4]);
    let swapped = ints(&[2, 2, 2], &[0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0]);
    let out = result(&node("ScatterND", &[]), &[on_demand(&m), swapped, counted(&[2, 2])]).unwrap();
    assert!(!out.has_numbers());
}

#[test]
fn operators_of_masks_give_their_numbers() {
    let string = |name: &str, value: &str| AttributeProto {
        name: Some(name.into()),
        s: Some(value.as_bytes().to_vec().into()),
        ..Default::default()
    };
    let numbers = |op: &str, attributes: &[AttributeProto], inputs: &[Tensor]| {
        result(&node(op, attributes), inputs).unwrap().data.unwrap()
    };
    let left = string("direction", "LEFT");
    assert_eq!(
        numbers("BitShift", &[left], &[ints(&[], &[1.0]), ints(&[], &[12.0])]),
        [4096.0]
    );
    let right = string("direction", "RIGHT");
    assert_eq!(
        numbers("BitShift", &[right], &[ints(&[], &[9000.0]), ints(&[], &[12.0])]),
        [2.0]
    );
    assert_eq!(
        numbers("BitwiseAnd", &[], &[ints(&[], &[9000.0]), ints(&[], &[-4096.0])]),
        [8192.0]
    );
    let both = [floats(&[2], &[-7.0, 7.0]), floats(&[], &[4.0])];
    assert_eq!(numbers("Mod", &[], &both), [1.0, 3.0]);
    assert_eq!(numbers("Mod", &[AttributeProto::int("fmod", 1)], &both), [-3.0, 3.0]);
    let eye = numbers("EyeLike", &[AttributeProto::int("k", 1)], &[counted(&[2, 3])]);
    assert_eq!(eye, [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
    // Pads of named axes, and a constant as it was written before opset 11.
    let last = [
        counted(&[1, 2]),
        ints(&[2], &[0.0, 1.0]),
        floats(&[], &[9.0]),
        ints(&[1], &[-1.0]),
    ];
    assert_eq!(numbers("Pad", &[], &last), [-3.0, -2.0, 9.0]);
    let reflected = [counted(&[1, 2]), ints(&[4], &[0.0, 1.0, 0.0, 0.0])];
    let unknown = result(&node("Pad", &[string("mode", "reflect")]), &reflected).unwrap();
    assert_eq!((unknown.shape, unknown.data), (vec![1, 3], None));
}

#[test]
fn a_table_ends_although_its_numbers_are_not_known() {
    let table = Tensor::unknown(vec![100, 8], DataType::Float);
    let gather = node("Gather", &[]);
    assert!(result(&gather, &[table.clone(), ints(&[2], &[99.0, -100.0])]).is_ok());
    let why = result(&gather, &[table, ints(&[1], &[100.0])]).expect_err("out of range");
    assert_eq!(why, Error::IndexOutOfRange { index: 100, len: 100 });
}

#[test]
fn numbers_that_take_too_many_steps_are_not_known() {
    // Each of these is computed twice for the next.
    let mut t = Tensor::filled(vec![1 << 20], DataType::Float, 1.0).unwrap();
    for _ in 0..64 {
        t = result(&node("Max", &[]), &[t.clone(), t]).unwrap();
    }
    let part = [t, ints(&[1], &[0.0]), ints(&[1], &[10.0])];
    assert!(!result(&node("Slice", &[]), &part).unwrap().has_numbers());
}

#[test]
fn a_mask_of_all_tokens_by_all_tokens_is_read_without_being_held() {
    let shape = ints(&[2], &[60_000.0, 60_000.0]);
    let one = TensorProto::floats("value", &[1], &[1.0]);
    let mut fill = node("ConstantOfShape", &[]);
    fill.attribute.push(AttributeProto {
        name: Some("value".into()),
        t: Some(Box::new(one)),
        ..Default::default()
    });
    let ones = result(&fill, &[shape]).unwrap();
    let low = result(&node("Trilu", &[AttributeProto::int("upper", 0)]), &[ones]).unwrap();
    let numbers = low.numbers().expect("numbers");
    assert!(low.data.is_none());
    assert_eq!(
        [59_999, 50_000, 50_001].map(|j| numbers.at(50_000 * 60_000 + j)),
        [0.0, 1.0, 0.0]
    );
}

/// Inputs that no model has, and some that fit now and then.
fn strange_inputs() -> Vec<Tensor> {
    let lazy = on_demand(&counted(&[2, 3]));
    vec![
        floats(&[], &[2.0]),
        floats(&[], &[f64::NAN]),
        ints(&[], &[-1.0]),
        ints(&[0], &[]),
        ints(&[1], &[0.0]),
        ints(&[1], &[i64::MIN as f64]),
        ints(&[1], &[i64::MAX as f64]),
        ints(&[2], &[-1.0, 1.0]),
        ints(&[2], &[1.0, 0.0]),
        ints(&[2], &[(1u64 << 40) as f64, (1u64 << 40) as f64]),
        ints(&[3], &[3.0, -7.0, 1e18]),
        ints(&[1, 2], &[-5.0, 5.0]),
        ints(&[1, 1], &[1.0]),
        counted(&[2, 3]),
        counted(&[3, 2]),
        counted(&[2, 3, 4]),
        counted(&[1, 3, 4]),
        counted(&[2, 1, 3, 4]),
        floats(&[0, 3], &[]),
        floats(&[3, 0], &[]),
        floats(&[2, 0, 3], &[]),
        floats(&[1, 2, 0, 4], &[]),
        lazy,
        on_demand(&floats(&[0, 3], &[])),
        Tensor::filled(vec![(1 << 18) + 1], DataType::Float, 1.0).expect("a shape"),
        Tensor::filled(vec![1 << 23, 1 << 23], DataType::Bool, 1.0).expect("a shape"),
        Tensor::unknown(vec![2, 3, 8], DataType::Float),
        Tensor::unknown(vec![usize::MAX], DataType::Float16),
        Tensor::unknown(vec![usize::MAX, 2, 3], DataType::Float),
        Tensor::unknown(vec![2, 0, usize::MAX, usize::MAX], DataType::Uint8),
        Tensor::unknown(vec![1; 70], DataType::Float),
    ]
}

fn strange_attributes() -> Vec<Vec<AttributeProto>> {
    let int = AttributeProto::int;
    let ints = AttributeProto::ints;
    let string = |name: &str, value: &[u8]| AttributeProto {
        name: Some(name.into()),
        s: Some(value.to_vec().into()),
        ..Default::default()
    };
    let numbers = [
        "axis",
        "num_heads",
        "kv_num_heads",
        "q_num_heads",
        "batch_dims",
        "N",
        "to",
        "k",
        "start",
        "end",
        "left_window_size",
    ];
    let lists = [
        "perm",
        "axes",
        "pads",
        "starts",
        "ends",
        "split",
        "shape",
        "strides",
        "dilations",
        "qkv_hidden_sizes",
    ];
    let mut all = vec![vec![]];
    for value in [0, 1, 2, -1, 5, i64::MIN, i64::MAX] {
        all.push(numbers.map(|name| int(name, value)).to_vec());
        for list in [vec![], vec![value], vec![value, 0], vec![0, value, 1], vec![value; 4]] {
            all.push(lists.map(|name| ints(name, &list)).to_vec());
        }
    }
    let flags = [
        "keepdims",
        "transA",
        "transB",
        "exclusive",
        "reverse",
        "fmod",
        "upper",
        "allowzero",
        "noop_with_empty_axes",
        "is_causal",
    ];
    all.push(flags.map(|name| int(name, 1)).to_vec());
    all.push(flags.map(|name| int(name, 0)).to_vec());
    for equation in [
        "",
        "->",
        "ab,bc->ac",
        "ii->i",
        "ab,a->",
        "a,b,c,d->dcba",
        "...a->a",
        "ab->z",
    ] {
        all.push(vec![
            string("equation", equation.as_bytes()),
            string("mode", b"edge"),
            string("auto_pad", b"SAME_UPPER"),
        ]);
    }
    all
}

#[test]
fn no_call_panics() {
    let (inputs, attributes) = (strange_inputs(), strange_attributes());
    let inputs: Vec<Option<Rc<Tensor>>> = inputs.into_iter().map(Rc::new).map(Some).chain([None]).collect();
    let mut state = 1u64;
    let mut pick = |n: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let mut names: Vec<_> = registry::names().collect();
    names.sort_unstable();
    assert!(names.len() > 150);
    let mut computed = 0;
    for (domain, op) in names {
        let mut node = NodeProto::new(domain, op, op, &["a", "b", "c", "d", "e", "f"], &["y", "z"]);
        for _ in 0..400 {
            node.attribute = attributes[pick(attributes.len())].clone();
            node.attribute.extend(attributes[pick(attributes.len())].clone());
            let given: Vec<_> = (0..pick(8)).map(|_| inputs[pick(inputs.len())].clone()).collect();
            for output in evaluate(&node, &given, [7, 13, 23][pick(3)])
                .into_iter()
                .flatten()
                .flatten()
            {
                computed += 1;
                if let Some(data) = &output.data {
                    assert_eq!(numel(&output.shape), Ok(data.len()), "{domain} {op}");
                }
                if let Some(lazy) = &output.lazy {
                    lazy.at(0);
                }
            }
        }
    }
    assert!(computed > 1000);
}

#[test]
fn an_operator_that_is_not_listed_has_no_shape() {
    let custom = NodeProto::new("com.example", "Mystery", "m", &["a"], &["y"]);
    let inputs = [Some(Rc::new(counted(&[2, 3])))];
    let expected = Error::NotSupported {
        domain: "com.example".to_owned(),
        op_type: "Mystery".to_owned(),
    };
    assert_eq!(
        expected.to_string(),
        "the operator com.example::Mystery is not supported"
    );
    assert_eq!(evaluate(&custom, &inputs, 23).err(), Some(expected));
    // A name that is listed in one domain says nothing in another.
    let other = NodeProto::new("com.example", "LayerNormalization", "m", &["a"], &["y"]);
    assert!(evaluate(&other, &inputs, 23).is_err());
}

#[test]
fn shapes_of_what_keeps_none_are_computed() {
    let ints_of = AttributeProto::ints;
    let conv = node("Conv", &[ints_of("pads", &[3, 3]), ints_of("strides", &[2])]);
    let (x, w) = (Tensor::unknown(vec![2, 8, 11], DataType::Float), counted(&[8, 1, 4]));
    assert_eq!(result(&conv, &[x, w]).unwrap().shape, [2, 8, 7]);
    let mut attention = node("Attention", &[]);
    attention.domain = Some("com.microsoft".to_owned());
    let inputs = [
        Tensor::unknown(vec![2, 5, 16], DataType::Float),
        Tensor::unknown(vec![16, 24], DataType::Float),
    ];
    assert_eq!(result(&attention, &inputs).unwrap().shape, [2, 5, 8]);
}

#[test]
fn elements_are_gathered_within_their_axis_only() {
    let t = counted(&[2, 3]);
    let gather = node("GatherElements", &[AttributeProto::int("axis", 1)]);
    let out = result(&gather, &[t.clone(), ints(&[2, 2], &[0.0, -1.0, 1.0, 2.0])]).unwrap();
    assert_eq!(out.data.unwrap(), [-3.0, -1.0, 1.0, 2.0]);
    // The fourth of three would be the next row's first.
    let why = result(&gather, &[t, ints(&[1, 1], &[3.0])]).expect_err("out of range");
    assert_eq!(why, Error::IndexOutOfRange { index: 3, len: 3 });
}
