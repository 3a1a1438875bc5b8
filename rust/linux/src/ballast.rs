//! Room for the merging thread's own records, held back while there is some.
//!
//! Rust ends the process when an allocation fails. The program may well live with that: at its
//! `RLIMIT_AS` or `RLIMIT_DATA`, or with every mapping used up, it gets a null pointer (or Python's
//! `MemoryError`) and goes on. It must not be ended because merging wanted to note something.
//!
//! So the thread keeps some memory that it has no use for, frees it when a job begins, and takes it back
//! when the job is over. A job finds at least that much; how much it needs is bounded, because work is
//! cut into slices, and what grows with the size of regions is asked for beforehand ([`has_room`]).
//! When the ballast could not be taken back in full, work that makes records is refused by name
//! ([`is_short`]), and un-merging still works: it needs a few kilobytes.
//!
//! # Departures
//! That memory freed by a thread is what the same thread gets next is how allocators with caches or
//! arenas for each thread behave (glibc's, jemalloc, mimalloc), and not a promise.
//!
//! # Cost
//! 2 MiB of address space, hardly any of it touched; 3 us a job.

use std::cell::Cell;

/// Below the size from which glibc maps each block by itself.
const PIECE: usize = 100 << 10;
const PIECES: usize = 20;
/// What a caller's side of a job allocates at most.
const HANDOVER: usize = 16 << 10;

thread_local! {
    static SHORT: Cell<bool> = const { Cell::new(false) };
}

/// The merging thread's.
#[derive(Debug, Default)]
pub(crate) struct Ballast {
    pieces: Vec<Vec<u8>>,
}

impl Ballast {
    /// Takes as much as it can get, up to the full amount.
    pub(crate) fn take(&mut self) {
        let mut full = self.pieces.try_reserve_exact(PIECES).is_ok();
        while full && self.pieces.len() < PIECES {
            let mut piece = Vec::new();
            full = piece.try_reserve_exact(PIECE).is_ok();
            if full {
                self.pieces.push(piece);
            }
        }
        SHORT.set(!full);
    }

    /// Frees it, for a job.
    pub(crate) fn spend(&mut self) {
        self.pieces.clear();
    }
}

/// On the merging thread: less was held back than a job may need.
pub(crate) fn is_short() -> bool {
    SHORT.get()
}

/// Whether `bytes` could be allocated in one piece now.
pub(crate) fn has_room(bytes: usize) -> bool {
    Vec::<u8>::new().try_reserve_exact(bytes).is_ok()
}

/// Whether a caller can hand a job over.
pub(crate) fn has_room_for_a_job() -> bool {
    has_room(HANDOVER)
}
