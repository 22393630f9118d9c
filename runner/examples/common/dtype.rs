//! Element types on the command line.

use clap::ValueEnum;
use ort::value::TensorElementType;
use retro_onnx::DataType;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub fn onnx(self) -> DataType {
        match self {
            Self::F32 => DataType::Float,
            Self::F16 => DataType::Float16,
            Self::Bf16 => DataType::Bfloat16,
        }
    }

    pub fn element(self) -> TensorElementType {
        match self {
            Self::F32 => TensorElementType::Float32,
            Self::F16 => TensorElementType::Float16,
            Self::Bf16 => TensorElementType::Bfloat16,
        }
    }
}
