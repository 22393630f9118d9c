//! The method in float64, one sequence at a time, written to be read: lists of rows, no page is skipped, nothing is
//! fast. The fast path is compared with it; it is itself compared with golden vectors of other hands
//! (`tests/tests/oracle.rs`).

use std::collections::{BTreeMap, BTreeSet};

use retro_contract::{GroupScore, Mode, Selector, budget_pages};

use crate::contract::Attributes;

mod adamas;
mod sketch;

type Row = Vec<f64>;

/// Rows fed to a layer: query `[n, heads, head_size]`, key and value `[n, kv_heads, head_size]`, RoPE applied.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    pub count: usize,
    pub query: Vec<f32>,
    pub key: Vec<f32>,
    pub value: Vec<f32>,
}

impl Rows {
    /// Rows `from..to`.
    pub fn slice(&self, from: usize, to: usize) -> Rows {
        let cut = |data: &[f32]| {
            let width = data.len().checked_div(self.count).unwrap_or(0);
            data[from * width..to * width].to_vec()
        };
        Rows {
            count: to - from,
            query: cut(&self.query),
            key: cut(&self.key),
            value: cut(&self.value),
        }
    }
}

/// One sequence in one layer.
pub struct Oracle {
    attrs: Attributes,
    head_size: usize,
    head_sink: Option<Vec<f64>>,
    /// Per position, all KV heads.
    keys: Vec<Row>,
    values: Vec<Row>,
    /// A: per KV head and page.
    page_steps: Vec<Vec<i64>>,
    /// Per position: output and log-sum-exp of all query heads.
    cache: BTreeMap<usize, (Row, Row)>,
    /// To the element type that page summaries and centres are stored in.
    stored: fn(f64) -> f64,
    /// One a KV head, with the selector `sketch`.
    sketches: Vec<sketch::Sketches>,
    /// One list of rows a KV head, with the selectors `adamas` and `adamas_rms`.
    codes: Vec<Vec<adamas::Codes>>,
}

/// What pages are scored from on the side of the queries, one a head of the group, where a selector needs more than
/// them.
#[derive(Default)]
struct Asked {
    /// Rotated, with the selector `sketch`.
    turned: Vec<Row>,
    /// With the selectors `adamas` and `adamas_rms`.
    codes: Vec<adamas::Codes>,
}

/// What a decoding step gave.
pub struct Stepped {
    /// `[tokens fed, heads, head_size]`
    pub output: Vec<f32>,
    /// Ascending pages, one list a KV head.
    pub selected: Vec<Vec<usize>>,
    /// Least distance between the worst page taken and the best one left, relative to the scores' size.
    pub margin: f64,
}

