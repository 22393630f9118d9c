//! Properties of a batch over a history of calls, against the oracle and against each sequence alone.

use proptest::prelude::*;
use retro_attention::contract::Phase;
use retro_attention::method::element::Element;
use retro_attention::method::oracle::{Oracle, Rows};
use retro_contract::{Mode, Selector};

use crate::bed::{Bed, Feed, Random, Shape, bits};
use crate::check::{Check, close, is_half, output_tolerance, run};
use crate::strategies::{History, Next};

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

/// Choices closer than this are left to rounding. Scores are made from summaries rounded to E: bounds are exact,
/// moments are not.
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
pub fn agrees_with_the_oracle<E: Element>(shape: &Shape, history: &History) -> Check {
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
pub fn batch_is_each_alone<E: Element>(shape: &Shape, history: &History) -> Check {
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

/// Rewinds of a ragged batch between its other calls: everything is the oracle's.
pub fn rewinds_agree_with_the_oracle<E: Element>(shape: &Shape, history: &History, backs: &[usize]) -> Check {
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
