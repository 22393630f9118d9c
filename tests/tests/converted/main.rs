//! Whole models, converted by `retro-export`, in a real ONNX Runtime session.

mod convert;
mod exports;
mod feeds;
mod generated;
mod inputs;
mod model;
mod padding;
mod products;
mod rewind;
mod structure;
mod variants;
mod verify;
mod window;
mod zoo;
