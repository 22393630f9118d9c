//! What a decoding step feeds, and which slots run together.

use std::ops::Range;

use crate::{Feed, Model, decoder::decode_loop::Policy, serve::slot::Slot};

/// Idle rows between two busy ones that a step is cheaper with than two steps: a row costs about a quarter of what a
/// step costs without any.
const GAP: usize = 3;

/// Rows of idle slots that a step of the busy ones and of this one has more than it must.
pub(super) fn distance(row: usize, busy: &[usize]) -> usize {
    let between = busy.iter().map(|&b| row.abs_diff(b).saturating_sub(1));
    between.min().unwrap_or(0)
}

/// The steps for slots that decode, in order: each of rows side by side, with few idle ones among them.
pub(super) fn side_by_side(decoding: &[usize]) -> Vec<Range<usize>> {
    let mut steps: Vec<Range<usize>> = Vec::new();
    for &row in decoding {
        match steps.last_mut() {
            Some(last) if row - last.end <= GAP => last.end = row + 1,
            _ => steps.push(row..row + 1),
        }
    }
    steps
}

/// The step of some rows: their newest tokens, and those before them in their windows. A row that does not decode is
/// fed a token behind what it holds, which the next that it is fed replaces.
pub(super) fn feed(rows: Range<usize>, slots: &mut [Slot], model: &Model, capacity: usize) -> Feed {
    let slots = slots.get_mut(rows).unwrap_or_default();
    let retro_lengths: Vec<usize> = slots.iter().map(retrospective).collect();
    let most = retro_lengths.iter().copied().max().unwrap_or(0);
    let mut feed = Feed {
        graph_capturable: false,
        ..Feed::default()
    };
    let mut budgets = Vec::with_capacity(slots.len());
    for slot in slots {
        let decodes = slot.decodes();
        let (ids, length, budget) = match &slot.running {
            Some(running) if decodes => {
                let tokens = &running.tokens;
                let newest = tokens.get(tokens.len().saturating_sub(most + 1)..).unwrap_or(&[]);
                let policy = running.submission.request.policy;
                (newest, tokens.len(), pages(model, policy, tokens.len()))
            }
            _ => {
                // A step has a token before the one that it feeds.
                let length = (slot.held.tokens.len() + 1).max(2).min(capacity);
                slot.held.rewind(length - 1);
                (&[][..], length, None)
            }
        };
        feed.ids.extend(std::iter::repeat_n(0, most + 1 - ids.len()));
        feed.ids.extend(ids.iter().map(|&id| i64::from(id)));
        feed.lengths.push(length);
        budgets.push(budget);
    }
    if most > 0 {
        feed.retro_lengths = Some(retro_lengths.iter().map(|&r| r as i32).collect());
    }
    if budgets.iter().any(Option::is_some) {
        // 0: as converted.
        feed.budgets = Some(budgets.into_iter().map(|b| b.unwrap_or(0)).collect());
    }
    feed
}

fn retrospective(slot: &Slot) -> usize {
    let running = slot.running.as_ref().filter(|_| slot.decodes());
    running.map_or(0, |r| r.retrospective())
}

/// Pages that a step of a sequence reads under a policy of its own; `None`: as converted.
fn pages(model: &Model, policy: Policy, length: usize) -> Option<i32> {
    let (budget, retro) = policy.budget.zip(model.retro.as_ref())?;
    let pages = budget.pages(retro.min_pages, length, retro.page_size).max(1);
    Some(i32::try_from(pages).unwrap_or(i32::MAX))
}

/// Whether a step of so many valid tokens reads all of them.
pub(super) fn reads_all(model: &Model, policy: Policy, length: usize) -> bool {
    let Some(retro) = &model.retro else { return true };
    let Some(budget) = policy.budget.or(retro.budget) else {
        return false;
    };
    budget.pages(retro.min_pages, length, retro.page_size) >= length.div_ceil(retro.page_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_run_together_unless_many_idle_ones_lie_between() {
        assert!(side_by_side(&[]).is_empty());
        assert_eq!(side_by_side(&[2]), vec![2..3]);
        assert_eq!(side_by_side(&[0, 1, 5, 7]), vec![0..8]);
        assert_eq!(side_by_side(&[0, 5, 6]), vec![0..1, 5..7]);
    }

    #[test]
    fn the_nearest_busy_slot_counts() {
        assert_eq!(distance(3, &[]), 0);
        assert_eq!(distance(3, &[4]), 0);
        assert_eq!(distance(3, &[0, 7]), 2);
    }
}
