//! Layout of a selector's state: the tensor `page_summary` of a layer.
//!
//! The plugin checks it, the converter declares it, and hosts allocate it. How its elements are computed is the
//! plugin's affair alone.

/// Sizes that the layout of a layer's state depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSize {
    /// C, tokens.
    pub capacity: usize,
    /// P, pages: C / `page_size` rounded up.
    pub pages: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// D.
    pub head_size: usize,
    /// Bits of an element of a sketch (attribute `sketch_bits`).
    pub sketch_bits: usize,
    /// Bytes of an element of the caches.
    pub cache_element: usize,
}

/// Cached rows that share a centre with the selector `sketch`.
pub const SKETCH_BLOCK: usize = 128;

/// Sequences of a batch that may have different numbers of retrospective tokens (input `retro_length`) on CUDA.
pub const CUDA_MAX_RAGGED: usize = 512;

/// Bytes of the sketches of a block of rows: codes, factors, centre.
const fn sketch_block_bytes(size: &CacheSize) -> usize {
    SKETCH_BLOCK * (size.head_size * size.sketch_bits / 8 + 2) + size.head_size * size.cache_element
}

/// Element type of a selector's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateElement {
    /// The caches' own type T.
    Cache,
    /// Packed codes, uint8.
    Byte,
}

impl StateElement {
    /// Size of the state's third dimension for caches of `capacity` tokens in `pages` pages: numbers stand in pages,
    /// sketches in blocks of rows.
    pub const fn entries(self, capacity: usize, pages: usize) -> usize {
        match self {
            Self::Cache => pages,
            Self::Byte => capacity.div_ceil(SKETCH_BLOCK),
        }
    }

    /// Bytes of an element, for caches whose elements have `cache_element` bytes.
    pub const fn bytes(self, cache_element: usize) -> usize {
        match self {
            Self::Cache => cache_element,
            Self::Byte => 1,
        }
    }
}

/// Shape of a selector's state behind `[B, Hkv]`, and its element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateLayout {
    sizes: [usize; 3],
    rank: usize,
    /// Element type.
    pub element: StateElement,
    /// The whole shape for messages, as docs/operator.md writes it.
    pub letters: &'static str,
}

impl StateLayout {
    /// A layout of one to three sizes behind `[B, Hkv]`.
    pub fn new<const N: usize>(sizes: [usize; N], element: StateElement, letters: &'static str) -> Self {
        const { assert!(N >= 1 && N <= 3) };
        let mut all = [1; 3];
        all[..N].copy_from_slice(&sizes);
        Self {
            sizes: all,
            rank: N,
            element,
            letters,
        }
    }

    /// Two vectors of D a page, `[B, Hkv, P, 2, D]` in the caches' type.
    pub fn page_vectors(size: &CacheSize) -> Self {
        Self::new(
            [size.pages, 2, size.head_size],
            StateElement::Cache,
            "[B, Hkv, P, 2, D]",
        )
    }

    /// Codes, factors and centre of every block of 128 rows, `[B, Hkv, ceil(C / 128), Z]` in bytes.
    pub fn sketches(size: &CacheSize) -> Self {
        Self::new(
            [
                StateElement::Byte.entries(size.capacity, size.pages),
                sketch_block_bytes(size),
            ],
            StateElement::Byte,
            "[B, Hkv, ceil(C/128), Z = 128*(D*sketch_bits/8 + 2) + D*sizeof(T)]",
        )
    }

    /// Two bits of code an element, in words of 32 elements, and a bit a row, for every block of 128 rows,
    /// `[B, Hkv, ceil(C / 128), Z]` in bytes.
    pub fn codes(size: &CacheSize) -> Self {
        Self::new(
            [
                StateElement::Byte.entries(size.capacity, size.pages),
                SKETCH_BLOCK * 8 * size.head_size.div_ceil(32) + SKETCH_BLOCK / 8,
            ],
            StateElement::Byte,
            "[B, Hkv, ceil(C/128), Z = 128*8*ceil(D/32) + 16]",
        )
    }

    /// The sizes behind `[B, Hkv]`.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes[..self.rank]
    }

    /// Elements of one KV head.
    pub fn len(&self) -> usize {
        self.sizes.iter().product()
    }

    /// Whether a KV head has no state.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of one KV head, for caches whose elements have `cache_element` bytes.
    pub fn bytes(&self, cache_element: usize) -> usize {
        self.len() * self.element.bytes(cache_element)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_sizes_and_the_element_type() {
        let size = CacheSize {
            capacity: 100,
            pages: 7,
            page_size: 16,
            head_size: 8,
            sketch_bits: 2,
            cache_element: 4,
        };
        let vectors = StateLayout::page_vectors(&size);
        assert_eq!((vectors.sizes(), vectors.len()), (&[7, 2, 8][..], 112));
        assert_eq!((vectors.bytes(4), vectors.bytes(2)), (448, 224));
        let codes = StateLayout::new([100, 5], StateElement::Byte, "[B, Hkv, C, 5]");
        assert_eq!((codes.sizes(), codes.bytes(4)), (&[100, 5][..], 500));
        let sketches = StateLayout::sketches(&size);
        assert_eq!((sketches.sizes(), sketches.bytes(4)), (&[1, 128 * 4 + 32][..], 544));
        let one_bit = CacheSize {
            capacity: 129,
            sketch_bits: 1,
            cache_element: 2,
            ..size
        };
        assert_eq!(StateLayout::sketches(&one_bit).sizes(), &[2, 128 * 3 + 16]);
        let padded = CacheSize { head_size: 33, ..size };
        assert_eq!(StateLayout::codes(&padded).sizes(), &[1, 128 * 16 + 16]);
        assert!(!codes.is_empty() && StateLayout::new([0, 5], StateElement::Byte, "").is_empty());
    }
}
