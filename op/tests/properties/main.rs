//! The invariants of docs/method.md, on plain buffers: random attributes, chunks, budgets, windows, batches.
//!
//! `PROPTEST_CASES` sets how many cases a property gets, `PROPTEST_RNG_SEED` fixes which. What has failed once is kept in
//! `op/tests/properties/main.regressions` and tried first.

mod bed;
mod strategies;

use bed::{Bed, Feed, Random, Shape, bits};
use half::f16;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use retro_attention::contract::Phase;
use retro_attention::method::element::Element;
use retro_attention::method::oracle::{Oracle, Rows};
use retro_contract::{Mode, SKETCH_BLOCK, Selector};
use strategies::{History, Next, history, mode, shape};

type Check = Result<(), TestCaseError>;

/// `cases` cases, or what the environment asks for.
fn config(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: if std::env::var_os("PROPTEST_CASES").is_some() {
            default.cases
        } else {
            cases
        },
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        max_shrink_iters: 2000,
        ..default
    }
}

fn is_half<E: Element>() -> bool {
    std::mem::size_of::<E>() == 2
}

fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) -> Check {
    prop_assert_eq!(got.len(), want.len(), "{}", what);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        prop_assert!(
            (g - w).abs() <= tolerance * w.abs().max(1.0),
            "{}: element {}: {} instead of {}",
            what,
            i,
            g,
            w
        );
    }
    Ok(())
}

/// Outputs are rounded to `E`; log-sum-exps are not.
fn output_tolerance<E: Element>() -> f32 {
    if is_half::<E>() { 2e-3 } else { 2e-5 }
}

/// One call of a history, made: what is fed, and the lengths after it.
struct Made {
    rows: Vec<Rows>,
    lens: Vec<usize>,
    phase: Phase,
    budget: Option<Vec<i32>>,
}

impl Made {
    fn feed(&self) -> Feed<'_> {
        Feed {
            rows: &self.rows,
            lens: &self.lens,
            phase: self.phase,
            budget: self.budget.as_deref(),
        }
    }
}

/// Makes a history's calls within the method's rules: r grows by at most 1, a chunk closes the window.
fn calls<E: Element>(shape: &Shape, history: &History) -> Vec<Made> {
    let (a, d) = (&shape.attributes, shape.head_size);
    let mut random = Random(history.seed);
    let mut lens = history.firsts.clone();
    let mut most = vec![0; lens.len()];
    let rows = |random: &mut Random, counts: &[usize]| counts.iter().map(|&n| random.rows::<E>(a, d, n)).collect();
    let mut made = vec![Made {
        rows: rows(&mut random, &lens),
        lens: lens.clone(),
        phase: Phase::Prefill,
        budget: None,
    }];
    for next in &history.calls {
        let (phase, counts, budget) = match next {
            Next::Chunk(n) => {
                most.fill(0);
                lens.iter_mut().for_each(|len| *len += n);
                (Phase::Prefill, vec![*n; lens.len()], None)
            }
            Next::Step { retro, budget } => {
                // Seldom less than what is allowed, so that windows fill up.
                let wish = |drawn: usize, most: usize| if drawn < 8 { drawn.min(most) } else { most };
                let counts: Vec<usize> = (0..lens.len())
                    .map(|b| {
                        let r = wish(retro[b], most[b].min(a.window - 1).min(lens[b]));
                        most[b] = r + 1;
                        r + 1
                    })
                    .collect();
                lens.iter_mut().for_each(|len| *len += 1);
                (Phase::Decode, counts, budget.clone())
            }
        };
        made.push(Made {
            rows: rows(&mut random, &counts),
            lens: lens.clone(),
            phase,
            budget,
        });
    }
    made
}

/// A call that is not what another property is about.
fn run<E: Element>(bed: &mut Bed<E>, feed: &Feed<'_>) -> Result<Vec<Vec<f32>>, TestCaseError> {
    bed.run(feed).map_err(TestCaseError::fail)
}

/// Choices closer than this are left to rounding. Scores are made from summaries rounded to E: bounds are exact, moments are
/// not.
fn least_margin<E: Element>(selector: Selector) -> f64 {
    match (is_half::<E>(), selector) {
        (true, Selector::Moments | Selector::SignedMoments) => 1e-2,
        // Queries meet codes in 16 bits.
        (_, Selector::Sketch) => 2e-3,
        _ => 1e-4,
    }
}

