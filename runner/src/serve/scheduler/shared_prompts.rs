//! Prompts that begin alike are read once: a slot takes the rows that another one has read.

use std::cmp::Reverse;

use super::{Scheduler, WORTH_KEEPING, running};
use crate::{decoder::Result, serve::slot::Leader};

impl Scheduler {
    /// Lets the request in a slot wait for one that came before, if that reads more of its prompt than the slot holds.
    /// As it came before, no two wait for each other.
    pub(super) fn follow(&mut self, row: usize) {
        let Some((slot, follower)) = self.slots.get(row).and_then(|s| Some((s, s.running.as_ref()?))) else {
            return;
        };
        let came = slot.held.used;
        let prompt = &follower.submission.request.prompt;
        let others = self.slots.iter().enumerate();
        let others = others.filter(|(_, slot)| slot.running.is_some() && slot.held.used < came);
        let leaders = others.map(|(row, slot)| Leader {
            row,
            request: slot.held.used,
            tokens: slot.will_have(prompt),
        });
        // Of several the one that came first, which is the first to have read it.
        let leader = leaders.max_by_key(|leader| (leader.tokens, Reverse(leader.request)));
        let leader = leader.filter(|leader| leader.tokens >= follower.cached + WORTH_KEEPING);
        if let Some((_, follower)) = running(&mut self.slots, row) {
            follower.leader = leader;
        }
    }

    /// Gives slots that wait for others what those have read, once that is all that they wait for. Where the other one
    /// has gone, what it has left is taken, and the rest read.
    pub(super) fn take_over(&mut self) {
        for row in 0..self.slots.len() {
            let slot = self.slots.get(row).and_then(|s| s.running.as_ref());
            let Some((slot, leader)) = slot.and_then(|s| Some((s, s.leader?))) else {
                continue;
            };
            let Some(other) = self.slots.get(leader.row) else {
                continue;
            };
            let common = other.held.common(&slot.submission.request.prompt);
            let still_reads = other.running.is_some() && other.held.used == leader.request;
            if still_reads && common < leader.tokens {
                continue;
            }
            if let Err(e) = self.take_rows(row, leader.row, common) {
                self.fail(row, &e);
            } else if common < leader.tokens {
                // Another one may be about to read the rest.
                self.follow(row);
            }
        }
    }

    /// Ends a slot's waiting, and gives it what another holds of the first `tokens` tokens of its prompt.
    fn take_rows(&mut self, row: usize, from: usize, tokens: usize) -> Result<()> {
        let Some((held, follower)) = running(&mut self.slots, row) else {
            return Ok(());
        };
        follower.leader = None;
        let more = tokens.saturating_sub(follower.cached);
        if more > 0 {
            self.rows.copy(from, row, tokens)?;
            held.hold(follower.tokens.get(..tokens).unwrap_or(&[]));
            follower.cached = tokens;
            follower.read = tokens;
            self.metrics.cached_tokens.inc_by(more as u64);
        }
        Ok(())
    }
}
