//! Buffers that outlive a step: a step allocates nothing once its sizes have been seen.

use std::sync::{Mutex, PoisonError};

use crate::method::attend::AttendScratch;
use crate::method::select::SelectScratch;

/// Scratch of one task.
#[derive(Default)]
pub struct TaskScratch {
    pub select: SelectScratch,
    pub attend: AttendScratch,
    pub rows: Vec<f32>,
    pub angles: Vec<f32>,
    pub partial: Vec<f32>,
}

/// Scratch of one call.
#[derive(Default)]
pub struct CallScratch {
    /// Rotated query rows of every task.
    pub query: Vec<f32>,
    /// Pages that each task reads, with the first row that reads each: `(page, row)`.
    pub pages: Vec<Vec<(u32, u32)>>,
    pub selected: Vec<Vec<u32>>,
    /// Maxima, sums and accumulators of every task and split.
    pub max: Vec<f32>,
    pub sum: Vec<f32>,
    pub acc: Vec<f32>,
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

/// Makes a buffer hold at least `len` elements; what they hold is left over from earlier.
pub fn fit<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}
