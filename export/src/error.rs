//! What the errors of all parts share.

use std::{error::Error, fmt::Write};

/// An error and what caused it, in one line: `cannot write m.onnx: No space left on device`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files;
    use std::io;

    #[test]
    fn causes_follow_one_another() {
        let source = io::Error::other(io::Error::from(io::ErrorKind::StorageFull));
        let path = "m.onnx".into();
        let error = files::Error::Write { path, source };
        assert_eq!(chain(&error), "cannot write m.onnx: no storage space");
    }
}
