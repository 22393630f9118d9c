//! A whole file: header, metadata, the list of tensors.

use std::collections::HashMap;

use bytes::Bytes;

use crate::{
    cursor::Cursor,
    error::Error,
    metadata::Metadata,
    tensor::{Tensor, TensorInfo},
};

const MAGIC: [u8; 4] = *b"GGUF";
/// No model has as many tensors.
const MAX_TENSORS: u64 = 1 << 20;
/// Where general.alignment is absent.
const ALIGNMENT: u64 = 32;

/// A parsed file.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// Keys and values.
    pub metadata: Metadata,
    file: Bytes,
    /// Where the tensors' bytes begin.
    data: u64,
    tensors: HashMap<String, TensorInfo>,
}

impl Gguf {
    /// Parses a file's bytes, mapped or not, and checks that every tensor of a known type lies in them. Time and memory
    /// are at most proportional to the header's length.
    ///
    /// # Errors
    /// The bytes are no GGUF file of version 2 or 3 in little-endian order, or not all of one.
    pub fn parse(file: Bytes) -> Result<Self, Error> {
        let mut cursor = Cursor::new(&file);
        if cursor.array::<4>("the magic number").ok() != Some(MAGIC) {
            return Err(Error::NoMagic);
        }
        let version = cursor.u32("the version")?;
        match version {
            2 | 3 => {}
            other if (1..=0xff).contains(&other.swap_bytes()) => return Err(Error::BigEndian),
            other => return Err(Error::Version(other)),
        }
        let tensors = cursor.count(TensorInfo::SMALLEST, MAX_TENSORS, "tensors")?;
        let keys = Metadata::count(&mut cursor)?;
        let metadata = Metadata::read(&mut cursor, keys)?;
        let tensors = (0..tensors)
            .map(|_| TensorInfo::read(&mut cursor))
            .collect::<Result<Vec<_>, _>>()?;
        let alignment = alignment(&metadata)?;
        // A file's length is below i64::MAX and an alignment at most 2^31.
        let data = (cursor.at() as u64).next_multiple_of(alignment);
        let mut by_name = HashMap::with_capacity(tensors.len());
        for tensor in tensors {
            tensor.check(data, file.len(), alignment)?;
            if let Some(same) = by_name.insert(tensor.name.clone(), tensor) {
                return Err(Error::TensorTwice(same.name));
            }
        }
        Ok(Self {
            metadata,
            file,
            data,
            tensors: by_name,
        })
    }

    /// How many tensors there are.
    pub fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// What the file says of all tensors, in no order.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor.
    ///
    /// # Errors
    /// There is none of that name, or it has a type that is not read.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, Error> {
        let info = self.tensors.get(name).ok_or_else(|| Error::NoTensor(name.to_owned()))?;
        info.open(&self.file, self.data)
    }
}

fn alignment(metadata: &Metadata) -> Result<u64, Error> {
    let alignment = metadata.integer("general.alignment")?.unwrap_or(ALIGNMENT);
    if alignment.is_power_of_two() && alignment <= 1 << 31 {
        Ok(alignment)
    } else {
        Err(Error::Alignment(alignment.to_string()))
    }
}
