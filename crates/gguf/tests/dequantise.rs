//! Every type against the dequantisation of the `gguf` package for Python: `data/tensor_types.py` wrote the file.

use retro_gguf::{Bytes, Gguf, TensorType};

fn file() -> Gguf {
    Gguf::parse(Bytes::from_static(include_bytes!("data/tensor_types.gguf"))).unwrap()
}

fn expected(file: &Gguf, name: &str) -> Vec<f32> {
    let tensor = file.tensor(&format!("{name}.f32")).unwrap();
    assert_eq!(tensor.kind(), TensorType::F32);
    let (chunks, _) = tensor.bytes().as_chunks();
    chunks.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn every_type_has_the_bits_of_the_reference() {
    let file = file();
    for kind in TensorType::ALL {
        let name = kind.to_string();
        let expected = expected(&file, if kind == TensorType::F32 { "F16" } else { &name });
        let stored = if kind == TensorType::F32 { "F16.f32" } else { &name };
        let tensor = file.tensor(stored).unwrap();
        assert_eq!((tensor.kind(), tensor.elements()), (kind, expected.len()));
        let mut got = vec![f32::NAN; expected.len()];
        tensor.read(0, &mut got).unwrap();
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(got.to_bits(), expected.to_bits(), "{name} {i}: {got} {expected}");
        }
    }
}

#[test]
fn a_run_is_a_piece_of_the_whole_wherever_it_begins_and_ends() {
    let file = file();
    for name in ["F16", "Q4_1", "Q8_0", "Q6_K"] {
        let expected = expected(&file, name);
        let tensor = file.tensor(name).unwrap();
        let block = tensor.kind().block();
        for start in [0, 1, block - 1, block, block + 1, expected.len() - 3, expected.len()] {
            for end in [start, start + 1, start + block, start + 2 * block - 1, expected.len()] {
                let Some(piece) = expected.get(start..end) else {
                    continue;
                };
                let mut got = vec![f32::NAN; piece.len()];
                tensor.read(start, &mut got).unwrap();
                assert_eq!(got, piece, "{name} {start}..{end}");
            }
        }
        let mut one = [0.0];
        assert!(tensor.read(expected.len(), &mut one).is_err());
        assert!(tensor.read(usize::MAX, &mut one).is_err());
    }
}
