//! One RetroAttention node in a session, its state, and calls with everything around them checked: what a call must not
//! touch stays as it was, bit for bit.

use retro_contract::{Mode, SKETCH_BLOCK, Selector, StateElement, graph::State as Slot, output};

use crate::{
    attrs::Attrs,
    compare::assert_same_bytes,
    host,
    node::{self, Slots},
    tensor::{Dtype, Tens},
};

/// How past and present are bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// One buffer for both.
    InPlace,
    /// The present has buffers of its own.
    Copying,
}

impl Binding {
    pub const BOTH: [Binding; 2] = [Binding::InPlace, Binding::Copying];
}

/// Past and present names of the six state tensors, in slot order.
pub const STATE: [(&str, &str); 6] = [
    ("past_key", "present_key"),
    ("past_value", "present_value"),
    ("past_page_summary", "present_page_summary"),
    ("past_page_steps", "present_page_steps"),
    ("past_outputs", "present_outputs"),
    ("past_lse", "present_lse"),
];
pub const KEY: usize = 0;
pub const VALUE: usize = 1;
pub const SUMMARY: usize = 2;
pub const STEPS: usize = 3;
pub const OUTPUTS: usize = 4;
pub const LSE: usize = 5;

/// The constant inputs of a node, as floats.
#[derive(Clone, Debug, Default)]
pub struct Constants {
    /// Cosines and sines, `[M, rotary_dim / 2]` each.
    pub rotary: Option<(Vec<f32>, Vec<f32>)>,
    pub rotary_half: usize,
    pub head_sink: Option<Vec<f32>>,
}

/// A node in a session.
pub struct Layer {
    pub attrs: Attrs,
    pub dtype: Dtype,
    pub session: host::Opened,
    slots: Slots,
    constants: Vec<(&'static str, Tens)>,
}

/// What one call is given, beside the state. Rows are `[B, S, heads, head_size]`.
#[derive(Clone, Debug, Default)]
pub struct Feed {
    pub tokens: usize,
    pub query: Vec<f32>,
    pub key: Vec<f32>,
    pub value: Vec<f32>,
    /// Valid tokens of each sequence after the call.
    pub lengths: Vec<usize>,
    pub retro: Vec<i32>,
    pub budget: Option<Vec<i32>>,
    /// If not the largest length.
    pub total: Option<i32>,
}

/// The state of a batch, poisoned where nothing is valid.
pub struct State {
    pub tensors: [Tens; 6],
    pub batch: usize,
    pub capacity: usize,
}

impl State {
    pub fn new(attrs: &Attrs, dtype: Dtype, batch: usize, capacity: usize) -> Self {
        let Attrs {
            heads,
            kv_heads,
            head_size,
            ..
        } = *attrs;
        let (pages, ring) = (attrs.pages(capacity), attrs.ring());
        let tensors = [
            Tens::poisoned(dtype, &[batch, kv_heads, capacity, head_size]),
            Tens::poisoned(dtype, &[batch, kv_heads, capacity, head_size]),
            Tens::poisoned(
                attrs.state_dtype(dtype),
                &[&[batch, kv_heads], attrs.layout(dtype, capacity).sizes()].concat(),
            ),
            Tens::poisoned(Dtype::I32, &[batch, kv_heads, pages]),
            Tens::poisoned(Dtype::F32, &[batch, ring, heads, head_size]),
            Tens::poisoned(Dtype::F32, &[batch, ring, heads]),
        ];
        Self {
            tensors,
            batch,
            capacity,
        }
    }

