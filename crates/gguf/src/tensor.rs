//! A tensor: what the file says of it, and its elements as f32.

use bytes::Bytes;

use crate::{cursor::Cursor, dequantise, error::Error, tensor_type::TensorType};

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// ggml's name.
    pub name: String,
    /// Sizes from the outermost dimension to the innermost, as NumPy has them; the file has them the other way round.
    pub shape: Vec<usize>,
    /// ggml's number of the type.
    pub type_id: u32,
    /// Bytes from the beginning of the data.
    offset: u64,
}

/// A tensor whose elements can be read.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    kind: TensorType,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl TensorInfo {
    /// The fewest bytes that an entry takes: length of its name, dimensions, type, offset.
    pub(crate) const SMALLEST: u64 = 8 + 4 + 8 + 4 + 8;

    pub(crate) fn read(cursor: &mut Cursor<'_>) -> Result<Self, Error> {
        let name = cursor.string("a tensor's name")?;
        let rank = cursor.u32("a tensor's dimensions")?;
        if !(1..=4).contains(&rank) {
            return Err(Error::Rank { name, dims: rank });
        }
        let mut dims = Vec::with_capacity(4);
        for _ in 0..rank {
            dims.push(cursor.u64("a tensor's size")?);
        }
        let elements = dims.iter().try_fold(1u64, |all, &n| all.checked_mul(n));
        let fits = elements.is_some_and(|n| (1..=u64::MAX >> 8).contains(&n) && usize::try_from(n).is_ok());
        if !fits {
            return Err(Error::Dims { name, dims });
        }
        let type_id = cursor.u32("a tensor's type")?;
        let offset = cursor.u64("a tensor's offset")?;
        if let Some(kind) = TensorType::from_id(type_id) {
            let columns = dims.first().copied().unwrap_or(1);
            let block = kind.block();
            if !columns.is_multiple_of(block as u64) {
                return Err(Error::Block {
                    name,
                    columns,
                    kind,
                    block,
                });
            }
        }
        Ok(Self {
            name,
            shape: dims.iter().rev().map(|&n| n as usize).collect(),
            type_id,
            offset,
        })
    }

    /// Checks that the tensor lies in a file of `len` bytes whose data begin at `data`. Of a type that is not read the
    /// length is not known: it is refused when it is opened.
    pub(crate) fn check(&self, data: u64, len: usize, alignment: u64) -> Result<(), Error> {
        if !self.offset.is_multiple_of(alignment) {
            return Err(Error::Unaligned {
                name: self.name.clone(),
                offset: self.offset,
                alignment,
            });
        }
        let Some(kind) = TensorType::from_id(self.type_id) else {
            return Ok(());
        };
        let (start, end) = self.extent(kind, data);
        if end > len as u64 {
            return Err(Error::TensorOutside {
                name: self.name.clone(),
                start,
                end,
                len,
            });
        }
        Ok(())
    }

    pub(crate) fn open<'a>(&'a self, file: &'a Bytes, data: u64) -> Result<Tensor<'a>, Error> {
        let kind = TensorType::from_id(self.type_id).ok_or_else(|| Error::TensorType {
            name: self.name.clone(),
            kind: TensorType::name_of(self.type_id),
        })?;
        let (start, end) = self.extent(kind, data);
        let bytes = file.get(start as usize..end as usize);
        let bytes = bytes.ok_or_else(|| Error::TensorOutside {
            name: self.name.clone(),
            start,
            end,
            len: file.len(),
        })?;
        let shape = &self.shape;
        Ok(Tensor { kind, shape, bytes })
    }

    /// First byte and the one after the last; past any file where they overflow.
    fn extent(&self, kind: TensorType, data: u64) -> (u64, u64) {
        // Checked when it was read: the product is at most 2^56, and a block is at most 210 bytes.
        let elements: usize = self.shape.iter().product();
        let bytes = (elements / kind.block()) as u64 * kind.block_bytes() as u64;
        let start = data.saturating_add(self.offset);
        (start, start.saturating_add(bytes))
    }
}

impl<'a> Tensor<'a> {
    /// The type it is stored in.
    pub fn kind(&self) -> TensorType {
        self.kind
    }

    /// Sizes from the outermost dimension to the innermost.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Elements in all.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The stored blocks.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Writes the elements from `start` on, in row-major order, to `out`, as many as it has room for. A run that begins
    /// and ends with a block is the fastest.
    ///
    /// # Errors
    /// The tensor has not as many.
    pub fn read(&self, start: usize, out: &mut [f32]) -> Result<(), Error> {
        let (end, len) = (start.saturating_add(out.len()), self.elements());
        if end > len {
            return Err(Error::ElementsOutside { start, end, len });
        }
        dequantise::run(self.kind, self.bytes, start, out);
        Ok(())
    }
}
