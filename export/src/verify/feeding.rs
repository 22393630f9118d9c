//! Feeds the original and the converted model as a schedule says.

use super::{
    compared_model::ComparedModel,
    comparison::{Comparison, PaddingCheck},
    difference::{LogitDifference, OwnDifference, Variation},
    error::Error,
    feed::Feed,
    schedule::FeedSchedule,
};
use crate::error::chain;

/// Drawings of other tokens in padding.
const PADDINGS: u64 = 2;

/// What the original gave.
pub struct Reference {
    /// After the prompt's pieces and after each step, of each sequence: `[calls * B][V]`.
    pub logits: Vec<Vec<f32>>,
    /// Why a piece of the prompt was fed token by token, if one was.
    pub one_by_one: Option<String>,
}

impl Reference {
    /// Whether other logits can be compared with these. Masks of minus infinity give none for padding, for instance; what is
    /// masked among tokens may be infinite.
    pub fn is_comparable(&self) -> bool {
        let mut numbers = self.logits.iter().flatten();
        numbers.clone().any(|x| x.is_finite()) && !numbers.any(|x| x.is_nan())
    }
}

/// What the original gives for a schedule, or what it gives for its sequences alone. `window`: tokens fed together in steps.
pub fn feed_original(
    model: &mut ComparedModel,
    ids: &[Vec<i64>],
    schedule: &FeedSchedule,
    window: usize,
    check: PaddingCheck,
) -> Result<Reference, Error> {
    if schedule.padding == 0 || check == PaddingCheck::Both {
        return feed_together(model, ids, schedule, window, 0);
    }
    feed_apart(model, ids, schedule, window)
}

/// Each sequence alone, without its padding; as often as a model takes sequences that is made for one number of them.
fn feed_apart(
    model: &mut ComparedModel,
    ids: &[Vec<i64>],
    schedule: &FeedSchedule,
    window: usize,
) -> Result<Reference, Error> {
    let mut sequences = Vec::new();
    for (b, row) in ids.iter().enumerate() {
        let skip = if b + 1 == ids.len() { schedule.padding } else { 0 };
        let copies = model.declared.batch.unwrap_or(1);
        let alone = vec![row.get(skip..).unwrap_or_default().to_vec(); copies];
        let mut run = feed_together(model, &alone, &schedule.unpadded(), window, skip)?;
        run.logits = run.logits.into_iter().step_by(copies.max(1)).collect();
        sequences.push(run);
    }
    // Sequence by sequence to call by call.
    let calls = sequences.iter().map(|r| r.logits.len()).min().unwrap_or(0);
    let logits = (0..calls).flat_map(|call| sequences.iter().filter_map(move |r| r.logits.get(call).cloned()));
    Ok(Reference {
        logits: logits.collect(),
        one_by_one: sequences.iter().find_map(|r| r.one_by_one.clone()),
    })
}

/// All sequences in one batch. `skip`: how many tokens shorter than usual the prompt is. `window`: tokens fed together in steps,
/// from a cache cut back.
fn feed_together(
    model: &mut ComparedModel,
    ids: &[Vec<i64>],
    schedule: &FeedSchedule,
    window: usize,
    skip: usize,
) -> Result<Reference, Error> {
    let feed = |count: usize, total: usize| Feed {
        ids,
        count,
        total,
        padding: schedule.padding,
        retro_length: 0,
        wide_mask: false,
    };
    model.start(ids.len())?;
    let (mut logits, mut one_by_one) = (Vec::new(), None);
    let mut from = 0;
    for end in schedule.ends.iter().map(|end| end - skip) {
        match model.feed(&feed(end - from, end)) {
            Ok(piece) => logits.extend(piece),
            Err(why) if from > 0 => {
                one_by_one = Some(format!(
                    "the original was fed a prompt's rest token by token, as together: {}",
                    chain(&why)
                ));
                for t in from..end {
                    let piece = model.feed(&feed(1, t + 1))?;
                    if t + 1 == end {
                        logits.extend(piece);
                    }
                }
            }
            Err(why) => return Err(why),
        }
        from = end;
    }
    for t in schedule.prompt() - skip..schedule.tokens() - skip {
        let again = (window - 1).min(t);
        let again = if again > 0 && model.rewind(t - again)? {
            again
        } else {
            0
        };
        logits.extend(model.feed(&feed(again + 1, t + 1))?);
    }
    Ok(Reference { logits, one_by_one })
}

