//! What a fork ends.
//!
//! A fork child maps every frame that its parent maps, and nobody tells the parent when it is gone.
//! So a fork ends a *generation* of frames: the parent never punches or reuses a place in a memfd
//! that a child may map (see [`crate::frames`]). The child has no merging thread: its copies of the
//! parent's engines are *detached*, and say so.
//!
//! # How a fork is noticed
//! * `fork()` calls our `pthread_atfork` handlers: *prepare* waits for the open window to close (a
//!   child would find its pages missing) and keeps the next one shut; *parent* counts the fork.
//! * Raw `clone` and `_Fork` call nothing. The frame store's canaries notice them before a place is
//!   punched (finding F8), and engines and the merging thread are known by their process number. A
//!   raw fork inside a window leaves the child with zeroes in the
//!   pages of that window: a limit that only short windows make small.
//!
//! # Invariants
//! * The gate is held for each window by the merging thread, and across `fork()` by the forking
//!   thread. Neither waits for anything else while it holds it.
//! * In a child nothing of the parent's is dropped, closed or locked: its descriptors have numbers
//!   of a table that the child does not have.

use crate::error::Error;
use crate::handoff;
use crate::sys;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Held while a window is open, and across a fork.
static GATE: Gate = Gate::new();
/// Forks that this process has made (with handlers).
static FORKS: AtomicU64 = AtomicU64::new(0);
/// How many forks lie between the first process and this one: an engine of another epoch is a
/// parent's.
static EPOCH: AtomicU64 = AtomicU64::new(0);

/// A gate of this process.
#[derive(Debug)]
pub(crate) struct Gate(handoff::Gate);

/// Looks at a closed gate before the waiting thread sleeps between looks.
const LOOKS: u32 = 64;
/// So long; a real-time thread that only yielded would keep the holder from running.
const SLEEP: Duration = Duration::from_micros(50);

impl Gate {
    pub(crate) const fn new() -> Self {
        Self(handoff::Gate::of(AtomicU32::new(0)))
    }

    /// Waits until the gate is open, and closes it. Allocates nothing and takes no lock.
    pub(crate) fn close(&self) {
        self.0.close(std::process::id(), |looks| {
            if looks < LOOKS {
                std::thread::yield_now();
            } else {
                std::thread::sleep(SLEEP);
            }
        });
    }

    pub(crate) fn open(&self) {
        self.0.open();
    }
}

impl handoff::Shuts for Gate {
    fn close(&self) {
        self.close();
    }

    fn open(&self) {
        self.open();
    }
}

/// No fork happens while this lives. Dropping it lets waiting forks go on.
#[derive(Debug)]
pub(crate) struct NoFork(());

impl NoFork {
    pub(crate) fn wait() -> Self {
        GATE.close();
        Self(())
    }
}

impl Drop for NoFork {
    fn drop(&mut self) {
        GATE.open();
    }
}

extern "C" fn prepare() {
    GATE.close();
    crate::worker::hold_start();
}

extern "C" fn parent() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    crate::worker::free_start();
    GATE.open();
}

extern "C" fn child() {
    EPOCH.fetch_add(1, Ordering::Relaxed);
    crate::worker::detach();
    crate::worker::free_start();
    GATE.open();
}

/// Installs the handlers, once for the process and its descendants.
pub(crate) fn watch_forks() -> Result<(), Error> {
    // Only whoever starts the merging thread gets here, one at a time. A failure is not for good.
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    if !INSTALLED.load(Ordering::Relaxed) {
        sys::thread::at_fork(prepare, parent, child)
            .map_err(|e| Error::os("cannot watch for forks (pthread_atfork)", e.into()))?;
        INSTALLED.store(true, Ordering::Relaxed);
    }
    Ok(())
}

/// Forks so far: a frame generation made at one count ends when the count has moved on.
pub(crate) fn forks() -> u64 {
    FORKS.load(Ordering::Relaxed)
}

/// Which process in the line of forks this is: an engine that says otherwise is a parent's. Raw forks
/// call no handler, so the process number is part of it.
pub(crate) fn epoch() -> (u64, u32) {
    (EPOCH.load(Ordering::Relaxed), std::process::id())
}
