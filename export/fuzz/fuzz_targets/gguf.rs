//! Any bytes: an error or a GGUF file whose tensors can be read, and a model of it or one line that says why not; never a
//! panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use retro_gguf::{Bytes, Gguf};
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let bytes = Bytes::copy_from_slice(data);
    if let Ok(file) = Gguf::parse(bytes.clone()) {
        for info in file.tensors() {
            if let Ok(tensor) = file.tensor(&info.name) {
                // A stored block has a few bytes at least: all of them are no more than the file.
                let mut elements = vec![0.0; tensor.elements().min(4096)];
                tensor.read(0, &mut elements).unwrap();
                tensor.read(tensor.elements() - elements.len(), &mut elements).unwrap();
            }
        }
    }
    if let Err(error) = retro_models::check_gguf(bytes, Path::new("fuzzed")) {
        assert!(!error.to_string().contains('\n'));
    }
});
