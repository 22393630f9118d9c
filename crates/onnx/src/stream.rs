//! Encoding without a buffer as large as the model: small fields are gathered, large ones go to the sink as they are.

use bytes::{Buf, BufMut, buf::UninitSlice};
use std::io;

/// Slices at least this long skip the gathering buffer.
const LARGE: usize = 4 << 10;
const GATHER: usize = 64 << 10;

/// Where encoded bytes go, in order.
pub trait Sink {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// Those of whatever the bytes go to; writing ends there.
    fn take(&mut self, bytes: &[u8]) -> io::Result<()>;
}

impl<S: Sink + ?Sized> Sink for &mut S {
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        (**self).take(bytes)
    }
}

/// A sink as the `BufMut` that prost writes to. The first error stops all writing and is returned by [`Self::finish`].
pub(super) struct Stream<S> {
    sink: S,
    gathered: Vec<u8>,
    error: Option<io::Error>,
}

impl<S: Sink> Stream<S> {
    pub(super) fn new(sink: S) -> Self {
        Self {
            sink,
            gathered: Vec::with_capacity(GATHER),
            error: None,
        }
    }

    /// Hands the rest to the sink and gives it back.
    pub(super) fn finish(mut self) -> io::Result<S> {
        self.flush();
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.sink),
        }
    }

    fn flush(&mut self) {
        if self.error.is_none() {
            self.error = self.sink.take(&self.gathered).err();
        }
        self.gathered.clear();
    }
}

// SAFETY: chunk_mut and advance_mut are those of `gathered`, a Vec<u8>, whose own implementation keeps the contract;
// remaining_mut promises only what put and put_slice, which flush when needed, can take.
unsafe impl<S: Sink> BufMut for Stream<S> {
    fn remaining_mut(&self) -> usize {
        self.gathered.remaining_mut()
    }

    unsafe fn advance_mut(&mut self, count: usize) {
        // SAFETY: the caller has initialised `count` bytes of the slice that chunk_mut gave out, which is the Vec's.
        unsafe { self.gathered.advance_mut(count) }
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        if self.gathered.len() >= GATHER {
            self.flush();
        }
        self.gathered.chunk_mut()
    }

    fn put<B: Buf>(&mut self, mut src: B) {
        while src.has_remaining() {
            let chunk = src.chunk();
            let len = chunk.len();
            self.put_slice(chunk);
            src.advance(len);
        }
    }

    fn put_slice(&mut self, src: &[u8]) {
        if src.len() >= LARGE {
            self.flush();
            if self.error.is_none() {
                self.error = self.sink.take(src).err();
            }
        } else {
            if self.gathered.len() + src.len() > GATHER {
                self.flush();
            }
            self.gathered.extend_from_slice(src);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ModelProto, TensorProto};
    use prost::Message;

    impl Sink for Vec<Vec<u8>> {
        fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
            self.push(bytes.to_vec());
            Ok(())
        }
    }

    #[test]
    fn a_stream_writes_what_encode_writes() {
        let weights = |n: usize| TensorProto::floats(&format!("w{n}"), &[n as i64], &vec![1.5; n]);
        let mut model = ModelProto {
            doc_string: Some("d".repeat(5000)),
            ..Default::default()
        };
        let graph = model.graph.get_or_insert_default();
        graph.initializer = (0..200).map(|i| weights(i * i % 3001)).collect();
        let mut stream = Stream::new(Vec::new());
        model.encode(&mut stream).unwrap();
        let pieces = stream.finish().unwrap();
        assert!(pieces.iter().all(|p| p.len() <= GATHER));
        assert!(pieces.concat() == model.encode_to_vec());
    }

    #[test]
    fn an_error_of_the_sink_comes_out() {
        struct Full;
        impl Sink for Full {
            fn take(&mut self, _: &[u8]) -> io::Result<()> {
                Err(io::ErrorKind::StorageFull.into())
            }
        }
        let mut stream = Stream::new(Full);
        stream.put_slice(&[0; 3 * GATHER]);
        stream.put_u8(1);
        assert_eq!(stream.finish().err().unwrap().kind(), io::ErrorKind::StorageFull);
    }
}
