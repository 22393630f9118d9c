//! The whole converter on any bytes: an error, or a model that can be read and is not converted a second time.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use retro_export::{Options, convert_bytes};
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let options = Options { partial: true, ..Options::default() };
    let folder = Path::new("/nonexistent");
    if let Ok(converted) = convert_bytes(Bytes::copy_from_slice(data), folder, &options) {
        assert!(convert_bytes(converted.into(), folder, &options).is_err());
    }
});