/// An oracle that stores what the operator stores in E.
fn oracle<E: Element>(shape: &Shape, sinks: Option<&[f32]>) -> Oracle {
    let oracle = Oracle::new(&shape.attributes, shape.head_size, sinks);
    match shape.attributes.selector {
        Selector::Sketch => oracle.storing(|x| f64::from(E::from_f32(x as f32).to_f32())),
        _ => oracle,
    }
}

/// Outputs, page steps, log-sum-exps and cached outputs against the oracle, sequence by sequence; what lies behind a
/// sequence's tokens stays as it was.
fn agrees_with_the_oracle<E: Element>(shape: &Shape, history: &History) -> Check {
    let a = &shape.attributes;
    let batch = history.firsts.len();
    let mut bed = Bed::<E>::new(shape, batch, history.capacity() + 3);
    bed.threads = [1, 2, 24][(history.seed % 3) as usize];
    let sinks = bed.sinks();
    let mut oracles: Vec<Oracle> = (0..batch).map(|_| oracle::<E>(shape, sinks.as_deref())).collect();
    let least_margin = least_margin::<E>(a.selector);
    for (n, made) in calls::<E>(shape, history).iter().enumerate() {
        let got = run(&mut bed, &made.feed())?;
        for (b, oracle) in oracles.iter_mut().enumerate() {
            let what = format!("call {n} ({:?}), sequence {b} of {}", made.phase, made.lens[b]);
            let rows = bed.rotated(&made.rows[b], made.lens[b]);
            let want = match made.phase {
                Phase::Prefill => oracle.prefill(&rows),
                Phase::Decode => {
                    let asked = made.budget.as_ref().map(|k| k[if k.len() == 1 { 0 } else { b }]);
                    let stepped = oracle.step(&rows, asked.filter(|&k| k > 0).map(|k| k as usize));
                    if stepped.margin < least_margin {
                        // Two pages are as good as each other: rounding decides, and the two part here.
                        return Ok(());
                    }
                    stepped.output
                }
            };
            close(&what, &got[b], &want, output_tolerance::<E>())?;
            if a.mode != Mode::Dense {
                prop_assert_eq!(bed.page_steps(b, made.lens[b]), oracle.page_steps(), "{}", what);
            }
            let row = a.heads * shape.head_size;
            let first = made.lens[b] - made.rows[b].count;
            for position in oracle.cached() {
                let (output, lse) = bed.cached(b, position);
                close(&format!("{what}: lse of {position}"), lse, &oracle.lse(position), 5e-5)?;
                if position >= first {
                    let want = &want[(position - first) * row..][..row];
                    close(&format!("{what}: cached output of {position}"), output, want, 2e-5)?;
                }
            }
            bed.untouched_after(b, made.lens[b])
                .map_err(|e| TestCaseError::fail(format!("{what}: {e}")))?;
        }
    }
    Ok(())
}

/// Every sequence of a batch goes as it would alone, to the last bit.
fn batch_is_each_alone<E: Element>(shape: &Shape, history: &History) -> Check {
    let batch = history.firsts.len();
    let capacity = history.capacity() + 3;
    let mut together = Bed::<E>::new(shape, batch, capacity);
    let mut alone: Vec<Bed<E>> = (0..batch).map(|_| Bed::new(shape, 1, capacity)).collect();
    for made in calls::<E>(shape, history) {
        let got = run(&mut together, &made.feed())?;
        for (b, bed) in alone.iter_mut().enumerate() {
            let budget = made.budget.as_ref().map(|k| vec![k[if k.len() == 1 { 0 } else { b }]]);
            let single = Feed {
                rows: &made.rows[b..=b],
                lens: &made.lens[b..=b],
                phase: made.phase,
                budget: budget.as_deref(),
            };
            let want = run(bed, &single)?;
            prop_assert_eq!(bits(&got[b]), bits(&want[0]), "outputs of sequence {}", b);
            prop_assert_eq!(
                together.sequence_bits(b),
                bed.sequence_bits(0),
                "state of sequence {}",
                b
            );
        }
    }
    Ok(())
}

/// Rows that do not change from layer to layer: token i is fed as row i whenever it is fed.
struct Fixed {
    all: Rows,
}

impl Fixed {
    fn new<E: Element>(shape: &Shape, seed: u64, count: usize) -> Self {
        Self {
            all: Random(seed).rows::<E>(&shape.attributes, shape.head_size, count),
        }
    }

