//! What can be wrong with an ONNX file, with its weights, or with writing one.

use std::{io, path::PathBuf};

/// Each is one line that says what is wrong, and where. The cause, where there is one, is the error's source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be opened.
    #[error("cannot open {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },

    /// What the system knows about the file can't be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },

    /// The file can't be mapped into memory.
    #[error("cannot map {}", .path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },

    /// A folder, a pipe or a device stands where a file should.
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),

    /// The file has no bytes.
    #[error("{} is empty", .0.display())]
    Empty(PathBuf),

    /// The bytes are no `ModelProto`.
    #[error("{} is not an ONNX model, or is cut short: {reason}", .path.display())]
    NotAModel {
        /// The file.
        path: PathBuf,
        /// Where decoding stopped.
        reason: prost::DecodeError,
    },

    /// The bytes are a `ModelProto` without a graph.
    #[error("{} is not an ONNX model: it has no graph", .0.display())]
    NoGraph(PathBuf),

    /// Writing the model unchanged would give other bytes.
    #[error(
        "{} holds fields or an encoding that this version doesn't know and would lose; save it again with a current onnx \
         package (onnx.save(onnx.load(...)))",
        .0.display()
    )]
    WouldLose(PathBuf),

    /// External data without a location.
    #[error("tensor {tensor} is external but names no file")]
    NoLocation {
        /// The tensor's name.
        tensor: String,
    },

    /// A location that is absolute, or leads out of the model's folder.
    #[error("tensor {tensor} is stored in {location:?}, which is not inside the model's folder: refused")]
    OutsideFolder {
        /// The tensor's name.
        tensor: String,
        /// The location as the model has it.
        location: String,
    },

    /// A location whose symbolic links lead out of the model's folder.
    #[error(
        "the weights of tensor {tensor} are in {}, which leads to {} outside the model's folder: ONNX Runtime does not read \
         them there, so they are refused; put the file itself into the folder",
        .path.display(), .target.display()
    )]
    LinkedOutside {
        /// The tensor's name.
        tensor: String,
        /// The location in the model's folder.
        path: PathBuf,
        /// The file that it leads to.
        target: PathBuf,
    },

    /// A file of external data that isn't there.
    #[error("the weights of tensor {tensor} are in {}, which can't be read", .path.display())]
    MissingData {
        /// The tensor's name.
        tensor: String,
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },

    /// External data in something that is no regular file.
    #[error("{} holds weights by the model's word, but is not a file", .0.display())]
    DataNotAFile(PathBuf),

    /// A tensor whose place in its file makes no sense.
    #[error("the weights of tensor {tensor} in {location}")]
    Extent {
        /// The tensor's name.
        tensor: String,
        /// The location as the model has it.
        location: String,
        /// What is wrong with its place.
        #[source]
        source: ExtentError,
    },

    /// A file of external data that ends before the tensors in it do.
    #[error(
        "{} has {len} bytes, but the model's weights in it need {needed} (the last is tensor {tensor}): is the file complete?",
        .path.display()
    )]
    ShortData {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Where the last tensor ends, in bytes.
        needed: u64,
        /// That tensor's name.
        tensor: String,
    },

    /// A model that one ONNX file can't hold.
    #[error(
        "the model would be {0} bytes, more than the 2 GiB that an ONNX file may have; save its weights as external data \
         first (onnx.save(..., save_as_external_data=True))"
    )]
    TooLarge(usize),

    /// The target is a folder.
    #[error("cannot write {}: it is a folder", .0.display())]
    TargetIsFolder(PathBuf),

    /// The target is there, and may not be replaced.
    #[error("{} exists already; use --force to replace it", .0.display())]
    TargetExists(PathBuf),

    /// Writing failed.
    #[error("cannot write {}", .path.display())]
    Write {
        /// The target.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// What is wrong with a tensor's place in its file of external data.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ExtentError {
    /// An offset or a length that is no number.
    #[error("have {key} {text:?}")]
    NotANumber {
        /// `offset` or `length`.
        key: &'static str,
        /// What the model has instead.
        text: String,
    },

    /// A data type or a shape from which no number of bytes follows.
    #[error("have no size: {data_type} {dims:?}")]
    NoSize {
        /// The element type, as NumPy writes it.
        data_type: &'static str,
        /// The shape.
        dims: Vec<i64>,
    },

    /// A length that is not the shape's.
    #[error("are {length} bytes long, but {dims:?} {data_type} needs {needed}")]
    OtherLength {
        /// The length in bytes by the model's word.
        length: u64,
        /// The element type, as NumPy writes it.
        data_type: &'static str,
        /// The shape.
        dims: Vec<i64>,
        /// The length in bytes by shape and type.
        needed: u64,
    },

    /// An end beyond what a file can have.
    #[error("end past any file (offset {offset}, length {length})")]
    PastAnyFile {
        /// Where the tensor begins, in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
    },
}
