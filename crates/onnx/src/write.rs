//! Writes a model to a file, streamed. The file is there whole or not at all.

use crate::{
    direct_write::{self, LARGE_FILE},
    error::Error,
    messages::ModelProto,
    read::folder_of,
    stream::{Sink, Stream},
    temporary::new_file_beside,
};
use bytes::Bytes;
use prost::Message;
use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

/// Most bytes of a model's file: protobuf's own limit, which ONNX Runtime enforces.
pub const MAX_MODEL_BYTES: usize = (1 << 31) - 1;

/// Writes a model to a new file beside the target, syncs it, and renames it over the target: at every moment the target
/// is the old file or the whole new one. Returns the length in bytes.
///
/// # Errors
/// The model is larger than protobuf's 2 GiB, the target exists and `overwrite` is false, or writing fails.
pub fn write_model(model: &ModelProto, target: &Path, overwrite: bool) -> Result<u64, Error> {
    let len = encoded_len(model)?;
    write_file(target, overwrite, |file| encode_to(model, file))?;
    Ok(len)
}

/// Bytes of a model's file.
///
/// # Errors
/// More than an ONNX file may have.
pub fn encoded_len(model: &ModelProto) -> Result<u64, Error> {
    let len = model.encoded_len();
    if len > MAX_MODEL_BYTES {
        return Err(Error::TooLarge(len));
    }
    Ok(len as u64)
}

/// What a model's file will hold.
pub enum Content<'c> {
    /// A model, which is encoded while it is written.
    Model(&'c ModelProto),
    /// So many bytes, which the function hands to the sink in order, as often as it is called.
    Bytes(u64, &'c dyn Fn(&mut dyn Sink) -> io::Result<()>),
}

impl Content<'_> {
    /// Bytes of the file.
    ///
    /// # Errors
    /// More than an ONNX file may have.
    pub fn byte_len(&self) -> Result<u64, Error> {
        match self {
            Self::Model(model) => encoded_len(model),
            Self::Bytes(len, _) => Ok(*len),
        }
    }

    /// Writes the content to a new, empty file. Large files go past the page cache where the file system can.
    ///
    /// # Errors
    /// Those of writing, and of the function that hands bytes over.
    pub fn write_to(&self, file: &mut File) -> io::Result<()> {
        match self {
            Self::Model(model) => encode_to(model, file),
            Self::Bytes(len, fill) => into_file(file, *len, |sink| fill(sink)),
        }
    }
}

/// Streams a model into a file.
pub fn encode_to(model: &ModelProto, file: &mut File) -> io::Result<()> {
    into_file(file, model.encoded_len() as u64, |sink| {
        let mut stream = Stream::new(sink);
        model.encode(&mut stream).map_err(io::Error::other)?;
        stream.finish().map(drop)
    })
}

/// Writes a file whole or not at all, as [`write_model`] does.
fn write_file(target: &Path, overwrite: bool, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), Error> {
    if target.is_dir() {
        return Err(Error::TargetIsFolder(target.to_owned()));
    }
    let temp = new_file_beside(target).and_then(|mut temp| {
        fill(temp.as_file_mut())?;
        temp.as_file().sync_all()?;
        Ok(temp)
    });
    let temp = temp.map_err(|source| Error::Write {
        path: target.to_owned(),
        source,
    })?;
    persist(temp, target, overwrite)
}

/// Renames a temporary file to its target, and makes that last through a power cut. The temporary file is removed where
/// this fails.
///
/// # Errors
/// The target exists and `overwrite` is false, or the file system refuses.
pub fn persist(temp: tempfile::NamedTempFile, target: &Path, overwrite: bool) -> Result<(), Error> {
    let done = if overwrite {
        temp.persist(target)
    } else {
        temp.persist_noclobber(target)
    };
    match done {
        Ok(_) => {}
        Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(Error::TargetExists(target.to_owned()));
        }
        Err(e) => {
            return Err(Error::Write {
                path: target.to_owned(),
                source: e.error,
            });
        }
    }
    sync_folder(folder_of(target));
    Ok(())
}

/// Makes renames in a folder last through a power cut, where the file system can; there is nothing to do if it can't.
pub fn sync_folder(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

struct ToFile<'a>(&'a mut File);

impl Sink for ToFile<'_> {
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }
}

/// Gives a new, empty file the `len` bytes that `fill` makes.
fn into_file(file: &mut File, len: u64, fill: impl FnOnce(&mut dyn Sink) -> io::Result<()>) -> io::Result<()> {
    if len < LARGE_FILE {
        fill(&mut ToFile(file))
    } else {
        direct_write::write(file, len, fill)
    }
}

/// Writes bytes to their places in a new, empty file, zeros between them. `placed`: offset in bytes and content, in
/// order.
///
/// # Errors
/// Those of writing; places that overlap.
pub fn write_placed(file: &mut File, placed: &[(u64, Bytes)]) -> io::Result<()> {
    let end = placed.last().map_or(0, |(at, bytes)| at + bytes.len() as u64);
    into_file(file, end, |sink| {
        let mut done = 0;
        for (at, bytes) in placed {
            let gap = at.checked_sub(done).ok_or(io::ErrorKind::InvalidInput)?;
            (0..gap).try_for_each(|_| sink.take(&[0]))?;
            sink.take(bytes)?;
            done = at + bytes.len() as u64;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GraphProto, TensorProto, read_model};
    use std::fs;

    fn sample() -> ModelProto {
        let initializer = vec![TensorProto::floats("w", &[5000], &[0.25; 5000])];
        ModelProto {
            graph: Some(GraphProto {
                initializer,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_written_reads_back_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.onnx");
        let len = write_model(&sample(), &path, false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), sample().encode_to_vec());
        assert_eq!(len, fs::metadata(&path).unwrap().len());
        assert_eq!(read_model(&path).unwrap().model, sample());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_existing_file_is_replaced_only_when_asked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.onnx");
        fs::write(&path, b"old").unwrap();
        let error = write_model(&sample(), &path, false).unwrap_err().to_string();
        assert!(error.contains("--force"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        write_model(&sample(), &path, true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), sample().encode_to_vec());
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, b"old").unwrap();
        let failed = write_file(&path, true, |f| {
            f.write_all(b"half")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_model(&sample(), &folder.path().join("no/such/m.onnx"), false).is_err());
        assert!(write_model(&sample(), folder.path(), true).is_err());
    }
}
