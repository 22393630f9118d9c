//! Generates text with ONNX language models, converted by `retro-export` or not.
