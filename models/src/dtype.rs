//! The two element types a built model can have.

use half::f16;
use retro_onnx::DataType;

/// Element type of weights, activations, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// float32.
    F32,
    /// float16.
    F16,
}

impl Dtype {
    /// Bytes of an element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }

    /// The same type as ONNX names it.
    pub const fn onnx(self) -> DataType {
        match self {
            Self::F32 => DataType::Float,
            Self::F16 => DataType::Float16,
        }
    }

    /// Writes `value`, rounded to this type, as the little-endian element `index` of `out`; outside it, nothing.
    #[inline]
    pub fn put(self, out: &mut [u8], index: usize, value: f32) {
        match self {
            Self::F32 => {
                if let Some(slot) = out.get_mut(index * 4..index * 4 + 4) {
                    slot.copy_from_slice(&value.to_le_bytes());
                }
            }
            Self::F16 => {
                if let Some(slot) = out.get_mut(index * 2..index * 2 + 2) {
                    slot.copy_from_slice(&f16::from_f32(value).to_le_bytes());
                }
            }
        }
    }
}
