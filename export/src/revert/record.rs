//! What a converted model remembers of its original: a list of pieces, which are bytes as they are, or the weights of one
//! tensor of the converted model, counted in the order of the file. It is deflated, and kept as text in the metadata.

use base64::{Engine, engine::general_purpose::STANDARD, read::DecoderReader};
use flate2::{Compression, read::DeflateDecoder, write::DeflateEncoder};
use prost::Message;
use retro_onnx::{Bytes, DataType, MAX_MODEL_BYTES, ModelProto, Sink, TensorProto, for_each_tensor, map_file};
use std::{
    cell::RefCell,
    collections::{HashMap, hash_map::Entry},
    convert::Infallible,
    io::{self, Read, Write},
    path::Path,
};
use xxhash_rust::xxh3::Xxh3;

/// Metadata that holds the record.
pub const RECORD: &str = "retro.original";
/// Shorter weights are kept as bytes.
const SHARED: usize = 1024;
const VERSION: u8 = 1;
/// Bytes that a record is inflated by at a time: nothing of it is kept.
const CHUNK: usize = 1 << 16;
const BYTES: u8 = 0;
const WEIGHTS: u8 = 1;

/// Why a record can't be made or doesn't give the original back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The model has no record.
    #[error(
        "it was not converted by retro-export, or by a version that kept no record: the original can't be restored"
    )]
    NotConverted,
    /// The record's form is not one that this version knows.
    #[error("its record of the original is of another version")]
    OtherVersion,
    /// The original has more bytes than a record may speak of.
    #[error(
        "it has {len} bytes, of which the converted model keeps too few to give the others back with --revert (at most \
         {most} bytes); save its large constants as external data first"
    )]
    TooLarge {
        /// Bytes of the original.
        len: u64,
        /// The most that it may have.
        most: u64,
    },
    /// The record speaks of more bytes than the original can have had.
    #[error("its record of the original is damaged: it speaks of {0} bytes, which this model can't have come from")]
    TooLong(u64),
    /// The record has a piece that there is not.
    #[error("its record of the original is damaged")]
    Damaged,
    /// The record ends too early, or is no deflated text.
    #[error("its record of the original is cut short or damaged")]
    CutShort(#[source] io::Error),
    /// Weights that the record names are gone or have another length.
    #[error("its weights are no longer those of the original")]
    OtherWeights,
    /// A file of weights ends before the weights that the record names.
    #[error("a file of weights is too short")]
    ShortWeights,
    /// The bytes are not those of the original.
    #[error(
        "its weights or its record were changed since the conversion: the original can't be restored byte for byte"
    )]
    Changed,
    /// A file of weights can't be read.
    #[error(transparent)]
    Weights(#[from] retro_onnx::Error),
    /// Compressing fails.
    #[error("the record of the original can't be made")]
    Compress(#[from] io::Error),
    /// Whoever takes the original's bytes refuses them.
    #[error("the original can't be written")]
    Write(#[source] io::Error),
}

/// The longest original that a record of a converted model may speak of: what is in the converted model's file, and what a graph may
/// have lost, tables of masks for instance. A record that inflates to more was made to do harm.
fn longest(converted: u64) -> u64 {
    const LOST: u64 = 64 << 20;
    const TIMES: u64 = 16;
    converted
        .saturating_mul(TIMES)
        .saturating_add(LOST)
        .min(MAX_MODEL_BYTES as u64)
}

/// Weights of a model that a record can refer to, in order.
enum Weights {
    Here(Bytes),
    There { location: String, offset: u64, len: u64 },
}

fn weights(model: &ModelProto) -> Vec<Weights> {
    let mut found = Vec::new();
    let Ok(()) = for_each_tensor(model, &mut |tensor| {
        if let Some(raw) = tensor.raw_data.as_ref().filter(|r| r.len() >= SHARED) {
            found.push(Weights::Here(raw.clone()));
        } else if tensor.is_external() {
            let entry = |key: &str| tensor.external_entry(key);
            let number = |key: &str| entry(key).and_then(|v| v.parse().ok());
            found.push(Weights::There {
                location: entry("location").unwrap_or_default().to_owned(),
                offset: number("offset").unwrap_or(0),
                len: number("length").or_else(|| bytes_of(tensor)).unwrap_or(0),
            });
        }
        Ok::<_, Infallible>(())
    });
    found
}

fn bytes_of(tensor: &TensorProto) -> Option<u64> {
    let bits = DataType::try_from(tensor.data_type()).ok()?.bits()?;
    let n = tensor
        .dims
        .iter()
        .try_fold(1u64, |n, d| n.checked_mul(u64::try_from(*d).ok()?))?;
    Some(n.checked_mul(bits)?.div_ceil(8))
}

/// Writes into a converted model how to get its original back.
///
/// # Errors
/// The original is so much larger than the converted model that [`Record::give`] would refuse it, or compressing fails.
pub fn record(converted: &mut ModelProto, original: &Bytes) -> Result<(), RecordError> {
    let (most, len) = (longest(converted.encoded_len() as u64), original.len() as u64);
    if len > most {
        return Err(RecordError::TooLarge { len, most });
    }
    let shared = shared_weights(converted, original);
    let mut hash = Xxh3::new();
    hash.update(original);
    let mut out = DeflateEncoder::new(Vec::new(), Compression::default());
    out.write_all(&[VERSION])?;
    out.write_all(&(original.len() as u64).to_le_bytes())?;
    out.write_all(&hash.digest().to_le_bytes())?;
    let mut from = 0;
    for (at, len, number) in shared {
        // The same weights under two names are in the file once.
        if at < from {
            continue;
        }
        plain(&mut out, original.get(from..at).unwrap_or_default())?;
        out.write_all(&[WEIGHTS])?;
        out.write_all(&(len as u64).to_le_bytes())?;
        out.write_all(&number.to_le_bytes())?;
        from = at + len;
    }
    plain(&mut out, original.get(from..).unwrap_or_default())?;
    let record = out.finish()?;
    converted.set_metadata(RECORD, STANDARD.encode(record));
    Ok(())
}

/// Weights of the converted model that lie in the original's bytes: offset, length, number.
fn shared_weights(converted: &ModelProto, original: &Bytes) -> Vec<(usize, usize, u64)> {
    let start = original.as_ptr() as usize;
    let mut shared = Vec::new();
    for (number, weights) in weights(converted).iter().enumerate() {
        let Weights::Here(raw) = weights else { continue };
        let at = (raw.as_ptr() as usize).wrapping_sub(start);
        if original
            .get(at..at.saturating_add(raw.len()))
            .is_some_and(|s| std::ptr::eq(s.as_ptr(), raw.as_ptr()))
        {
            shared.push((at, raw.len(), number as u64));
        }
    }
    shared.sort_unstable();
    shared
}

fn plain(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    if !bytes.is_empty() {
        out.write_all(&[BYTES])?;
        out.write_all(&(bytes.len() as u64).to_le_bytes())?;
        out.write_all(bytes)?;
    }
    Ok(())
}

/// What a converted model remembers of its original.
pub struct Record<'m> {
    text: &'m str,
    weights: Vec<Weights>,
    folder: &'m Path,
    /// Files of weights.
    maps: RefCell<HashMap<String, Bytes>>,
    /// Bytes that the original may have.
    most: u64,
}

impl<'m> Record<'m> {
    /// `len`: bytes of the model and its files of weights.
    pub fn of(model: &'m ModelProto, folder: &'m Path, len: u64) -> Result<Self, RecordError> {
        let text = model.metadata(RECORD).ok_or(RecordError::NotConverted)?;
        Ok(Self {
            text,
            weights: weights(model),
            folder,
            maps: RefCell::default(),
            most: longest(len),
        })
    }

    /// Hands the original's bytes over, in pieces; how many there were.
    ///
    /// # Errors
    /// The record is damaged, or the model's weights are no longer those of the original: known at the end only.
    pub fn give(&self, sink: &mut dyn Sink) -> Result<u64, RecordError> {
        let mut record = DeflateDecoder::new(DecoderReader::new(self.text.as_bytes(), &STANDARD));
        if byte(&mut record)? != VERSION {
            return Err(RecordError::OtherVersion);
        }
        let (length, wanted) = (number(&mut record)?, number(&mut record)?);
        if length > self.most {
            return Err(RecordError::TooLong(length));
        }
        let mut hash = Xxh3::new();
        let mut chunk = vec![0; CHUNK];
        let mut left = length;
        while left > 0 {
            let kind = byte(&mut record)?;
            let len = number(&mut record)?;
            if !(1..=left).contains(&len) {
                return Err(RecordError::Damaged);
            }
            left -= len;
            match kind {
                BYTES => {
                    let mut rest = len;
                    while rest > 0 {
                        let next = rest.min(CHUNK as u64) as usize;
                        let part = chunk.get_mut(..next).unwrap_or_default();
                        record.read_exact(part).map_err(RecordError::CutShort)?;
                        hash.update(part);
                        sink.take(part).map_err(RecordError::Write)?;
                        rest -= next as u64;
                    }
                }
                WEIGHTS => {
                    let bytes = self.weights(number(&mut record)?)?;
                    if bytes.len() as u64 != len {
                        return Err(RecordError::OtherWeights);
                    }
                    hash.update(&bytes);
                    sink.take(&bytes).map_err(RecordError::Write)?;
                }
                _ => return Err(RecordError::Damaged),
            }
        }
        if record.read(&mut [0]).is_ok_and(|n| n == 0) {
            if hash.digest() != wanted {
                return Err(RecordError::Changed);
            }
        } else {
            return Err(RecordError::Damaged);
        }
        Ok(length)
    }

    fn weights(&self, number: u64) -> Result<Bytes, RecordError> {
        let which = usize::try_from(number).ok().and_then(|n| self.weights.get(n));
        match which.ok_or(RecordError::OtherWeights)? {
            Weights::Here(bytes) => Ok(bytes.clone()),
            Weights::There { location, offset, len } => {
                let mut maps = self.maps.borrow_mut();
                let file = match maps.entry(location.clone()) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(new) => {
                        let file = map_file(&self.folder.join(location));
                        new.insert(file?)
                    }
                };
                let range = usize::try_from(*offset).ok().zip(usize::try_from(*len).ok());
                let range = range
                    .and_then(|(o, l)| Some(o..o.checked_add(l)?))
                    .filter(|r| r.end <= file.len());
                Ok(file.slice(range.ok_or(RecordError::ShortWeights)?))
            }
        }
    }
}

