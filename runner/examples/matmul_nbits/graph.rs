//! Graphs of N MatMulNBits nodes that read one A.

use anyhow::{Result, ensure};
use prost::Message;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use retro_onnx::{Bytes, DataType, GraphBuilder, MAX_MODEL_BYTES, ValueInfoProto};

use crate::{
    args::{Args, Operator, WeightShape, ZeroPoints},
    common::fill::{bytes_of, encode},
};

/// Sizes and kinds that all nodes of a graph share.
#[derive(Clone, Copy, Debug)]
pub struct NodeShape {
    pub weights: WeightShape,
    pub nodes: usize,
    bits: usize,
    block: usize,
    dtype: DataType,
    zero_points: ZeroPoints,
    accuracy_level: i64,
}

impl NodeShape {
    /// As many nodes as have the bytes of weights that are asked for, and two at least.
    pub fn new(args: &Args, weights: WeightShape) -> Result<Self> {
        let mut shape = Self {
            weights,
            nodes: 1,
            bits: args.bits,
            block: args.block,
            dtype: args.dtype().onnx(),
            zero_points: args.zero_points,
            accuracy_level: args.accuracy_level,
        };
        shape.nodes = args.weight_bytes().div_ceil(shape.bytes()).max(2);
        ensure!(
            shape.nodes * shape.bytes() < MAX_MODEL_BYTES,
            "--shape {weights}: {} nodes of {} bytes are more than a model can have; ask for fewer --weights",
            shape.nodes,
            shape.bytes()
        );
        Ok(shape)
    }

    fn blocks(&self) -> usize {
        self.weights.k.div_ceil(self.block)
    }

    fn zero_point_bytes(&self) -> usize {
        match self.zero_points {
            ZeroPoints::None => 0,
            ZeroPoints::Packed => (self.blocks() * self.bits).div_ceil(8),
            ZeroPoints::Float => self.blocks() * bytes_of(self.dtype),
        }
    }

    /// Bytes of a node's weights, scales and zero points.
    pub fn bytes(&self) -> usize {
        let codes = self.blocks() * self.block * self.bits / 8;
        self.weights.n * (codes + self.blocks() * bytes_of(self.dtype) + self.zero_point_bytes())
    }
}

pub fn output_of(node: usize) -> String {
    format!("y.{node}")
}

/// A model of nodes of `operator`, serialized. The same shape gives the same weights.
pub fn model(shape: &NodeShape, operator: Operator) -> Vec<u8> {
    let mut b = GraphBuilder::new("products");
    b.input(ValueInfoProto::unshaped("a", shape.dtype));
    let mut random = StdRng::seed_from_u64(1);
    for node in 0..shape.nodes {
        let inputs = weights(&mut b, shape, &mut random);
        let inputs: Vec<&str> = std::iter::once("a").chain(inputs.iter().map(String::as_str)).collect();
        let output = output_of(node);
        b.output(ValueInfoProto::unshaped(&output, shape.dtype));
        b.node("MatMulNBits", &inputs)
            .domain(operator.domain())
            .int("K", shape.weights.k as i64)
            .int("N", shape.weights.n as i64)
            .int("bits", shape.bits as i64)
            .int("block_size", shape.block as i64)
            .int("accuracy_level", shape.accuracy_level)
            .named(&format!("node.{node}"), &[&output]);
    }
    b.into_model(10, &[("", 21), (operator.domain(), 1)]).encode_to_vec()
}

/// Adds random weights, scales and zero points of a node; returns their names.
fn weights(b: &mut GraphBuilder, shape: &NodeShape, random: &mut StdRng) -> Vec<String> {
    let WeightShape { k, n } = shape.weights;
    let blocks = shape.blocks();
    let [rows, columns] = [n as i64, blocks as i64];
    let bytes = |random: &mut StdRng, count: usize| {
        let mut bytes = vec![0; count];
        random.fill_bytes(&mut bytes);
        Bytes::from(bytes)
    };
    let floats = |random: &mut StdRng, range: std::ops::Range<f32>| {
        let numbers: Vec<f32> = (0..n * blocks).map(|_| random.random_range(range.clone())).collect();
        Bytes::from(encode(shape.dtype, &numbers))
    };
    let blob = shape.block * shape.bits / 8;
    let codes = bytes(random, n * blocks * blob);
    // Products of normal A are then of the order of 1.
    let step = 1.0 / ((1 << (shape.bits - 1)) as f32 * (k as f32).sqrt());
    let scales = floats(random, step..2.0 * step);
    let mut names = vec![
        b.raw("codes", DataType::Uint8, &[rows, columns, blob as i64], codes),
        b.raw("scales", shape.dtype, &[rows, columns], scales),
    ];
    match shape.zero_points {
        ZeroPoints::None => {}
        ZeroPoints::Packed => {
            let row = shape.zero_point_bytes();
            let points = bytes(random, n * row);
            names.push(b.raw("zero_points", DataType::Uint8, &[rows, row as i64], points));
        }
        ZeroPoints::Float => {
            let middle = (1 << (shape.bits - 1)) as f32;
            let points = floats(random, 0.5 * middle..1.5 * middle);
            names.push(b.raw("zero_points", shape.dtype, &[rows, columns], points));
        }
    }
    names
}
