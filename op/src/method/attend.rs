//! Attention of a block of query rows over pages, with running maxima, so that partial results can be joined.

use super::element::Element;
use super::math::{Isa, add_weighted_rows, dispatched, dot, exp_nonpositive, scale_all};

/// Softmax attention over the tokens seen so far, for a block of rows. Row `i` is query head `i % group` of token
/// `i / group`; tokens stand at consecutive positions.
pub struct Partial<'a> {
    /// Running maximum of the logits, `rows`.
    pub max: &'a mut [f32],
    /// Sum of e^(logit - max), `rows`.
    pub sum: &'a mut [f32],
    /// Sum of e^(logit - max) * value, `rows * D`.
    pub acc: &'a mut [f32],
}

impl Partial<'_> {
    /// Forgets everything: nothing has been seen.
    pub fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.acc.fill(0.0);
    }

    /// Log-sum-exp of a row; -inf when it has seen nothing.
    pub fn lse(&self, row: usize) -> f32 {
        if self.sum[row] == 0.0 {
            f32::NEG_INFINITY
        } else {
            self.max[row] + self.sum[row].ln()
        }
    }
}

/// What a block of rows has in common.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Query heads a KV head, g.
    pub group: usize,
    /// D.
    pub head_size: usize,
    pub page_size: usize,
    /// Position of the block's first token.
    pub first_position: usize,
    /// 0: off.
    pub softcap: f32,
    /// Tokens that a query sees, itself included.
    pub local_window: Option<usize>,
}

/// Scratch of [`attend_page`].
#[derive(Default)]
pub struct AttendScratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    logits: Vec<f32>,
}

impl AttendScratch {
    fn fit(&mut self, block: &Block) {
        let n = block.page_size * block.head_size;
        self.keys.resize(n, 0.0);
        self.values.resize(n, 0.0);
        self.logits.resize(block.page_size, 0.0);
    }
}

dispatched! {
    fn page_kernel<E: Element>(
        block: &Block, query: &[f32], keys: &[E], values: &[E], page: usize, first_row: usize,
        partial: &mut Partial<'_>, scratch: &mut AttendScratch,
    ) = page_body
}

/// Adds one page to the rows `first_row..` of a block. Each row sees the page's tokens up to its own position and within
/// its sliding window; keys of the page are read once for all rows.
///
/// `query`: `rows * D`, after RoPE and scaled; `cache_keys`, `cache_values`: one KV head's cache, `[C, D]`.
#[expect(
    clippy::too_many_arguments,
    reason = "the kernel's operands; a struct would only rename the list"
)]
pub fn attend_page<E: Element>(
    isa: Isa,
    block: &Block,
    query: &[f32],
    cache_keys: &[E],
    cache_values: &[E],
    page: usize,
    first_row: usize,
    partial: &mut Partial<'_>,
    scratch: &mut AttendScratch,
) {
    scratch.fit(block);
    page_kernel(
        isa,
        block,
        query,
        cache_keys,
        cache_values,
        page,
        first_row,
        partial,
        scratch,
    );
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "as attend_page")]
fn page_body<const FMA: bool, E: Element>(
    block: &Block,
    query: &[f32],
    cache_keys: &[E],
    cache_values: &[E],
    page: usize,
    first_row: usize,
    partial: &mut Partial<'_>,
    scratch: &mut AttendScratch,
) {
    let d = block.head_size;
    let rows = query.len() / d;
    let start = page * block.page_size;
    let newest = block.first_position + rows / block.group - 1;
    let end = (start + block.page_size).min(newest + 1);
    if start >= end || first_row >= rows {
        return;
    }
    let AttendScratch { keys, values, logits } = scratch;
    let keys = E::widen(&cache_keys[start * d..end * d], keys);
    let values = E::widen(&cache_values[start * d..end * d], values);
    for row in first_row..rows {
        let position = block.first_position + row / block.group;
        let low = block
            .local_window
            .map_or(0, |w| (position + 1).saturating_sub(w))
            .max(start);
        let high = end.min(position + 1);
        if low >= high {
            continue;
        }
        let (low, high) = (low - start, high - start);
        let q = &query[row * d..][..d];
        let logits = &mut logits[..high - low];
        for (l, key) in logits.iter_mut().zip(keys[low * d..].chunks_exact(d)) {
            *l = dot::<FMA>(q, key);
        }
        if block.softcap > 0.0 {
            for l in logits.iter_mut() {
                *l = block.softcap * (*l / block.softcap).tanh();
            }
        }
        let old = partial.max[row];
        let new = logits.iter().fold(old, |m, &l| m.max(l));
        if new == f32::NEG_INFINITY {
            continue;
        }
        let acc = &mut partial.acc[row * d..][..d];
        if new > old {
            let shrink = exp_nonpositive::<FMA>(old - new);
            partial.max[row] = new;
            partial.sum[row] *= shrink;
            scale_all(acc, shrink);
        }
        let mut sum = 0.0;
        for l in logits.iter_mut() {
            *l = exp_nonpositive::<FMA>(*l - new);
            sum += *l;
        }
        partial.sum[row] += sum;
        add_weighted_rows::<FMA>(acc, logits, &values[low * d..high * d]);
    }
}
