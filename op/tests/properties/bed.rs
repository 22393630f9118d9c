//! A layer on plain buffers: the caches and state of a batch, and calls checked as the operator checks them.

use retro_attention::contract::{Attributes, CallLengths, CallPlan, Dims, InputShapes, Phase};
use retro_attention::cpu::{CpuCall, Dense, Inputs, LayerState, Pool, ScratchPool, Shared, run};
use retro_attention::for_selector;
use retro_attention::method::element::Element;
use retro_attention::method::oracle::Rows;
use retro_attention::method::rope::{Angles, rotate};
use retro_attention::ort::Plain;
use retro_attention::selector::{StateElement, StateLayout};
use retro_contract::{CacheSize, SKETCH_BLOCK, input, pages_for};

/// What stands in page steps that nobody has written.
const POISON_STEP: i32 = 0x5a5a_5a5a;

/// Runs tasks one after another but splits work as for so many threads.
struct InTurn(usize);

impl Pool for InTurn {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> retro_attention::ort::Result<()> {
        (0..count).for_each(task);
        Ok(())
    }

    fn width(&self) -> usize {
        self.0
    }
}

/// Numbers that look random: SplitMix64, which needs no state but a counter.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `n` values in -1.5..1.5 that `E` holds exactly.
    pub fn values<E: Element>(&mut self, n: usize) -> Vec<f32> {
        let value = |bits: u64| ((bits >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 3.0;
        (0..n).map(|_| E::from_f32(value(self.next())).to_f32()).collect()
    }

    /// Rows before RoPE.
    pub fn rows<E: Element>(&mut self, a: &Attributes, head_size: usize, count: usize) -> Rows {
        Rows {
            count,
            query: self.values::<E>(count * a.heads * head_size),
            key: self.values::<E>(count * a.kv_heads * head_size),
            value: self.values::<E>(count * a.kv_heads * head_size),
        }
    }
}

/// How a layer is fed.
#[derive(Clone, Debug)]
pub struct Shape {
    pub attributes: Attributes,
    pub head_size: usize,
    pub packed: bool,
    /// Rotated pairs a head, where the attributes ask for rotation.
    pub rotary_half: usize,
    pub has_sink: bool,
}

/// One call: for each sequence its rows before RoPE, and its valid tokens afterwards.
pub struct Feed<'a> {
    pub rows: &'a [Rows],
    pub lens: &'a [usize],
    /// Prefill, or a step in which each sequence feeds `rows.count - 1` tokens again.
    pub phase: Phase,
    /// One number, or one a sequence.
    pub budget: Option<&'a [i32]>,
}

/// A batch's caches and state. All of it is poison until a call writes it.
pub struct Bed<E> {
    pub shape: Shape,
    pub batch: usize,
    pub capacity: usize,
    pub pages: usize,
    pub key: Vec<E>,
    pub value: Vec<E>,
    /// The selector's, in its own type.
    pub selector_state: Words,
    pub steps: Vec<i32>,
    pub outputs: Vec<f32>,
    pub lse: Vec<f32>,
    cos: Vec<E>,
    sin: Vec<E>,
    pub sink: Vec<E>,
    /// Threads that work is split for.
    pub threads: usize,
    scratch: ScratchPool,
}

/// Memory for elements of any type; poison has every bit set, which is a NaN of every type.
pub struct Words {
    words: Vec<u64>,
    bytes: usize,
}

impl Words {
    fn poison(bytes: usize) -> Self {
        Self {
            words: vec![u64::MAX; bytes.div_ceil(8)],
            bytes,
        }
    }

    pub fn elements<T: Plain>(&mut self) -> &mut [T] {
        assert!(align_of::<T>() <= align_of::<u64>());
        // SAFETY: the words have as many bytes, aligned for T, which is a plain number of any bits.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), self.bytes / size_of::<T>()) }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the words have as many bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.bytes) }
    }
}

/// How a layer's selector lays its state out.
pub fn layout<E>(shape: &Shape, capacity: usize) -> StateLayout {
    let a = &shape.attributes;
    a.selector.layout(&CacheSize {
        capacity,
        pages: pages_for(capacity, a.page_size),
        page_size: a.page_size,
        head_size: shape.head_size,
        sketch_bits: a.sketch_bits,
        cache_element: size_of::<E>(),
    })
}

