//! The operator's contract in code: attributes, shapes, lengths. docs/operator.md is the prose.
//!
//! Everything here is plain arithmetic on numbers, so that every execution provider checks the same things with the
//! same words before it writes anything.

use std::fmt;

use retro_contract::{GroupScore, Mode, Selector, budget_pages, input, limits, pages_for, ring_slots};

use smallvec::SmallVec;

use crate::for_selector;
use crate::ort::{Error, Result, require};
use crate::selector::{CacheSize, PageSelector};

/// Source of attribute values: the host's kernel info, or a plain struct in tests.
pub trait AttributeSource {
    fn int(&self, name: &str) -> Result<Option<i64>>;
    fn float(&self, name: &str) -> Result<Option<f32>>;
    fn string(&self, name: &str) -> Result<Option<String>>;
    /// Whether there is an attribute of this name, whatever its type.
    fn has(&self, _name: &str) -> Result<bool> {
        Ok(false)
    }
}

/// The node's attributes, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Attributes {
    /// Hq, a multiple of `kv_heads`.
    pub heads: usize,
    /// Hkv.
    pub kv_heads: usize,
    /// `None`: 1/sqrt(D).
    pub scale: Option<f32>,
    /// 0: off.
    pub softcap: f32,
    pub do_rotary: bool,
    pub rotary_interleaved: bool,
    /// Tokens that a query sees, itself included; `None`: all.
    pub local_window: Option<usize>,
    pub page_size: usize,
    /// w.
    pub window: usize,
    pub budget_ratio: f64,
    pub budget_min_pages: usize,
    pub sink_pages: usize,
    pub selector: Selector,
    pub group_score: GroupScore,
    pub selector_lambda: f32,
    /// Share of a key's spread along the query that the page's principal direction stands for (`signed_moments`), 0 to
    /// 1.
    pub selector_correlation: f32,
    pub mode: Mode,
}

impl Attributes {
    /// Reads and checks the attributes of a node.
    pub fn read(source: &impl AttributeSource) -> Result<Self> {
        use retro_contract::attribute as name;
        unknown::refuse(source)?;
        let flag = |n: &str| -> Result<bool> {
            match source.int(n)?.unwrap_or(0) {
                0 => Ok(false),
                1 => Ok(true),
                v => Err(Error::invalid(format!("attribute {n} is {v}, expected 0 or 1"))),
            }
        };
        let in_range = |n: &str, default: Option<usize>, low: i64, high: i64| -> Result<usize> {
            let v = match (source.int(n)?, default) {
                (Some(v), _) => v,
                (None, Some(d)) => return Ok(d),
                (None, None) => return Err(Error::invalid(format!("attribute {n} is missing: it is required"))),
            };
            require!(
                (low..=high).contains(&v),
                "attribute {n} is {v}, expected {low}..{high}"
            );
            Ok(v as usize)
        };
        let not_negative = |n: &str, default: f32| -> Result<f32> {
            let v = source.float(n)?.unwrap_or(default);
            require!(
                v.is_finite() && v >= 0.0,
                "attribute {n} is {v}, expected a finite number of at least 0"
            );
            Ok(v)
        };
        fn choice<T: std::str::FromStr<Err: fmt::Display> + Default>(s: &impl AttributeSource, n: &str) -> Result<T> {
            match s.string(n)? {
                None => Ok(T::default()),
                Some(v) => v.parse().map_err(|e: T::Err| Error::invalid(format!("attribute {e}"))),
            }
        }
        const MANY: i64 = i32::MAX as i64;

        let heads = in_range(name::NUM_HEADS, None, 1, MANY)?;
        let kv_heads = in_range(name::KV_NUM_HEADS, None, 1, MANY)?;
        require!(
            heads.is_multiple_of(kv_heads),
            "attribute num_heads is {heads}, expected a multiple of kv_num_heads ({kv_heads})"
        );
        let scale = not_negative(name::SCALE, 0.0)?;
        let local_window = match source.int(name::LOCAL_WINDOW_SIZE)?.unwrap_or(-1) {
            -1 => None,
            v if v >= 1 => Some(v as usize),
            v => {
                return Err(Error::invalid(format!(
                    "attribute local_window_size is {v}, expected -1 or at least 1"
                )));
            }
        };
        let selector = choice(source, name::SELECTOR)?;
        let page_sizes = for_selector!(selector, P => P::PAGE_SIZES);
        let page_size = in_range(
            name::PAGE_SIZE,
            Some(limits::PAGE_SIZE),
            *page_sizes.start() as i64,
            *page_sizes.end() as i64,
        )?;
        require!(
            page_size.is_power_of_two(),
            "attribute page_size is {page_size}, expected a power of two"
        );
        let ratio = not_negative(name::BUDGET_RATIO, limits::BUDGET_RATIO)?;
        require!(ratio <= 1.0, "attribute budget_ratio is {ratio}, expected 0..1");
        let correlation = not_negative(name::SELECTOR_CORRELATION, limits::SELECTOR_CORRELATION)?;
        require!(
            correlation <= 1.0,
            "attribute selector_correlation is {correlation}, expected 0..1"
        );
        Ok(Self {
            heads,
            kv_heads,
            scale: (scale != 0.0).then_some(scale),
            softcap: not_negative(name::SOFTCAP, 0.0)?,
            do_rotary: flag(name::DO_ROTARY)?,
            rotary_interleaved: flag(name::ROTARY_INTERLEAVED)?,
            local_window,
            page_size,
            window: in_range(name::WINDOW, Some(limits::WINDOW), 1, limits::WINDOW_MAX as i64)?,
            budget_ratio: decimal(ratio),
            budget_min_pages: in_range(name::BUDGET_MIN_PAGES, Some(limits::BUDGET_MIN_PAGES), 0, MANY)?,
            sink_pages: in_range(name::SINK_PAGES, Some(limits::SINK_PAGES), 0, MANY)?,
            selector,
            group_score: choice(source, name::GROUP_SCORE)?,
            selector_lambda: not_negative(name::SELECTOR_LAMBDA, limits::SELECTOR_LAMBDA)?,
            selector_correlation: correlation,
            mode: choice(source, name::MODE)?,
        })
    }

