//! Models in GGUF files: what `retro-models build` makes of them, against llama.cpp and against Hugging Face folders of
//! the same weights. `tests/data/gguf/expected.py` says where the expected values come from.

mod hostile;
mod hugging_face;
mod logits;
mod q4;
mod tokens;

use std::{fs, path::Path};

use retro_models::{Options, build};

/// Writes a file beside the model folder and builds it.
fn build_file(bytes: &[u8], out: &Path, options: &Options) -> Result<(), String> {
    let file = out.with_extension("gguf");
    fs::write(&file, bytes).unwrap();
    let built = build(&file, out, options);
    built.map(drop).map_err(|e| format!("{:#}", Chain(&e)))
}

/// An error with its causes in one line, as the command prints it.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(next) = cause {
            write!(f, ": {next}")?;
            cause = next.source();
        }
        Ok(())
    }
}