    fn run<E: Element>(
        &self,
        bed: &mut Bed<E>,
        from: usize,
        to: usize,
        phase: Phase,
        budget: Option<i32>,
    ) -> Result<Vec<f32>, TestCaseError> {
        let budget = budget.map(|k| vec![k]);
        let feed = Feed {
            rows: &[self.all.slice(from, to)],
            lens: &[to],
            phase,
            budget: budget.as_deref(),
        };
        Ok(run(bed, &feed)?.remove(0))
    }
}

/// With a budget of all pages, every row of every step is dense attention, whatever w is.
fn full_budget_is_dense<E: Element>(shape: &Shape, prompt: usize, steps: usize, seed: u64) -> Check {
    let end = prompt + steps;
    let fixed = Fixed::new::<E>(shape, seed, end);
    let mut dense = Bed::<E>::new(shape, 1, end);
    let want = fixed.run(&mut dense, 0, end, Phase::Prefill, None)?;
    let row = shape.attributes.heads * shape.head_size;
    let mut bed = Bed::<E>::new(shape, 1, end);
    fixed.run(&mut bed, 0, prompt, Phase::Prefill, None)?;
    for t in prompt..end {
        let r = (shape.attributes.window - 1).min(t - prompt);
        let got = fixed.run(&mut bed, t - r, t + 1, Phase::Decode, Some(i32::MAX))?;
        close(
            &format!("t = {t}, r = {r}"),
            &got,
            &want[(t - r) * row..(t + 1) * row],
            output_tolerance::<E>(),
        )?;
    }
    Ok(())
}

/// With unchanged queries, keys and values, the cached output of token i is attention over the union of S_i..S_t.
fn cached_output_is_attention_over_the_union(shape: &Shape, prompt: usize, steps: usize, seed: u64) -> Check {
    let (a, d) = (&shape.attributes, shape.head_size);
    let (group, end) = (a.heads / a.kv_heads, prompt + steps);
    let fixed = Fixed::new::<f32>(shape, seed, end);
    let mut bed = Bed::<f32>::new(shape, 1, end);
    let turned = bed.rotated(&fixed.all, end);
    fixed.run(&mut bed, 0, prompt, Phase::Prefill, None)?;
    let scale = a.scale.map_or(1.0 / (d as f64).sqrt(), f64::from);
    // loaded[t - prompt][kv head][page]
    let mut loaded: Vec<Vec<Vec<bool>>> = Vec::new();
    for t in prompt..end {
        let r = (a.window - 1).min(t - prompt);
        fixed.run(&mut bed, t - r, t + 1, Phase::Decode, None)?;
        let of_head = |s: &Vec<i32>| s.iter().map(|&step| step == t as i32).collect();
        loaded.push(bed.page_steps(0, t + 1).iter().map(of_head).collect());
        // The output cache keeps the last w - 1 positions; the prompt's saw everything from the start.
        for i in prompt.max((t + 2).saturating_sub(a.window))..=t {
            let (outputs, lses) = bed.cached(0, i);
            for h in 0..a.heads {
                let kv = h / group;
                let seen = |j: usize| {
                    let page = j / a.page_size;
                    let in_union = loaded[i - prompt..].iter().any(|s| s[kv].get(page) == Some(&true));
                    in_union && a.local_window.is_none_or(|w| i - j < w)
                };
                let rows: Vec<usize> = (0..=i).filter(|&j| seen(j)).collect();
                let logit = |&j: &usize| {
                    let (q, k) = (
                        &turned.query[(i * a.heads + h) * d..][..d],
                        &turned.key[(j * a.kv_heads + kv) * d..][..d],
                    );
                    let x = scale * q.iter().zip(k).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
                    if a.softcap == 0.0 {
                        x
                    } else {
                        f64::from(a.softcap) * (x / f64::from(a.softcap)).tanh()
                    }
                };
                let weights: Vec<f64> = rows.iter().map(|j| logit(j).exp()).collect();
                let sink = bed.sink.get(h).map_or(0.0, |&s| f64::from(s).exp());
                let sum = weights.iter().sum::<f64>() + sink;
                let want: Vec<f32> = (0..d)
                    .map(|e| {
                        let value = |j: usize| f64::from(turned.value[(j * a.kv_heads + kv) * d + e]);
                        (rows.iter().zip(&weights).map(|(&j, w)| w * value(j)).sum::<f64>() / sum) as f32
                    })
                    .collect();
                close(
                    &format!("O of {i}, head {h}, at t = {t}"),
                    &outputs[h * d..][..d],
                    &want,
                    3e-5,
                )?;
                close(
                    &format!("L of {i}, head {h}, at t = {t}"),
                    &lses[h..=h],
                    &[sum.ln() as f32],
                    5e-5,
                )?;
            }
        }
    }
    Ok(())
}

