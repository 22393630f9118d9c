//! A mutable buffer whose disjoint parts are written by several tasks at once.

use std::marker::PhantomData;

/// A mutable slice that tasks share; each task takes ranges that no other task touches at the time.
#[derive(Clone, Copy)]
pub struct Shared<'a, T> {
    data: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a borrowed mutable slice; `range`'s contract keeps concurrent accesses disjoint.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self {
            data: slice.as_mut_ptr(),
            len: slice.len(),
            _borrow: PhantomData,
        }
    }

    /// Elements `start..start + len`, mutable. Panics when the range leaves the buffer.
    ///
    /// # Safety
    /// While the slice lives, no other slice of this buffer that overlaps it does.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub unsafe fn range_mut(&self, start: usize, len: usize) -> &mut [T] {
        assert!(
            start.checked_add(len).is_some_and(|end| end <= self.len),
            "a task left its buffer"
        );
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }

    /// Elements `start..start + len`. Panics when the range leaves the buffer.
    ///
    /// # Safety
    /// While the slice lives, no mutable slice of this buffer that overlaps it does.
    pub unsafe fn range(&self, start: usize, len: usize) -> &[T] {
        assert!(
            start.checked_add(len).is_some_and(|end| end <= self.len),
            "a task left its buffer"
        );
        // SAFETY: in bounds by the assertion; not written meanwhile by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.data.add(start), len) }
    }
}
