//! Trained weights: one `model.safetensors` or the shards that `model.safetensors.index.json` names, mapped, never
//! copied whole.

use std::{collections::HashMap, fs::File, ops::Range, path::Path};

use half::{bf16, f16};
use memmap2::Mmap;
use serde_json::Value;

use crate::error::{Error, Result, at};

/// Element types that weights are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    F32,
    F16,
    Bf16,
}

struct Entry {
    file: usize,
    stored: Stored,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// The tensors of a folder of weights, by their Hugging Face names.
pub struct Weights {
    files: Vec<Mmap>,
    entries: HashMap<String, Entry>,
}

/// One mapped tensor.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    stored: Stored,
    bytes: &'a [u8],
}

impl Weights {
    /// Maps the weights of `folder`.
    ///
    /// # Errors
    /// When there are none, a file is damaged, or a tensor has a type other than f32, f16 or bf16.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut weights = Self {
            files: Vec::new(),
            entries: HashMap::new(),
        };
        let index = folder.join("model.safetensors.index.json");
        if index.is_file() {
            let text = std::fs::read_to_string(&index).map_err(at!(Read, index))?;
            let json: Value = serde_json::from_str(&text).map_err(at!(NotJson, index))?;
            let map = json.get("weight_map").and_then(Value::as_object);
            let map = map.ok_or_else(|| Error::NoWeightMap(index.clone()))?;
            let mut shards: Vec<&str> = map.values().filter_map(Value::as_str).collect();
            shards.sort_unstable();
            shards.dedup();
            for shard in shards {
                // A shard is a plain name in this folder: nothing else is opened on a file's say-so.
                if Path::new(shard).file_name().is_none_or(|name| name != shard) {
                    return Err(Error::ForeignShard {
                        index: index.clone(),
                        shard: shard.to_owned(),
                    });
                }
                weights.map(&folder.join(shard))?;
            }
        } else {
            weights.map(&folder.join("model.safetensors"))?;
        }
        Ok(weights)
    }

    fn map(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(at!(OpenWeights, path))?;
        // SAFETY: the mapping is read-only and private to this process; like every program that maps model files, this
        // one counts on nobody truncating them while it reads.
        let mapped = unsafe { Mmap::map(&file) }.map_err(at!(Map, path))?;
        let (header, metadata) =
            safetensors::SafeTensors::read_metadata(&mapped).map_err(|reason| Error::NotSafetensors {
                path: path.to_owned(),
                reason,
            })?;
        let data = header + 8; // the header's length itself takes 8 bytes
        for (name, info) in metadata.tensors() {
            let stored = match info.dtype {
                safetensors::Dtype::F32 => Stored::F32,
                safetensors::Dtype::F16 => Stored::F16,
                safetensors::Dtype::BF16 => Stored::Bf16,
                got => {
                    return Err(Error::ElementType {
                        tensor: name,
                        path: path.to_owned(),
                        got,
                    });
                }
            };
            let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
            if bytes.end > mapped.len() {
                return Err(Error::CutShort {
                    path: path.to_owned(),
                    tensor: name,
                });
            }
            let entry = Entry {
                file: self.files.len(),
                stored,
                shape: info.shape.clone(),
                bytes,
            };
            self.entries.insert(name, entry);
        }
        self.files.push(mapped);
        Ok(())
    }

    /// The tensors' names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// What the type of the tensor `name` is called, if it is there.
    pub fn type_name(&self, name: &str) -> Option<&'static str> {
        self.entries.get(name).map(|entry| match entry.stored {
            Stored::F32 => "F32",
            Stored::F16 => "F16",
            Stored::Bf16 => "BF16",
        })
    }

    /// The tensor `name`, which must have exactly `shape`.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let entry = self.entries.get(name).ok_or_else(|| Error::NoTensor(name.to_owned()))?;
        if entry.shape != shape {
            return Err(Error::TensorShape {
                tensor: name.to_owned(),
                got: entry.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        let bytes = self.files.get(entry.file).and_then(|f| f.get(entry.bytes.clone()));
        let bytes = bytes.ok_or_else(|| Error::OutsideFile(name.to_owned()))?;
        Ok(Tensor {
            stored: entry.stored,
            bytes,
        })
    }
}

impl Tensor<'_> {
    /// Writes the elements from `start` on, in row-major order, to `out`; those outside the tensor stay as they are.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        match self.stored {
            Stored::F32 => self.convert(start, out, f32::from_le_bytes),
            Stored::F16 => self.convert(start, out, |b| f16::from_le_bytes(b).to_f32()),
            Stored::Bf16 => self.convert(start, out, |b| bf16::from_le_bytes(b).to_f32()),
        }
    }

    fn convert<const N: usize>(&self, start: usize, out: &mut [f32], element: impl Fn([u8; N]) -> f32) {
        let (elements, _) = self.bytes.as_chunks::<N>();
        for (slot, bytes) in out.iter_mut().zip(elements.iter().skip(start)) {
            *slot = element(*bytes);
        }
    }
}
