//! Any bytes: an error or a model, never a panic; a model that is read is written back as it was.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use retro_onnx::{external_files, read_bytes};
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    if let Ok(loaded) = read_bytes(Bytes::copy_from_slice(data), Path::new("fuzzed")) {
        let _ = external_files(&loaded.model, Path::new("/nonexistent"));
    }
});
