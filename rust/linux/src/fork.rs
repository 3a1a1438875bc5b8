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
//! # Locks
//! A child has no other thread than the one that forked, so a lock that another one held would stay taken
//! for ever there. [`ForkLock`] is never held across a fork: *prepare* waits at a turnstile until nobody
//! holds one, and lets nobody take one until the fork is over. (After a raw fork it is as it is with
//! malloc: what was held stays so.)
//!
//! # Invariants
//! * Whoever holds a [`ForkLock`] waits for nothing but other such locks, which he takes by
//!   [`ForkLock::lock_within`]: no window, no gate, no job, no turnstile.
//! * The gate is held for each window by the merging thread, and across `fork()` by the forking
//!   thread. Neither waits for anything else while it holds it.
//! * In a child nothing of the parent's is dropped, closed or locked: its descriptors have numbers
//!   of a table that the child does not have.

use crate::error::Error;
use crate::handoff;
use crate::sys;
use crate::sys::leaked::Leaked;
use crate::sys::mapping::{Advice, Mapping, Protection};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
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

/// Whoever holds a [`ForkLock`] is inside.
static TURNSTILE: handoff::Turnstile = handoff::Turnstile::of(AtomicU32::new(0));
/// The process whose threads the turnstile has counted.
static COUNTED: AtomicU32 = AtomicU32::new(0);

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
        self.0.close(std::process::id(), wait);
    }

    pub(crate) fn open(&self) {
        self.0.open();
    }
}

fn wait(looks: u32) {
    if looks < LOOKS {
        std::thread::yield_now();
    } else {
        std::thread::sleep(SLEEP);
    }
}

/// A lock that no fork finds taken, for what a child goes on to use: short work that waits for nothing.
#[derive(Debug, Default)]
pub struct ForkLock<T>(Mutex<T>);

/// What a [`ForkLock`] guards, while it is held.
#[derive(Debug)]
pub struct ForkGuard<'a, T> {
    // Released first: whoever waits at the turnstile finds it free.
    guard: MutexGuard<'a, T>,
    /// `None`: whoever holds another such lock is inside already.
    _inside: Option<Inside>,
}

#[derive(Debug)]
struct Inside(());

impl Drop for Inside {
    fn drop(&mut self) {
        TURNSTILE.leave();
    }
}

impl<T> ForkLock<T> {
    /// Guards `value`.
    pub const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Takes it; `None` when a thread has panicked while it held it, so that what it guards may be half
    /// done.
    ///
    /// Nothing may be waited for while it is held, but for [another](Self::lock_within): a fork waits until
    /// it is given back, and holds windows off meanwhile. (Taking another one by this very call could wait for
    /// a fork that waits for this one.)
    pub fn lock(&self) -> Option<ForkGuard<'_, T>> {
        TURNSTILE.enter(wait);
        let inside = Inside(());
        let guard = self.0.lock().ok()?;
        Some(ForkGuard {
            guard,
            _inside: Some(inside),
        })
    }

    /// Takes it while `outer` is held.
    pub fn lock_within<'a, U>(&'a self, outer: &ForkGuard<'a, U>) -> Option<ForkGuard<'a, T>> {
        let _ = outer;
        let guard = self.0.lock().ok()?;
        Some(ForkGuard {
            guard,
            _inside: None,
        })
    }
}

impl<T> Deref for ForkGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for ForkGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
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
    let me = std::process::id();
    if COUNTED.swap(me, Ordering::Relaxed) != me {
        // The child of a raw fork, which no handler has told.
        TURNSTILE.empty();
    }
    TURNSTILE.shut(wait);
}

extern "C" fn parent() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    TURNSTILE.open();
    crate::worker::free_start();
    GATE.open();
}

extern "C" fn child() {
    EPOCH.fetch_add(1, Ordering::Relaxed);
    COUNTED.store(std::process::id(), Ordering::Relaxed);
    TURNSTILE.empty();
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
        COUNTED.store(std::process::id(), Ordering::Relaxed);
        INSTALLED.store(true, Ordering::Relaxed);
        remember_mark();
    }
    Ok(())
}

/// A page that children find empty.
static MARK: Leaked<Mapping> = Leaked::empty();

/// [`epoch`] in one number, for those who ask at every turn: it takes no system call, but the first time in
/// a process.
pub(crate) fn mark() -> u64 {
    let made = || {
        let (epoch, process) = epoch();
        epoch << 32 | u64::from(process)
    };
    let Some(page) = MARK.get() else {
        return made();
    };
    match page.read_u64(0) {
        // Whoever else finds nothing there makes the same.
        0 => {
            let mark = made();
            page.write_u64(0, mark);
            mark
        }
        mark => mark,
    }
}

/// Has [`mark`] remember, where the kernel can see to it that children forget.
fn remember_mark() {
    if MARK.get().is_none()
        && let Ok(page) = Mapping::anonymous(sys::page_size(), Protection::ReadWrite)
        && page.advise(Advice::WipeOnFork).is_ok()
    {
        MARK.set(page);
    }
}

/// Forks so far: a frame generation made at one count ends when the count has moved on.
pub(crate) fn forks() -> u64 {
    FORKS.load(Ordering::Relaxed)
}

/// How many forks, as far as handlers were called, lie between the first process and this one. Whoever
/// finds another number than before is in a child: what other threads had under way will not end.
#[must_use]
pub fn generation() -> u64 {
    EPOCH.load(Ordering::Relaxed)
}

/// Which process in the line of forks this is: an engine that says otherwise is a parent's. Raw forks
/// call no handler, so the process number is part of it.
pub(crate) fn epoch() -> (u64, u32) {
    (EPOCH.load(Ordering::Relaxed), std::process::id())
}
