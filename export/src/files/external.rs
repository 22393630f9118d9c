//! What becomes of weights in files of their own.

/// What becomes of weights in files of their own. They are never rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ExternalMode {
    /// The output lies beside them and refers to them
    Reference,
    /// Hard links in the output's folder, copies where the file system has none; Python's onnx refuses to load weights from a
    /// file with several hard links, the original's too
    Link,
    /// Copies in the output's folder, which share their blocks where the file system can
    Copy,
}
