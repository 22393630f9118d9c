//! Reads a model from a mapped file. Its weights stay slices of the mapping.

use crate::{
    error::Error,
    messages::ModelProto,
    stream::{Sink, Stream},
};
use bytes::Bytes;
use prost::Message;
use std::{
    fs::{self, File, Metadata},
    io,
    path::{Path, PathBuf},
};

/// A model and the file it came from.
pub struct LoadedModel {
    /// The model. Tensors' `raw_data` are slices of [`Self::bytes`].
    pub model: ModelProto,
    /// The file as it was named.
    pub path: PathBuf,
    /// Length of the file in bytes.
    pub len: u64,
    /// The file, mapped.
    pub bytes: Bytes,
}

impl LoadedModel {
    /// The folder that external data is looked up in.
    pub fn folder(&self) -> &Path {
        folder_of(&self.path)
    }
}

/// The folder of a file; "." for a bare name.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Reads a model without copying its weights, and makes sure that writing it unchanged would give the same bytes.
///
/// # Errors
/// The file is absent, not a regular file, empty, not an ONNX model, or holds something these messages can't represent
/// (it would be lost on writing).
pub fn read_model(path: &Path) -> Result<LoadedModel, Error> {
    read_bytes(map_file(path)?, path)
}

/// As [`read_model`] for bytes that are in memory already; `path` is for messages.
///
/// # Errors
/// As [`read_model`].
pub fn read_bytes(bytes: Bytes, path: &Path) -> Result<LoadedModel, Error> {
    let model = ModelProto::decode(bytes.clone()).map_err(|reason| Error::NotAModel {
        path: path.to_owned(),
        reason,
    })?;
    if model.graph.is_none() {
        return Err(Error::NoGraph(path.to_owned()));
    }
    if !writes_back_as(&model, &bytes) {
        return Err(Error::WouldLose(path.to_owned()));
    }
    Ok(LoadedModel {
        model,
        path: path.to_owned(),
        len: bytes.len() as u64,
        bytes,
    })
}

/// The bytes of a file, mapped into memory: they are read from disk when they are looked at.
///
/// # Errors
/// The file is absent, not a regular file, empty, or can't be mapped.
pub fn map_file(path: &Path) -> Result<Bytes, Error> {
    let named = || path.to_owned();
    let is_file = |meta: Metadata| {
        if meta.is_file() {
            Ok(meta)
        } else {
            Err(Error::NotAFile(named()))
        }
    };
    let open = |source| Error::Open { path: named(), source };
    // Asked before it is opened: opening a pipe would wait for whoever writes to it.
    is_file(fs::metadata(path).map_err(open)?)?;
    let file = File::open(path).map_err(open)?;
    let meta = file
        .metadata()
        .map_err(|source| Error::Read { path: named(), source })?;
    if is_file(meta)?.len() == 0 {
        return Err(Error::Empty(named()));
    }
    // SAFETY: the mapping is read-only and private. What this program writes goes to a new file that is renamed, so it
    // never changes a mapped one; a model that someone else rewrites in place while it is read is out of our hands, as
    // for every program that maps files.
    let mapping = unsafe { memmap2::Mmap::map(&file) }.map_err(|source| Error::Map { path: named(), source })?;
    Ok(Bytes::from_owner(mapping))
}

/// Whether encoding the model gives exactly these bytes.
fn writes_back_as(model: &ModelProto, bytes: &Bytes) -> bool {
    if model.encoded_len() != bytes.len() {
        return false;
    }
    let mut stream = Stream::new(Compare { rest: bytes });
    model.encode(&mut stream).is_ok() && stream.finish().is_ok_and(|c| c.rest.is_empty())
}

struct Compare<'a> {
    rest: &'a [u8],
}

impl Sink for Compare<'_> {
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.rest.split_at_checked(bytes.len()) {
            // The same address at the same place: a slice of the file itself, nothing to read.
            Some((head, rest)) if std::ptr::eq(head, bytes) || head == bytes => {
                self.rest = rest;
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GraphProto, NodeProto, TensorProto};

    fn sample() -> ModelProto {
        let graph = GraphProto {
            node: vec![NodeProto::new("", "Identity", "n", &["w"], &["y"])],
            initializer: vec![TensorProto::floats("w", &[3000], &[0.5; 3000])],
            ..Default::default()
        };
        ModelProto {
            ir_version: Some(10),
            graph: Some(graph),
            ..Default::default()
        }
    }

    fn error_of(bytes: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.onnx");
        std::fs::write(&path, bytes).unwrap();
        read_model(&path).err().map_or_else(String::new, |e| e.to_string())
    }

    #[test]
    fn weights_are_slices_of_the_mapping() {
        let bytes = Bytes::from(sample().encode_to_vec());
        let model = ModelProto::decode(bytes.clone()).unwrap();
        let raw = model.graph.unwrap().initializer[0].raw_data.clone().unwrap();
        assert!(bytes.as_ptr_range().contains(&raw.as_ptr()));
        assert_eq!(error_of(&bytes), "");
    }

    #[test]
    fn a_field_that_would_be_lost_is_refused() {
        let mut bytes = sample().encode_to_vec();
        bytes.extend([0xfa, 0x3e, 1, b'x']); // field 1007, length-delimited
        assert!(error_of(&bytes).contains("would lose"));
    }

    #[test]
    fn what_is_not_a_model_is_refused() {
        assert!(error_of(b"").contains("is empty"));
        assert!(error_of(b"not an onnx file at all").contains("not an ONNX model"));
        assert!(error_of(&sample().encode_to_vec()[..2000]).contains("cut short"));
        assert!(error_of(&[8, 10]).contains("no graph"));
        let folder = tempfile::tempdir().unwrap();
        let error = |p: &Path| read_model(p).err().unwrap().to_string();
        assert!(error(folder.path()).contains("is not a file"));
        assert!(error(&folder.path().join("none.onnx")).contains("cannot open"));
    }
}
