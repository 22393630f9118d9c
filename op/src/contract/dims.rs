//! The shapes of a call's inputs, checked, and the sizes that they give.

use retro_contract::{SKETCH_BLOCK, StateElement, input, pages_for};
use smallvec::SmallVec;

use super::attributes::Attributes;
use crate::for_selector;
use crate::ort::{Error, Result, require};
use crate::selector::{CacheSize, PageSelector};

/// The sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    pub batch: usize,
    /// S, tokens fed for each sequence.
    pub tokens: usize,
    /// C, tokens that the cache can hold.
    pub capacity: usize,
    /// Pages that the state has room for: at least those of the cache, P.
    pub pages: usize,
    /// Blocks of sketches that the state has room for: at least those of the cache. 0: its selector has none.
    pub blocks: usize,
    /// D.
    pub head_size: usize,
    /// Keys and values come behind the query in one tensor.
    pub packed: bool,
    /// Rows of cos_cache, M; 0 without rotary embedding.
    pub rotary_rows: usize,
    /// Rotated pairs: the width of cos_cache.
    pub rotary_half: usize,
    /// Bytes of an element of the caches.
    pub element: usize,
}

/// A tensor's sizes; on the stack up to the highest rank that an input has.
pub type Shape = SmallVec<[i64; 6]>;

/// The shapes of a call's inputs, in slot order; `None` for an absent one.
pub type InputShapes = [Option<Shape>; input::COUNT];

fn shown(shape: &[i64]) -> String {
    format!("[{}]", shape.iter().map(i64::to_string).collect::<Vec<_>>().join(", "))
}

struct Checker<'a>(&'a InputShapes);