/// Bits of each value, so that poison (NaN) compares too.
pub fn bits<E: Element>(values: &[E]) -> Vec<u32> {
    values.iter().map(|v| v.to_f32().to_bits()).collect()
}

fn narrow<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|&v| E::from_f32(v)).collect()
}

impl<E: Element> Bed<E> {
    pub fn new(shape: &Shape, batch: usize, capacity: usize) -> Self {
        let (a, d) = (&shape.attributes, shape.head_size);
        let pages = pages_for(capacity, a.page_size);
        let poison = |n: usize| vec![E::from_f32(f32::NAN); n];
        let angle = |i: usize| {
            let (position, pair) = (i / shape.rotary_half, i % shape.rotary_half);
            position as f32 * 0.3f32.powi(pair as i32)
        };
        let table = |f: fn(f32) -> f32| -> Vec<f32> {
            let rows = if a.do_rotary { capacity * shape.rotary_half } else { 0 };
            (0..rows).map(|i| f(angle(i))).collect()
        };
        Self {
            shape: shape.clone(),
            batch,
            capacity,
            pages,
            key: poison(batch * a.kv_heads * capacity * d),
            value: poison(batch * a.kv_heads * capacity * d),
            selector_state: Words::poison(batch * a.kv_heads * layout::<E>(shape, capacity).bytes(size_of::<E>())),
            steps: vec![POISON_STEP; batch * a.kv_heads * pages],
            outputs: vec![f32::NAN; batch * a.ring() * a.heads * d],
            lse: vec![f32::NAN; batch * a.ring() * a.heads],
            cos: narrow(&table(f32::cos)),
            sin: narrow(&table(f32::sin)),
            sink: if shape.has_sink {
                (0..a.heads).map(|h| E::from_f32(h as f32 * 0.75 - 1.0)).collect()
            } else {
                Vec::new()
            },
            threads: 1,
            scratch: ScratchPool::default(),
        }
    }

    /// The sinks as the oracle takes them.
    pub fn sinks(&self) -> Option<Vec<f32>> {
        (!self.sink.is_empty()).then(|| self.sink.iter().map(|s| s.to_f32()).collect())
    }

