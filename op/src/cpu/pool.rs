//! Who runs the tasks of a call.

use crate::ort::Result;

/// Who runs the tasks: the session's thread pool, or the calling thread.
pub trait Pool {
    /// Runs `task(0..count)` and waits for all.
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()>;

    /// Threads that may run tasks at once: how finely work is split.
    fn width(&self) -> usize;
}

/// Runs every task on the calling thread.
pub struct Serial;

impl Pool for Serial {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        (0..count).for_each(task);
        Ok(())
    }

    fn width(&self) -> usize {
        1
    }
}
