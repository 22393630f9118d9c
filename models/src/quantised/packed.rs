//! How weights become codes, and what initializers have of them.

use retro_gguf::CodeLayout;
use retro_onnx::DataType;

use crate::{dtype::Dtype, part::Part, source::Source};

/// Elements of a group of weights that are rounded.
const GROUP: usize = 32;

/// What quantised weights are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// f32, as everywhere else.
    F32,
    /// Rounded to 8 bits in groups: faster, most with several tokens at a time, and less exact.
    Int8,
    /// f16, as are all other numbers of the graph, as in int4 exports for CUDA.
    F16,
}

impl Activations {
    /// MatMulNBits' attribute `accuracy_level`.
    pub const fn accuracy_level(self) -> i64 {
        match self {
            Self::F32 => 1,
            Self::Int8 => 4,
            // The kernel's own choice, as it is without the attribute.
            Self::F16 => 0,
        }
    }

    /// Element type of activations, keys, values, scales and minimums.
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::F32 | Self::Int8 => Dtype::F32,
            Self::F16 => Dtype::F16,
        }
    }
}

/// How the elements of a tensor become codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format(pub(super) CodeLayout);

impl Format {
    /// Of a tensor by its Hugging Face name. Where it has no codes, it gets `four_bits`, or 8.
    pub fn of(source: &Source, tensor: &str, four_bits: bool) -> Self {
        Self(source.code_layout(tensor).unwrap_or(CodeLayout {
            group: GROUP,
            four_bits,
            has_min: false,
        }))
    }

    pub fn group(self) -> usize {
        self.0.group
    }

    pub fn has_min(self) -> bool {
        self.0.has_min
    }

    pub fn bits(self) -> i64 {
        if self.0.four_bits { 4 } else { 8 }
    }

    /// The parts of codes that are multiplied one by one.
    pub fn halves(self, activations: Activations) -> &'static [Half] {
        match (self.0.four_bits, activations) {
            (false, Activations::F32) => &[Half::High, Half::Low],
            (true, _) | (false, Activations::Int8 | Activations::F16) => &[Half::Both],
        }
    }

    /// Bits of that part of a code.
    pub fn stored_bits(self, half: Half) -> i64 {
        if half == Half::Both { self.bits() } else { 4 }
    }
}

/// Which bits of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// All. The number in the file is the code and 8, or 128.
    Both,
    /// The upper four of 8, and the number 8.
    High,
    /// The lower four of 8.
    Low,
}

impl Half {
    /// What distinguishes its names.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Both => "",
            Self::High => "_high",
            Self::Low => "_low",
        }
    }
}

/// What of quantised weights an initializer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// `[outer, groups, bytes of a group]`, as MatMulNBits takes them.
    Codes(Half),
    /// The same bytes as `[outer, inner]`, as GatherBlockQuantized takes them.
    Table(Half),
    /// `[outer, groups]`.
    Scales(Half),
    /// `[groups, outer]`, to multiply with.
    Mins,
    /// `[outer, groups]`, to gather rows of.
    TableMins,
}

/// An initializer of quantised linear layers, one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    pub parts: Vec<Part>,
    /// Columns of each.
    pub inner: usize,
    /// That of all parts.
    pub format: Format,
    pub what: What,
}

impl Packed {
    /// ONNX's element type where activations are `dtype`.
    pub fn data_type(&self, dtype: Dtype) -> DataType {
        match self.what {
            What::Table(half) if self.format.stored_bits(half) == 4 => DataType::Uint4,
            What::Codes(_) | What::Table(_) => DataType::Uint8,
            What::Scales(_) | What::Mins | What::TableMins => dtype.onnx(),
        }
    }

    /// Weights that the model has in these bytes, and not in another initializer's.
    pub fn parameters(&self) -> usize {
        let rows: usize = self.parts.iter().map(|part| part.rows).sum();
        match self.what {
            What::Codes(Half::Both | Half::High) | What::Table(Half::Both | Half::High) => rows * self.inner,
            What::Codes(Half::Low) | What::Table(Half::Low) => 0,
            What::Scales(_) | What::Mins | What::TableMins => 0,
        }
    }

    pub fn dims(&self) -> Vec<usize> {
        let outer: usize = self.parts.iter().map(|part| part.rows).sum();
        let groups = self.inner / self.format.group();
        match self.what {
            What::Codes(half) => {
                let bytes = self.format.group() * self.format.stored_bits(half) as usize / 8;
                vec![outer, groups, bytes]
            }
            What::Table(_) => vec![outer, self.inner],
            What::Scales(_) | What::TableMins => vec![outer, groups],
            What::Mins => vec![groups, outer],
        }
    }
}
