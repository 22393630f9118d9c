//! Products of packed weights: weights of every form at random, a model of one node, and the product in f64.

use prost::Message;
use retro_contract::matmul_nbits::{OP_TYPE, attribute};
use retro_contract::{DOMAIN, OPSET_VERSION};
use retro_onnx::{AttributeProto, DataType, GraphBuilder, NodeProto, TensorProto, ValueInfoProto};

use crate::{
    node::data_type,
    random::Random,
    tensor::{Dtype, Tens},
};

/// The zero points that a product has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPoints {
    /// None: 2^(bits - 1).
    Middle,
    /// Codes of as many bits as the weights.
    Packed,
    /// Numbers of the activations' type, no whole ones.
    Float,
}

impl ZeroPoints {
    pub const ALL: [ZeroPoints; 3] = [Self::Middle, Self::Packed, Self::Float];
}

/// The form of a product.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    pub dtype: Dtype,
    pub bits: usize,
    pub block_size: usize,
    pub zero_points: ZeroPoints,
    pub bias: bool,
    pub k: usize,
    pub n: usize,
}

impl Form {
    pub fn blocks(&self) -> usize {
        self.k.div_ceil(self.block_size)
    }

    /// The attributes of a node, as exporters write them.
    pub fn attributes(&self) -> Vec<AttributeProto> {
        [
            (attribute::K, self.k),
            (attribute::N, self.n),
            (attribute::BITS, self.bits),
            (attribute::BLOCK_SIZE, self.block_size),
        ]
        .map(|(name, value)| AttributeProto::int(name, value as i64))
        .to_vec()
    }
}

/// Random weights of a form.
pub struct Weights {
    pub form: Form,
    /// Codes, `[n][blocks * block_size]`: those behind k are stored, and must not count.
    codes: Vec<u8>,
    scales: Vec<f32>,
    /// Codes or numbers, `[n][blocks]`.
    zero_points: Vec<f32>,
    bias: Vec<f32>,
}

/// Codes of `bits` bits in whole bytes a row, the first in the lowest bits.
fn pack(codes: &[u8], row: usize, bits: usize) -> Vec<u8> {
    let per_byte = 8 / bits;
    let byte = |codes: &[u8]| {
        let shifted = codes.iter().enumerate().map(|(i, &c)| c << (i * bits));
        shifted.fold(0, |byte, c| byte | c)
    };
    codes
        .chunks(row)
        .flat_map(|row| row.chunks(per_byte).map(byte).collect::<Vec<_>>())
        .collect()
}

impl Weights {
    pub fn random(form: Form, random: &mut Random) -> Self {
        let Form { n, bits, dtype, .. } = form;
        let (blocks, codes) = (form.blocks(), 1 << bits);
        let rounded = |numbers: Vec<f32>| numbers.into_iter().map(|x| dtype.round(x)).collect::<Vec<_>>();
        Self {
            form,
            codes: (0..n * blocks * form.block_size)
                .map(|_| random.below(codes) as u8)
                .collect(),
            scales: rounded(random.uniform(n * blocks, -0.02, 0.06)),
            zero_points: match form.zero_points {
                ZeroPoints::Middle => vec![(codes / 2) as f32; n * blocks],
                ZeroPoints::Packed => (0..n * blocks).map(|_| random.below(codes) as f32).collect(),
                ZeroPoints::Float => rounded(random.uniform(n * blocks, 0.0, codes as f32)),
            },
            bias: match form.bias {
                true => rounded(random.uniform(n, -4.0, 4.0)),
                false => vec![0.0; n],
            },
        }
    }

    fn floats(&self, name: &str, dims: &[usize], numbers: &[f32]) -> TensorProto {
        let bytes = Tens::floats(self.form.dtype, dims, numbers).bytes().to_vec();
        let dims: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
        TensorProto::raw(name, data_type(self.form.dtype), &dims, bytes.into())
    }