    /// Runs a call; the outputs of each sequence's own rows. The rows in front of them must come out as 0.
    pub fn run(&mut self, feed: &Feed<'_>) -> Result<Vec<Vec<f32>>, String> {
        let (a, d) = (&self.shape.attributes, self.shape.head_size);
        let (heads, kv_heads, ring) = (a.heads, a.kv_heads, a.ring());
        let tokens = feed.rows.iter().map(|r| r.count).max().unwrap_or(0);
        // Rows that do not count are poison too.
        let row = |rows: &Rows, data: &[f32], width: usize, s: usize| -> Vec<f32> {
            match s.checked_sub(tokens - rows.count) {
                Some(i) => data[i * width..][..width].to_vec(),
                None => vec![f32::NAN; width],
            }
        };
        let (mut query, mut key, mut value) = (Vec::new(), Vec::new(), Vec::new());
        for rows in feed.rows {
            for s in 0..tokens {
                let of = |data: &[f32], heads: usize| row(rows, data, heads * d, s);
                let (q, k, v) = (
                    of(&rows.query, heads),
                    of(&rows.key, kv_heads),
                    of(&rows.value, kv_heads),
                );
                query.extend(q);
                if self.shape.packed {
                    query.extend(k);
                    query.extend(v);
                } else {
                    key.extend(k);
                    value.extend(v);
                }
            }
        }
        let (query, key, value) = (narrow::<E>(&query), narrow::<E>(&key), narrow::<E>(&value));

        let mut shapes: InputShapes = Default::default();
        let mut set = |slot: usize, sizes: &[usize]| shapes[slot] = Some(sizes.iter().map(|&n| n as i64).collect());
        let b = self.batch;
        if self.shape.packed {
            set(input::QUERY, &[b, tokens, (heads + 2 * kv_heads) * d]);
        } else {
            set(input::QUERY, &[b, tokens, heads * d]);
            set(input::KEY, &[b, tokens, kv_heads * d]);
            set(input::VALUE, &[b, tokens, kv_heads * d]);
        }
        set(input::PAST_KEY, &[b, kv_heads, self.capacity, d]);
        set(input::PAST_VALUE, &[b, kv_heads, self.capacity, d]);
        set(input::SEQLENS_K, &[b]);
        set(input::TOTAL_SEQUENCE_LENGTH, &[]);
        if a.do_rotary {
            set(input::COS_CACHE, &[self.capacity, self.shape.rotary_half]);
            set(input::SIN_CACHE, &[self.capacity, self.shape.rotary_half]);
        }
        set(input::RETRO_LENGTH, &[b]);
        let layout = layout::<E>(&self.shape, self.capacity);
        set(input::PAST_PAGE_SUMMARY, &[&[b, kv_heads], layout.sizes()].concat());
        set(input::PAST_PAGE_STEPS, &[b, kv_heads, self.pages]);
        set(input::PAST_OUTPUTS, &[b, ring, heads, d]);
        set(input::PAST_LSE, &[b, ring, heads]);
        if let Some(budget) = feed.budget {
            set(input::PAGE_BUDGET, &[budget.len()]);
        }
        if self.shape.has_sink {
            set(input::HEAD_SINK, &[heads]);
        }
        let said = |e: retro_attention::ort::Error| e.message().to_owned();
        let dims = Dims::read(a, &shapes, size_of::<E>()).map_err(said)?;
        let last: Vec<i32> = feed.lens.iter().map(|&n| n as i32 - 1).collect();
        let retro: Vec<i32> = match feed.phase {
            Phase::Prefill => vec![-1; b],
            Phase::Decode => feed.rows.iter().map(|r| r.count as i32 - 1).collect(),
        };
        let lengths = CallLengths {
            seqlens_k: &last,
            total_sequence_length: self.capacity as i32,
            retro_length: &retro,
            page_budget: feed.budget,
            retro_count: None,
        };
        let plan = CallPlan::read(a, &dims, &lengths).map_err(said)?;
        assert_eq!(plan.phase, feed.phase);

        let mut output = vec![E::from_f32(f32::NAN); b * tokens * heads * d];
        for_selector!(a.selector, P => {
        let call = CpuCall::<E, P> {
            attributes: a,
            dims: &dims,
            plan: &plan,
            inputs: Inputs {
                query: &query,
                key: &key,
                value: &value,
                cos: &self.cos,
                sin: &self.sin,
                head_sink: &self.sink,
            },
            output: Shared::new(&mut output),
            state: LayerState {
                key: Shared::new(&mut self.key),
                value: Shared::new(&mut self.value),
                pages: Shared::new(self.selector_state.elements()),
                steps: Shared::new(&mut self.steps),
                outputs: Shared::new(&mut self.outputs),
                lse: Shared::new(&mut self.lse),
            },
            scratch: &self.scratch,
        };
        run(&call, &InTurn(self.threads), Dense::Own).map_err(said)?;
        });
        let mut outputs = Vec::new();
        for (rows, output) in feed.rows.iter().zip(output.chunks_exact(tokens * heads * d)) {
            let (ignored, own) = output.split_at((tokens - rows.count) * heads * d);
            if ignored.iter().any(|v| v.to_f32() != 0.0) {
                return Err("an ignored row has an output".to_owned());
            }
            outputs.push(own.iter().map(|v| v.to_f32()).collect());
        }
        Ok(outputs)
    }