fn wide(data: &[f32]) -> Row {
    data.iter().map(|&x| f64::from(x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn log_sum_exp(scores: &[f64]) -> f64 {
    if scores.iter().any(|s| s.is_nan()) {
        return f64::NAN;
    }
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if top == f64::NEG_INFINITY {
        return top;
    }
    top + scores.iter().map(|s| (s - top).exp()).sum::<f64>().ln()
}

impl Oracle {
    /// An empty sequence. Rotary embedding is the caller's: rows come rotated.
    pub fn new(attrs: &Attributes, head_size: usize, head_sink: Option<&[f32]>) -> Self {
        Self {
            attrs: attrs.clone(),
            head_size,
            head_sink: head_sink.map(wide),
            keys: Vec::new(),
            values: Vec::new(),
            page_steps: vec![Vec::new(); attrs.kv_heads],
            cache: BTreeMap::new(),
            stored: |x| x,
            sketches: (0..attrs.kv_heads).map(|_| sketch::Sketches::default()).collect(),
            codes: (0..attrs.kv_heads).map(|_| Vec::new()).collect(),
        }
    }

    /// Page summaries are rounded like this before they are used: moments, unlike bounds, are no numbers of the keys'
    /// type.
    pub fn storing(mut self, round: fn(f64) -> f64) -> Self {
        self.stored = round;
        self
    }

    fn group(&self) -> usize {
        self.attrs.heads / self.attrs.kv_heads
    }

    fn heads_of(&self, kv: usize) -> std::ops::Range<usize> {
        kv * self.group()..(kv + 1) * self.group()
    }

    fn scale(&self) -> f64 {
        self.attrs.scale.map_or(1.0 / (self.head_size as f64).sqrt(), f64::from)
    }

    fn pages(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.attrs.page_size)
    }

    /// Valid tokens.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Forgets all but the first `len` tokens, as a host that rewinds does: it says nothing but a shorter length.
    pub fn truncate(&mut self, len: usize) {
        self.keys.truncate(len);
        self.values.truncate(len);
        self.cache.retain(|&position, _| position < len);
    }

    /// Writes rows from `first` on; those from `appended` on are new.
    fn write(&mut self, first: usize, appended: usize, rows: &Rows) {
        let width = self.attrs.kv_heads * self.head_size;
        self.keys.truncate(first);
        self.values.truncate(first);
        self.keys.extend(rows.key.chunks(width).map(wide));
        self.values.extend(rows.value.chunks(width).map(wide));
        let pages = self.pages(self.len());
        self.page_steps.iter_mut().for_each(|steps| steps.resize(pages, -1));
        if self.attrs.selector == Selector::Sketch {
            let (size, bits, stored) = (self.head_size, self.attrs.sketch_bits, self.stored);
            for (kv, sketches) in self.sketches.iter_mut().enumerate() {
                let keys: Vec<&[f64]> = self.keys.iter().map(|key| &key[kv * size..][..size]).collect();
                sketches.write(&keys, first, appended, bits, stored);
            }
        }
        if self.is_adamas() {
            let (size, selector) = (self.head_size, self.attrs.selector);
            for (kv, codes) in self.codes.iter_mut().enumerate() {
                codes.truncate(first);
                let new = self.keys[first..].iter().map(|key| &key[kv * size..][..size]);
                codes.extend(new.map(|key| adamas::Codes::of(key, selector)));
            }
        }
    }

    fn is_adamas(&self) -> bool {
        matches!(self.attrs.selector, Selector::Adamas | Selector::AdamasRms)
    }

    fn remember(&mut self, position: usize, output: Row, lse: Row) {
        self.cache.insert(position, (output, lse));
        while self.cache.len() > self.attrs.window - 1 {
            self.cache.pop_first();
        }
    }

    /// Attention of one query head over the given rows, those the query may see.
    fn attend(&self, query: &[f64], head: usize, at: usize, rows: &[usize], with_sink: bool) -> (Row, f64) {
        let (attrs, size) = (&self.attrs, self.head_size);
        let kv = head / self.group();

        let seen = |&&row: &&usize| row <= at && attrs.local_window.is_none_or(|w| at - row < w);
        let rows: Vec<usize> = rows.iter().filter(seen).copied().collect();
        let score = |&row: &usize| {
            let plain = self.scale() * dot(query, &self.keys[row][kv * size..][..size]);
            match attrs.softcap {
                0.0 => plain,
                cap => f64::from(cap) * (plain / f64::from(cap)).tanh(),
            }
        };
        let mut scores: Vec<f64> = rows.iter().map(score).collect();
        if let (true, Some(sink)) = (with_sink, &self.head_sink) {
            scores.push(sink[head]);
        }
        let lse = log_sum_exp(&scores);
        let mut output = vec![0.0; size];
        for (&row, score) in rows.iter().zip(&scores) {
            let weight = (score - lse).exp();
            let value = &self.values[row][kv * size..][..size];
            output.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
        }
        (output, lse)
    }

    fn query(&self, rows: &Rows, token: usize, head: usize) -> Row {
        let (heads, size) = (self.attrs.heads, self.head_size);
        wide(&rows.query[(token * heads + head) * size..][..size])
    }

    fn page_rows(&self, page: usize) -> std::ops::Range<usize> {
        page * self.attrs.page_size..((page + 1) * self.attrs.page_size).min(self.len())
    }

    /// One chunk of a prompt: its outputs.
    pub fn prefill(&mut self, rows: &Rows) -> Vec<f32> {
        let first = self.len();
        self.write(first, first, rows);
        let all: Vec<usize> = (0..self.len()).collect();
        let mut outputs = Vec::new();
        for token in 0..rows.count {
            let at = first + token;
            let heads = (0..self.attrs.heads).map(|h| self.attend(&self.query(rows, token, h), h, at, &all, true));
            let (output, lse): (Vec<Row>, Row) = heads.unzip();
            outputs.extend(output.iter().flatten().map(|&x| x as f32));
            self.remember(at, output.concat(), lse);
        }
        let newest = self.len() as i64 - 1;
        self.page_steps.iter_mut().flatten().for_each(|step| *step = newest);
        outputs
    }

    /// Signs of the elements of the direction that two rounds of the power iteration find from the row farthest from
    /// the mean of `range`.
    fn signs(&self, kv: usize, range: std::ops::Range<usize>) -> Row {
        let size = self.head_size;
        let count = range.len() as f64;
        let rows: Vec<Row> = range.map(|row| self.keys[row][kv * size..][..size].to_vec()).collect();
        let mean: Row = (0..size)
            .map(|d| rows.iter().map(|r| r[d]).sum::<f64>() / count)
            .collect();
        let apart: Vec<Row> = rows
            .iter()
            .map(|r| r.iter().zip(&mean).map(|(x, m)| x - m).collect())
            .collect();
        let mut far = 0;
        for (i, row) in apart.iter().enumerate() {
            // The first of those that are as far but for rounding.
            if dot(row, row) > dot(&apart[far], &apart[far]) * 1.00001 {
                far = i;
            }
        }
        let mut direction = apart[far].clone();
        for _ in 0..2 {
            let weights: Row = apart.iter().map(|r| dot(&direction, r)).collect();
            direction = (0..size)
                .map(|d| apart.iter().zip(&weights).map(|(r, w)| w * r[d]).sum())
                .collect();
        }
        let largest = direction.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        direction
            .iter()
            .map(|&x| if x < -1e-5 * largest { -1.0 } else { 1.0 })
            .collect()
    }

    /// A page's log mass by the sketches of the tokens that the newest query sees.
    fn sketched_mass(&self, query: &[f64], turned: &[f64], kv: usize, page: usize) -> f64 {
        let attrs = &self.attrs;
        let logit = |row: usize| {
            let plain = self.scale() * self.sketches[kv].product(row, query, turned);
            match attrs.softcap {
                0.0 => plain,
                cap => f64::from(cap) * (plain / f64::from(cap)).tanh(),
            }
        };
        let logits: Vec<f64> = self.seen(page).map(logit).collect();
        log_sum_exp(&logits)
    }

    /// The rows of a page that the newest query sees.
    fn seen(&self, page: usize) -> impl Iterator<Item = usize> {
        let (newest, window) = (self.len() - 1, self.attrs.local_window);
        self.page_rows(page)
            .filter(move |row| window.is_none_or(|w| newest - row < w))
    }

    /// A page's score for every head of a group.
    fn head_scores(&self, rows: &Rows, token: usize, kv: usize, page: usize, asked: &Asked) -> Vec<f64> {
        let (attrs, size) = (&self.attrs, self.head_size);
        let range = self.page_rows(page);
        let count = range.len() as f64;
        let element = |d: usize| range.clone().map(move |row| self.keys[row][kv * size + d]);
        let group = self.heads_of(kv);
        let softmax = attrs.group_score == GroupScore::Softmax;
        let score = |head: usize| {
            let query = self.query(rows, token, head);
            match attrs.selector {
                Selector::Bounds => {
                    let bound = |(d, q): (usize, &f64)| element(d).map(|k| q * k).fold(f64::NEG_INFINITY, f64::max);
                    let bound: f64 = query.iter().enumerate().map(bound).sum();
                    if softmax { self.scale() * bound } else { bound }
                }
                Selector::Moments | Selector::SignedMoments => {
                    let signed = attrs.selector == Selector::SignedMoments;
                    let signs = if signed {
                        self.signs(kv, range.clone())
                    } else {
                        vec![1.0; size]
                    };
                    let (mut along, mut spread, mut line) = (0.0, 0.0, 0.0);
                    for (d, q) in query.iter().enumerate() {
                        let mean = element(d).sum::<f64>() / count;
                        let variance = element(d).map(|k| (k - mean).powi(2)).sum::<f64>() / count;
                        let sd = (self.stored)(variance.sqrt());
                        along += q * (self.stored)(mean);
                        spread += q * q * sd.powi(2);
                        line += q * signs[d] * sd;
                    }
                    let rho = if signed {
                        f64::from(attrs.selector_correlation)
                    } else {
                        0.0
                    };
                    let spread = rho * line * line + (1.0 - rho) * spread;
                    self.scale() * (along + f64::from(attrs.selector_lambda) * spread.sqrt()) + count.ln()
                }
                Selector::Sketch => self.sketched_mass(&query, &asked.turned[head % self.group()], kv, page),
                Selector::Adamas | Selector::AdamasRms => {
                    let query = &asked.codes[head % self.group()];
                    let similarity = |row: usize| -query.distance(&self.codes[kv][row]);
                    self.seen(page).map(similarity).fold(f64::NEG_INFINITY, f64::max)
                }
            }
        };
        group.map(score).collect()
    }

    /// Sinks, the newest pages, and every pi-th page between.
    fn periodic(&self, candidates: &[usize], budget: usize) -> Vec<usize> {
        let newest = (self.len() - 1) / self.attrs.page_size;
        let is_sink = |page: usize| page < self.attrs.sink_pages;
        let sinks = candidates
            .iter()
            .filter(|&&page| is_sink(page) && page != newest)
            .count();
        let left = budget.saturating_sub(sinks).max(1);
        let recent = left - left / 2;
        let between: Vec<usize> = candidates
            .iter()
            .copied()
            .filter(|&page| !is_sink(page) && page + recent <= newest)
            .collect();
        let every = |pi: usize| between.iter().copied().filter(move |page| page % pi == 0);
        let fits = |&pi: &usize| every(pi).count() <= left / 2;
        let pi = (1..=newest + 1).find(fits).filter(|_| left / 2 > 0);
        let mut chosen: BTreeSet<usize> = pi.map(|pi| every(pi).collect()).unwrap_or_default();
        let others = candidates
            .iter()
            .filter(|&&page| is_sink(page) || page + recent > newest);
        chosen.extend(others);
        chosen.into_iter().collect()
    }

    /// The pages of a step for one KV head, and how clear the choice was.
    fn select(&self, rows: &Rows, kv: usize, budget: usize) -> (Vec<usize>, f64) {
        let attrs = &self.attrs;
        let t = self.len() - 1;
        let pages = self.pages(self.len());
        let in_window = |page: &usize| {
            let last = self.page_rows(*page).end - 1;
            attrs.mode == Mode::Dense || attrs.local_window.is_none_or(|w| t - last < w)
        };
        let candidates: Vec<usize> = (0..pages).filter(in_window).collect();
        let forced = |page: usize| page < attrs.sink_pages || page == t / attrs.page_size;
        let mut chosen: BTreeSet<usize> = candidates.iter().copied().filter(|&p| forced(p)).collect();
        let rest: Vec<usize> = candidates.iter().copied().filter(|&p| !forced(p)).collect();
        let mut clear = f64::INFINITY;
        let scores: Vec<f64> = match attrs.mode {
            Mode::Dense => return (candidates, f64::INFINITY),
            Mode::Streaming => rest.iter().map(|&page| page as f64).collect(),
            Mode::Periodic => return (self.periodic(&candidates, budget), f64::INFINITY),
            Mode::Retro => {
                let newest = rows.count - 1;
                let queries = self.heads_of(kv).map(|head| self.query(rows, newest, head));
                let mut asked = Asked::default();
                if attrs.selector == Selector::Sketch {
                    asked.turned = queries.map(|query| sketch::rotated(&query)).collect();
                } else if self.is_adamas() {
                    asked.codes = queries.map(|query| adamas::Codes::of(&query, attrs.selector)).collect();
                    let rows = candidates.iter().flat_map(|&page| self.seen(page));
                    let all = rows.map(|row| &self.codes[kv][row]).chain(&asked.codes);
                    clear = all.fold(clear, |least, codes| least.min(codes.clear));
                }
                let of_page: Vec<Vec<f64>> = candidates
                    .iter()
                    .map(|&p| self.head_scores(rows, newest, kv, p, &asked))
                    .collect();
                let norms: Vec<f64> = (0..self.group())
                    .map(|g| log_sum_exp(&of_page.iter().map(|s| s[g]).collect::<Vec<_>>()))
                    .collect();
                let total = |scores: &Vec<f64>| match attrs.group_score {
                    GroupScore::Max => scores.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                    GroupScore::Softmax => scores.iter().zip(&norms).map(|(s, norm)| (s - norm).exp()).sum(),
                };
                let of_candidate = candidates.iter().copied().zip(of_page.iter().map(total));
                of_candidate.filter(|&(p, _)| !forced(p)).map(|(_, s)| s).collect()
            }
        };
        let mut order: Vec<usize> = (0..rest.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let take = budget.saturating_sub(chosen.len()).min(rest.len());
        chosen.extend(order[..take].iter().map(|&i| rest[i]));
        let worst_and_next = (
            take.checked_sub(1).map(|i| scores[order[i]]),
            order.get(take).map(|&i| scores[i]),
        );
        let margin = match worst_and_next {
            (Some(last), Some(next)) => {
                // Distances are whole numbers: where all codes are certain, so is it that two are equal.
                let tie = self.is_adamas() && last == next;
                let gap = if tie {
                    f64::INFINITY
                } else {
                    (last - next) / last.abs().max(next.abs()).max(1e-30)
                };
                gap.min(20.0 * clear)
            }
            _ => f64::INFINITY,
        };
        (chosen.into_iter().collect(), margin)
    }

    /// One decoding step that feeds `rows.count` tokens, the last of them new.
    pub fn step(&mut self, rows: &Rows, budget: Option<usize>) -> Stepped {
        let attrs = self.attrs.clone();
        let retro = rows.count - 1;
        let t = self.len();
        let first = t - retro;
        self.write(first, t, rows);
        // What only tokens that were taken back again have loaded counts as loaded just before the rows fed now.
        for step in self.page_steps.iter_mut().flatten().filter(|step| **step >= t as i64) {
            *step = first as i64 - 1;
        }
        // The decimal that the attribute was written as, not the float's own value.
        let budget =
            budget.unwrap_or_else(|| budget_pages(attrs.budget_ratio, attrs.budget_min_pages, t + 1, attrs.page_size));
        let chosen: Vec<(Vec<usize>, f64)> = (0..attrs.kv_heads).map(|kv| self.select(rows, kv, budget)).collect();
        let expand = |pages: &mut dyn Iterator<Item = usize>| pages.flat_map(|p| self.page_rows(p)).collect::<Vec<_>>();

        let mut outputs = Vec::new();
        let mut results = Vec::new();
        for token in 0..rows.count {
            let at = first + token;
            let mut output = Vec::new();
            let mut lse = Vec::new();
            for head in 0..attrs.heads {
                let kv = head / self.group();
                let query = self.query(rows, token, head);
                let pages = &chosen[kv].0;
                let (o, l) = if at == t || attrs.mode == Mode::Dense {
                    self.attend(&query, head, at, &expand(&mut pages.iter().copied()), true)
                } else {
                    let missed = |page: &usize| self.page_steps[kv][*page] < at as i64;
                    let missed = expand(&mut pages.iter().copied().filter(missed));
                    let (new, new_lse) = self.attend(&query, head, at, &missed, false);
                    let (old, old_lse) = &self.cache[&at];
                    let old = &old[head * self.head_size..][..self.head_size];
                    let total = log_sum_exp(&[old_lse[head], new_lse]);
                    let (a, b) = ((old_lse[head] - total).exp(), (new_lse - total).exp());
                    (old.iter().zip(&new).map(|(x, y)| a * x + b * y).collect(), total)
                };
                output.extend(o);
                lse.push(l);
            }
            outputs.extend(output.iter().map(|&x| x as f32));
            results.push((at, output, lse));
        }
        for (at, output, lse) in results {
            if at == t || self.cache.contains_key(&at) {
                self.remember(at, output, lse);
            }
        }
        for (steps, (pages, _)) in self.page_steps.iter_mut().zip(&chosen) {
            pages.iter().for_each(|&page| steps[page] = t as i64);
        }
        Stepped {
            output: outputs,
            margin: chosen
                .iter()
                .fold(f64::INFINITY, |least, (_, margin)| least.min(*margin)),
            selected: chosen.into_iter().map(|(pages, _)| pages).collect(),
        }
    }

    /// A, one list a KV head.
    pub fn page_steps(&self) -> Vec<Vec<i32>> {
        let row = |steps: &Vec<i64>| steps.iter().map(|&s| s as i32).collect();
        self.page_steps.iter().map(row).collect()
    }

    /// Log-sum-exps of a position in the output cache.
    pub fn lse(&self, position: usize) -> Vec<f32> {
        self.cache[&position].1.iter().map(|&l| l as f32).collect()
    }

    /// The last positions in the output cache.
    pub fn cached(&self) -> Vec<usize> {
        self.cache.keys().copied().collect()
    }
}