/// How a converted model is fed.
#[derive(Clone, Copy)]
pub struct ConvertedFeeding {
    /// w: a step has w - 1 corrected tokens.
    pub window: usize,
    /// The graph feeds these by itself.
    pub in_graph: bool,
    /// Masks are as wide as the caches, but for a padded prompt's.
    pub wide_masks: bool,
}

/// What the converted model gives.
pub fn feed_converted(
    model: &mut ComparedModel,
    ids: &[Vec<i64>],
    schedule: &FeedSchedule,
    feeding: ConvertedFeeding,
) -> Result<Vec<Vec<f32>>, Error> {
    model.start(ids.len())?;
    let mut logits = Vec::new();
    let mut from = 0;
    for end in schedule.ends.iter().copied() {
        logits.extend(model.feed(&Feed {
            ids,
            count: end - from,
            total: end,
            padding: schedule.padding,
            retro_length: -1,
            wide_mask: feeding.wide_masks && schedule.padding == 0,
        })?);
        from = end;
    }
    for t in schedule.prompt()..schedule.tokens() {
        let again = if feeding.in_graph {
            0
        } else {
            (feeding.window - 1).min(t)
        };
        let feed = Feed {
            ids,
            count: again + 1,
            total: t + 1,
            padding: schedule.padding,
            retro_length: again as i32,
            wide_mask: feeding.wide_masks,
        };
        logits.extend(model.feed(&feed)?);
    }
    Ok(logits)
}

/// How far the original moves when nothing but what it reads beside a sequence changes: the tokens in padding, or, where it is
/// fed each sequence alone, the other sequence.
pub fn own_difference_of_padding(
    original: &mut ComparedModel,
    ids: &[Vec<i64>],
    schedule: &FeedSchedule,
    comparison: &Comparison,
    expected: &Reference,
) -> Result<OwnDifference, Error> {
    let mut own = OwnDifference::default();
    if comparison.padding == PaddingCheck::Alone {
        let unpadded = schedule.unpadded();
        let together = feed_together(original, ids, &unpadded, 1, 0);
        if let (Ok(together), Ok(apart)) = (together, feed_apart(original, ids, &unpadded, 1)) {
            let difference = LogitDifference::between(&together.logits, &apart.logits)?;
            own.include(&difference, Variation::SequencesAlone);
        }
        return Ok(own);
    }
    for drawing in 1..=PADDINGS {
        let mut ids = ids.to_vec();
        let seed = comparison.seed.wrapping_add(1000 * drawing);
        let other = draw_tokens(seed, 1, schedule.padding, comparison.vocabulary);
        if let Some((row, other)) = ids.last_mut().zip(other.first()) {
            row.iter_mut().zip(other).for_each(|(id, other)| *id = *other);
        }
        if let Ok(run) = feed_original(original, &ids, schedule, 1, comparison.padding) {
            let difference = LogitDifference::between(&expected.logits, &run.logits)?;
            own.include(&difference, Variation::OtherPadding);
        }
    }
    Ok(own)
}

/// Seeded token ids, `[batch][count]`.
pub fn draw_tokens(seed: u64, batch: usize, count: usize, vocabulary: usize) -> Vec<Vec<i64>> {
    // The first few ids are special tokens of most tokenizers.
    let low = 3.min(vocabulary.saturating_sub(1));
    let span = (vocabulary - low).max(1) as f64;
    let row = |b: usize| {
        let numbers = crate::rules::noise(count, seed.wrapping_add(b as u64));
        numbers
            .into_iter()
            .map(|x| low as i64 + ((x + 1.0) / 2.0 * span) as i64)
            .collect()
    };
    (0..batch).map(row).collect()
}
