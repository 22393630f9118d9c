//! A decoding step allocates nothing once its sizes have been seen: the checks of its inputs and the step itself, for every
//! selector.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use retro_attention::contract::{AttributeSource, Attributes, CallLengths, CallPlan, Dims, InputShapes};
use retro_attention::cpu::{CpuCall, Dense, Inputs, LayerState, ScratchPool, Serial, Shared, run};
use retro_attention::for_selector;
use retro_attention::ort::{Plain, Result};
use retro_attention::selector::{CacheSize, Selector};
use retro_contract::input;
use smallvec::smallvec;

/// The system's allocator, which counts what the calling thread asks for.
struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    COUNT.set(COUNT.get() + 1);
}

// SAFETY: everything is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: passed on.
        unsafe { System.realloc(place, layout, size) }
    }
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const D: usize = 32;
const CAPACITY: usize = 512;
const PAGE: usize = 16;
const PAGES: usize = CAPACITY / PAGE;
const RING: usize = 1;

struct Node(&'static str);

impl AttributeSource for Node {
    fn int(&self, name: &str) -> Result<Option<i64>> {
        Ok(match name {
            "num_heads" => Some(HEADS as i64),
            "kv_num_heads" => Some(KV_HEADS as i64),
            _ => None,
        })
    }
    fn float(&self, _: &str) -> Result<Option<f32>> {
        Ok(None)
    }
    fn string(&self, name: &str) -> Result<Option<String>> {
        Ok((name == "selector").then(|| self.0.to_owned()))
    }
}

/// The state of one sequence, and one call of it.
struct Layer {
    attributes: Attributes,
    key: Vec<f32>,
    value: Vec<f32>,
    pages: Vec<u64>,
    steps: Vec<i32>,
    outputs: Vec<f32>,
    lse: Vec<f32>,
    scratch: ScratchPool,
}

impl Layer {
    fn call(&mut self, rows: &[f32], output: &mut [f32], tokens: usize, len: usize, retro: i32) {
        let sizes = |n: &[usize]| Some(n.iter().map(|&n| n as i64).collect());
        let mut shapes: InputShapes = Default::default();
        shapes[input::QUERY] = sizes(&[1, tokens, (HEADS + 2 * KV_HEADS) * D]);
        shapes[input::PAST_KEY] = sizes(&[1, KV_HEADS, CAPACITY, D]);
        shapes[input::PAST_VALUE] = sizes(&[1, KV_HEADS, CAPACITY, D]);
        shapes[input::SEQLENS_K] = sizes(&[1]);
        shapes[input::TOTAL_SEQUENCE_LENGTH] = Some(smallvec![]);
        shapes[input::RETRO_LENGTH] = sizes(&[1]);
        let layout = self.attributes.selector.layout(&cache_size());
        shapes[input::PAST_PAGE_SUMMARY] =
            Some([1, KV_HEADS].iter().chain(layout.sizes()).map(|&n| n as i64).collect());
        shapes[input::PAST_PAGE_STEPS] = sizes(&[1, KV_HEADS, PAGES]);
        shapes[input::PAST_OUTPUTS] = sizes(&[1, RING, HEADS, D]);
        shapes[input::PAST_LSE] = sizes(&[1, RING, HEADS]);
        let dims = Dims::read(&self.attributes, &shapes, 4).unwrap();
        let lengths = CallLengths {
            seqlens_k: &[len as i32 - 1],
            total_sequence_length: len as i32,
            retro_length: &[retro],
            page_budget: None,
            retro_count: None,
        };
        let plan = CallPlan::read(&self.attributes, &dims, &lengths).unwrap();
        let inputs = Inputs {
            query: rows,
            key: &[],
            value: &[],
            cos: &[],
            sin: &[],
            head_sink: &[],
        };
        let state = KV_HEADS * layout.len();
        for_selector!(self.attributes.selector, P => {
            let call = CpuCall::<f32, P> {
                attributes: &self.attributes,
                dims: &dims,
                plan: &plan,
                inputs,
                output: Shared::new(output),
                state: LayerState {
                    key: Shared::new(&mut self.key),
                    value: Shared::new(&mut self.value),
                    pages: Shared::new(elements(&mut self.pages, state)),
                    steps: Shared::new(&mut self.steps),
                    outputs: Shared::new(&mut self.outputs),
                    lse: Shared::new(&mut self.lse),
                },
                scratch: &self.scratch,
            };
            run(&call, &Serial, Dense::Own).unwrap();
        });
    }
}

/// Words of memory as `len` elements of a selector's state.
fn elements<T: Plain>(words: &mut [u64], len: usize) -> &mut [T] {
    assert!(len * size_of::<T>() <= size_of_val(words) && align_of::<T>() <= align_of::<u64>());
    // SAFETY: the words have as many bytes, aligned for T, which is a plain number of any bits.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), len) }
}

fn cache_size() -> CacheSize {
    CacheSize {
        capacity: CAPACITY,
        pages: PAGES,
        page_size: PAGE,
        head_size: D,
        sketch_bits: 2,
        cache_element: 4,
    }
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count)
        .map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.0 - 1.0)
        .collect()
}

#[test]
fn a_step_allocates_nothing() {
    let width = (HEADS + 2 * KV_HEADS) * D;
    for selector in Selector::VALUES {
        let mut layer = Layer {
            attributes: Attributes::read(&Node(selector)).unwrap(),
            key: vec![0.0; KV_HEADS * CAPACITY * D],
            value: vec![0.0; KV_HEADS * CAPACITY * D],
            pages: vec![0; KV_HEADS * selector.parse::<Selector>().unwrap().layout(&cache_size()).bytes(4) / 8],
            steps: vec![-1; KV_HEADS * PAGES],
            outputs: vec![0.0; RING * HEADS * D],
            lse: vec![0.0; RING * HEADS],
            scratch: ScratchPool::default(),
        };
        let prompt = 304;
        let rows = numbers(prompt * width);
        let mut output = vec![0.0; prompt * HEADS * D];
        layer.call(&rows, &mut output, prompt, prompt, -1);
        // The first steps see the sizes; all of them end in one page, which is one page more than before.
        for step in 1..=8 {
            let tokens = if step == 1 { 1 } else { 2 };
            COUNT.set(0);
            let (rows, output) = (&rows[..tokens * width], &mut output[..tokens * HEADS * D]);
            layer.call(rows, output, tokens, prompt + step, tokens as i32 - 1);
            assert!(output.iter().all(|x| x.is_finite()));
            assert!(
                step <= 2 || COUNT.get() == 0,
                "{selector}: step {step} allocates {} times",
                COUNT.get()
            );
        }
    }
}