    /// Several states of equal shapes as one batch.
    pub fn stack(states: &[State]) -> State {
        let tensors = std::array::from_fn(|slot| {
            let parts: Vec<&Tens> = states.iter().map(|s| &s.tensors[slot]).collect();
            let mut shape = parts[0].shape().to_vec();
            shape[0] = parts.iter().map(|p| p.shape()[0]).sum();
            let mut whole = Tens::poisoned(parts[0].dtype(), &shape);
            let mut at = 0;
            for part in parts {
                assert_eq!(part.shape()[1..], shape[1..], "states of one batch have equal shapes");
                match part.dtype() {
                    Dtype::I32 => whole.ints_mut()[at..at + part.len()].copy_from_slice(part.ints_ref()),
                    Dtype::U8 => whole.bytes_mut()[at..at + part.len()].copy_from_slice(part.bytes()),
                    _ => whole.write(at, &part.read()),
                }
                at += part.len();
            }
            whole
        });
        State {
            tensors,
            batch: states.iter().map(|s| s.batch).sum(),
            capacity: states[0].capacity,
        }
    }

    pub fn duplicate(&self) -> State {
        let tensors = std::array::from_fn(|slot| {
            let mut copy = Tens::poisoned(self.tensors[slot].dtype(), self.tensors[slot].shape());
            copy.copy_from(&self.tensors[slot]);
            copy
        });
        State { tensors, ..*self }
    }

    pub fn bytes(&self) -> Vec<Vec<u8>> {
        self.tensors.iter().map(|t| t.bytes().to_vec()).collect()
    }

    /// Page steps of a sequence's valid pages, `[kv_heads][pages]`.
    pub fn page_steps(&self, sequence: usize, pages: usize) -> Vec<Vec<i32>> {
        let &[_, kv_heads, all] = self.tensors[STEPS].shape() else {
            unreachable!()
        };
        let steps = self.tensors[STEPS].ints_ref();
        let row = |head| &steps[(sequence * kv_heads + head) * all..][..pages];
        (0..kv_heads).map(|head| row(head).to_vec()).collect()
    }

    /// Log-sum-exps of a position, one a query head.
    pub fn lse(&self, sequence: usize, position: usize) -> Vec<f32> {
        let &[_, ring, heads] = self.tensors[LSE].shape() else {
            unreachable!()
        };
        self.tensors[LSE].read()[(sequence * ring + position % ring) * heads..][..heads].to_vec()
    }

    /// Rows of keys (or values) 0..len of a sequence, `[kv_heads, len, head_size]`.
    pub fn rows(&self, slot: usize, sequence: usize, len: usize) -> Vec<f32> {
        let &[_, kv_heads, capacity, size] = self.tensors[slot].shape() else {
            unreachable!()
        };
        let all = self.tensors[slot].read();
        let head = |h: usize| all[(sequence * kv_heads + h) * capacity * size..][..len * size].to_vec();
        (0..kv_heads).flat_map(head).collect()
    }

    /// One of a page summary's two vectors for the valid pages, `[kv_heads, pages, head_size]`.
    pub fn summary(&self, sequence: usize, which: usize, pages: usize) -> Vec<f32> {
        let &[_, kv_heads, all, 2, size] = self.tensors[SUMMARY].shape() else {
            unreachable!()
        };
        let data = self.tensors[SUMMARY].read();
        let page = |h: usize, p: usize| &data[(((sequence * kv_heads + h) * all + p) * 2 + which) * size..][..size];
        (0..kv_heads)
            .flat_map(|h| (0..pages).flat_map(move |p| page(h, p).to_vec()))
            .collect()
    }
}

impl Layer {
    pub fn new(attrs: &Attrs, dtype: Dtype) -> Self {
        Self::with(
            attrs,
            dtype,
            Slots {
                page_budget: true,
                ..Slots::default()
            },
            &Constants::default(),
        )
    }

