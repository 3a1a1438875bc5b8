//! An allocator that counts the bytes that the whole process has out: what the engine really takes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, Ordering};

static OUT: AtomicI64 = AtomicI64::new(0);

/// The system's allocator, counting.
#[derive(Debug)]
struct Counting;

fn count(bytes: usize, sign: i64) {
    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
    OUT.fetch_add(sign * bytes, Ordering::Relaxed);
}

// SAFETY: every call is the system allocator's, with the caller's own arguments; counting is one
// atomic addition, and allocates nothing.
#[allow(unsafe_code, reason = "an allocator")]
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

/// Bytes allocated and not given back.
pub(crate) fn out() -> i64 {
    OUT.load(Ordering::Relaxed)
}
