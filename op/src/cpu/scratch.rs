//! Buffers that outlive a step: a step allocates nothing once its sizes have been seen.

use std::sync::{Mutex, PoisonError};

use super::angle_cache::AngleCache;
use crate::method::attend::PageRows;
use crate::method::select::SelectScratch;

/// Scratch of one task.
#[derive(Default)]
pub struct TaskScratch {
    pub select: SelectScratch,
    pub rows: Lines,
    pub summary: Vec<f32>,
    pub angles: AngleCache,
    pub partial: Lines,
    pub pages: Vec<PageRows>,
}

/// Scratch of one call.
#[derive(Default)]
pub struct CallScratch {
    /// Rotated query rows of every task.
    pub query: Lines,
    /// Scores of every task's heads, where several tasks make them.
    pub heads: Lines,
    /// Pages that each task reads, with the first row that reads each.
    pub pages: Vec<Vec<PageRows>>,
    pub selected: Vec<Vec<u32>>,
    /// Maxima and sums of every task and split.
    pub sums: Lines,
    /// Accumulators of every task and split.
    pub acc: Lines,
}

/// Floats that start at a cache line: vectors do not straddle two, and parts of [`padded`] length share none.
#[derive(Default)]
pub struct Lines(Vec<Line>);

#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

const LINE: usize = 16;

/// `len` floats in whole cache lines.
pub const fn padded(len: usize) -> usize {
    len.next_multiple_of(LINE)
}

impl Lines {
    /// At least `len` floats; what they hold is left over from earlier.
    pub fn fit(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(LINE);
        if self.0.len() < lines {
            self.0.resize(lines, Line::default());
        }
        // SAFETY: a line is 16 floats without padding (repr(C), 64 bytes of alignment and size), and there are enough.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<f32>(), len) }
    }
}

/// Scratch that waits for its next user. One kernel may run on many threads at once: each call takes its own.
#[derive(Default)]
pub struct ScratchPool {
    calls: Mutex<Vec<CallScratch>>,
    tasks: Mutex<Vec<TaskScratch>>,
}

impl ScratchPool {
    /// Lends a call's scratch to `f`.
    pub fn with_call<R>(&self, f: impl FnOnce(&mut CallScratch) -> R) -> R {
        lend(&self.calls, f)
    }

    /// Lends a task's scratch to `f`.
    pub fn with_task<R>(&self, f: impl FnOnce(&mut TaskScratch) -> R) -> R {
        lend(&self.tasks, f)
    }
}

fn lend<T: Default, R>(shelf: &Mutex<Vec<T>>, f: impl FnOnce(&mut T) -> R) -> R {
    // A panic elsewhere can at worst have lost a scratch, never broken one.
    let lock = || shelf.lock().unwrap_or_else(PoisonError::into_inner);
    let mut scratch = lock().pop().unwrap_or_default();
    let result = f(&mut scratch);
    lock().push(scratch);
    result
}

/// Makes a list have at least `len` elements.
pub fn fit<T: Clone + Default>(list: &mut Vec<T>, len: usize) -> &mut [T] {
    if list.len() < len {
        list.resize(len, T::default());
    }
    &mut list[..len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_start_at_a_cache_line_and_keep_their_contents() {
        let mut lines = Lines::default();
        lines.fit(5).fill(1.0);
        let more = lines.fit(40);
        assert_eq!(more.as_ptr().addr() % 64, 0);
        assert_eq!((more.len(), more[4]), (40, 1.0));
        assert_eq!((padded(0), padded(1), padded(16), padded(17)), (0, 16, 16, 32));
    }
}