    pub fn with(attrs: &Attrs, dtype: Dtype, slots: Slots, constants: &Constants) -> Self {
        let mut tensors = Vec::new();
        if let Some((cos, sin)) = &constants.rotary {
            let shape = [cos.len() / constants.rotary_half, constants.rotary_half];
            tensors.push(("cos_cache", Tens::floats(dtype, &shape, cos)));
            tensors.push(("sin_cache", Tens::floats(dtype, &shape, sin)));
        }
        if let Some(sink) = &constants.head_sink {
            tensors.push(("head_sink", Tens::floats(dtype, &[attrs.heads], sink)));
        }
        let slots = Slots {
            rotary: constants.rotary.is_some(),
            head_sink: constants.head_sink.is_some(),
            ..slots
        };
        let session = host::open(&node::retro_with_state(
            node::attributes(attrs),
            slots,
            dtype,
            attrs.state_dtype(dtype),
        ))
        .expect("a session with the plugin");
        Self {
            attrs: attrs.clone(),
            dtype,
            session,
            slots,
            constants: tensors,
        }
    }

    /// The inputs of a call that are not state.
    pub fn inputs(&self, feed: &Feed) -> Vec<(&'static str, Tens)> {
        let Attrs {
            heads,
            kv_heads,
            head_size,
            ..
        } = self.attrs;
        let (batch, tokens) = (feed.lengths.len(), feed.tokens);
        let lengths: Vec<i32> = feed.lengths.iter().map(|&n| n as i32 - 1).collect();
        let total = feed.total.unwrap_or(lengths.iter().max().unwrap() + 1);
        let mut inputs = vec![
            ("seqlens_k", Tens::ints(&[batch], &lengths)),
            ("total_sequence_length", Tens::ints(&[1], &[total])),
            ("retro_length", Tens::ints(&[feed.retro.len()], &feed.retro)),
        ];
        if self.slots.packed {
            let rows = feed.query.chunks(heads * head_size);
            let keys = feed
                .key
                .chunks(kv_heads * head_size)
                .zip(feed.value.chunks(kv_heads * head_size));
            let packed: Vec<f32> = rows.zip(keys).flat_map(|(q, (k, v))| [q, k, v].concat()).collect();
            let shape = [batch, tokens, (heads + 2 * kv_heads) * head_size];
            inputs.push(("query", Tens::floats(self.dtype, &shape, &packed)));
        } else {
            let kv_shape = [batch, tokens, kv_heads * head_size];
            let query = Tens::floats(self.dtype, &[batch, tokens, heads * head_size], &feed.query);
            inputs.push(("query", query));
            inputs.push(("key", Tens::floats(self.dtype, &kv_shape, &feed.key)));
            inputs.push(("value", Tens::floats(self.dtype, &kv_shape, &feed.value)));
        }
        if self.slots.page_budget {
            let budget = feed.budget.clone().unwrap_or(vec![0; batch]);
            inputs.push(("page_budget", Tens::ints(&[budget.len()], &budget)));
        }
        inputs
    }

    /// The inputs of every call: rotary caches and head sinks.
    pub fn constants(&self) -> impl Iterator<Item = (&str, &Tens)> {
        self.constants.iter().map(|(name, tensor)| (*name, tensor))
    }

    /// A poisoned tensor for the first output.
    pub fn output(&self, feed: &Feed) -> Tens {
        let width = self.attrs.heads * self.attrs.head_size;
        Tens::poisoned(self.dtype, &[feed.lengths.len(), feed.tokens, width])
    }

    /// Runs with the state in place, nothing checked.
    pub fn call_in_place(&self, inputs: &[(&str, &Tens)], result: &mut Tens, state: &mut State) -> Result<(), String> {
        let inputs: Vec<_> = inputs.iter().copied().chain(self.constants()).collect();
        let mut in_place: Vec<_> = STATE
            .iter()
            .zip(&mut state.tensors)
            .map(|(&(past, present), t)| (past, present, t))
            .collect();
        host::run(&self.session, &inputs, &mut [(output::NAMES[0], result)], &mut in_place)
    }

    /// Runs from one state into another, nothing checked.
    pub fn call_copying(
        &self,
        inputs: &[(&str, &Tens)],
        result: &mut Tens,
        past: &State,
        present: &mut State,
    ) -> Result<(), String> {
        let pasts = STATE.iter().zip(&past.tensors).map(|(names, t)| (names.0, t));
        let inputs: Vec<_> = inputs.iter().copied().chain(self.constants()).chain(pasts).collect();
        let mut outputs = vec![(output::NAMES[0], result)];
        outputs.extend(STATE.iter().zip(&mut present.tensors).map(|(names, t)| (names.1, t)));
        host::run(&self.session, &inputs, &mut outputs, &mut [])
    }