/// However a prompt is cut, the state that decoding starts from is the same.
fn chunked_prefill_is_one_prefill<E: Element>(shape: &Shape, cuts: &[usize], seed: u64) -> Check {
    let end: usize = cuts.iter().sum();
    let fixed = Fixed::new::<E>(shape, seed, end);
    let (mut whole, mut pieces) = (Bed::<E>::new(shape, 1, end + 5), Bed::<E>::new(shape, 1, end + 5));
    let want = fixed.run(&mut whole, 0, end, Phase::Prefill, None)?;
    let (mut got, mut at) = (Vec::new(), 0);
    for &n in cuts {
        got.extend(fixed.run(&mut pieces, at, at + n, Phase::Prefill, None)?);
        at += n;
    }
    close("outputs", &got, &want, output_tolerance::<E>())?;
    prop_assert_eq!(bits(&pieces.key), bits(&whole.key));
    prop_assert_eq!(bits(&pieces.value), bits(&whole.value));
    prop_assert_eq!(pieces.state_bytes(0), whole.state_bytes(0));
    prop_assert_eq!(pieces.page_steps(0, end), whole.page_steps(0, end));
    for position in end.saturating_sub(shape.attributes.window - 1)..end {
        let ((o, l), (want_o, want_l)) = (pieces.cached(0, position), whole.cached(0, position));
        close(&format!("cached output of {position}"), o, want_o, 2e-5)?;
        close(&format!("cached lse of {position}"), l, want_l, 5e-5)?;
    }
    Ok(())
}

/// A step that feeds one token does not depend on the window, and w = 1 is such a step always: Quest.
fn one_token_is_quest_for_every_window<E: Element>(shape: &Shape, prompt: usize, steps: usize, seed: u64) -> Check {
    let fixed = Fixed::new::<E>(shape, seed, prompt + steps);
    let mut quest = shape.clone();
    quest.attributes.window = 1;
    let (mut wide, mut quest) = (
        Bed::<E>::new(shape, 1, prompt + steps),
        Bed::<E>::new(&quest, 1, prompt + steps),
    );
    for bed in [&mut wide, &mut quest] {
        fixed.run(bed, 0, prompt, Phase::Prefill, None)?;
    }
    let ring = (bits(&quest.outputs), bits(&quest.lse));
    for t in prompt..prompt + steps {
        let got = fixed.run(&mut wide, t, t + 1, Phase::Decode, None)?;
        prop_assert_eq!(bits(&got), bits(&fixed.run(&mut quest, t, t + 1, Phase::Decode, None)?));
        prop_assert_eq!(wide.page_steps(0, t + 1), quest.page_steps(0, t + 1));
    }
    prop_assert_eq!(ring, (bits(&quest.outputs), bits(&quest.lse)), "w = 1 keeps no outputs");
    Ok(())
}

/// After a rewind, of which the operator learns nothing but a shorter length, decoding goes on as if the later tokens had never been.
fn truncation_forgets<E: Element>(shape: &Shape, prompt: usize, steps: usize, keep: usize, seed: u64) -> Check {
    let a = &shape.attributes;
    let end = prompt + steps;
    let fixed = Fixed::new::<E>(shape, seed, end);
    let mut bed = Bed::<E>::new(shape, 1, end);
    fixed.run(&mut bed, 0, prompt, Phase::Prefill, None)?;
    for t in prompt..end {
        let r = (a.window - 1).min(t - prompt);
        fixed.run(&mut bed, t - r, t + 1, Phase::Decode, None)?;
    }
    // The operator recomputes the summary of the page that the next token falls into; a page that ends at `keep` is complete, as is its
    // summary. The rule for page steps: A[j] = min(A[j], len - 1).
    let keep = 1 + keep % (end - 1);
    let ruled: Vec<Vec<i32>> = bed
        .page_steps(0, keep)
        .iter()
        .map(|head| head.iter().map(|&step| step.min(keep as i32 - 1)).collect())
        .collect();
    let mut fresh = Bed::<E>::new(shape, 1, end);
    fixed.run(&mut fresh, 0, keep, Phase::Prefill, None)?;
    let other = Fixed::new::<E>(shape, !seed, end);
    for t in keep..end {
        let r = (a.window - 1).min(t - keep);
        let got = other.run(&mut bed, t - r, t + 1, Phase::Decode, None)?;
        prop_assert_eq!(
            bits(&got),
            bits(&other.run(&mut fresh, t - r, t + 1, Phase::Decode, None)?),
            "t = {}",
            t
        );
        if t == keep && a.mode != Mode::Dense {
            for (got, ruled) in bed.page_steps(0, keep).iter().zip(&ruled) {
                for (got, ruled) in got.iter().zip(ruled) {
                    prop_assert!(
                        got == ruled || *got == keep as i32,
                        "page steps after a rewind to {}",
                        keep
                    );
                }
            }
        }
    }
    Ok(())
}

