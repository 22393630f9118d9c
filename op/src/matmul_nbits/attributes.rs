//! The node's attributes, read and checked.

use retro_contract::DOMAIN;
use retro_contract::matmul_nbits::{attribute as name, limits};

use crate::contract::{AttributeSource, MANY, Names, Reader, refuse_unknown};
use crate::ort::{Result, require};

/// The attributes of a `MatMulNBits` node, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Columns of A.
    pub k: usize,
    /// Columns of the output.
    pub n: usize,
    /// Bits of a weight: 4 or 8.
    pub bits: usize,
    /// Weights a scale: 16, 32, 64 or 128.
    pub block_size: usize,
    /// What the host may round products to, 0 to 4.
    pub accuracy_level: usize,
}

/// What other libraries and operators call these.
const FOREIGN: [&str; 10] = [
    "k",
    "n",
    "group_size",
    "blocksize",
    "num_bits",
    "nbits",
    "transB",
    "alpha",
    "has_bias",
    "quant_type",
];

impl Attributes {
    /// Reads and checks the attributes of a node.
    ///
    /// # Errors
    /// When one is missing, unknown or out of its range.
    pub fn read(source: &impl AttributeSource) -> Result<Self> {
        let operator = &format!("{DOMAIN}::MatMulNBits");
        let names = Names {
            operator,
            known: &name::ALL,
            foreign: &FOREIGN,
        };
        refuse_unknown(source, &names)?;
        let read = Reader(source);
        let one_of = |name: &str, default: Option<usize>, values: &[usize]| {
            let v = read.in_range(name, default, 0, MANY)?;
            require!(
                values.contains(&v),
                "attribute {name} is {v}, expected one of {}",
                values.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
            );
            Ok(v)
        };
        let prepacked = read.in_range(name::WEIGHT_PREPACKED, Some(0), 0, MANY)?;
        require!(
            prepacked == 0,
            "attribute {} is {prepacked}, expected 0: weights in another order than the operator's",
            name::WEIGHT_PREPACKED
        );
        Ok(Self {
            k: read.in_range(name::K, None, 1, MANY)?,
            n: read.in_range(name::N, None, 1, MANY)?,
            bits: one_of(name::BITS, Some(limits::BITS_DEFAULT), &limits::BITS)?,
            block_size: one_of(name::BLOCK_SIZE, None, &limits::BLOCK_SIZES)?,
            accuracy_level: read.in_range(name::ACCURACY_LEVEL, Some(0), 0, limits::ACCURACY_LEVEL_MAX as i64)?,
        })
    }

    /// G: blocks of a column of weights, the last of which may be cut.
    pub fn blocks(&self) -> usize {
        self.k.div_ceil(self.block_size)
    }

    /// Bytes of a block's weights.
    pub fn block_bytes(&self) -> usize {
        self.block_size * self.bits / 8
    }

    /// Bytes of a column's zero points, where they are packed.
    pub fn zero_point_bytes(&self) -> usize {
        (self.blocks() * self.bits).div_ceil(8)
    }
}
