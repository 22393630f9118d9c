//! What a decoding step feeds, and which slots run together.

use std::ops::Range;

use crate::{Feed, Model, decoder::step_plan::StepPlan, serve::slot::Slot};

/// Idle rows between two busy ones that a step is cheaper with than two steps: on a CPU a row costs about a quarter of
/// what a step costs without any.
const GAP: usize = 3;

/// How steps are made of the slots that decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grouping {
    /// Several, each of rows side by side with few idle ones among them: on a CPU every row takes its time.
    SideBySide,
    /// One: on a GPU a step takes as long as it takes to read the weights, nearly whatever its rows.
    Together,
    /// One, of a block of rows: 1, 2, 4 and so on, from a multiple of as many on. Such blocks are few, so that a CUDA
    /// graph can be kept for each.
    Blocks,
}

impl Grouping {
    /// For a model.
    pub fn of(model: &Model) -> Self {
        if model.last_graph.is_some() {
            Self::Blocks
        } else if model.gpu.is_some() {
            Self::Together
        } else {
            Self::SideBySide
        }
    }

    /// The steps for slots that decode, in order, of `all` slots.
    pub fn steps(self, decoding: &[usize], all: usize) -> Vec<Range<usize>> {
        let Some((&first, &last)) = decoding.first().zip(decoding.last()) else {
            return Vec::new();
        };
        match self {
            Self::SideBySide => side_by_side(decoding),
            Self::Together => std::iter::once(first..last + 1).collect(),
            Self::Blocks => std::iter::once(block(first, last, all)).collect(),
        }
    }
}

/// Rows of idle slots that a step of the busy ones and of this one has more than it must.
pub(super) fn distance(row: usize, busy: &[usize]) -> usize {
    let between = busy.iter().map(|&b| row.abs_diff(b).saturating_sub(1));
    between.min().unwrap_or(0)
}

/// Rows side by side, with few idle ones among them.
fn side_by_side(decoding: &[usize]) -> Vec<Range<usize>> {
    let mut steps: Vec<Range<usize>> = Vec::new();
    for &row in decoding {
        match steps.last_mut() {
            Some(last) if row - last.end <= GAP => last.end = row + 1,
            _ => steps.push(row..row + 1),
        }
    }
    steps
}

/// The smallest block that two rows lie in.
fn block(first: usize, last: usize, all: usize) -> Range<usize> {
    let mut size = 1;
    while first / size != last / size {
        size *= 2;
    }
    let start = first / size * size;
    start..(start + size).min(all)
}

/// The step of some rows: their newest tokens, and those before them in their windows. A row that does not decode is
/// fed tokens behind those that it holds, which the next that it is fed replace. `captures`: steps of one shape are
/// captured.
pub(super) fn feed(rows: Range<usize>, slots: &mut [Slot], capacity: usize, captures: bool) -> Feed {
    let slots = slots.get_mut(rows).unwrap_or_default();
    let plans: Vec<Option<StepPlan>> = slots.iter_mut().map(plan).collect();
    let alike = captures.then(|| of_one_shape(slots, &plans, capacity)).flatten();
    let retrospective = |plan: &Option<StepPlan>| plan.as_ref().map_or(alike.unwrap_or(0), |p| p.retrospective);
    let retro_lengths: Vec<usize> = plans.iter().map(retrospective).collect();
    let most = retro_lengths.iter().copied().max().unwrap_or(0);
    let mut feed = Feed {
        graph_capturable: alike.is_some(),
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
                // A step has a token before those that it feeds.
                let fed = alike.unwrap_or(0) + 1;
                let length = (slot.held.tokens.len() + fed).max(fed + 1).min(capacity);
                slot.held.rewind(length - fed);
                (&[][..], length)
            }
        };
        feed.ids.extend(std::iter::repeat_n(0, most + 1 - ids.len()));
        feed.ids.extend(ids.iter().map(|&id| i64::from(id)));
        feed.lengths.push(length);
        budgets.push(plan.and_then(|plan| plan.budgets?.first().copied()));
    }
    if alike.is_some() {
        feed.retro_length = most as i32;
    } else if most > 0 {
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

/// The retrospective tokens of every row that decodes, if their windows are of one size and open to the full, so that
/// steps to come are as this one. Other rows are fed as many, for which there must be room behind what is still needed.
fn of_one_shape(slots: &[Slot], plans: &[Option<StepPlan>], capacity: usize) -> Option<usize> {
    let mut alike = None;
    for (slot, plan) in slots.iter().zip(plans) {
        let Some((running, plan)) = slot.running.as_ref().zip(plan.as_ref()) else {
            continue;
        };
        let open = plan.retrospective + 1 == running.submission.request.policy.window;
        if !open || alike.is_some_and(|r| r != plan.retrospective) {
            return None;
        }
        alike = Some(plan.retrospective);
    }
    let retrospective = alike?;
    let has_room = |slot: &Slot| {
        let needed = if slot.running.is_some() {
            slot.held.tokens.len()
        } else {
            0
        };
        // A step has a token before those that it feeds.
        needed.max(1) + retrospective < capacity
    };
    let mut others = slots.iter().zip(plans).filter(|(_, plan)| plan.is_none());
    others.all(|(slot, _)| has_room(slot)).then_some(retrospective)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_run_together_unless_many_idle_ones_lie_between() {
        let steps = |decoding: &[usize]| Grouping::SideBySide.steps(decoding, 8);
        assert!(steps(&[]).is_empty());
        assert_eq!(steps(&[2]), vec![2..3]);
        assert_eq!(steps(&[0, 1, 5, 7]), vec![0..8]);
        assert_eq!(steps(&[0, 5, 6]), vec![0..1, 5..7]);
    }

    #[test]
    fn on_a_gpu_all_run_in_one_step() {
        assert_eq!(Grouping::Together.steps(&[1, 6], 8), vec![1..7]);
        let blocks = |decoding: &[usize], all| Grouping::Blocks.steps(decoding, all).remove(0);
        assert!(Grouping::Blocks.steps(&[], 8).is_empty());
        assert_eq!(blocks(&[5], 8), 5..6);
        assert_eq!(blocks(&[4, 5], 8), 4..6);
        assert_eq!(blocks(&[5, 6], 8), 4..8);
        assert_eq!(blocks(&[3, 4], 8), 0..8);
        assert_eq!(blocks(&[0, 1, 2, 3], 8), 0..4);
        assert_eq!((blocks(&[4], 5), blocks(&[3, 4], 5)), (4..5, 0..5));
    }

    #[test]
    fn the_nearest_busy_slot_counts() {
        assert_eq!(distance(3, &[]), 0);
        assert_eq!(distance(3, &[4]), 0);
        assert_eq!(distance(3, &[0, 7]), 2);
    }
}