    /// Slots of the output cache.
    pub fn ring(&self) -> usize {
        ring_slots(self.window)
    }
}

/// The decimal that a float attribute was written as: 0.15f32 stands for 0.15, and 0.15 * 320 / 16 is exactly 3 pages,
/// while the float's own value would round it up to 4.
fn decimal(v: f32) -> f64 {
    v.to_string().parse().unwrap_or(f64::from(v))
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    pub batch: usize,
    /// S, tokens fed for each sequence.
    pub tokens: usize,
    /// C, tokens that the cache can hold.
    pub capacity: usize,
    /// P, pages of the cache.
    pub pages: usize,
    /// D.
    pub head_size: usize,
    /// Keys and values come behind the query in one tensor.
    pub packed: bool,
    /// Rows of cos_cache, M; 0 without rotary embedding.
    pub rotary_rows: usize,
    /// Rotated pairs: the width of cos_cache.
    pub rotary_half: usize,
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
}

impl Dims {
    /// What the layout of a selector's state depends on.
    pub fn cache_size(&self, attributes: &Attributes) -> CacheSize {
        CacheSize {
            capacity: self.capacity,
            pages: self.pages,
            page_size: attributes.page_size,
            head_size: self.head_size,
        }
    }

    /// Checks every input's shape against the attributes and against each other.
    pub fn read(attributes: &Attributes, shapes: &InputShapes) -> Result<Self> {
        let check = Checker(shapes);
        let (heads, kv_heads) = (attributes.heads, attributes.kv_heads);

        let cache = check.required(input::PAST_KEY)?;
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
        check.exact(
            input::PAST_VALUE,
            &[batch, kv_heads, capacity, head_size],
            "[B, Hkv, C, D]",
        )?;

        let query = check.required(input::QUERY)?;
        let packed = check.get(input::KEY).is_none();
        require!(
            packed == check.get(input::VALUE).is_none(),
            "input {} is missing: key and value come together, or neither does and query is packed",
            if packed { "key" } else { "value" }
        );
        let width = if packed {
            (heads + 2 * kv_heads) * head_size
        } else {
            heads * head_size
        };
        let tokens = match *query {
            [qb, s, w] if qb == b && s >= 1 && w == width as i64 => s as usize,
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
                check.exact(slot, &[batch, tokens, kv_heads * head_size], "[B, S, Hkv*D]")?;
            }
        }

