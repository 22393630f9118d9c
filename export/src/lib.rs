//! Rewrites the attention nodes of ONNX graphs of language models into `ai.retro::RetroAttention`.

pub mod onnx;
