//! Synthetic state of selectors is what the operator leaves behind a prefill.

use half::{bf16, f16};
use ort::value::TensorElementType;
use retro_contract::{Selector, StateElement, limits};
use retro_models::Dtype;
use retro_run::{
    Device, OpenOptions, Runtime,
    bench::{op::operator::AttentionShape, selector_state::StatePattern},
    runtime::find_plugin,
};

/// Page size, D.
const SHAPES: [(usize, usize); 3] = [(8, 16), (16, 64), (128, 40)];

/// ONNX Runtime has one environment a process, so that all is one test.
struct Bed {
    runtime: Runtime,
    options: OpenOptions,
}

impl Bed {
    fn new() -> Self {
        let plugin = find_plugin(None).unwrap();
        assert!(plugin.is_some(), "build the plugin first: cargo build --release");
        let options = OpenOptions {
            plugin,
            ..OpenOptions::default()
        };
        let runtime = Runtime::load_for(Device::Cpu, None).unwrap();
        Self { runtime, options }
    }

    fn pattern(&self, selector: Selector, (page, d): (usize, usize), cache: TensorElementType) -> Vec<u8> {
        let pattern = StatePattern::new(
            &self.runtime,
            &self.options,
            selector,
            page,
            d,
            limits::SKETCH_BITS,
            cache,
        )
        .unwrap();
        pattern.bytes().to_vec()
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

#[test]
fn state_is_what_a_prefill_leaves() {
    let bed = Bed::new();
    is_valid(&bed);
    is_in_the_caches_type(&bed);
}

fn is_valid(bed: &Bed) {
    for &selector in Selector::ALL {
        for shape in SHAPES {
            let (page_size, d) = shape;
            let bytes = bed.pattern(selector, shape, TensorElementType::Float32);
            // As long as that of whole pages of one KV head.
            let one = AttentionShape {
                heads: 1,
                kv_heads: 1,
                head_size: d,
                page_size,
                dtype: Dtype::F32,
                sketch_bits: limits::SKETCH_BITS,
            };
            let layout = selector.layout(&one.cache_size(256));
            assert_eq!(bytes.len(), 127 * layout.bytes(4), "{selector}, {shape:?}");
            assert!(bytes.iter().any(|&b| b != bytes[0]), "{selector}: {shape:?}");
            if layout.element == StateElement::Byte {
                continue;
            }
            let numbers = floats(&bytes);
            assert!(numbers.iter().all(|x| x.is_finite()), "{selector}: {shape:?}");
            for page in numbers.chunks_exact(2 * d) {
                let (first, second) = page.split_at(d);
                let valid = |&(a, b): &(&f32, &f32)| match selector {
                    Selector::Bounds => a < b,
                    Selector::Moments => *b > 0.0,
                    // Signed deviations, and what is yet to come.
                    _ => *b != 0.0,
                };
                assert!(
                    first.iter().zip(second).all(|pair| valid(&pair)),
                    "{selector}: {page:?}"
                );
            }
        }
    }
}

fn is_in_the_caches_type(bed: &Bed) {
    let wide = floats(&bed.pattern(Selector::Bounds, SHAPES[0], TensorElementType::Float32));
    let narrow = bed.pattern(Selector::Bounds, SHAPES[0], TensorElementType::Float16);
    let narrow: Vec<f32> = narrow
        .as_chunks()
        .0
        .iter()
        .map(|&b| f16::from_le_bytes(b).to_f32())
        .collect();
    assert_eq!(narrow.len(), wide.len());
    assert!(narrow.iter().zip(&wide).all(|(a, b)| (a - b).abs() <= 2e-3 * b.abs()));
    let brain = bed.pattern(Selector::Bounds, SHAPES[0], TensorElementType::Bfloat16);
    let brain = brain.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b));
    assert!(brain.eq(narrow.iter().map(|&x| bf16::from_f32(x))));
}
