//! Files that are cut short or say what cannot be: one clear line each, at once.

use retro_gguf::{Bytes, Gguf, TensorType, Writer};

fn parse(bytes: Vec<u8>) -> Result<Gguf, retro_gguf::Error> {
    Gguf::parse(Bytes::from(bytes))
}

/// A good file with everything that can be cut.
fn good() -> Writer {
    let mut file = Writer::new();
    file.string("general.architecture", "llama")
        .u32("a", 1)
        .f32("b", 2.0)
        .boolean("c", true)
        .strings("d", &["x", "yz"])
        .i32s("e", &[1, -2])
        .f32s("f", &[1.5])
        .tensor("t", &[2, 32], TensorType::Q8_0, &[1; 68]);
    file
}

#[test]
fn what_is_written_is_read() {
    let file = parse(good().finish()).unwrap();
    let m = &file.metadata;
    assert_eq!(m.string("general.architecture").unwrap(), Some("llama"));
    assert_eq!(m.integer("a").unwrap(), Some(1));
    assert_eq!((m.float("a").unwrap(), m.float("b").unwrap()), (Some(1.0), Some(2.0)));
    assert_eq!(m.boolean("c").unwrap(), Some(true));
    let strings: Vec<_> = m
        .array("d")
        .unwrap()
        .unwrap()
        .strings()
        .collect::<Result<_, _>>()
        .unwrap();
    assert_eq!(strings, ["x", "yz"]);
    let e = m.array("e").unwrap().unwrap();
    assert_eq!((e.len(), e.numbers().count(), e.strings().count()), (2, 2, 0));
    assert_eq!(m.integer("none").unwrap(), None);
    let error = m.integer("general.architecture").unwrap_err().to_string();
    assert_eq!(
        error,
        "the value of \"general.architecture\" is a string, expected a whole number"
    );
    assert_eq!(file.tensor("t").unwrap().shape(), [2, 32]);
}

#[test]
fn every_file_that_is_cut_short_is_an_error() {
    let whole = good().finish();
    for length in 0..whole.len() {
        let error = parse(whole[..length].to_vec()).map(drop).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        assert!(length < 4 || error.contains("cut short"), "{length}: {error}");
    }
    assert!(parse(whole).is_ok());
}

/// Whatever one byte says instead: an error or a file, and tensors that can be read or are refused.
#[test]
fn any_byte_may_be_any_other() {
    let whole = good().finish();
    for at in 0..whole.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff, whole[at] ^ 1, whole[at] ^ 0x10] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            let Ok(file) = parse(bytes) else { continue };
            for info in file.tensors() {
                if let Ok(tensor) = file.tensor(&info.name) {
                    let mut all = vec![0.0; tensor.elements()];
                    tensor.read(0, &mut all).unwrap();
                }
            }
        }
    }
}

fn with(change: impl FnOnce(&mut Writer) -> &mut Writer) -> Result<Gguf, retro_gguf::Error> {
    let mut file = good();
    change(&mut file);
    parse(file.finish())
}

/// The good file with a number of the header replaced.
fn header(at: usize, value: &[u8]) -> Result<Gguf, retro_gguf::Error> {
    let mut bytes = good().finish();
    bytes[at..at + value.len()].copy_from_slice(value);
    parse(bytes)
}

#[test]
fn what_cannot_be_is_named() {
    let huge = u64::MAX.to_le_bytes();
    let list = |kind: u32, count: u64, rest: &[u8]| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(rest);
        bytes
    };
    let nested = (0..40).fold(list(0, 0, &[]), |inner, _| list(9, 1, &inner));
    let far = u64::MAX - 31;
    for (got, said) in [
        (parse(b"GGML\0\0\0\0".to_vec()), "\"GGUF\""),
        (header(4, &[1, 0, 0, 0]), "version is 1"),
        (header(4, &[0, 0, 0, 3]), "big-endian"),
        (header(8, &huge), "tensors, more than"),
        (header(8, &[0, 0, 8, 0]), "cut short: tensors"),
        (header(16, &huge), "keys, more than"),
        (header(16, &[0xff, 0xff, 0, 0]), "cut short: keys"),
        (header(24, &huge), "cut short: a key"),
        (with(|f| f.u32("a", 2)), "key \"a\" occurs twice"),
        (with(|f| f.raw("k", 13, &[])), "unknown type 13"),
        (with(|f| f.raw("k", 8, &huge)), "cut short: a value"),
        (with(|f| f.raw("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])), "not UTF-8"),
        (with(|f| f.raw("k", 9, &list(0, u64::MAX, &[]))), "cut short: a list"),
        (with(|f| f.raw("k", 9, &list(12, 1 << 61, &[]))), "cut short: a list"),
        (with(|f| f.raw("k", 9, &list(8, 2, &huge))), "cut short"),
        (with(|f| f.raw("k", 9, &nested)), "list of lists of lists"),
        (with(|f| f.u32("general.alignment", 0)), "alignment is 0"),
        (with(|f| f.u32("general.alignment", 24)), "alignment is 24"),
        (with(|f| f.string("general.alignment", "x")), "is a string"),
        (with(|f| f.info("u", &[], 0, 0)), "0 dimensions"),
        (with(|f| f.info("u", &[1; 5], 0, 0)), "5 dimensions"),
        (with(|f| f.info("u", &[4, 0], 0, 0)), "[4, 0]"),
        (with(|f| f.info("u", &[1 << 40, 1 << 40], 0, 0)), "no tensor can have"),
        (with(|f| f.info("u", &[1 << 55], 0, 0)), "cut short: tensor \"u\""),
        (with(|f| f.info("u", &[40], 8, 0)), "blocks of 32"),
        (with(|f| f.info("u", &[1], 0, 8)), "starts at 8"),
        (with(|f| f.info("u", &[1], 0, far)), "cut short: tensor \"u\""),
        (with(|f| f.info("u", &[32], 8, 64)), "cut short: tensor \"u\""),
        (with(|f| f.info("t", &[1], 0, 0)), "tensor \"t\" occurs twice"),
    ] {
        let error = got.map(drop).unwrap_err().to_string();
        assert!(error.contains(said) && !error.contains('\n'), "{said}: {error}");
    }
}

#[test]
fn a_type_that_is_not_read_is_named_when_its_tensor_is_wanted() {
    for (id, name) in [(10, "Q2_K"), (39, "MXFP4"), (1000, "number 1000")] {
        let file = with(|f| f.info("u", &[1 << 40], id, far_multiple())).unwrap();
        let error = file.tensor("u").map(drop).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("Q4_K"), "{error}");
    }
}

fn far_multiple() -> u64 {
    1 << 62
}