/// A step changes no more of the sketches than those of the rows that it feeds, and the centre of a block that it begins.
fn overwriting_changes_the_rows_own_sketches<E: Element>(
    shape: &Shape,
    prompt: usize,
    steps: usize,
    seed: u64,
) -> Check {
    let mut shape = shape.clone();
    shape.attributes.selector = Selector::Sketch;
    if shape.head_size == 33 {
        // No whole number of bytes a row.
        shape.head_size = 40;
    }
    let (a, d) = (&shape.attributes, shape.head_size);
    let mut random = Random(seed);
    let mut bed = Bed::<E>::new(&shape, 1, prompt + steps);
    let mut feed = |bed: &mut Bed<E>, count: usize, len: usize, phase| {
        let rows = [random.rows::<E>(&shape.attributes, d, count)];
        let feed = Feed {
            rows: &rows,
            lens: &[len],
            phase,
            budget: None,
        };
        run(bed, &feed).map(|_| ())
    };
    feed(&mut bed, prompt, prompt, Phase::Prefill)?;
    for t in prompt..prompt + steps {
        let r = (a.window - 1).min(t - prompt);
        let before = bed.state_bytes(0).to_vec();
        feed(&mut bed, r + 1, t + 1, Phase::Decode)?;
        let of_head = before.len() / a.kv_heads;
        let heads = before
            .chunks_exact(of_head)
            .zip(bed.state_bytes(0).chunks_exact(of_head));
        let begun = usize::from(t % SKETCH_BLOCK == 0);
        let most = (r + 1) * (d * a.sketch_bits / 8 + 2) + begun * d * size_of::<E>();
        for (before, after) in heads {
            let changed = before.iter().zip(after).filter(|(x, y)| x != y).count();
            prop_assert!(changed <= most, "t = {}, r = {}: {} bytes of {}", t, r, changed, most);
            prop_assert!(changed > 0, "t = {}: the new row has no sketch", t);
        }
    }
    Ok(())
}

