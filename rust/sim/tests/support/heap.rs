//! An allocator that counts, for each thread, the bytes that it has out: what memory the scanner really
//! takes, against what it says. Simulated memory's own needs are left out by [`aside`].

#![allow(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static OUT: Cell<i64> = const { Cell::new(0) };
    static ASIDE: Cell<bool> = const { Cell::new(false) };
}

/// The system's allocator, counting.
#[derive(Debug)]
pub(crate) struct Counting;

fn count(bytes: usize, sign: i64) {
    // At the very end of a thread there is nobody left to count for.
    let _ = ASIDE.try_with(|aside| {
        if !aside.get() {
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            let _ = OUT.try_with(|out| out.set(out.get() + sign * bytes));
        }
    });
}

// SAFETY: every call is the system allocator's, with the caller's own arguments; counting touches
// plain thread-local cells, which need no allocation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: our caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: our caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, 1);
        count(layout.size(), -1);
        // SAFETY: our caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Bytes that this thread has allocated and not given back, but for what happened [`aside`].
pub(crate) fn out() -> i64 {
    OUT.get()
}

/// What allocates or frees in here is not counted.
pub(crate) fn aside<T>(what: impl FnOnce() -> T) -> T {
    let before = ASIDE.replace(true);
    let done = what();
    ASIDE.set(before);
    done
}