    /// Rows as the cache and the scores see them: rotated for positions that end before `len`, keys rounded to `E`.
    pub fn rotated(&self, rows: &Rows, len: usize) -> Rows {
        let (a, d, half) = (&self.shape.attributes, self.shape.head_size, self.shape.rotary_half);
        let mut out = rows.clone();
        if !a.do_rotary {
            return out;
        }
        for i in 0..rows.count {
            let position = len - rows.count + i;
            let table = |t: &[E]| -> Vec<f32> { t[position * half..][..half].iter().map(|v| v.to_f32()).collect() };
            let (cos, sin) = (table(&self.cos), table(&self.sin));
            let angles = Angles {
                cos: &cos,
                sin: &sin,
                interleaved: a.rotary_interleaved,
            };
            for (data, heads) in [(&mut out.query, a.heads), (&mut out.key, a.kv_heads)] {
                let row = &mut data[i * heads * d..][..heads * d];
                row.chunks_exact_mut(d).for_each(|head| rotate(head, angles));
            }
        }
        out.key.iter_mut().for_each(|k| *k = E::from_f32(*k).to_f32());
        out
    }

    /// A of one sequence: a list a KV head, of the pages that hold valid tokens.
    pub fn page_steps(&self, b: usize, len: usize) -> Vec<Vec<i32>> {
        let kv_heads = self.shape.attributes.kv_heads;
        let valid = pages_for(len, self.shape.attributes.page_size);
        let of = |h: usize| self.steps[(b * kv_heads + h) * self.pages..][..valid].to_vec();
        (0..kv_heads).map(of).collect()
    }

    /// Output cache of a position: outputs `[Hq, D]` and log-sum-exps `[Hq]`.
    pub fn cached(&self, b: usize, position: usize) -> (&[f32], &[f32]) {
        let (a, d) = (&self.shape.attributes, self.shape.head_size);
        let slot = b * a.ring() + position % a.ring();
        (
            &self.outputs[slot * a.heads * d..][..a.heads * d],
            &self.lse[slot * a.heads..][..a.heads],
        )
    }

    /// The selector's state of one sequence.
    pub fn state_bytes(&self, b: usize) -> &[u8] {
        let bytes = self.selector_state.bytes();
        let n = bytes.len() / self.batch;
        &bytes[b * n..][..n]
    }

    /// Everything of one sequence, as bits.
    pub fn sequence_bits(&self, b: usize) -> Vec<Vec<u32>> {
        fn part<T: Element>(data: &[T], b: usize, batch: usize) -> Vec<u32> {
            let n = data.len() / batch;
            bits(&data[b * n..][..n])
        }
        let steps = self.steps.len() / self.batch;
        vec![
            part(&self.key, b, self.batch),
            part(&self.value, b, self.batch),
            self.state_bytes(b).iter().map(|&byte| u32::from(byte)).collect(),
            self.steps[b * steps..][..steps].iter().map(|&s| s as u32).collect(),
            part(&self.outputs, b, self.batch),
            part(&self.lse, b, self.batch),
        ]
    }

    /// What no token has reached is as it was: rows of keys and values after `len`, summaries and steps of later pages.
    pub fn untouched_after(&self, b: usize, len: usize) -> Result<(), String> {
        let (a, d) = (&self.shape.attributes, self.shape.head_size);
        let first = pages_for(len, a.page_size);
        for h in b * a.kv_heads..(b + 1) * a.kv_heads {
            let rows = |data: &[E]| {
                data[(h * self.capacity + len) * d..(h + 1) * self.capacity * d]
                    .iter()
                    .any(|v| !v.to_f32().is_nan())
            };
            let layout = layout::<E>(&self.shape, self.capacity);
            let (items, state) = (layout.sizes()[0], layout.bytes(size_of::<E>()));
            // Pages, or blocks of rows.
            let first_item = match layout.element {
                StateElement::Cache => first,
                StateElement::Byte => len.div_ceil(SKETCH_BLOCK),
            };
            let behind = &self.selector_state.bytes()[h * state..][..state][first_item * state / items..];
            let steps = &self.steps[h * self.pages + first..(h + 1) * self.pages];
            // A prefill may say "never loaded" of pages that nobody has reached; it may say nothing else.
            let stamped = steps.iter().any(|&s| s != POISON_STEP && s != -1);
            if rows(&self.key) || rows(&self.value) || behind.iter().any(|&byte| byte != u8::MAX) || stamped {
                return Err(format!("sequence {b} wrote behind its {len} tokens"));
            }
        }
        Ok(())
    }
}
