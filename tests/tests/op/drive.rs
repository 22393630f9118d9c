//! A prompt and decoding steps, fed to a layer alone or to a layer and the oracle.

use retro_tests::{
    attrs::Attrs,
    compare,
    golden::{Case, Rows, Step},
    layer::{Binding, Constants, Feed, Layer, State},
    oracle::oracle,
    random::Random,
    tensor::Dtype,
};

/// A chunk of a prompt that ends at `length`.
pub fn prefill_feed(rows: &Rows, length: usize) -> Feed {
    feed(rows, length, -1, None)
}

pub fn feed(rows: &Rows, length: usize, retro: i32, budget: Option<usize>) -> Feed {
    Feed {
        tokens: rows.count,
        query: rows.query.clone(),
        key: rows.key.clone(),
        value: rows.value.clone(),
        lengths: vec![length],
        retro: vec![retro],
        budget: budget.map(|pages| vec![pages as i32]),
        total: None,
    }
}

pub fn step_feed(step: &Step) -> Feed {
    feed(&step.rows, step.t + 1, step.retro as i32, step.budget)
}

/// Feeds a case's prompt in its chunks; the outputs of all its tokens.
pub fn prefill(layer: &Layer, state: &mut State, case: &Case, binding: Binding) -> Vec<f32> {
    let mut fed = 0;
    let mut outputs = Vec::new();
    for &chunk in case.chunks.iter().filter(|&&chunk| chunk > 0) {
        let rows = case.prompt.slice(fed, fed + chunk);
        fed += chunk;
        outputs.extend(layer.run(state, &prefill_feed(&rows, fed), binding));
    }
    outputs
}

/// Random rows, exact in every dtype.
pub fn rows(random: &mut Random, attrs: &Attrs, count: usize) -> Rows {
    let (heads, kv_heads, size) = (attrs.heads, attrs.kv_heads, attrs.head_size);
    Rows {
        count,
        query: random.exact(count * heads * size),
        key: random.exact(count * kv_heads * size),
        value: random.exact(count * kv_heads * size),
    }
}

/// Drives a layer and the oracle through a prompt in two chunks and `steps` steps of r = min(window - 1, t), and
/// compares outputs, log-sum-exps, pages and page steps.
pub struct Duel {
    pub attrs: Attrs,
    pub dtype: Dtype,
    pub prompt: usize,
    pub steps: usize,
    pub seed: u64,
    pub head_sink: Option<Vec<f32>>,
}

impl Duel {
    pub fn new(attrs: Attrs, prompt: usize, steps: usize) -> Self {
        Self {
            attrs,
            dtype: Dtype::F32,
            prompt,
            steps,
            seed: 7,
            head_sink: None,
        }
    }

    pub fn run(&self, binding: Binding) {
        let attrs = &self.attrs;
        let what = format!(
            "{:?} {:?} window {} mode {} {} {}",
            self.dtype, binding, attrs.window, attrs.mode, attrs.selector, attrs.group_score
        );
        let constants = Constants {
            head_sink: self.head_sink.clone(),
            ..Constants::default()
        };
        let layer = Layer::with(attrs, self.dtype, Default::default(), &constants);
        let mut reference = oracle(attrs, self.head_sink.as_deref()).storing(stored(self.dtype));
        let mut random = Random::new(self.seed);
        let mut state = State::new(attrs, self.dtype, 1, self.prompt + self.steps + 3);
        let tolerance = |expected: &[f32]| match self.dtype {
            Dtype::F32 => 2e-5,
            _ => self.dtype.tolerance() * expected.iter().fold(0.0f32, |m, x| m.max(x.abs())).max(0.5),
        };
        let close =
            |at: &str, got: &[f32], expected: &[f32]| compare::assert_close(at, got, expected, tolerance(expected));
        for (first, last) in [(0, self.prompt / 3), (self.prompt / 3, self.prompt)] {
            if first == last {
                continue; // A prompt of one token has no first third.
            }
            let rows = rows(&mut random, attrs, last - first);
            let got = layer.run(&mut state, &prefill_feed(&rows, last), binding);
            close(
                &format!("{what}: prompt {first}..{last}"),
                &got,
                &reference.prefill(&rows),
            );
        }
        for t in self.prompt..self.prompt + self.steps {
            let retro = (attrs.window - 1).min(t);
            let rows = rows(&mut random, attrs, retro + 1);
            let at = format!("{what}: t = {t}");
            let got = layer.run(&mut state, &feed(&rows, t + 1, retro as i32, None), binding);
            let expected = reference.step(&rows, None);
            assert!(
                expected.margin > 1e-6,
                "{at}: a tie by chance ({}); choose another seed",
                expected.margin
            );
            if attrs.mode != retro_contract::Mode::Dense {
                let steps = state.page_steps(0, attrs.pages(t + 1));
                assert_eq!(selected(&steps, t), expected.selected, "{at}: pages");
                assert_eq!(steps, reference.page_steps(), "{at}: page steps");
                for position in reference.cached() {
                    compare::assert_close(
                        &format!("{at}: lse of {position}"),
                        &state.lse(0, position),
                        &reference.lse(position),
                        5e-5,
                    );
                }
            }
            close(&at, &got, &expected.output);
        }
    }
}

/// How page summaries are rounded when they are stored.
fn stored(dtype: Dtype) -> fn(f64) -> f64 {
    match dtype {
        Dtype::F16 => |x| f64::from(Dtype::F16.round(x as f32)),
        Dtype::Bf16 => |x| f64::from(Dtype::Bf16.round(x as f32)),
        _ => |x| f64::from(x as f32),
    }
}

/// The pages that the step at `t` loaded, from the page steps it left.
pub fn selected(page_steps: &[Vec<i32>], t: usize) -> Vec<Vec<usize>> {
    let of_head = |steps: &Vec<i32>| (0..steps.len()).filter(|&page| steps[page] == t as i32).collect();
    page_steps.iter().map(of_head).collect()
}
