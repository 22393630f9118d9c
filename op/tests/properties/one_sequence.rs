//! Properties of one sequence whose queries, keys and values are the same however it is cut into calls.

use proptest::prelude::*;
use retro_attention::contract::Phase;
use retro_attention::method::element::Element;
use retro_attention::method::oracle::Rows;
use retro_contract::{Mode, SKETCH_BLOCK, Selector};

use crate::bed::{Bed, Feed, Random, Shape, bits};
use crate::check::{Check, close, output_tolerance, run};

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
pub fn full_budget_is_dense<E: Element>(shape: &Shape, prompt: usize, steps: usize, seed: u64) -> Check {
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
pub fn cached_output_is_attention_over_the_union(shape: &Shape, prompt: usize, steps: usize, seed: u64) -> Check {
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
pub fn chunked_prefill_is_one_prefill<E: Element>(shape: &Shape, cuts: &[usize], seed: u64) -> Check {
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
pub fn one_token_is_quest_for_every_window<E: Element>(shape: &Shape, prompt: usize, steps: usize, seed: u64) -> Check {
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

/// After a rewind, of which the operator learns nothing but a shorter length, decoding goes on as if the later tokens
/// had never been.
pub fn truncation_forgets<E: Element>(shape: &Shape, prompt: usize, steps: usize, keep: usize, seed: u64) -> Check {
    let a = &shape.attributes;
    let end = prompt + steps;
    let fixed = Fixed::new::<E>(shape, seed, end);
    let mut bed = Bed::<E>::new(shape, 1, end);
    fixed.run(&mut bed, 0, prompt, Phase::Prefill, None)?;
    for t in prompt..end {
        let r = (a.window - 1).min(t - prompt);
        fixed.run(&mut bed, t - r, t + 1, Phase::Decode, None)?;
    }
    // The operator recomputes the summary of the page that the next token falls into; a page that ends at `keep` is
    // complete, as is its summary. The rule for page steps: A[j] = min(A[j], len - 1).
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

/// A step changes no more of the sketches or codes than those of the rows that it feeds, and the centre of a block that
/// it begins.
pub fn overwriting_changes_the_rows_own_sketches<E: Element>(
    shape: &Shape,
    selector: Selector,
    prompt: usize,
    steps: usize,
    seed: u64,
) -> Check {
    let mut shape = shape.clone();
    shape.attributes.selector = selector;
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
        let most = if selector == Selector::Sketch {
            (r + 1) * (d * a.sketch_bits / 8 + 2) + begun * d * size_of::<E>()
        } else {
            (r + 1) * (8 * d.div_ceil(32) + 1)
        };
        for (before, after) in heads {
            let changed = before.iter().zip(after).filter(|(x, y)| x != y).count();
            prop_assert!(changed <= most, "t = {}, r = {}: {} bytes of {}", t, r, changed, most);
            prop_assert!(changed > 0, "t = {}: the new row has no sketch", t);
        }
    }
    Ok(())
}