/// Rewinds of a ragged batch between its other calls: everything is the oracle's.
fn rewinds_agree_with_the_oracle<E: Element>(shape: &Shape, history: &History, backs: &[usize]) -> Check {
    let a = &shape.attributes;
    let batch = history.firsts.len();
    let mut bed = Bed::<E>::new(shape, batch, history.capacity() + 3);
    bed.threads = [1, 2, 24][(history.seed % 3) as usize];
    let sinks = bed.sinks();
    let mut oracles: Vec<Oracle> = (0..batch).map(|_| oracle::<E>(shape, sinks.as_deref())).collect();
    let mut random = Random(history.seed);
    let mut lens = vec![0; batch];
    let mut most = vec![0; batch];
    let mut calls: Vec<Option<&Next>> = vec![None];
    calls.extend(history.calls.iter().map(Some));
    for (number, next) in calls.into_iter().enumerate() {
        // One sequence after another, so that some go on while others go back.
        let (b, back) = (number % batch, backs[number % backs.len()]);
        if back > 0 && back < lens[b] {
            lens[b] -= back;
            most[b] = 0;
            oracles[b].truncate(lens[b]);
        }
        let (phase, counts, budget) = match next {
            None => (Phase::Prefill, history.firsts.clone(), None),
            Some(Next::Chunk(n)) => (Phase::Prefill, vec![*n; batch], None),
            Some(Next::Step { budget, .. }) => {
                let counts = (0..batch).map(|b| most[b].min(a.window - 1).min(lens[b]) + 1).collect();
                (Phase::Decode, counts, budget.clone())
            }
        };
        for b in 0..batch {
            most[b] = if phase == Phase::Decode { counts[b] } else { 0 };
            lens[b] += if phase == Phase::Decode { 1 } else { counts[b] };
        }
        let rows: Vec<Rows> = counts
            .iter()
            .map(|&n| random.rows::<E>(a, shape.head_size, n))
            .collect();
        let got = run(
            &mut bed,
            &Feed {
                rows: &rows,
                lens: &lens,
                phase,
                budget: budget.as_deref(),
            },
        )?;
        for b in 0..batch {
            let turned = bed.rotated(&rows[b], lens[b]);
            let want = match phase {
                Phase::Prefill => oracles[b].prefill(&turned),
                Phase::Decode => {
                    let asked = budget.as_ref().map_or(0, |v| v[b % v.len()]);
                    let stepped = oracles[b].step(&turned, (asked > 0).then_some(asked as usize));
                    // What is chosen within rounding of a tie is anyone's.
                    if stepped.margin < least_margin::<E>(a.selector) {
                        return Ok(());
                    }
                    stepped.output
                }
            };
            close(
                &format!("call {number}, sequence {b}"),
                &got[b],
                &want,
                output_tolerance::<E>(),
            )?;
            if a.mode != Mode::Dense {
                prop_assert_eq!(
                    bed.page_steps(b, lens[b]),
                    oracles[b].page_steps(),
                    "call {}, sequence {}",
                    number,
                    b
                );
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(80))]

    #[test]
    fn oracle_f32(shape in shape(), mode in mode(), history in history(4)) {
        agrees_with_the_oracle::<f32>(&with_mode(shape, mode), &history)?;
    }

    #[test]
    fn oracle_f16(shape in shape(), mode in mode(), history in history(4)) {
        agrees_with_the_oracle::<f16>(&with_mode(shape, mode), &history)?;
    }

    #[test]
    fn batch(shape in shape(), mode in mode(), history in history(4), half in any::<bool>()) {
        let shape = with_mode(shape, mode);
        if half { batch_is_each_alone::<f16>(&shape, &history)? } else { batch_is_each_alone::<f32>(&shape, &history)? }
    }

    #[test]
    fn full_budget(shape in shape(), prompt in 1usize..160, steps in 1usize..20, seed: u64, half in any::<bool>()) {
        // What a sliding window hides from the newest query is not loaded for older ones.
        let mut shape = shape;
        shape.attributes.local_window = None;
        if half { full_budget_is_dense::<f16>(&shape, prompt, steps, seed)? } else { full_budget_is_dense::<f32>(&shape, prompt, steps, seed)? }
    }

    #[test]
    fn union(shape in shape(), prompt in 1usize..120, steps in 1usize..16, seed: u64) {
        cached_output_is_attention_over_the_union(&shape, prompt, steps, seed)?;
    }

    #[test]
    fn chunks(shape in shape(), cuts in prop::collection::vec(1usize..70, 1..5), seed: u64, half in any::<bool>()) {
        if half { chunked_prefill_is_one_prefill::<f16>(&shape, &cuts, seed)? } else { chunked_prefill_is_one_prefill::<f32>(&shape, &cuts, seed)? }
    }

    #[test]
    fn quest(shape in shape(), mode in mode(), prompt in 1usize..160, steps in 1usize..12, seed: u64, half in any::<bool>()) {
        let shape = with_mode(shape, mode);
        if half { one_token_is_quest_for_every_window::<f16>(&shape, prompt, steps, seed)? } else { one_token_is_quest_for_every_window::<f32>(&shape, prompt, steps, seed)? }
    }

    #[test]
    fn truncation(shape in shape(), mode in mode(), prompt in 1usize..120, steps in 1usize..20, keep: usize, seed: u64, half in any::<bool>()) {
        let shape = with_mode(shape, mode);
        if half { truncation_forgets::<f16>(&shape, prompt, steps, keep, seed)? } else { truncation_forgets::<f32>(&shape, prompt, steps, keep, seed)? }
    }

    #[test]
    fn overwriting(shape in shape(), prompt in 100usize..140, steps in 1usize..40, seed: u64, half in any::<bool>()) {
        if half { overwriting_changes_the_rows_own_sketches::<f16>(&shape, prompt, steps, seed)? } else { overwriting_changes_the_rows_own_sketches::<f32>(&shape, prompt, steps, seed)? }
    }

    #[test]
    fn rewinds(shape in shape(), mode in mode(), history in history(3), backs in prop::collection::vec(prop_oneof![2 => Just(0usize), 1 => 1usize..30], 1..6)) {
        rewinds_agree_with_the_oracle::<f32>(&with_mode(shape, mode), &history, &backs)?;
    }
}

fn with_mode(mut shape: Shape, mode: Mode) -> Shape {
    shape.attributes.mode = mode;
    shape
}
