//! A place in the file's bytes from which little-endian values are taken, each checked against what is left.

use bytes::Bytes;

use crate::error::Error;

pub struct Cursor<'a> {
    file: &'a Bytes,
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(file: &'a Bytes) -> Self {
        Self { file, at: 0 }
    }

    /// Another cursor at the same place.
    pub fn fork(&self) -> Self {
        Self { ..*self }
    }

    /// Bytes before the cursor.
    pub fn at(&self) -> usize {
        self.at
    }

    pub fn left(&self) -> usize {
        self.file.len().saturating_sub(self.at)
    }

    /// The next `needed` bytes, as a slice of the file's.
    pub fn take(&mut self, needed: u64, what: &'static str) -> Result<Bytes, Error> {
        let (at, left) = (self.at, self.left());
        match usize::try_from(needed) {
            Ok(n) if n <= left => {
                self.at += n;
                Ok(self.file.slice(at..at + n))
            }
            _ => Err(Error::CutShort { what, at, needed, left }),
        }
    }

    pub fn u32(&mut self, what: &'static str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: &'static str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Error> {
        let (at, left) = (self.at, self.left());
        let rest = self.file.get(at..).unwrap_or_default();
        let Some(first) = rest.first_chunk::<N>() else {
            return Err(Error::CutShort {
                what,
                at,
                needed: N as u64,
                left,
            });
        };
        self.at += N;
        Ok(*first)
    }

    /// The number of things of at least `smallest` bytes each that follow: no more than `limit`, and no more than what
    /// is left can hold.
    pub fn count(&mut self, smallest: u64, limit: u64, what: &'static str) -> Result<usize, Error> {
        let at = self.at;
        let count = self.u64(what)?;
        let left = self.left();
        if count > limit {
            return Err(Error::TooMany { what, count, limit });
        }
        let needed = count.saturating_mul(smallest);
        match usize::try_from(count) {
            Ok(n) if needed <= left as u64 => Ok(n),
            _ => Err(Error::CutShort { what, at, needed, left }),
        }
    }

    /// A string's bytes: its length as u64, then the text.
    pub fn text(&mut self, what: &'static str) -> Result<Bytes, Error> {
        let length = self.u64(what)?;
        self.take(length, what)
    }

    /// A string that must be UTF-8.
    pub fn string(&mut self, what: &'static str) -> Result<String, Error> {
        let at = self.at;
        let bytes = self.text(what)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| Error::NotUtf8 { what, at })?;
        Ok(text.to_owned())
    }
}
