//! What a decoding step feeds, and which slots run together.

use std::ops::Range;

use crate::{Feed, decoder::step_plan::StepPlan, serve::slot::Slot};

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
pub(super) fn feed(rows: Range<usize>, slots: &mut [Slot], capacity: usize) -> Feed {
    let slots = slots.get_mut(rows).unwrap_or_default();
    let plans: Vec<Option<StepPlan>> = slots.iter_mut().map(plan).collect();
    let retro_lengths = plans.iter().map(|plan| plan.as_ref().map_or(0, |p| p.retrospective));
    let retro_lengths: Vec<usize> = retro_lengths.collect();
    let most = retro_lengths.iter().copied().max().unwrap_or(0);
    let mut feed = Feed {
        graph_capturable: false,
        ..Feed::default()
    };
    let mut budgets = Vec::with_capacity(slots.len());
    for (slot, plan) in slots.iter_mut().zip(plans) {
        let (ids, length) = match (&slot.running, &plan) {
            (Some(running), Some(_)) => {
                let tokens = &running.tokens;
                let newest = tokens.get(tokens.len().saturating_sub(most + 1)..).unwrap_or(&[]);
                (newest, tokens.len())
            }
            _ => {
                // A step has a token before the one that it feeds.
                let length = (slot.held.tokens.len() + 1).max(2).min(capacity);
                slot.held.rewind(length - 1);
                (&[][..], length)
            }
        };
        feed.ids.extend(std::iter::repeat_n(0, most + 1 - ids.len()));
        feed.ids.extend(ids.iter().map(|&id| i64::from(id)));
        feed.lengths.push(length);
        budgets.push(plan.and_then(|plan| plan.budgets?.first().copied()));
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

/// What the next step of a slot feeds and reads; `None`: it does not decode.
fn plan(slot: &mut Slot) -> Option<StepPlan> {
    if !slot.decodes() {
        return None;
    }
    let running = slot.running.as_mut()?;
    Some(running.planner.next(&[running.tokens.len()]))
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