    /// Runs and checks what a call must leave alone. Returns the output `[B, S, heads, head_size]`.
    pub fn run(&self, state: &mut State, feed: &Feed, binding: Binding) -> Vec<f32> {
        let owned = self.inputs(feed);
        let inputs: Vec<(&str, &Tens)> = owned.iter().map(|(name, t)| (*name, t)).collect();
        let mut result = self.output(feed);
        let before = state.duplicate();
        match binding {
            Binding::InPlace => self
                .call_in_place(&inputs, &mut result, state)
                .expect("the call succeeds"),
            Binding::Copying => {
                let mut present = State::new(&self.attrs, self.dtype, state.batch, state.capacity);
                self.call_copying(&inputs, &mut result, state, &mut present)
                    .expect("the call succeeds");
                for (slot, (name, _)) in STATE.iter().enumerate() {
                    assert_same_bytes(
                        &format!("{name} of a copying call"),
                        state.tensors[slot].bytes(),
                        before.tensors[slot].bytes(),
                    );
                }
                *state = present;
            }
        }
        self.check_untouched(&before, state, feed, binding);
        self.check_written(state, feed);
        let output = result.read();
        assert!(
            output.iter().all(|x| x.is_finite()),
            "the output holds a NaN or an infinity"
        );
        output
    }