impl Checker<'_> {
    fn get(&self, slot: usize) -> Option<&[i64]> {
        self.0.get(slot).and_then(|s| s.as_deref())
    }

    fn required(&self, slot: usize) -> Result<&[i64]> {
        self.get(slot)
            .ok_or_else(|| Error::invalid(format!("input {} is missing", input::NAMES[slot])))
    }

    fn exact(&self, slot: usize, expected: &[usize], letters: &str) -> Result<()> {
        let got = self.required(slot)?;
        require!(
            got.len() == expected.len() && got.iter().zip(expected).all(|(&g, &e)| g == e as i64),
            "input {} has shape {}, expected {letters} = {}",
            input::NAMES[slot],
            shown(got),
            shown(&expected.iter().map(|&e| e as i64).collect::<Vec<_>>())
        );
        Ok(())
    }

    /// A state tensor, whose host may size it by other rules than the caches: it may have dimensions of 1, dimensions
    /// merged with those behind them, and more than is needed of what `open` counts, the place of pages or blocks.
    /// Elements lie in the same order all the same. Returns how many of those there are.
    fn state_tensor(&self, slot: usize, expected: &[usize], open: Option<usize>, letters: &str) -> Result<usize> {
        let got = self.required(slot)?;
        if let Some(entries) = entries(got, expected, open) {
            return Ok(entries);
        }
        let more = if open.is_some() {
            ", or more of its third dimension"
        } else {
            ""
        };
        Err(Error::invalid(format!(
            "input {} has shape {}, expected {letters} = {}{more}",
            input::NAMES[slot],
            shown(got),
            shown(&expected.iter().map(|&e| e as i64).collect::<Vec<_>>())
        )))
    }

    /// A scalar, `[1]`, or (where allowed) one number a sequence.
    fn numbers(&self, slot: usize, batch: Option<usize>) -> Result<()> {
        let got = self.required(slot)?;
        let per_sequence = batch.is_some_and(|b| got == [b as i64]);
        require!(
            got.is_empty() || got == [1] || per_sequence,
            "input {} has shape {}, expected a scalar{}",
            input::NAMES[slot],
            shown(got),
            batch.map_or(" or [1]".to_owned(), |b| format!(", [1] or [B] = [{b}]"))
        );
        Ok(())
    }

    /// Keys and values of the cache: B, C and D.
    fn caches(&self, kv_heads: usize) -> Result<(usize, usize, usize)> {
        let cache = self.required(input::PAST_KEY)?;
        let &[b, h, c, d] = cache else {
            return Err(Error::invalid(format!(
                "input past_key has shape {}, expected [B, Hkv, C, D]",
                shown(cache)
            )));
        };
        require!(
            b >= 1 && h == kv_heads as i64 && c >= 1 && d >= 1,
            "input past_key has shape {}, expected [B, Hkv = {kv_heads}, C, D] with none of them 0",
            shown(cache)
        );
        let (batch, capacity, head_size) = (b as usize, c as usize, d as usize);
        require!(
            capacity <= i32::MAX as usize,
            "input past_key has capacity {capacity}, expected at most {}",
            i32::MAX
        );
        self.exact(
            input::PAST_VALUE,
            &[batch, kv_heads, capacity, head_size],
            "[B, Hkv, C, D]",
        )?;
        Ok((batch, capacity, head_size))
    }

    /// Queries, keys and values that are fed: S, and whether they are packed.
    fn rows(&self, attributes: &Attributes, batch: usize, head_size: usize) -> Result<(usize, bool)> {
        let (heads, kv_heads) = (attributes.heads, attributes.kv_heads);
        let query = self.required(input::QUERY)?;
        let packed = self.get(input::KEY).is_none();
        require!(
            packed == self.get(input::VALUE).is_none(),
            "input {} is missing: key and value come together, or neither does and query is packed",
            if packed { "key" } else { "value" }
        );
        let width = if packed {
            (heads + 2 * kv_heads) * head_size
        } else {
            heads * head_size
        };
        let tokens = match *query {
            [b, s, w] if b == batch as i64 && s >= 1 && w == width as i64 => s as usize,
            _ => {
                let letters = if packed { "[B, S, (Hq+2*Hkv)*D]" } else { "[B, S, Hq*D]" };
                return Err(Error::invalid(format!(
                    "input query has shape {}, expected {letters} = [{batch}, at least 1, {width}]",
                    shown(query)
                )));
            }
        };
        if !packed {
            for slot in [input::KEY, input::VALUE] {
                self.exact(slot, &[batch, tokens, kv_heads * head_size], "[B, S, Hkv*D]")?;
            }
        }
        Ok((tokens, packed))
    }

    /// The integer inputs.
    fn lengths(&self, attributes: &Attributes, batch: usize) -> Result<()> {
        // As GroupQueryAttention: old exporters write a column.
        if self.required(input::SEQLENS_K)? != [batch as i64, 1] {
            self.exact(input::SEQLENS_K, &[batch], "[B]")?;
        }
        self.numbers(input::TOTAL_SEQUENCE_LENGTH, None)?;
        self.numbers(input::RETRO_LENGTH, Some(batch))?;
        if self.get(input::PAGE_BUDGET).is_some() {
            self.numbers(input::PAGE_BUDGET, Some(batch))?;
        }
        if self.get(input::RETRO_COUNT).is_some() {
            require!(
                attributes.step_rows > 0,
                "input retro_count is there, and attribute step_rows is 0: it needs one of at least window ({})",
                attributes.window
            );
            self.numbers(input::RETRO_COUNT, Some(batch))?;
        }
        Ok(())
    }

    /// The operator's own state, and the head sink. Sets how many pages and blocks the state has room for.
    fn state(&self, attributes: &Attributes, dims: &mut Dims) -> Result<()> {
        let (heads, kv_heads, ring) = (attributes.heads, attributes.kv_heads, attributes.ring());
        let (batch, d) = (dims.batch, dims.head_size);
        require!(
            d.is_multiple_of(attributes.selector.head_size_multiple(attributes.sketch_bits)),
            "input past_key has head size {d}, and attribute sketch_bits is {}: the selector sketch needs a product \
             that is a multiple of 8",
            attributes.sketch_bits
        );
        let steps = [batch, kv_heads, dims.pages];
        dims.pages = self.state_tensor(input::PAST_PAGE_STEPS, &steps, Some(2), "[B, Hkv, P]")?;
        let layout = for_selector!(attributes.selector, P => P::layout(&dims.cache_size(attributes)));
        let mut state = SmallVec::<[usize; 6]>::from_slice(&[batch, kv_heads]);
        state.extend_from_slice(layout.sizes());
        // Pages are those of the page steps.
        let open = (layout.element == StateElement::Byte).then_some(2);
        let entries = self.state_tensor(input::PAST_PAGE_SUMMARY, &state, open, layout.letters)?;
        dims.blocks = open.map_or(0, |_| entries);
        let outputs = [batch, ring, heads, d];
        self.state_tensor(input::PAST_OUTPUTS, &outputs, None, "[B, R = max(window-1, 1), Hq, D]")?;
        self.state_tensor(input::PAST_LSE, &outputs[..3], None, "[B, R = max(window-1, 1), Hq]")?;
        if self.get(input::HEAD_SINK).is_some() {
            self.exact(input::HEAD_SINK, &[heads], "[Hq]")?;
        }
        Ok(())
    }

    /// The tables of the rotary embedding: M and the rotated pairs.
    fn rotary(&self, head_size: usize) -> Result<(usize, usize)> {
        let cos = self.required(input::COS_CACHE)?;
        let &[m, half] = cos else {
            return Err(Error::invalid(format!(
                "input cos_cache has shape {}, expected [M, rotary_dim/2]",
                shown(cos)
            )));
        };
        require!(
            m >= 1 && half >= 1 && 2 * half <= head_size as i64,
            "input cos_cache has shape {}, expected [M, rotary_dim/2] with rotary_dim at most D = {head_size}",
            shown(cos)
        );
        let (rows, half) = (m as usize, half as usize);
        self.exact(input::SIN_CACHE, &[rows, half], "that of cos_cache")?;
        Ok((rows, half))
    }
}

