//! Writes GGUF files whose tensors fit into memory: small models, for tests.

use crate::tensor_type::TensorType;

/// The alignment of files that do not say another.
const ALIGNMENT: usize = 32;

/// A file of version 3 in the making. What is written is not checked: a test may want it wrong.
///
/// ```
/// use retro_gguf::{Bytes, Gguf, TensorType, Writer};
///
/// let mut file = Writer::new();
/// file.string("general.architecture", "llama").u32("llama.block_count", 1);
/// file.tensor("output_norm.weight", &[2], TensorType::F32, &[0, 0, 128, 63, 0, 0, 0, 64]);
/// let file = Gguf::parse(Bytes::from(file.finish()))?;
/// let mut norm = [0.0; 2];
/// file.tensor("output_norm.weight")?.read(0, &mut norm)?;
/// assert_eq!(norm, [1.0, 2.0]);
/// # Ok::<(), retro_gguf::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Writer {
    keys: u64,
    metadata: Vec<u8>,
    tensors: u64,
    infos: Vec<u8>,
    data: Vec<u8>,
}

impl Writer {
    /// A file without keys and tensors.
    pub fn new() -> Self {
        Self::default()
    }

    fn key(&mut self, key: &str, kind: u32) -> &mut Vec<u8> {
        self.keys += 1;
        text(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
        &mut self.metadata
    }

    fn list(&mut self, key: &str, kind: u32, count: usize) -> &mut Vec<u8> {
        let out = self.key(key, 9);
        out.extend(kind.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
        out
    }

    /// A whole number.
    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.key(key, 4).extend(value.to_le_bytes());
        self
    }

    /// A floating-point number.
    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.key(key, 6).extend(value.to_le_bytes());
        self
    }

    /// true or false.
    pub fn boolean(&mut self, key: &str, value: bool) -> &mut Self {
        self.key(key, 7).push(value.into());
        self
    }

    /// Text.
    pub fn string(&mut self, key: &str, value: &str) -> &mut Self {
        text(self.key(key, 8), value);
        self
    }

    /// A list of texts.
    pub fn strings<S: AsRef<str>>(&mut self, key: &str, values: &[S]) -> &mut Self {
        let out = self.list(key, 8, values.len());
        values.iter().for_each(|value| text(out, value.as_ref()));
        self
    }

    /// A list of whole numbers.
    pub fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let out = self.list(key, 5, values.len());
        out.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        self
    }

    /// A list of floating-point numbers.
    pub fn f32s(&mut self, key: &str, values: &[f32]) -> &mut Self {
        let out = self.list(key, 6, values.len());
        out.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        self
    }

    /// A value of any type, as its number and bytes.
    pub fn raw(&mut self, key: &str, kind: u32, bytes: &[u8]) -> &mut Self {
        self.key(key, kind).extend(bytes);
        self
    }

    /// A tensor: sizes from the outermost dimension to the innermost, and its blocks.
    pub fn tensor(&mut self, name: &str, shape: &[usize], kind: TensorType, blocks: &[u8]) -> &mut Self {
        let dims: Vec<u64> = shape.iter().rev().map(|&n| n as u64).collect();
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        let offset = self.data.len() as u64;
        self.data.extend(blocks);
        self.info(name, &dims, kind.id(), offset)
    }

    /// A tensor's entry alone, as the file has it: sizes from the innermost dimension to the outermost.
    pub fn info(&mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> &mut Self {
        self.tensors += 1;
        text(&mut self.infos, name);
        self.infos.extend((dims.len() as u32).to_le_bytes());
        self.infos.extend(dims.iter().flat_map(|n| n.to_le_bytes()));
        self.infos.extend(kind.to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
        self
    }

    /// The file's bytes.
    pub fn finish(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(self.tensors.to_le_bytes());
        out.extend(self.keys.to_le_bytes());
        out.extend(&self.metadata);
        out.extend(&self.infos);
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(&self.data);
        out
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