        // As GroupQueryAttention: old exporters write a column.
        if check.required(input::SEQLENS_K)? != [b, 1] {
            check.exact(input::SEQLENS_K, &[batch], "[B]")?;
        }
        check.numbers(input::TOTAL_SEQUENCE_LENGTH, None)?;
        check.numbers(input::RETRO_LENGTH, Some(batch))?;
        if check.get(input::PAGE_BUDGET).is_some() {
            check.numbers(input::PAGE_BUDGET, Some(batch))?;
        }

        let pages = pages_for(capacity, attributes.page_size);
        let ring = attributes.ring();
        let size = CacheSize {
            capacity,
            pages,
            page_size: attributes.page_size,
            head_size,
        };
        let layout = for_selector!(attributes.selector, P => P::layout(&size));
        let mut state = SmallVec::<[usize; 6]>::from_slice(&[batch, kv_heads]);
        state.extend_from_slice(layout.sizes());
        check.exact(input::PAST_PAGE_SUMMARY, &state, layout.letters)?;
        check.exact(input::PAST_PAGE_STEPS, &[batch, kv_heads, pages], "[B, Hkv, P]")?;
        check.exact(
            input::PAST_OUTPUTS,
            &[batch, ring, heads, head_size],
            "[B, R = max(window-1, 1), Hq, D]",
        )?;
        check.exact(input::PAST_LSE, &[batch, ring, heads], "[B, R = max(window-1, 1), Hq]")?;
        if check.get(input::HEAD_SINK).is_some() {
            check.exact(input::HEAD_SINK, &[heads], "[Hq]")?;
        }

        let (mut rotary_rows, mut rotary_half) = (0, 0);
        if attributes.do_rotary {
            let cos = check.required(input::COS_CACHE)?;
            let &[m, half] = cos else {
                return Err(Error::invalid(format!(
                    "input cos_cache has shape {}, expected [M, rotary_dim/2]",
                    shown(cos)
                )));
            };
            require!(
                m >= 1 && half >= 1 && 2 * half <= d,
                "input cos_cache has shape {}, expected [M, rotary_dim/2] with rotary_dim at most D = {head_size}",
                shown(cos)
            );
            (rotary_rows, rotary_half) = (m as usize, half as usize);
            check.exact(input::SIN_CACHE, &[rotary_rows, rotary_half], "that of cos_cache")?;
        }
        Ok(Self {
            batch,
            tokens,
            capacity,
            pages,
            head_size,
            packed,
            rotary_rows,
            rotary_half,
        })
    }
}

/// What a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A prompt or a chunk of it: dense causal attention; closes the window.
    Prefill,
    /// One new token for each sequence, with its retrospective ones before it.
    Decode,
}

impl Phase {
    /// What a call is that feeds `tokens` tokens with these values of retro_length (at least one of them), after
    /// checking them.
    pub fn of_call(window: usize, tokens: usize, retro_length: &[i32], empty_cache: bool) -> Result<Self> {
        let (mut lowest, mut highest) = (i32::MAX, i32::MIN);
        for &r in retro_length {
            require!(
                (-1..window as i32).contains(&r),
                "input retro_length is {r}, expected -1 (prefill) or 0..{} (window {window})",
                window - 1
            );
            (lowest, highest) = (lowest.min(r), highest.max(r));
        }
        require!(
            lowest >= 0 || highest == -1,
            "input retro_length mixes -1 (prefill) with {highest}: prefill is for the whole batch"
        );
        if highest == -1 || (highest == 0 && (tokens > 1 || empty_cache)) {
            return Ok(Phase::Prefill);
        }
        require!(
            tokens == highest as usize + 1,
            "input retro_length is {highest}, so a step feeds {} tokens, but query has {tokens}",
            highest + 1
        );
        Ok(Phase::Decode)
    }
}

