//! The product for every instruction set of this machine against f64.

use half::f16;

use super::{Attributes, Product, ZeroPoints, multiply};
use crate::cpu::{Serial, Shared};
use crate::method::element::Element;
use crate::simd::Isa;

/// Numbers that look random, in 0..bound.
fn random(seed: &mut u32, bound: u32) -> u32 {
    *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    (*seed >> 8) % bound
}

fn numbers<T: Element>(seed: &mut u32, count: usize, scale: f32) -> Vec<T> {
    let number = |seed: &mut u32| T::from_f32((random(seed, 2001) as f32 - 1000.0) / 1000.0 * scale);
    (0..count).map(|_| number(seed)).collect()
}

fn product<T: Element>(isa: Isa, product: &Product<'_, T>, a: &[T]) -> Vec<T> {
    let mut out = vec![T::default(); a.len() / product.attributes.k * product.attributes.n];
    let shared = Shared::new(&mut out);
    multiply(isa, product, a, &shared, &Serial).expect("a product");
    out
}

/// Codes, scales and zero points of a form, and how far off a product of theirs may be.
fn check<T: Element>(attributes: Attributes, kind: usize, ordered: bool, unit: f64) {
    let Attributes { k, n, bits, .. } = attributes;
    let blocks = attributes.blocks();
    let seed = &mut ((k * 31 + bits * 7 + kind) as u32);
    let codes: Vec<u8> = (0..n * blocks * attributes.block_bytes())
        .map(|_| random(seed, 256) as u8)
        .collect();
    let scales: Vec<T> = numbers(seed, n * blocks, 0.05);
    let packed: Vec<u8> = (0..n * attributes.zero_point_bytes())
        .map(|_| random(seed, 256) as u8)
        .collect();
    let floats: Vec<T> = numbers(seed, n * blocks, 16.0);
    let bias: Vec<T> = numbers(seed, n, 3.0);
    let g_idx: Vec<i32> = match ordered {
        true => (0..k).map(|_| random(seed, blocks as u32) as i32).collect(),
        false => Vec::new(),
    };
    let weights = Product {
        attributes: &attributes,
        codes: &codes,
        scales: &scales,
        zero_points: match kind {
            0 => ZeroPoints::Middle,
            1 => ZeroPoints::Packed(&packed),
            _ => ZeroPoints::Numbers(&floats),
        },
        g_idx: &g_idx,
        bias: if kind == 2 { &[] } else { &bias },
    };
    weights.check_order().expect("blocks that there are");
    let code = |bytes: &[u8], i: usize| match bits {
        4 => f64::from(bytes[i / 2] >> (i % 2 * 4) & 15),
        _ => f64::from(bytes[i]),
    };
    let zero = |column: usize, g: usize| match kind {
        0 => f64::from(1 << (bits - 1)),
        1 => code(&packed[column * attributes.zero_point_bytes()..], g),
        _ => f64::from(floats[column * blocks + g].to_f32()),
    };
    let weight = |column: usize, i: usize| {
        let g = g_idx.get(i).map_or(i / attributes.block_size, |&g| g as usize);
        let code = code(&codes[column * blocks * attributes.block_bytes()..], i);
        let scale = f64::from(scales[column * blocks + g].to_f32());
        let zero = zero(column, g);
        (scale * (code - zero), scale.abs() * (code + zero.abs()))
    };
    let a: Vec<T> = numbers(seed, 11 * k, 2.0);
    for &isa in Isa::all() {
        let got = product(isa, &weights, &a);
        for (at, got) in got.iter().enumerate() {
            let (row, column) = (&a[at / n * k..][..k], at % n);
            let (mut sum, mut size) = (0.0, 0.0);
            for (i, x) in row.iter().enumerate() {
                let (w, most) = weight(column, i);
                sum += f64::from(x.to_f32()) * w;
                size += f64::from(x.to_f32().abs()) * most;
            }
            let bias = weights.bias.get(column).map_or(0.0, |b| f64::from(b.to_f32()));
            let tolerance =
                size * (k + 4) as f64 * 2f64.powi(-24) + unit * (sum + bias).abs() * 1.01 + 1e-7 * bias.abs();
            let off = (f64::from(got.to_f32()) - sum - bias).abs();
            assert!(
                off <= tolerance,
                "{isa:?} {attributes:?} {kind} {ordered}: element {at} is off by {off}"
            );
        }
        // A row alone has the numbers that it has among others.
        for (row, together) in a.chunks(k).zip(got.chunks(n)) {
            assert!(product(isa, &weights, row) == together, "{isa:?} {attributes:?}");
        }
    }
}

#[test]
fn every_form_is_the_product() {
    for bits in [4, 8] {
        for block_size in [16, 32, 64, 128] {
            for (k, n) in [(128, 12), (67, 1), (200, 33), (400, 40)] {
                let attributes = Attributes {
                    k,
                    n,
                    bits,
                    block_size,
                    accuracy_level: 0,
                };
                for kind in 0..3 {
                    for ordered in [false, true] {
                        check::<f32>(attributes, kind, ordered, 2f64.powi(-24));
                        check::<f16>(attributes, kind, ordered, 2f64.powi(-11));
                    }
                }
            }
        }
    }
}

#[test]
fn an_order_that_names_no_block_is_refused() {
    let attributes = Attributes {
        k: 40,
        n: 1,
        bits: 4,
        block_size: 32,
        accuracy_level: 0,
    };
    for wrong in [-1, 2] {
        let mut g_idx = vec![0; 40];
        g_idx[7] = wrong;
        let product = Product::<f32> {
            attributes: &attributes,
            codes: &[0; 32],
            scales: &[1.0; 2],
            zero_points: ZeroPoints::Middle,
            g_idx: &g_idx,
            bias: &[],
        };
        let error = product.check_order().expect_err("it is refused").to_string();
        assert_eq!(error, format!("input g_idx has {wrong} at 7, expected 0..1"));
    }
}