/// The next number of a record.
fn number(record: &mut impl Read) -> Result<u64, RecordError> {
    let mut bytes = [0; 8];
    record.read_exact(&mut bytes).map_err(RecordError::CutShort)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The next byte of a record.
fn byte(record: &mut impl Read) -> Result<u8, RecordError> {
    let mut bytes = [0; 1];
    record.read_exact(&mut bytes).map_err(RecordError::CutShort)?;
    Ok(bytes[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::chain, testing::gqa_model};

    struct Kept(Vec<u8>);

    impl Sink for Kept {
        fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
            self.0.extend_from_slice(bytes);
            Ok(())
        }
    }

    fn restored(model: &ModelProto, folder: &Path) -> Result<Vec<u8>, RecordError> {
        let mut kept = Kept(Vec::new());
        Record::of(model, folder, model.encoded_len() as u64)?.give(&mut kept)?;
        Ok(kept.0)
    }

    #[test]
    fn the_record_gives_the_bytes_back_and_notices_changes() {
        let bytes = Bytes::from(gqa_model(2).encode_to_vec());
        let mut model = ModelProto::decode(bytes.clone()).unwrap();
        let graph = model.graph.as_mut().unwrap();
        graph.node.truncate(1);
        graph.initializer.push(TensorProto::floats("new", &[512], &[0.0; 512]));
        record(&mut model, &bytes).unwrap();
        assert!(
            model.metadata(RECORD).unwrap().len() < bytes.len() / 8,
            "weights are not in the record"
        );
        let nowhere = Path::new(".");
        let back = restored(&model, nowhere).unwrap();
        assert!(back == bytes);
        let weight = model
            .graph
            .as_mut()
            .unwrap()
            .initializer
            .iter_mut()
            .find(|t| t.name() == "lm_head.weight")
            .unwrap();
        *weight = TensorProto::floats("lm_head.weight", &[32, 10], &[0.2; 320]);
        let why = chain(&restored(&model, nowhere).unwrap_err());
        assert!(why.contains("changed since the conversion"), "{why}");
        model.set_metadata(RECORD, "????");
        assert!(restored(&model, nowhere).is_err());
        model.metadata_props.clear();
        assert!(
            restored(&model, nowhere)
                .unwrap_err()
                .to_string()
                .contains("not converted by retro-export")
        );
    }

    /// A record of zeros without end, and ones that say too much or too little.
    #[test]
    fn what_a_record_inflates_to_is_bounded() {
        let packed = |length: u64, piece: u64, given: usize| {
            let mut out = DeflateEncoder::new(Vec::new(), Compression::best());
            out.write_all(&[VERSION]).unwrap();
            for number in [length, 0] {
                out.write_all(&number.to_le_bytes()).unwrap();
            }
            out.write_all(&[BYTES]).unwrap();
            out.write_all(&piece.to_le_bytes()).unwrap();
            out.write_all(&vec![0; given]).unwrap();
            let mut model = gqa_model(1);
            model.set_metadata(RECORD, STANDARD.encode(out.finish().unwrap()));
            chain(&restored(&model, Path::new(".")).unwrap_err())
        };
        for (length, piece, given, says) in [
            (1 << 40, 1 << 40, 1 << 20, "can't have come from"),
            (u64::MAX, u64::MAX, 0, "can't have come from"),
            (1000, 1 << 40, 1 << 20, "damaged"),
            (1000, 1000, 1 << 20, "damaged"),
            (1000, 1000, 10, "cut short"),
            (1000, 1000, 1000, "changed since"),
        ] {
            let why = packed(length, piece, given);
            assert!(why.contains(says), "{length} {piece} {given}: {why}");
        }
    }
}