/// One sequence of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Valid tokens after the call, n: the newest position is n-1.
    pub len: usize,
    /// Rows of this call that count: the last `fed` of the S; the leading ones are ignored and their outputs are 0.
    pub fed: usize,
    /// Pages per KV head that a decoding step may load (forced pages come on top).
    pub budget: usize,
}

impl Sequence {
    /// Position of the first row that counts.
    pub fn first_position(&self) -> usize {
        self.len - self.fed
    }
}

/// The lengths of one call, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallPlan {
    pub phase: Phase,
    /// One a sequence of the batch; on the stack where they are few.
    pub sequences: SmallVec<[Sequence; 8]>,
}

/// The integer inputs of a call.
pub struct CallLengths<'a> {
    /// `[B]`.
    pub seqlens_k: &'a [i32],
    pub total_sequence_length: i32,
    /// One number, or one a sequence.
    pub retro_length: &'a [i32],
    /// One number, or one a sequence.
    pub page_budget: Option<&'a [i32]>,
}

/// Element `b` of one number for the whole batch or one a sequence.
fn of_sequence(values: &[i32], b: usize) -> i32 {
    if values.len() == 1 { values[0] } else { values[b] }
}

impl CallPlan {
    /// Decides what the call is and checks every range.
    pub fn read(attributes: &Attributes, dims: &Dims, lengths: &CallLengths<'_>) -> Result<Self> {
        let window = attributes.window;
        let mut longest = 0;
        for (b, &last) in lengths.seqlens_k.iter().enumerate() {
            require!(
                last != limits::MASK_NOT_UNDERSTOOD,
                "input seqlens_k[{b}] is {last}: the attention mask of sequence {b} is not understood: it has zeros between valid tokens, or after the newest \
                 token fed, or padding that this model doesn't mask. Pad on the left (zeros, then ones)"
            );
            require!(
                (0..dims.capacity as i32).contains(&last),
                "input seqlens_k[{b}] is {last}, expected 0..{} (valid tokens after this call minus 1, capacity {})",
                dims.capacity - 1,
                dims.capacity
            );
            longest = longest.max(last as usize + 1);
        }
        let total = lengths.total_sequence_length;
        require!(
            i64::from(total) >= longest as i64,
            "input total_sequence_length is {total}, expected at least {longest}, the largest seqlens_k plus 1"
        );
        if attributes.do_rotary {
            require!(
                longest <= dims.rotary_rows,
                "input seqlens_k asks for position {}, but cos_cache has {} rows",
                longest - 1,
                dims.rotary_rows
            );
        }
        let phase = Phase::of_call(window, dims.tokens, lengths.retro_length, longest == 1)?;
        let mut sequences = SmallVec::with_capacity(dims.batch);
        for (b, &last) in lengths.seqlens_k.iter().enumerate() {
            let len = last as usize + 1;
            let fed = match phase {
                Phase::Prefill => dims.tokens.min(len),
                Phase::Decode => {
                    let r = of_sequence(lengths.retro_length, b);
                    require!(
                        (r as usize) < len,
                        "input retro_length[{b}] is {r}, but the cache of the sequence holds {} tokens before this step",
                        len - 1
                    );
                    r as usize + 1
                }
            };
            let asked = lengths.page_budget.map_or(0, |v| of_sequence(v, b));
            require!(
                asked >= 0,
                "input page_budget[{b}] is {asked}, expected at least 0 (0: from the attributes)"
            );
            let budget = if asked > 0 {
                (asked as usize).min(pages_for(len, attributes.page_size))
            } else {
                budget_pages(
                    attributes.budget_ratio,
                    attributes.budget_min_pages,
                    len,
                    attributes.page_size,
                )
            };
            sequences.push(Sequence { len, fed, budget });
        }
        Ok(Self { phase, sequences })
    }
}

mod unknown;

#[cfg(test)]
mod tests;
