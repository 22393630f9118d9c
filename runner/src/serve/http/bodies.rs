//! Bodies of requests in memory: so many bytes of each, and of all together.

use std::sync::Arc;

use axum::body::{Body, HttpBody as _};
use futures_util::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::{ApiError, Result};

/// Bytes of each body that count for nothing: most bodies are no longer, and are never refused for want of room.
const SMALL: usize = 64 << 10;
/// Bytes of all bodies together, beside the first [`SMALL`] of each; more if one body may be longer.
const TOGETHER: usize = 64 << 20;
/// Bytes of a place: memory is counted by so many.
const PLACE: usize = 1 << 10;

/// The memory that bodies share.
pub struct Bodies {
    /// The most bytes of one.
    most: usize,
    places: Arc<Semaphore>,
}

/// A body. Its room is given back when it is dropped.
#[derive(Debug, Default)]
pub struct ReadBody {
    pub bytes: Vec<u8>,
    room: Option<OwnedSemaphorePermit>,
}

impl Bodies {
    /// For bodies of up to `most` bytes.
    pub fn new(most: usize) -> Self {
        let places = most.max(TOGETHER).div_ceil(PLACE).min(Semaphore::MAX_PERMITS);
        Self {
            most,
            places: Arc::new(Semaphore::new(places)),
        }
    }

    /// Reads a body.
    ///
    /// # Errors
    /// When it is too long, is cut off, or other bodies leave it no room.
    pub async fn read(&self, body: Body) -> Result<ReadBody> {
        // Most clients read an answer only once they have sent all: what is a little too long is taken and forgotten.
        let patience = self.most.saturating_mul(2);
        if body.size_hint().lower() > patience as u64 {
            return Err(ApiError::body_too_large(self.most));
        }
        let mut parts = body.into_data_stream();
        let mut read = ReadBody::default();
        let mut length = 0;
        while let Some(part) = parts.next().await {
            let part = part.map_err(|_| ApiError::broken_body())?;
            length += part.len();
            if length > patience {
                break;
            }
            if length > self.most {
                read = ReadBody::default();
                continue;
            }
            self.make_room(&mut read.room, length)?;
            read.bytes.extend_from_slice(&part);
        }
        if length > self.most {
            return Err(ApiError::body_too_large(self.most));
        }
        Ok(read)
    }

    fn make_room(&self, room: &mut Option<OwnedSemaphorePermit>, length: usize) -> Result<()> {
        let held = room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = length.saturating_sub(SMALL).div_ceil(PLACE).saturating_sub(held);
        if more == 0 {
            return Ok(());
        }
        let more = u32::try_from(more).map_err(|_| ApiError::no_room())?;
        let more = Arc::clone(&self.places).try_acquire_many_owned(more);
        let more = more.map_err(|_| ApiError::no_room())?;
        match room {
            Some(room) => room.merge(more),
            None => *room = Some(more),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, io};

    use axum::{body::Bytes, http::StatusCode};
    use futures_util::stream;

    use super::*;

    /// A body that comes in parts and does not say how long it is.
    fn parts(count: usize) -> Body {
        Body::from_stream(stream::iter(
            (0..count).map(|_| Ok::<_, Infallible>(Bytes::from(vec![b' '; 1 << 20]))),
        ))
    }

    async fn status(bodies: &Bodies, body: Body) -> StatusCode {
        bodies.read(body).await.unwrap_err().status
    }

    #[tokio::test]
    async fn a_body_has_a_limit_whether_it_says_its_length_or_not() {
        let bodies = Bodies::new(4 << 20);
        assert_eq!(bodies.read(parts(4)).await.unwrap().bytes.len(), 4 << 20);
        assert_eq!(status(&bodies, parts(5)).await, StatusCode::PAYLOAD_TOO_LARGE);
        let endless = stream::iter(std::iter::repeat_with(|| {
            Ok::<_, Infallible>(Bytes::from_static(b"   "))
        }));
        let body = Body::from_stream(endless);
        assert_eq!(status(&bodies, body).await, StatusCode::PAYLOAD_TOO_LARGE);
        let body = Body::from(vec![0; (4 << 20) + 1]);
        assert_eq!(status(&bodies, body).await, StatusCode::PAYLOAD_TOO_LARGE);
        let broken = Body::from_stream(stream::iter([Err::<Bytes, _>(io::Error::other("cut off"))]));
        assert_eq!(status(&bodies, broken).await, StatusCode::BAD_REQUEST);
    }

    #[tokio::test]
    async fn all_together_have_a_limit_and_small_ones_pass() {
        let bodies = Bodies::new(4 << 20);
        let mut held = Vec::new();
        let full = loop {
            match bodies.read(parts(4)).await {
                Ok(body) => held.push(body),
                Err(e) => break e,
            }
        };
        assert_eq!(full.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(held.len(), TOGETHER / ((4 << 20) - SMALL));
        assert!(bodies.read(Body::from(vec![0; SMALL])).await.is_ok());
        held.pop();
        assert!(bodies.read(parts(4)).await.is_ok());
    }
}
