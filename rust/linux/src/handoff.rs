//! The hand-offs between threads, apart from what is handed over: who waits for whom, and in which order
//! things become visible. Nothing here knows of memory, so `tests/loom_stop.rs` can go through all ways
//! in which the threads can interleave.
//!
//! [`crate::sync`] is the standard library's atomics here, and loom's there.
//!
//! # Invariants (proved by that test)
//! * H1. Between [`Gate::close`] and [`Gate::open`] there is one thread, and it sees what the one before
//!   it has done.
//! * H2. The helper lifts nothing while the gate of a window is closed, and ends after [`Helping::end`],
//!   whatever it is doing at that moment.
//! * H3. Each job is run once, in order, and its sender gets an answer or learns that it panicked. Once
//!   a job that stops the background work has been answered, no slice of that work runs any more.
//! * H4. What is [made once](made_once) is made once, and never while a fork is under way.
//! * H5. Between [`Turnstile::shut`] and [`Turnstile::open`] nobody is inside, and whoever shut it sees what
//!   those who were inside have done.

use crate::sync::{AtomicBool, AtomicU32, Ordering};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A lock without an owning thread, so that the one that returns from `fork()` in the child may open it.
/// It holds the number of the process that closed it, or 0. Held for a window (about 100 us) or a
/// fork.
#[derive(Debug)]
pub(crate) struct Gate(AtomicU32);

impl Gate {
    /// `holder` is 0, for an open gate.
    pub(crate) const fn of(holder: AtomicU32) -> Self {
        Self(holder)
    }

    /// Waits until the gate is open, and closes it in the name of the process `me`. Between looks at a
    /// closed gate `wait` is called, with their number so far. Allocates nothing and takes no lock.
    pub(crate) fn close(&self, me: u32, mut wait: impl FnMut(u32)) {
        let mut looks = 0;
        loop {
            let Err(holder) = self
                .0
                .compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed)
            else {
                return;
            };
            // In the child of a raw fork, what its parent held at that moment is held by nobody.
            if holder != me
                && self
                    .0
                    .compare_exchange(holder, me, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                return;
            }
            looks += 1;
            wait(looks);
        }
    }

    pub(crate) fn open(&self) {
        self.0.store(0, Ordering::Release);
    }
}

/// Lets any number of threads in, except while it is shut: what they do inside is whole when a fork
/// copies it. The highest bit says that it is shut, the others how many are inside.
#[derive(Debug)]
pub(crate) struct Turnstile(AtomicU32);

const SHUT: u32 = 1 << 31;

impl Turnstile {
    /// `state` is 0, for one that is open and empty.
    pub(crate) const fn of(state: AtomicU32) -> Self {
        Self(state)
    }

    /// Waits until it is open, and goes in. `wait` is called as for [`Gate::close`].
    pub(crate) fn enter(&self, mut wait: impl FnMut(u32)) {
        let mut looks = 0;
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            if seen & SHUT != 0 {
                looks += 1;
                wait(looks);
                seen = self.0.load(Ordering::Relaxed);
                continue;
            }
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            match self
                .0
                .compare_exchange_weak(seen, seen + 1, success, failure)
            {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    pub(crate) fn leave(&self) {
        // In the child of a raw fork, those who were inside may have been forgotten meanwhile.
        let mut seen = self.0.load(Ordering::Relaxed);
        while seen & !SHUT != 0 {
            let (success, failure) = (Ordering::Release, Ordering::Relaxed);
            match self
                .0
                .compare_exchange_weak(seen, seen - 1, success, failure)
            {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// Lets nobody in any more, and waits until nobody is inside.
    pub(crate) fn shut(&self, mut wait: impl FnMut(u32)) {
        self.0.fetch_or(SHUT, Ordering::Acquire);
        let mut looks = 0;
        while self.0.load(Ordering::Acquire) != SHUT {
            looks += 1;
            wait(looks);
        }
    }

    pub(crate) fn open(&self) {
        self.0.fetch_and(!SHUT, Ordering::Release);
    }

    /// Forgets who was inside: threads that a fork has left behind.
    pub(crate) fn empty(&self) {
        self.0.store(0, Ordering::Release);
    }
}

/// What keeps a helper and a window apart.
pub(crate) trait Shuts {
    /// Waits until it is open, and closes it.
    fn close(&self);
    /// Opens it.
    fn open(&self);
}

/// It is shut while this lives, also while unwinding.
pub(crate) struct Shut<'a, G: Shuts>(&'a G);

impl<'a, G: Shuts> Shut<'a, G> {
    pub(crate) fn new(gate: &'a G) -> Self {
        gate.close();
        Self(gate)
    }
}

impl<G: Shuts> Drop for Shut<'_, G> {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// What a helper and whom it helps tell each other.
#[derive(Debug)]
pub(crate) struct Helping {
    stop: AtomicBool,
    /// The helper has ended by itself.
    over: AtomicBool,
}

impl Helping {
    /// Neither is set.
    pub(crate) const fn of(stop: AtomicBool, over: AtomicBool) -> Self {
        Self { stop, over }
    }

    /// The helper's life: `turn` settles what has come, and waits for more or for a wake-up.
    ///
    /// A panic in it, which is a bug of this library, must not leave writers waiting: they would wait
    /// for ever, and the merging thread for the gate. So it is caught, and what was under way is
    /// done again.
    pub(crate) fn help(&self, mut turn: impl FnMut()) {
        while !self.stop.load(Ordering::Acquire) && !self.is_over() {
            // The panic has been printed already.
            let _ = catch_unwind(AssertUnwindSafe(&mut turn));
        }
    }

    /// Has the helper end; then it can be joined. `wake` wakes it.
    pub(crate) fn end(&self, wake: impl FnOnce()) {
        self.stop.store(true, Ordering::Release);
        wake();
    }

    /// The helper ends by itself.
    pub(crate) fn give_up(&self) {
        self.over.store(true, Ordering::Release);
    }

    /// Whether it has.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

/// What the merging thread hears next.
#[derive(Debug)]
pub(crate) enum Next<J> {
    /// A job.
    Job(J),
    /// No job until background work was due.
    Due,
    /// There will be no more jobs.
    Gone,
}

/// What the merging thread does.
pub(crate) trait Serves {
    /// When background work is due, and which.
    type Due: Copy;
    /// The most urgent background work, if there is any.
    fn due(&self) -> Option<Self::Due>;
    /// One slice of it.
    fn slice(&mut self, due: Self::Due);
}

/// The merging thread's life: jobs, and background work while there are none.
pub(crate) fn serve<S: Serves, J: FnOnce(&mut S)>(
    stage: &mut S,
    mut next: impl FnMut(Option<S::Due>) -> Next<J>,
) {
    loop {
        let due = stage.due();
        match next(due) {
            // A panic outside any engine's own work: the caller sees its reply missing.
            Next::Job(job) => drop(catch_unwind(AssertUnwindSafe(|| job(stage)))),
            Next::Due => {
                if let Some(due) = due {
                    stage.slice(due);
                }
            }
            Next::Gone => return,
        }
    }
}

/// What `get` finds, or else what `make` makes; `make` has `get` find it. What `hold` gives is kept
/// meanwhile, and dropped afterwards, also while unwinding: it keeps others out.
pub(crate) fn made_once<T, E, G>(
    get: impl Fn() -> Option<T>,
    hold: impl FnOnce() -> G,
    make: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    if let Some(found) = get() {
        return Ok(found);
    }
    let _held = hold();
    get().map_or_else(make, Ok)
}
