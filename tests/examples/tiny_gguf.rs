//! Writes the tiny GGUF files of the tests into a folder: `tiny_gguf FOLDER`. They are the fuzzer's corpus, and what
//! `tests/data/gguf/expected.py` computes the expected logits of.

use std::{fs, path::Path};

use retro_tests::gguf::{SENTENCEPIECE, TINY_GGUFS};

fn main() -> std::io::Result<()> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| ".".to_owned());
    let folder = Path::new(&folder);
    fs::create_dir_all(folder)?;
    for tiny in TINY_GGUFS.into_iter().chain([SENTENCEPIECE]) {
        fs::write(folder.join(tiny.name).with_extension("gguf"), tiny.bytes())?;
    }
    Ok(())
}
