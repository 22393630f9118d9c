//! The way back: a converted model carries how its original was written, all but the weights, which it has itself. From both
//! come the original's bytes.
//!
//! The record is a list of pieces: bytes as they are, or the weights of one tensor of the converted model, which are counted in
//! the order of the file. It is deflated, and kept as text in the metadata.

use crate::{
    files::{self, ExternalMode, Output},
    onnx::{
        Bytes, Content, DataType, LoadedModel, ModelProto, TensorProto, external_files, for_each_tensor, map_file,
        read_model,
    },
    source::find_source,
};
use anyhow::{Context, Result, bail, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use flate2::{Compression, read::DeflateDecoder, write::DeflateEncoder};
use std::{
    collections::HashMap,
    io::{Read, Write},
    path::{Path, PathBuf},
};
use xxhash_rust::xxh3::Xxh3;

/// Metadata that holds the record.
pub const RECORD: &str = "retro.original";
/// Shorter weights are kept as bytes.
const SHARED: usize = 1024;
const VERSION: u8 = 1;
/// A record is the original's graph without its weights: more than this is an attack.
const MAX_RECORD: u64 = 1 << 30;
const BYTES: u8 = 0;
const WEIGHTS: u8 = 1;

/// Weights of a model that a record can refer to, in order.
enum Weights {
    Here(Bytes),
    There { location: String, offset: u64, len: u64 },
}

fn weights(model: &ModelProto) -> Result<Vec<Weights>> {
    let mut found = Vec::new();
    for_each_tensor(model, &mut |tensor| {
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
        Ok(())
    })?;
    Ok(found)
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
/// Compressing fails.
pub fn record(converted: &mut ModelProto, original: &Bytes) -> Result<()> {
    let start = original.as_ptr() as usize;
    let mut shared: Vec<(usize, usize, u64)> = Vec::new();
    for (number, weights) in weights(converted)?.iter().enumerate() {
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

fn plain(out: &mut impl Write, bytes: &[u8]) -> Result<()> {
    if !bytes.is_empty() {
        out.write_all(&[BYTES])?;
        out.write_all(&(bytes.len() as u64).to_le_bytes())?;
        out.write_all(bytes)?;
    }
    Ok(())
}

/// The original's bytes, in pieces.
///
/// # Errors
/// The model has no record, or its weights are no longer those of the original.
fn pieces(model: &ModelProto, folder: &Path) -> Result<Vec<Bytes>> {
    let Some(text) = model.metadata(RECORD) else {
        bail!(
            "it was not converted by retro-export, or by a version that kept no record: the original can't be restored"
        )
    };
    let packed = STANDARD.decode(text).context("its record of the original is damaged")?;
    let mut record = Vec::new();
    let length = DeflateDecoder::new(packed.as_slice())
        .take(MAX_RECORD + 1)
        .read_to_end(&mut record);
    ensure!(
        length.is_ok_and(|n| n as u64 <= MAX_RECORD),
        "its record of the original is damaged"
    );
    let record = Bytes::from(record);
    let weights = weights(model)?;
    let mut maps: HashMap<String, Bytes> = HashMap::new();
    let mut at = 0usize;
    let mut take = |len: u64| -> Result<Bytes> {
        let end = usize::try_from(len)
            .ok()
            .and_then(|len| at.checked_add(len))
            .filter(|end| *end <= record.len());
        let end = end.context("its record of the original is cut short")?;
        let part = record.slice(at..end);
        at = end;
        Ok(part)
    };
    fn number(bytes: &Bytes) -> u64 {
        bytes.as_ref().try_into().map_or(0, u64::from_le_bytes)
    }
    ensure!(
        take(1)?.first() == Some(&VERSION),
        "its record of the original is of another version"
    );
    let (length, wanted) = (number(&take(8)?), number(&take(8)?));
    let mut pieces = Vec::new();
    let mut done = 0u64;
    while done < length {
        let kind = take(1)?.first().copied();
        let len = number(&take(8)?);
        let piece = match kind {
            Some(BYTES) => take(len)?,
            Some(WEIGHTS) => {
                let which = usize::try_from(number(&take(8)?)).ok().and_then(|n| weights.get(n));
                let bytes = match which.context("its weights are no longer those of the original")? {
                    Weights::Here(bytes) => bytes.clone(),
                    Weights::There { location, offset, len } => {
                        if !maps.contains_key(location) {
                            maps.insert(location.clone(), map_file(&folder.join(location))?);
                        }
                        let file = maps.get(location).context("a file of weights is gone")?;
                        let range = usize::try_from(*offset).ok().zip(usize::try_from(*len).ok());
                        let range = range
                            .and_then(|(o, l)| Some(o..o.checked_add(l)?))
                            .filter(|r| r.end <= file.len());
                        file.slice(range.context("a file of weights is too short")?)
                    }
                };
                ensure!(
                    bytes.len() as u64 == len,
                    "its weights are no longer those of the original"
                );
                bytes
            }
            _ => bail!("its record of the original is damaged"),
        };
        ensure!(!piece.is_empty(), "its record of the original is damaged");
        done += piece.len() as u64;
        pieces.push(piece);
    }
    let mut hash = Xxh3::new();
    pieces.iter().for_each(|p| hash.update(p));
    ensure!(
        done == length && hash.digest() == wanted,
        "its weights or its record were changed since the conversion: the original can't be restored byte for byte"
    );
    Ok(pieces)
}

/// Restores the original of a converted model, a file or a folder. Gives the model's path and the bytes written.
///
/// # Errors
/// The model is no converted one, what it was converted from can't be restored exactly, or the output can't be written.
pub fn revert(
    source: &Path,
    graph: Option<&str>,
    target: &Path,
    external: Option<ExternalMode>,
    force: bool,
) -> Result<(PathBuf, u64)> {
    let source = find_source(source, graph, Some(target))?;
    let output = Output::plan(&source, target, external, force)?;
    let LoadedModel { model, .. } = read_model(&source.model)?;
    let shown = source.model.display();
    // Weights are only looked up where a conversion would have put them.
    let mut files = external_files(&model, source.folder()).with_context(|| format!("{shown}"))?;
    let spilled = model.metadata(crate::spill::SPILLED);
    let pieces = pieces(&model, source.folder()).with_context(|| format!("{shown}"))?;
    files.retain(|f| spilled.is_none_or(|s| f.location != Path::new(s)));
    let brought = files::brought(&model);
    for file in &mut files {
        if let Some(usual) = brought.get(&file.location) {
            file.location.clone_from(usual);
        }
    }
    let written = output.write(&Content::Pieces(&pieces), &files, &[])?;
    Ok((output.model_path(), written.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gqa_model;
    use prost::Message;

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
        let back: Vec<u8> = pieces(&model, nowhere).unwrap().concat();
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
        let why = format!("{:#}", pieces(&model, nowhere).unwrap_err());
        assert!(why.contains("changed since the conversion"), "{why}");
        model.set_metadata(RECORD, "????");
        assert!(pieces(&model, nowhere).is_err());
        model.metadata_props.clear();
        assert!(
            pieces(&model, nowhere)
                .unwrap_err()
                .to_string()
                .contains("not converted by retro-export")
        );
    }
}