    /// Rows, pages and ring slots that the call had no business with: equal to what they were. Of what is not valid a
    /// copying call need copy nothing.
    fn check_untouched(&self, before: &State, after: &State, feed: &Feed, binding: Binding) {
        for (sequence, &len) in feed.lengths.iter().enumerate() {
            let fed = feed.fed(sequence);
            let first = len - fed;
            let pages = self.attrs.pages(len);
            let first_page = first / self.attrs.page;
            let same = |slot: usize, item: usize, what: &str| {
                let (a, b) = (&before.tensors[slot], &after.tensors[slot]);
                assert_rows_equal(a, b, sequence, item, what);
            };
            for row in 0..after.capacity {
                if row < first || (row >= len && binding == Binding::InPlace) {
                    same(KEY, row, "key row");
                    same(VALUE, row, "value row");
                }
            }
            // Of the selector's state, pages or blocks of rows.
            let (first_item, items) = match self.attrs.selector.state_element() {
                StateElement::Cache => (first_page, pages),
                StateElement::Byte => (first / SKETCH_BLOCK, len.div_ceil(SKETCH_BLOCK)),
            };
            for item in 0..after.tensors[SUMMARY].shape()[2] {
                if item < first_item || (item >= items && binding == Binding::InPlace) {
                    same(SUMMARY, item, "selector state");
                }
            }
            for page in 0..self.attrs.pages(after.capacity) {
                if page >= pages && binding == Binding::InPlace {
                    same(STEPS, page, "page step");
                }
            }
            if self.attrs.window > 1 && binding == Binding::InPlace {
                for slot in (0..self.attrs.ring()).filter(|slot| (first..len).all(|at| at % self.attrs.ring() != *slot))
                {
                    same(OUTPUTS, slot, "output cache slot");
                    same(LSE, slot, "log-sum-exp slot");
                }
            }
        }
    }
}

/// What a later call reads of the state, and so must hold no poison.
impl Layer {
    fn check_written(&self, state: &State, feed: &Feed) {
        let Attrs {
            heads,
            kv_heads,
            head_size,
            window,
            ..
        } = self.attrs;
        let (pages, ring) = (self.attrs.pages(state.capacity), self.attrs.ring());
        let whole = |slot: usize, start: usize, width: usize| {
            let poisoned = (start..start + width).find(|&at| state.tensors[slot].is_poison(at));
            if let Some(at) = poisoned {
                panic!("{}: element {at} was not written", STATE[slot].1);
            }
        };
        for (sequence, &len) in feed.lengths.iter().enumerate() {
            for head in (0..kv_heads).map(|head| sequence * kv_heads + head) {
                for slot in [KEY, VALUE] {
                    whole(slot, head * state.capacity * head_size, len * head_size);
                }
                if self.attrs.mode == Mode::Retro {
                    match self.attrs.selector.state_element() {
                        StateElement::Cache => {
                            let valid = self.attrs.pages(len) * 2 * head_size;
                            whole(SUMMARY, head * pages * 2 * head_size, valid);
                        }
                        StateElement::Byte => check_rows(&self.attrs, &state.tensors[SUMMARY], head, len),
                    }
                    whole(STEPS, head * pages, self.attrs.pages(len));
                }
            }
            if self.attrs.mode != Mode::Dense && window > 1 {
                // Of a prompt whose tokens were fed one by one: as far as the ring reaches.
                let fed = feed.fed(sequence).min(window - 1);
                for position in len - fed..len {
                    let row = sequence * ring + position % ring;
                    whole(OUTPUTS, row * heads * head_size, heads * head_size);
                    whole(LSE, row * heads, heads);
                }
            }
        }
    }
}

impl Feed {
    /// Tokens of a sequence that are not ignored leading rows.
    pub fn fed(&self, sequence: usize) -> usize {
        match self.retro[if self.retro.len() == 1 { 0 } else { sequence }] {
            -1 => self.tokens,
            retro => {
                if retro == 0 && self.retro.len() == 1 {
                    self.tokens
                } else {
                    retro as usize + 1
                }
            }
        }
    }
}

/// Every valid row has a factor that is a number, or a mark that says that its elements are.
fn check_rows(attrs: &Attrs, state: &Tens, head: usize, len: usize) {
    let &[_, _, blocks, size] = state.shape() else {
        unreachable!()
    };
    let codes = SKETCH_BLOCK * attrs.head_size * attrs.sketch_bits / 8;
    let marks = size - SKETCH_BLOCK / 8;
    for row in 0..len {
        if attrs.selector != Selector::Sketch {
            let at = (head * blocks + row / SKETCH_BLOCK) * size + marks + row % SKETCH_BLOCK / 8;
            let mark = state.bytes()[at] >> (row % 8) & 1;
            assert_eq!(mark, 0, "the codes of row {row} were not written");
            continue;
        }
        let at = (head * blocks + row / SKETCH_BLOCK) * size + codes + 2 * (row % SKETCH_BLOCK);
        let factor = &state.bytes()[at..at + 2];
        assert_ne!(factor, [u8::MAX; 2], "the factor of row {row} was not written");
    }
}

/// Item `item` of axis 2 (or of axis 1 for the ring), for every head.
fn assert_rows_equal(before: &Tens, after: &Tens, sequence: usize, item: usize, what: &str) {
    let shape = before.shape();
    let ring = what.contains("slot");
    let (outer, axis) = if ring { (1, 1) } else { (shape[1], 2) };
    let inner = shape[axis + 1..].iter().product::<usize>() * before.dtype().bytes();
    for head in 0..outer {
        let at = ((sequence * outer + head) * shape[axis] + item) * inner;
        let after = &after.bytes()[at..at + inner];
        // On CUDA, value rows that ONNX Runtime's own operator multiplies by weights of 0 are cleared before it runs.
        let cleared = what.contains("value") && host::on_gpu() && after.iter().all(|&byte| byte == 0);
        let same = cleared || before.bytes()[at..at + inner] == *after;
        assert!(
            same,
            "{what} {item} of sequence {sequence}, head {head} changed, and must not"
        );
    }
}

/// The state of the contract and the state of this harness have one order.
pub fn check_state_order() {
    for (names, slot) in STATE[2..].iter().zip(Slot::ALL) {
        assert_eq!(names.0, format!("past_{}", slot.as_str()));
    }
}