/// How many entries a tensor of shape `got` has in dimension `open` of `expected`, at least as many as expected; `None`:
/// it is not that tensor. 0 without an open dimension.
fn entries(got: &[i64], expected: &[usize], open: Option<usize>) -> Option<usize> {
    let (&batch, got) = got.split_first()?;
    let (&expected_batch, expected) = expected.split_first()?;
    let mut sizes = SmallVec::<[usize; 6]>::new();
    for &size in got {
        sizes.push(usize::try_from(size).ok()?);
    }
    let product = |sizes: &[usize]| sizes.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    let mut expected = SmallVec::<[usize; 6]>::from_slice(expected);
    let mut found = 0;
    if let Some(place) = open {
        let entries = expected.get_mut(place.checked_sub(1)?)?;
        let least = std::mem::replace(entries, 1);
        let (all, one) = (product(&sizes)?, product(&expected)?);
        if one == 0 || !all.is_multiple_of(one) || all / one < least {
            return None;
        }
        found = all / one;
        *expected.get_mut(place - 1)? = found;
    }
    // Each dimension that is there is one that is expected, or several neighbours of these together.
    let mut rest = expected.iter().copied().filter(|&size| size != 1);
    let merged = sizes.iter().filter(|&&size| size != 1).all(|&size| {
        let mut together = 1usize;
        while together < size {
            let Some(next) = rest.next() else { return false };
            together = together.saturating_mul(next);
        }
        together == size
    });
    (batch == expected_batch as i64 && merged && rest.next().is_none()).then_some(found)
}

impl Dims {
    /// What the layout of a selector's state depends on.
    pub fn cache_size(&self, attributes: &Attributes) -> CacheSize {
        CacheSize {
            // Blocks are known once the state was read.
            capacity: self.capacity.max(self.blocks * SKETCH_BLOCK),
            pages: self.pages,
            page_size: attributes.page_size,
            head_size: self.head_size,
            sketch_bits: attributes.sketch_bits,
            cache_element: self.element,
        }
    }

    /// Checks every input's shape against the attributes and against each other; `element`: bytes of an element of the
    /// caches.
    ///
    /// # Errors
    /// When an input is missing, or has another shape.
    pub fn read(attributes: &Attributes, shapes: &InputShapes, element: usize) -> Result<Self> {
        let check = Checker(shapes);
        let (batch, capacity, head_size) = check.caches(attributes.kv_heads)?;
        let (tokens, packed) = check.rows(attributes, batch, head_size)?;
        check.lengths(attributes, batch)?;
        let mut dims = Self {
            batch,
            tokens,
            capacity,
            pages: pages_for(capacity, attributes.page_size),
            blocks: 0,
            head_size,
            packed,
            rotary_rows: 0,
            rotary_half: 0,
            element,
        };
        check.state(attributes, &mut dims)?;
        if attributes.do_rotary {
            (dims.rotary_rows, dims.rotary_half) = check.rotary(head_size)?;
        }
        Ok(dims)
    }
}