    /// The tensors of a node, by slot; `None` where the form has none.
    pub fn tensors(&self) -> [Option<TensorProto>; 5] {
        let Form {
            n, bits, block_size, ..
        } = self.form;
        let blocks = self.form.blocks();
        let bytes = |name: &str, dims: &[usize], data: Vec<u8>| {
            let dims: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
            TensorProto::raw(name, DataType::Uint8, &dims, data.into())
        };
        let blob = block_size * bits / 8;
        let zero_points = match self.form.zero_points {
            ZeroPoints::Middle => None,
            ZeroPoints::Packed => {
                let codes: Vec<u8> = self.zero_points.iter().map(|&z| z as u8).collect();
                let row = (blocks * bits).div_ceil(8);
                Some(bytes("zero_points", &[n, row], pack(&codes, blocks, bits)))
            }
            ZeroPoints::Float => Some(self.floats("zero_points", &[n, blocks], &self.zero_points)),
        };
        [
            Some(bytes(
                "B",
                &[n, blocks, blob],
                pack(&self.codes, blocks * block_size, bits),
            )),
            Some(self.floats("scales", &[n, blocks], &self.scales)),
            zero_points,
            None,
            self.form.bias.then(|| self.floats("bias", &[n], &self.bias)),
        ]
    }

    /// A model of one node, with these weights in it.
    pub fn model(&self, domain: &str) -> Vec<u8> {
        one_node(domain, &self.form, self.form.attributes(), self.tensors())
    }

    /// The product of rows of activations in f64, and how far off each number may be.
    pub fn product(&self, a: &[f32], rounding: Rounding) -> (Vec<f32>, Vec<f32>) {
        let Form { n, k, dtype, .. } = self.form;
        let Rounding { accumulator, weights } = rounding;
        let unit = unit_roundoff(dtype);
        let (mut product, mut tolerance) = (Vec::new(), Vec::new());
        for row in a.chunks(k) {
            for column in 0..n {
                let (mut sum, mut size) = (0f64, 0f64);
                for (i, &x) in row.iter().enumerate() {
                    let (code, scale, zero) = self.at(column, i);
                    sum += f64::from(x) * scale * (code - zero);
                    // A difference of whole numbers is exact.
                    let difference = match self.form.zero_points {
                        ZeroPoints::Float => code + zero.abs(),
                        _ => (code - zero).abs(),
                    };
                    size += (f64::from(x) * scale).abs() * difference;
                }
                let bias = f64::from(self.bias[column]);
                let total = sum + bias;
                // Each product and each sum of the k rounds once, and the zero point's difference and product do; the
                // result rounds to the type, once before the bias and once after it.
                let inner = (k + 4) as f64 * accumulator + 2.0 * weights;
                product.push(total as f32);
                tolerance.push(
                    (size * inner + unit * (sum.abs() + total.abs()) + f64::from(f32::EPSILON) * bias.abs()) as f32,
                );
            }
        }
        (product, tolerance)
    }

    /// Code, scale and zero point of a weight.
    fn at(&self, column: usize, i: usize) -> (f64, f64, f64) {
        let blocks = self.form.blocks();
        let block = column * blocks + i / self.form.block_size;
        let code = self.codes[column * blocks * self.form.block_size + i];
        (
            f64::from(code),
            f64::from(self.scales[block]),
            f64::from(self.zero_points[block]),
        )
    }
}

/// Unit roundoffs inside a product.
#[derive(Clone, Copy, Debug)]
pub struct Rounding {
    /// Of what products are summed in.
    pub accumulator: f64,
    /// Of what weights are widened to.
    pub weights: f64,
}

/// Half the distance from 1 to the next number.
pub fn unit_roundoff(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
        _ => 2f64.powi(-24),
    }
}

/// A model of one product whose weights are initializers. `tensors` in slot order, from B on.
pub fn one_node(
    domain: &str,
    form: &Form,
    attributes: Vec<AttributeProto>,
    tensors: [Option<TensorProto>; 5],
) -> Vec<u8> {
    let mut b = GraphBuilder::new("one_node");
    let t = data_type(form.dtype);
    b.input(ValueInfoProto::unshaped("A", t));
    b.output(ValueInfoProto::unshaped("Y", t));
    let mut inputs = vec!["A".to_owned()];
    inputs.extend(
        tensors
            .iter()
            .map(|t| t.as_ref().map_or(String::new(), |t| t.name().to_owned())),
    );
    let last = inputs.iter().rposition(|name| !name.is_empty()).unwrap_or_default();
    tensors.into_iter().flatten().for_each(|t| b.initializer(t));
    let names: Vec<&str> = inputs[..=last].iter().map(String::as_str).collect();
    let mut node = NodeProto::new(domain, OP_TYPE, "node", &names, &["Y"]);
    node.attribute = attributes;
    b.push(node);
    let version = if domain == DOMAIN { OPSET_VERSION } else { 1 };
    b.into_model(10, &[("", 21), (domain, version)]).encode_to_vec()
}
