//! The node's attributes, read and checked.

use std::{fmt, str::FromStr};

use retro_contract::attribute::{LOCAL_WINDOW_SIZE, PAGE_SIZE, STEP_ROWS};
use retro_contract::{GroupScore, Mode, OP_TYPE, Selector, limits, ring_slots};

use super::unknown;
use crate::ort::{Error, Result, require};

/// Source of attribute values: the host's kernel info, or a plain struct in tests. `None`: there is no such attribute.
///
/// # Errors
/// All fail where an attribute has another type, or the host fails.
pub trait AttributeSource {
    /// A whole number.
    fn int(&self, name: &str) -> Result<Option<i64>>;
    /// A number.
    fn float(&self, name: &str) -> Result<Option<f32>>;
    /// A text.
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
    /// Bits of an element of a sketch (`sketch`), 1 or 2.
    pub sketch_bits: usize,
    pub mode: Mode,
    /// Rows that a step may feed, of which a sequence's last ones count; 0: as many as retro_length says.
    pub step_rows: usize,
}

impl Attributes {
    /// Reads and checks the attributes of a node.
    ///
    /// # Errors
    /// When one is missing, unknown, out of its range, or does not fit another.
    pub fn read(source: &impl AttributeSource) -> Result<Self> {
        use retro_contract::attribute as name;
        let names = unknown::Names {
            operator: OP_TYPE,
            known: &name::ALL,
            foreign: &unknown::OF_ATTENTION,
        };
        unknown::refuse(source, &names)?;
        let read = Reader(source);
        let heads = read.in_range(name::NUM_HEADS, None, 1, MANY)?;
        let kv_heads = read.in_range(name::KV_NUM_HEADS, None, 1, MANY)?;
        require!(
            heads.is_multiple_of(kv_heads),
            "attribute num_heads is {heads}, expected a multiple of kv_num_heads ({kv_heads})"
        );
        let scale = read.not_negative(name::SCALE, 0.0)?;
        let local_window = read.local_window()?;
        let selector = read.choice(name::SELECTOR)?;
        let page_size = read.page_size(selector)?;
        let window = read.in_range(name::WINDOW, Some(limits::WINDOW), 1, limits::WINDOW_MAX as i64)?;
        Ok(Self {
            heads,
            kv_heads,
            scale: (scale != 0.0).then_some(scale),
            local_window,
            page_size,
            selector,
            budget_ratio: decimal(read.share(name::BUDGET_RATIO, limits::BUDGET_RATIO)?),
            selector_correlation: read.share(name::SELECTOR_CORRELATION, limits::SELECTOR_CORRELATION)?,
            softcap: read.not_negative(name::SOFTCAP, 0.0)?,
            do_rotary: read.flag(name::DO_ROTARY)?,
            rotary_interleaved: read.flag(name::ROTARY_INTERLEAVED)?,
            budget_min_pages: read.in_range(name::BUDGET_MIN_PAGES, Some(limits::BUDGET_MIN_PAGES), 0, MANY)?,
            sink_pages: read.in_range(name::SINK_PAGES, Some(limits::SINK_PAGES), 0, MANY)?,
            group_score: read.choice(name::GROUP_SCORE)?,
            selector_lambda: read.not_negative(name::SELECTOR_LAMBDA, limits::SELECTOR_LAMBDA)?,
            sketch_bits: read.in_range(
                name::SKETCH_BITS,
                Some(limits::SKETCH_BITS),
                1,
                limits::SKETCH_BITS_MAX as i64,
            )?,
            mode: read.choice(name::MODE)?,
            step_rows: read.step_rows(window)?,
            window,
        })
    }

    /// Slots of the output cache.
    pub fn ring(&self) -> usize {
        ring_slots(self.window)
    }
}

/// The largest count.
pub(crate) const MANY: i64 = i32::MAX as i64;

/// Reads attributes by what is allowed of their values.
pub(crate) struct Reader<'a, S>(pub &'a S);

impl<S: AttributeSource> Reader<'_, S> {
    fn flag(&self, name: &str) -> Result<bool> {
        match self.0.int(name)?.unwrap_or(0) {
            0 => Ok(false),
            1 => Ok(true),
            v => Err(Error::invalid(format!("attribute {name} is {v}, expected 0 or 1"))),
        }
    }

    pub fn in_range(&self, name: &str, default: Option<usize>, low: i64, high: i64) -> Result<usize> {
        let v = match (self.0.int(name)?, default) {
            (Some(v), _) => v,
            (None, Some(default)) => return Ok(default),
            (None, None) => {
                return Err(Error::invalid(format!("attribute {name} is missing: it is required")));
            }
        };
        require!(
            (low..=high).contains(&v),
            "attribute {name} is {v}, expected {low}..{high}"
        );
        Ok(v as usize)
    }

    fn not_negative(&self, name: &str, default: f32) -> Result<f32> {
        let v = self.0.float(name)?.unwrap_or(default);
        require!(
            v.is_finite() && v >= 0.0,
            "attribute {name} is {v}, expected a finite number of at least 0"
        );
        Ok(v)
    }

    fn share(&self, name: &str, default: f32) -> Result<f32> {
        let v = self.not_negative(name, default)?;
        require!(v <= 1.0, "attribute {name} is {v}, expected 0..1");
        Ok(v)
    }

    fn choice<T: FromStr<Err: fmt::Display> + Default>(&self, name: &str) -> Result<T> {
        match self.0.string(name)? {
            None => Ok(T::default()),
            Some(v) => v.parse().map_err(|e: T::Err| Error::invalid(format!("attribute {e}"))),
        }
    }

    fn local_window(&self) -> Result<Option<usize>> {
        match self.0.int(LOCAL_WINDOW_SIZE)?.unwrap_or(-1) {
            -1 => Ok(None),
            v if v >= 1 => Ok(Some(v as usize)),
            v => Err(Error::invalid(format!(
                "attribute {LOCAL_WINDOW_SIZE} is {v}, expected -1 or at least 1"
            ))),
        }
    }

    /// 0, or room for a whole window.
    fn step_rows(&self, window: usize) -> Result<usize> {
        let rows = self.in_range(STEP_ROWS, Some(0), 0, limits::WINDOW_MAX as i64)?;
        require!(
            rows == 0 || rows >= window,
            "attribute step_rows is {rows}, expected 0 or at least window ({window})"
        );
        Ok(rows)
    }

    /// A power of two that the selector has.
    fn page_size(&self, selector: Selector) -> Result<usize> {
        let sizes = selector.page_sizes();
        let (low, high) = (*sizes.start() as i64, *sizes.end() as i64);
        let size = self.in_range(PAGE_SIZE, Some(limits::PAGE_SIZE), low, high)?;
        require!(
            size.is_power_of_two(),
            "attribute page_size is {size}, expected a power of two"
        );
        Ok(size)
    }
}

/// The decimal that a float attribute was written as: 0.15f32 stands for 0.15, and 0.15 * 320 / 16 is exactly 3 pages,
/// while the float's own value would round it up to 4.
fn decimal(v: f32) -> f64 {
    v.to_string().parse().unwrap_or(f64::from(v))
}
